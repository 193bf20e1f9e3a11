"""The types that every wing shares: groups of tokens, ragged log-probs, and further quantities per token."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar, overload

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")


class MadeOnDemand(Sequence[T]):
    """A sequence that makes an item when asked for it, so that it takes a few bytes an item; a slice is a list."""

    @abstractmethod
    def item(self, place: int) -> T:
        """The item at a place from 0 on, below the length."""

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        places = range(len(self))[index]
        return self.item(places) if isinstance(places, int) else [self.item(place) for place in places]


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on that device, without making the host wait for a GPU.

    A copy from ordinary memory starts only when the GPU has done everything that it was given before, and the host
    waits for it. A copy from pinned memory queues up like all other work, and torch keeps the memory until it is made.
    """
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda" and tensor.numel():
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def rows_from_pairs(num_pairs: int) -> list[int]:
    """Which sequence of the pairs each row is, where pairs become rows: all chosen ones, then all rejected ones.

    Sequences 2i and 2i + 1 are the chosen and the rejected completion of pair i. In this order the next row answers
    another prompt, which a mismatched baseline (KTO) relies on.
    """
    return [*range(0, 2 * num_pairs, 2), *range(1, 2 * num_pairs, 2)]


def pairs_from_rows(num_pairs: int) -> list[int]:
    """Which row each sequence of the pairs is: the way back from `rows_from_pairs`."""
    return [k * num_pairs + i for i in range(num_pairs) for k in range(2)]


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """One tokenised prompt and its K >= 1 tokenised completions.

    A preference pair is K = 2 with the chosen completion first; a labelled (KTO) row is K = 1 with a label; a ranked
    list is K > 2, best first.

    Attributes:
        prompt: (P,) int32 token ids, with BOS if the tokenizer adds one; P >= 1.
        completions: K arrays (C_k,) int32, each with its end-of-turn tokens unless it was truncated; C_k >= 1.
        labels: K booleans (True: desirable), or None for data without labels.
        scores: K floats from the data (a judge, a reward model), or None.
        weight: factor of the group's loss, from the data.
        source: the row's origin, "file:row", for messages and samples.
        scored: K arrays (C_k,) bool, each true for at least one token: the tokens of a completion that are scored. The
            others, such as the results of tools, are context: they are read and have no log-prob. None: all are scored.
        dataset: name of the source that the group comes from, in a mixture; it changes nothing but what is reported.
        drawn: K arrays (C_k,) float32, the log-probs of the completions' tokens under the policy that drew them, at
            temperature 1; None for completions of the data.

    Raises:
        ValueError: a wrong dtype, nothing to score, or another number of labels, scores or masks than completions.
    """

    prompt: np.ndarray
    completions: tuple[np.ndarray, ...]
    labels: tuple[bool, ...] | None = None
    scores: tuple[float, ...] | None = None
    weight: float = 1.0
    source: str = ""
    scored: tuple[np.ndarray, ...] | None = None
    dataset: str = ""
    drawn: tuple[np.ndarray, ...] | None = None

    def __post_init__(self) -> None:
        if any(tokens.dtype != np.int32 for tokens in (self.prompt, *self.completions)):
            raise ValueError("The tokens of a Group must be int32.")
        if not len(self.prompt):
            raise ValueError("The prompt of a Group needs a token: it predicts the first completion token.")
        if not self.completions or not all(len(tokens) for tokens in self.completions):
            raise ValueError("A Group needs a completion, and every completion needs a token.")
        for name, values in self._by_completion().items():
            if values is not None and len(values) != len(self.completions):
                raise ValueError(f"A Group of {len(self.completions)} completions cannot have {len(values)} {name}.")
        for tokens, mask in zip(self.completions, self.scored or (), strict=self.scored is not None):
            if mask.dtype != np.bool_ or mask.shape != tokens.shape or not mask.any():
                raise ValueError("A mask of scored tokens is bool, as long as its completion, and true for a token.")

    def _by_completion(self) -> dict[str, tuple[Any, ...] | None]:
        return {"labels": self.labels, "scores": self.scores, "masks": self.scored, "log-probs": self.drawn}

    def scored_tokens(self, index: int) -> np.ndarray:
        """(scored,) the tokens of one completion that are scored."""
        return self.completions[index] if self.scored is None else self.completions[index][self.scored[index]]

    @property
    def scored_lengths(self) -> list[int]:
        """How many tokens of each completion are scored."""
        return [int(mask.sum()) for mask in self.scored or ()] or [len(tokens) for tokens in self.completions]

    def only(self, *indices: int) -> Group:
        """The prompt with these completions alone, without what the data say of them."""
        scored = None if self.scored is None else tuple(self.scored[i] for i in indices)
        return Group(self.prompt, tuple(self.completions[i] for i in indices), scored=scored)

    def key(self, index: int) -> bytes:
        """32-byte hash of the tokens of the prompt and of one completion, and of which are scored."""
        mask = None if self.scored is None or self.scored[index].all() else self.scored[index]
        digest = hashlib.blake2b(digest_size=32, person=b"" if mask is None else b"some scored")
        if mask is not None:
            digest.update(len(mask).to_bytes(8, "little"))
            digest.update(np.packbits(mask).tobytes())
        digest.update(len(self.prompt).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(self.prompt, dtype="<i4").tobytes())
        digest.update(np.ascontiguousarray(self.completions[index], dtype="<i4").tobytes())
        return digest.digest()

    def keys(self) -> list[bytes]:
        """The keys of all completions, in order."""
        return [self.key(i) for i in range(len(self.completions))]


