"""A reference whose log-probs are computed in every step, by a frozen copy of the policy."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from alignment.errors import require
from alignment.ranks.team import Post, Team, trained_parameters
from alignment.reference.base import Reference
from alignment.reference.frozen import FrozenPolicy
from alignment.scoring.head import OtherModel
from alignment.scoring.layout import BatchLayout, MicroBatch
from alignment.scoring.logps import hidden_states, in_passes, join_scores, score_groups, score_tokens, scoring_head
from alignment.types import Group, Quantity, RaggedLogps, to_device

log = logging.getLogger(__name__)


class LiveReference(Reference):
    """A frozen copy of the starting policy, which scores every batch: nothing is stored, every pass is paid for.

    Args:
        model: the policy at the start.
        tokens_per_batch: tokens of one forward pass.
        mix: a refresh makes the reference `mix` times the policy plus 1 - `mix` times what it was.
        team: the ranks that have a live reference of their own, each of which follows this one.

    Raises:
        UserError: a number is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: BatchLayout,
        tokens_per_batch: int,
        device: torch.device,
        mix: float = 1.0,
        team: Team | None = None,
    ) -> None:
        require(tokens_per_batch >= 1, f"tokens_per_batch must be at least 1, not {tokens_per_batch}.")
        require(0 < mix <= 1, f"mix must be in (0, 1], not {mix}.")
        super().__init__(model)
        self.frozen = FrozenPolicy(model)
        log.info("Live reference: %s.", self.frozen.form)
        self._mix = mix
        self._layout = layout
        self._tokens_per_batch = tokens_per_batch
        self._device = device
        self._team = team

    def prepare(self, groups: Sequence[Group]) -> None:
        """Nothing to prepare."""

    def is_policy(self, step: int) -> bool:
        """Also: what was mixed with an earlier policy is none."""
        return super().is_policy(step) and (self._mix == 1 or not self.refreshes)

    def refresh(self, step: int, groups: Sequence[Group]) -> None:
        """Move towards the policy as it is now."""
        del groups
        if self._team is not None:
            self._team.tell(_mix, self._mix, trained_parameters(self._model))
        self.frozen.mix(self._mix)
        with self.frozen.active() as model:
            self._note_refresh(step, model)

    def logps(self, groups: Sequence[Group]) -> RaggedLogps:
        """Score the groups with the frozen policy."""
        with self.frozen.active() as model:
            scored = list(score_groups(model, groups, self._layout, self._tokens_per_batch, self._device))
        return join_scores(groups, scored)

    def entropies(self, groups: Sequence[Group]) -> RaggedLogps:
        """Entropies, from a pass of their own."""
        with self.frozen.active() as model:
            passes = in_passes(
                lambda batch: score_tokens(model, batch, frozenset({Quantity.entropy})),
                groups,
                self._layout,
                self._tokens_per_batch,
                self._device,
            )
            scored = [
                (batch, RaggedLogps(scores[Quantity.entropy], to_device(batch.offsets, self._device)))
                for batch, scores in passes
            ]
        return join_scores(groups, scored)

    def other_model(self, batch: MicroBatch) -> OtherModel:
        """The frozen policy's head, and its hidden states that predict the scored tokens of a pass."""
        with self.frozen.active() as model:
            hidden = hidden_states(model, batch)
            head = scoring_head(model)
        if any(
            parameter.requires_grad for parameter in head.parameters()
        ):  # the head trains, so the frozen one differs
            return OtherModel(self._run_head, hidden)
        return OtherModel(head, hidden)

    def _run_head(self, hidden: Tensor) -> Tensor:
        with self.frozen.active() as model:
            return scoring_head(model)(hidden)

    def _tensors(self) -> dict[str, Tensor]:
        return self.frozen.state()

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        if self._team is not None:
            self._team.tell(_restore, tensors)
        self.frozen.load_state(tensors)

    def summary(self) -> dict[str, Any]:
        """Identities only, because nothing is stored."""
        return {"mode": "live", **super().summary()}

    def close(self) -> None:
        """Drop the copy."""
        self.frozen.close()


def _mix(post: Post, share: float) -> None:
    post.passes.objective.reference.frozen.mix(share)


def _restore(post: Post, tensors: dict[str, Tensor]) -> None:
    post.passes.objective.reference.frozen.load_state(tensors)
