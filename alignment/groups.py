"""The unit of everything after tokenisation: one prompt with K completions."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """One tokenised prompt and its K >= 1 tokenised completions.

    A preference pair is K = 2 with the chosen completion first; a labelled (KTO) row is K = 1 with a label; a ranked
    list is K > 2, best first.

    Attributes:
        prompt: (P,) int32 token ids, with BOS where the tokenizer wants one; P >= 1.
        completions: K arrays (C_k,) int32, each with its end-of-turn tokens unless it was truncated; C_k >= 1.
        labels: K booleans (True: desirable), or None for data without labels.
        scores: K floats from the data (a judge, a reward model), or None.
        weight: factor of the group's loss, from the data.
        source: where the row came from, "file:row", for messages and samples.
    """

    prompt: np.ndarray
    completions: tuple[np.ndarray, ...]
    labels: tuple[bool, ...] | None = None
    scores: tuple[float, ...] | None = None
    weight: float = 1.0
    source: str = ""

    def __post_init__(self) -> None:
        assert self.prompt.dtype == np.int32 and all(c.dtype == np.int32 for c in self.completions)
        assert len(self.prompt) >= 1, "a prompt has at least one token: it scores the first completion token"
        assert self.completions and all(len(c) >= 1 for c in self.completions)

    def key(self, index: int) -> bytes:
        """32-byte content hash of the prompt's and one completion's tokens, and of nothing else."""
        digest = hashlib.blake2b(digest_size=32)
        digest.update(len(self.prompt).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(self.prompt, dtype="<i4").tobytes())
        digest.update(np.ascontiguousarray(self.completions[index], dtype="<i4").tobytes())
        return digest.digest()

    def keys(self) -> list[bytes]:
        """The content hashes of all completions, in order."""
        return [self.key(i) for i in range(len(self.completions))]