class Quantity(Enum):
    """A number per scored token that a loss can ask for beyond the log-prob. It is computed from the logits."""

    collision = "collision"
    """log sum_v p_v^2 of the policy's next-token distribution p, without gradient."""

    entropy = "entropy"
    """Entropy of the reference's next-token distribution divided by the log of the vocabulary's size: 0 to 1."""

    forward_kl = "forward_kl"
    """Sum over the teacher's likeliest next tokens v of q_v (log q_v - log p_v), in nats, differentiable in the
    policy's p: KL(teacher || policy) but for the tokens that are left out."""

    divergence = "divergence"
    """KL(reference || policy) of the next-token distributions in nats, differentiable; needs a live reference."""


@dataclass(frozen=True, slots=True)
class RaggedLogps:
    """Log-probs of the scored tokens of S completions, laid end to end.

    They stay per token until a loss reduces them. So sums, means and prefixes come from one source, and one stored
    reference serves every loss.

    Attributes:
        values: (tokens,) float32 or float64, natural logarithms, one per scored token: all tokens of a completion,
            or the assistant's where it has several turns.
        offsets: (S + 1,) int64 on the device of `values`; sequence s holds `values[offsets[s]:offsets[s + 1]]`.

    Raises:
        ValueError: tensors of another shape or dtype.
    """

    values: Tensor
    offsets: Tensor

    def __post_init__(self) -> None:
        if self.values.dim() != 1 or self.offsets.dim() != 1 or not len(self.offsets):
            raise ValueError("The values and offsets of RaggedLogps must be one-dimensional, with at least one offset.")
        if self.offsets.dtype != torch.int64:
            raise ValueError(f"The offsets of RaggedLogps must be int64, not {self.offsets.dtype}.")

    @classmethod
    def from_sequences(cls, sequences: Sequence[Tensor]) -> RaggedLogps:
        """Join S one-dimensional tensors; gradients flow through."""
        lengths = torch.tensor([0, *(len(s) for s in sequences)], dtype=torch.int64)
        values = torch.cat(list(sequences)) if sequences else torch.zeros(0)
        return cls(values, to_device(lengths.cumsum(0), values.device))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Tensor:
        """(S,) int64, scored tokens per sequence."""
        return self.offsets.diff()

    def sums(self) -> Tensor:
        """(S,) sum of the scored tokens' log-probs per sequence: log pi(y|x) in nats."""
        return torch.segment_reduce(self.values, "sum", offsets=self.offsets, axis=0)

    def means(self) -> Tensor:
        """(S,) mean log-prob per scored token. A sequence without tokens has none; `Group` refuses it."""
        return self.sums() / self.lengths

    def sequence(self, index: int) -> Tensor:
        """(length,) view of one sequence's values."""
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def select(self, indices: Sequence[int]) -> RaggedLogps:
        """The given sequences, in the given order."""
        ends = self.offsets.tolist()  # once: each look makes the host wait for a GPU
        return RaggedLogps.from_sequences([self.values[ends[i] : ends[i + 1]] for i in indices])

    def detach(self) -> RaggedLogps:
        """The same log-probs without gradient."""
        return RaggedLogps(self.values.detach(), self.offsets)

    def to(self, device: torch.device | str) -> RaggedLogps:
        """The same log-probs on that device."""
        return RaggedLogps(to_device(self.values, device), to_device(self.offsets, device))
