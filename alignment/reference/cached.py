"""A reference whose log-probs come from the store."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from alignment.data.rows.sequences import Picked
from alignment.errors import NotFinite, require
from alignment.policy.identity import policy_identity
from alignment.ranks.shares import in_rounds, share_groups
from alignment.ranks.team import Post, Team, trained_parameters
from alignment.reference.base import Reference, agreement_limit
from alignment.reference.completions import Completions, CompletionValues
from alignment.reference.frozen import FrozenPolicy
from alignment.reference.given import ENTROPIES, LOGPS, likeliest_of
from alignment.reference.store import ReferenceStore
from alignment.scoring.head import Likeliest
from alignment.scoring.layout import BatchLayout, MicroBatch
from alignment.scoring.logps import in_passes, score_likeliest, score_tokens
from alignment.types import Group, Quantity, RaggedLogps

log = logging.getLogger(__name__)

_SEQUENCES_PER_WRITE = 64
_LOOKED_UP = 4096
"""Completions that are looked up together."""
_COMPUTED = 16384
"""Completions that are laid out in passes together; of more, those that come first are computed first."""
_PASSES_PER_ROUND = 8
"""Of each rank, before rank 0 has the values of all and writes them."""

Scored = tuple[Sequence[int], list[int], Tensor]
"""Of a pass: its groups, as indices, their scored tokens, and (rows, tokens) on the CPU in the order of the store."""


Scorer = Literal["policy", "start", "teacher"]
"""What scores: the policy as it is, the one that the stage started from, or a teacher."""


@dataclass(frozen=True, slots=True)
class Missing:
    """Completions that a rank is to score for the store, each in a group of its own.

    Attributes:
        likeliest: how many of the likeliest tokens are wanted, and of how many; None for none.
    """

    groups: Sequence[Group]
    tokens_per_batch: int
    quantities: frozenset[Quantity]
    likeliest: tuple[int, int] | None
    scorer: Scorer

    def scored(self, model: nn.Module, layout: BatchLayout, device: torch.device) -> Iterator[Scored]:
        """Their values, pass by pass."""

        def run(batch: MicroBatch) -> Tensor:
            if self.likeliest is not None:
                return score_likeliest(model, batch, self.likeliest)
            scores = score_tokens(model, batch, self.quantities)
            return torch.stack([scores.logps, *scores.by_quantity().values()])

        for batch, values in in_passes(run, self.groups, layout, self.tokens_per_batch, device):
            yield batch.indices, batch.offsets.diff().tolist(), values.to("cpu")


def score_missing(post: Post, missing: Missing) -> list[Scored]:
    """What a rank that follows has scored of the completions that the store lacks."""
    if missing.scorer == "teacher":
        teacher, layout = post.teacher
        return list(missing.scored(teacher, layout, post.device))
    with post.start.active() if missing.scorer == "start" else nullcontext(post.model) as model:
        return list(missing.scored(model, post.layout, post.device))


def _identity_of(what: str, identity: str) -> str:
    """The identity that the store keeps something of a policy under that is not its log-probs."""
    return hashlib.blake2b(f"{what} of {identity}".encode(), digest_size=32).hexdigest()


class CachedReference(Reference):
    """Reference log-probs from the store; missing ones are computed once and added.

    Attributes:
        telling: whether a bar and a log line say what is computed.

    Args:
        store: closed by `close`.
        model: the policy at the start, which is the reference.
        tokens_per_batch: tokens of one forward pass.
        spot_checks: number of stored completions that are computed again and compared in each `prepare`.
        with_entropies: compute and store the entropies too, in the same passes.
        team: the ranks that share what is missing; this one alone reads and writes the store.
        fixed: groups whose log-probs stay those of the start when the reference is refreshed.
        likeliest: how many of the likeliest tokens are computed and stored beside each log-prob, in the same passes,
            and of how many tokens, those with the smallest ids; 8 bytes for each. None for none.

    Raises:
        UserError: a number is out of range.
    """

    telling: ClassVar[bool] = True
    _scorer: Scorer = "policy"

    def __init__(
        self,
        store: ReferenceStore,
        model: nn.Module,
        layout: BatchLayout,
        tokens_per_batch: int,
        device: torch.device,
        spot_checks: int,
        with_entropies: bool = False,
        team: Team | None = None,
        fixed: Sequence[Group] = (),
        likeliest: tuple[int, int] | None = None,
    ) -> None:
        require(tokens_per_batch >= 1, f"tokens_per_batch must be at least 1, not {tokens_per_batch}.")
        require(spot_checks >= 0, f"spot_checks must be at least 0, not {spot_checks}.")
        super().__init__(model)
        self._store = store
        self._quantities = frozenset({Quantity.entropy} if with_entropies else ())
        self._layout = layout
        self._tokens_per_batch = tokens_per_batch
        self._device = device
        self._spot_checks = spot_checks
        self._team = team
        self._fixed = fixed
        self._likeliest = likeliest
        self._values: CompletionValues | None = None  # rows: log-probs, and entropies or likeliest tokens
        self._register()
        self._summary: dict[str, Any] = {
            "mode": "cache",
            "path": str(store.path),
            "hits": 0,
            "misses": 0,
            "spot_checks": 0,
            "spot_check_max_diff": 0.0,
            "seconds": 0.0,
        }

    def prepare(self, groups: Sequence[Group]) -> None:
        """Look up all completions, recompute a few of those found as a check, and compute and store the rest."""
        started = time.monotonic()
        wanted = Completions(groups)
        with self._store.locked(self.identity):
            fixed = self._rows_so_far(self._fixed)
            values = self._begin(wanted, fixed)
            of_start = values.known()
            self._look_up(wanted, values)
            found = wanted.first[values.known() & ~of_start]  # in the order of their keys
            if len(found) and not self._spot_check(wanted, found, values):
                for identity in self._identities():
                    self._store.forget(identity)
                values, found = self._begin(wanted, fixed), found[:0]
            missing = Picked(wanted, np.sort(wanted.first[~values.known()]))
            self._summary["hits"] += len(found)
            self._summary["misses"] += len(missing)
            level = logging.INFO if self.telling else logging.DEBUG
            log.log(
                level, "Reference %s: %d of %d completions stored.", self.identity[:12], len(values), len(wanted.first)
            )
            self._compute(missing)
        self._summary["seconds"] += time.monotonic() - started

    def prepare_at(self, start: FrozenPolicy, groups: Sequence[Group]) -> None:
        """As `prepare`, where the policy has moved away from its start, which every rank has kept."""
        self._scorer = "start"
        with start.active():
            self.prepare(groups)
        self._scorer = "policy"

    def learn(self, values: Mapping[bytes, np.ndarray]) -> None:
        """Store log-probs of completions, by `Group.key`, that the policy as it is now has given while it drew them."""
        identity, description = policy_identity(self._model)
        self._store.register(identity, description)
        self._store.put(identity, values)

    def refresh(self, step: int, groups: Sequence[Group]) -> None:
        """Become the policy as it is now. The store may already have its log-probs."""
        self._note_refresh(step, self._model)
        self._register()
        self.prepare(groups)

    def _identities(self) -> dict[str, int]:
        """The identities that the rows of the values are stored under, with how many each has."""
        found = {self.identity: 1}
        if self._quantities:
            found[_identity_of("entropy", self.identity)] = 1
        if self._likeliest is not None:
            count, size = self._likeliest
            found[_identity_of(f"{count} likeliest of {size} tokens", self.identity)] = 2 * count
        return found

    def _register(self) -> None:
        for identity in self._identities():
            kept = (
                {} if identity == self.identity else {"values": "entropies" if self._quantities else "likeliest tokens"}
            )
            self._store.register(identity, self._description | kept)

    def _rows_so_far(self, groups: Sequence[Group]) -> dict[bytes, np.ndarray]:
        return {} if self._values is None else self.rows(groups)

    def _begin(self, wanted: Completions, fixed: Mapping[bytes, np.ndarray]) -> CompletionValues:
        """No values but the fixed ones, in place of those before."""
        self._forget_values()
        self._values = CompletionValues(self._store.path.parent, wanted.hashes, sum(self._identities().values()))
        for key, rows in fixed.items():
            self._values.add(key, rows)
        return self._values

    def _forget_values(self) -> None:
        if self._values is not None:
            self._values.close()
            self._values = None

    def _look_up(self, wanted: Completions, values: CompletionValues) -> None:
        """Take the completions that the store has in full."""
        different = ((key, group) for key, group in wanted.different() if not values.has(key))
        while lengths := {key: group.scored_lengths[0] for key, group in islice(different, _LOOKED_UP)}:
            found = [(self._store.get(identity, list(lengths)), rows) for identity, rows in self._identities().items()]
            for key, length in lengths.items():
                if all(key in kept and len(kept[key]) == rows * length for kept, rows in found):
                    values.add(key, np.concatenate([kept[key].reshape(rows, length) for kept, rows in found]))

    def _spot_check(self, wanted: Completions, found: np.ndarray, values: CompletionValues) -> bool:
        picks = found[:: max(1, len(found) // max(1, self._spot_checks))][: self._spot_checks]
        if not len(picks):
            return True
        keys, groups = zip(*(wanted[place] for place in picks.tolist()), strict=True)
        fresh: dict[int, np.ndarray] = {}
        for indices, lengths, found_now in self._score(groups):
            fresh.update(zip(indices, (part[LOGPS].numpy() for part in found_now.split(lengths, 1)), strict=True))
        stored = np.concatenate([values.get(key)[LOGPS] for key in keys])
        difference = np.abs(np.concatenate([fresh[i] for i in range(len(keys))]) - stored)
        self._summary["spot_checks"] += len(keys)
        self._summary["spot_check_max_diff"] = float(difference.max())
        # The mean over all checks: in 16 bits, a single token of a short completion may be off by more.
        mean = float(difference.mean())
        if not mean <= agreement_limit(self._model, groups, mean, len(difference), self._layout):
            log.warning(
                "Stored reference log-probs of %s differ from fresh ones by %.3g nats per token; they are dropped and "
                "computed again.",
                self.identity[:12],
                mean,
            )
            return False
        return True

    def _missing(self, groups: Sequence[Group]) -> Missing:
        return Missing(groups, self._tokens_per_batch, self._quantities, self._likeliest, self._scorer)

    def _score(self, groups: Sequence[Group]) -> Iterator[Scored]:
        """The values of each pass, whichever rank runs it."""
        if self._team is None:
            yield from self._missing(groups).scored(self._model, self._layout, self._device)
            return
        team, weights = self._team, trained_parameters(self._model) if self._scorer == "policy" else ()
        for members in in_rounds(groups, team.size * _PASSES_PER_ROUND * self._tokens_per_batch):
            shares = [[members[i] for i in own] for own in share_groups([groups[i] for i in members], team.size)]
            found = team.run(
                score_missing,
                [self._missing([groups[i] for i in own]) for own in shares],
                lambda share: list(share.scored(self._model, self._layout, self._device)),
                weights,
            )
            for own, passes in zip(shares, found, strict=True):
                for indices, lengths, values in passes:
                    yield [own[i] for i in indices], lengths, values

    def _compute(self, missing: Sequence[tuple[bytes, Group]]) -> None:
        if not missing:
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, disable=not self.telling) as progress:
            task = progress.add_task("Reference log-probs", total=len(missing))
            for start in range(0, len(missing), _COMPUTED):
                keys, groups = zip(*missing[start : start + _COMPUTED], strict=True)
                for done in self._computed(keys, groups):
                    progress.advance(task, done)

    def _computed(self, keys: Sequence[bytes], groups: Sequence[Group]) -> Iterator[int]:
        """Compute and store completions; how many in each pass."""
        pending: dict[bytes, np.ndarray] = {}
        for indices, lengths, values in self._score(groups):
            if not values.isfinite().all():
                raise NotFinite(self._why_not_finite())
            for part, index in zip(values.float().split(lengths, 1), indices, strict=True):
                pending[keys[index]] = part.numpy().copy()
            if len(pending) >= _SEQUENCES_PER_WRITE:
                self._flush(pending)
                pending = {}
            yield len(indices)
        self._flush(pending)

    def _why_not_finite(self) -> str:
        if self.refreshes:
            return (
                f"After step {self.refreshes[-1]['step']} the policy, which becomes the reference, gives log-probs "
                f"that are not finite: the training has diverged, try a lower optim.lr."
            )
        return (
            "The policy that this stage starts from gives log-probs that are not finite: its weights are damaged or "
            "overflow in this dtype (model.dtype, quantization.compute_dtype)."
        )

    def _flush(self, pending: Mapping[bytes, np.ndarray]) -> None:
        assert self._values is not None, "`prepare` begins them"
        end = 0
        for identity, rows in self._identities().items():
            self._store.put(identity, {key: value[end : end + rows].reshape(-1) for key, value in pending.items()})
            end += rows
        for key, value in pending.items():
            self._values.add(key, value)

    def logps(self, groups: Sequence[Group]) -> RaggedLogps:
        """Log-probs of all completions; `prepare` or `refresh` must have seen the groups."""
        return self._known(groups, LOGPS)

    def entropies(self, groups: Sequence[Group]) -> RaggedLogps:
        """The same for entropies; needs `with_entropies`."""
        return self._known(groups, ENTROPIES)

    def likeliest(self, groups: Sequence[Group]) -> Likeliest:
        """The likeliest tokens at all tokens of the completions, in order; needs `likeliest`."""
        return likeliest_of(groups, self.rows(groups))

    def _known(self, groups: Sequence[Group], row: int) -> RaggedLogps:
        assert self._values is not None, "`prepare` comes first"
        keys = [key for group in groups for key in group.keys()]  # noqa: SIM118
        return RaggedLogps.from_sequences([torch.from_numpy(self._values.get(key)[row]) for key in keys])

    def rows(self, groups: Sequence[Group]) -> dict[bytes, np.ndarray]:
        """(rows, tokens) of all completions of these groups, by key, for a rank that works on them."""
        assert self._values is not None, "`prepare` comes first"
        return {key: self._values.get(key) for group in groups for key in group.keys()}  # noqa: SIM118

    def _tensors(self) -> dict[str, Tensor]:
        assert self._values is not None, "a refresh prepares them"
        return {name: torch.from_numpy(array) for name, array in self._values.arrays().items()}

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        self._forget_values()
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        self._values = CompletionValues.of(self._store.path.parent, **arrays)

    def summary(self) -> dict[str, Any]:
        """Identities, hits, misses and what the spot checks found."""
        return {**self._summary, **super().summary()}

    def close(self) -> None:
        """Close the store."""
        self._forget_values()
        self._store.close()
