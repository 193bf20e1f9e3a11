"""A reference whose log-probs come from the store."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from alignment.errors import NotFinite, require
from alignment.reference.base import Reference, agreement_limit
from alignment.reference.store import ReferenceStore
from alignment.scoring.layout import BatchLayout, MicroBatch
from alignment.scoring.logps import in_passes, join_scores, score_tokens
from alignment.types import Group, Quantity, RaggedLogps

log = logging.getLogger(__name__)

_SEQUENCES_PER_WRITE = 64
_LOGPS, _ENTROPIES = 0, 1
"""Rows of the values that this module keeps of a completion; the second only where entropies are asked for."""


def _entropy_identity(identity: str) -> str:
    """The identity that the store keeps a policy's entropies under."""
    return hashlib.blake2b(f"entropy of {identity}".encode(), digest_size=32).hexdigest()


class CachedReference(Reference):
    """Reference log-probs from the store; missing ones are computed once and added.

    Args:
        store: closed by `close`.
        model: the policy at the start, which is the reference.
        tokens_per_batch: tokens of one forward pass.
        spot_checks: number of stored completions that are computed again and compared in each `prepare`.
        with_entropies: compute and store the entropies too, in the same passes.

    Raises:
        UserError: a number is out of range.
    """

    def __init__(
        self,
        store: ReferenceStore,
        model: nn.Module,
        layout: BatchLayout,
        tokens_per_batch: int,
        device: torch.device,
        spot_checks: int,
        with_entropies: bool = False,
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
        self._values: dict[bytes, np.ndarray] = {}  # (1 or 2, tokens): log-probs, entropies
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

    def prepare(self, groups: Iterable[Group]) -> None:
        """Look up all completions, recompute a few of those found as a check, and compute and store the rest."""
        started = time.monotonic()
        wanted: dict[bytes, Group] = {}
        for group in groups:
            for k, key in enumerate(group.keys()):
                wanted.setdefault(key, group.only(k))
        with self._store.locked(self.identity):
            self._values = self._stored(wanted)
            if self._values and not self._spot_check(wanted):
                for identity in self._identities():
                    self._store.forget(identity)
                self._values = {}
            missing = {key: group for key, group in wanted.items() if key not in self._values}
            self._summary["hits"] += len(wanted) - len(missing)
            self._summary["misses"] += len(missing)
            log.info("Reference %s: %d of %d completions stored.", self.identity[:12], len(self._values), len(wanted))
            self._compute(missing)
        self._summary["seconds"] += time.monotonic() - started

    def refresh(self, step: int, groups: Iterable[Group]) -> None:
        """Become the policy as it is now. The store may already have its log-probs."""
        self._note_refresh(step, self._model)
        self._register()
        self.prepare(groups)

    def _identities(self) -> list[str]:
        """The identity that each row of the values is stored under."""
        return [self.identity, *(_entropy_identity(self.identity) for _ in self._quantities)]

    def _register(self) -> None:
        for identity, kept in zip(self._identities(), ("log-probs", "entropies"), strict=False):
            self._store.register(identity, self._description | ({"values": kept} if kept == "entropies" else {}))

    def _stored(self, wanted: dict[bytes, Group]) -> dict[bytes, np.ndarray]:
        """The completions that the store has in full."""
        found = [self._store.get(identity, list(wanted)) for identity in self._identities()]
        lengths = {key: group.scored_lengths[0] for key, group in wanted.items()}
        return {
            key: np.stack([rows[key] for rows in found])
            for key, length in lengths.items()
            if all(key in rows and len(rows[key]) == length for rows in found)
        }

    def _spot_check(self, wanted: dict[bytes, Group]) -> bool:
        found = sorted(self._values)
        picks = found[:: max(1, len(found) // max(1, self._spot_checks))][: self._spot_checks]
        if not picks:
            return True
        groups = [wanted[key] for key in picks]
        fresh = join_scores(groups, [(b, RaggedLogps(v[_LOGPS], b.offsets)) for b, v in self._score(groups)])
        stored = np.concatenate([self._values[key][_LOGPS] for key in picks])
        difference = np.abs(fresh.values.numpy() - stored)
        self._summary["spot_checks"] += len(picks)
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

    def _score(self, groups: Sequence[Group]) -> Iterator[tuple[MicroBatch, Tensor]]:
        """(rows, tokens) of each pass on the CPU, in the order of the rows that are stored."""
        passes = in_passes(
            lambda batch: score_tokens(self._model, batch, self._quantities),
            groups,
            self._layout,
            self._tokens_per_batch,
            self._device,
        )
        for batch, scores in passes:
            yield batch, torch.stack([scores.logps, *scores.by_quantity().values()]).to("cpu")

    def _compute(self, missing: dict[bytes, Group]) -> None:
        if not missing:
            return
        keys, groups = list(missing), list(missing.values())
        pending: dict[bytes, np.ndarray] = {}
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns) as progress:
            task = progress.add_task("Reference log-probs", total=len(groups))
            for batch, values in self._score(groups):
                if not values.isfinite().all():
                    if self.refreshes:
                        raise NotFinite(
                            f"After step {self.refreshes[-1]['step']} the policy, which becomes the reference, gives "
                            f"log-probs that are not finite: the training has diverged, try a lower optim.lr."
                        )
                    raise NotFinite(
                        "The policy that this stage starts from gives log-probs that are not finite: its weights are "
                        "damaged or overflow in this dtype (model.dtype, quantization.compute_dtype)."
                    )
                for part, index in zip(
                    values.float().split(batch.offsets.diff().tolist(), 1), batch.indices, strict=True
                ):
                    pending[keys[index]] = part.numpy().copy()
                progress.advance(task, len(batch.indices))
                if len(pending) >= _SEQUENCES_PER_WRITE:
                    self._flush(pending)
                    pending = {}
            self._flush(pending)

    def _flush(self, pending: dict[bytes, np.ndarray]) -> None:
        for row, identity in enumerate(self._identities()):
            self._store.put(identity, {key: value[row] for key, value in pending.items()})
        self._values.update(pending)

    def logps(self, groups: Sequence[Group]) -> RaggedLogps:
        """Log-probs of all completions; `prepare` or `refresh` must have seen the groups."""
        return self._known(groups, _LOGPS)

    def entropies(self, groups: Sequence[Group]) -> RaggedLogps:
        """The same for entropies; needs `with_entropies`."""
        return self._known(groups, _ENTROPIES)

    def _known(self, groups: Sequence[Group], row: int) -> RaggedLogps:
        return RaggedLogps.from_sequences(
            [torch.from_numpy(self._values[key][row]) for group in groups for key in group.keys()]  # noqa: SIM118
        )

    def _tensors(self) -> dict[str, Tensor]:
        keys = np.frombuffer(b"".join(self._values), np.uint8).reshape(len(self._values), -1)
        lengths = np.array([value.shape[1] for value in self._values.values()])
        values = np.concatenate(list(self._values.values()), axis=1)
        return {name: torch.tensor(array) for name, array in (("keys", keys), ("lengths", lengths), ("values", values))}

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        values = tensors["values"].split(tensors["lengths"].tolist(), 1)
        keys = (key.tobytes() for key in tensors["keys"].numpy())
        self._values = {key: value.numpy() for key, value in zip(keys, values, strict=True)}

    def summary(self) -> dict[str, Any]:
        """Identities, hits, misses and what the spot checks found."""
        return {**self._summary, **super().summary()}

    def close(self) -> None:
        """Close the store."""
        self._values = {}
        self._store.close()
