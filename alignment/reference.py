"""The reference: the policy as it was when the stage started, from the shared store or live."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from alignment.errors import UserError
from alignment.groups import Group
from alignment.layout import BatchLayout, MicroBatch
from alignment.logps import hidden_states, join_scores, score_groups
from alignment.policy import FrozenStart, policy_identity
from alignment.ragged import RaggedLogps
from alignment.reference_store import ReferenceStore

log = logging.getLogger(__name__)

_SEQUENCES_PER_WRITE = 64


def comparison_tolerance(model: nn.Module, num_tokens: int) -> float:
    """Largest mean difference over so many tokens, in nats, that batch shapes alone may cause between two scorings.

    Seen on 135M parameters and real text, with and without NF4: a mean of 2e-7 in fp32 and 3e-3 in bfloat16, where a
    single unlikely token is off by 0.3; the rest is room for larger models, and for one such token in a short text.
    A reference that is another policy is off by more: a short SFT moves tenths of a nat.
    """
    config: Any = model.config
    quantization = config.to_dict().get("quantization_config") or {}
    precise = model.dtype in (torch.float32, torch.float64) and (
        quantization.get("bnb_4bit_compute_dtype") in (None, "float32", "float64")
    )
    return (1e-4 if precise else 3e-2) * (1 + 16 / num_tokens)


class Reference(Protocol):
    """Reference log-probs of groups."""

    def prepare(self, groups: Iterable[Group]) -> None:
        """Called once, before the first update, with every group that will be asked for."""
        ...

    def logps(self, groups: Sequence[Group]) -> RaggedLogps:
        """Log-probs of all completions, in order, on the CPU."""
        ...

    def summary(self) -> dict[str, Any]:
        """What `summary.json` says of it."""
        ...

    def close(self) -> None:
        """Give its memory back."""
        ...


class CachedReference:
    """Reference log-probs from the content-addressed store; what it lacks is computed once and added."""

    def __init__(
        self,
        store: ReferenceStore,
        model: nn.Module,
        layout: BatchLayout,
        tokens_per_batch: int,
        device: torch.device,
        spot_checks: int,
    ) -> None:
        self._store = store
        self._model = model
        self._layout = layout
        self._tokens_per_batch = tokens_per_batch
        self._device = device
        self._spot_checks = spot_checks
        self._values: dict[bytes, np.ndarray] = {}
        self.identity, description = policy_identity(model)
        store.register(self.identity, description)
        self._summary: dict[str, Any] = {
            "mode": "cache",
            "identity": self.identity,
            "path": str(store.path),
            "hits": 0,
            "misses": 0,
            "spot_checks": 0,
            "spot_check_max_diff": 0.0,
            "seconds": 0.0,
        }

    def prepare(self, groups: Iterable[Group]) -> None:
        """Look everything up, recompute a few finds, compute and store the rest."""
        started = time.monotonic()
        wanted: dict[bytes, Group] = {}
        for group in groups:
            for key, completion in zip(group.keys(), group.completions, strict=True):
                wanted.setdefault(key, Group(group.prompt, (completion,)))
        stored = self._store.get(self.identity, list(wanted))
        self._values = {k: v for k, v in stored.items() if len(v) == len(wanted[k].completions[0])}
        if self._values and not self._agrees(wanted):
            self._store.forget(self.identity)
            self._values = {}
        missing = {key: group for key, group in wanted.items() if key not in self._values}
        self._summary["hits"] += len(wanted) - len(missing)
        self._summary["misses"] += len(missing)
        log.info("Reference %s: %d of %d completions stored.", self.identity[:12], len(self._values), len(wanted))
        self._compute(missing)
        self._summary["seconds"] += time.monotonic() - started

    def _agrees(self, wanted: dict[bytes, Group]) -> bool:
        found = sorted(self._values)
        picks = found[:: max(1, len(found) // max(1, self._spot_checks))][: self._spot_checks]
        if not picks:
            return True
        groups = [wanted[key] for key in picks]
        fresh = join_scores(groups, list(self._score(groups)))
        stored = np.concatenate([self._values[key] for key in picks])
        difference = np.abs(fresh.values.numpy() - stored)
        self._summary["spot_checks"] += len(picks)
        self._summary["spot_check_max_diff"] = float(difference.max())
        # The mean over all of them: one token of a short completion may be off by more in 16 bit.
        if not difference.mean() <= comparison_tolerance(self._model, len(difference)):
            log.warning(
                "Stored reference log-probs of %s differ from fresh ones by %.3g nats per token: they are dropped and "
                "computed again.",
                self.identity[:12],
                difference.mean(),
            )
            return False
        return True

    def _score(self, groups: Sequence[Group]):
        return score_groups(self._model, groups, self._layout, self._tokens_per_batch, self._device)

    def _compute(self, missing: dict[bytes, Group]) -> None:
        if not missing:
            return
        keys, groups = list(missing), list(missing.values())
        pending: dict[bytes, np.ndarray] = {}
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns) as progress:
            task = progress.add_task("Reference log-probs", total=len(groups))
            for batch, logps in self._score(groups):
                if not logps.values.isfinite().all():
                    raise UserError(
                        "The policy that this stage starts from gives log-probs that are not finite: its weights are "
                        "damaged or overflow in this dtype (model.dtype, quantization.compute_dtype)."
                    )
                for position, index in enumerate(batch.indices):
                    pending[keys[index]] = logps.sequence(position).float().numpy().copy()
                progress.advance(task, len(batch.indices))
                if len(pending) >= _SEQUENCES_PER_WRITE:
                    self._flush(pending)
                    pending = {}
            self._flush(pending)

    def _flush(self, pending: dict[bytes, np.ndarray]) -> None:
        self._store.put(self.identity, pending)
        self._values.update(pending)

    def logps(self, groups: Sequence[Group]) -> RaggedLogps:
        """Stored values of all completions of the groups, which `prepare` has seen."""
        return RaggedLogps.from_sequences(
            [torch.from_numpy(self._values[key]) for group in groups for key in group.keys()]  # noqa: SIM118
        )

    def summary(self) -> dict[str, Any]:
        """Identity, hits, misses and what the spot checks found."""
        return dict(self._summary)

    def close(self) -> None:
        """Close the store."""
        self._values = {}
        self._store.close()


class LiveReference:
    """A frozen copy of the starting policy, run beside the training policy: the oracle, at the price of its passes."""

    def __init__(self, model: nn.Module, layout: BatchLayout, tokens_per_batch: int, device: torch.device) -> None:
        self.identity, _ = policy_identity(model)
        self._start = FrozenStart(model)
        self._layout = layout
        self._tokens_per_batch = tokens_per_batch
        self._device = device

    def prepare(self, groups: Iterable[Group]) -> None:
        """Nothing to prepare."""

    def logps(self, groups: Sequence[Group]) -> RaggedLogps:
        """Score the groups with the starting policy."""
        with self._start.active() as model:
            scored = list(score_groups(model, groups, self._layout, self._tokens_per_batch, self._device))
        return join_scores(groups, scored)

    def hidden_states(self, batch: MicroBatch) -> tuple[Any, Tensor]:
        """The starting policy's head, and its (tokens, H) hidden states that predict the scored tokens of a pass."""
        with self._start.active() as model:
            return model.get_output_embeddings(), hidden_states(model, batch)

    def summary(self) -> dict[str, Any]:
        """Identity only: nothing is stored."""
        return {"mode": "live", "identity": self.identity}

    def close(self) -> None:
        """Drop the copy."""
        self._start.close()
