"""The passes of one optimizer step, on the groups that a rank has of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from alignment.losses import StepTotals
from alignment.policy.layers import checkpoint_layers
from alignment.policy.sharding import backward_turn, can_try_again
from alignment.ranks.team import Post, trained_parameters
from alignment.reference.given import GivenReference
from alignment.scoring.layout import BatchLayout, MicroBatch
from alignment.training.metrics import Means, Observed, preference_metrics, read
from alignment.training.objective import Objective
from alignment.training.router import RouterLoss
from alignment.types import Group, to_device


@dataclass(frozen=True, slots=True)
class StepPart:
    """Groups of a step, and what holds for the whole of it however it is split.

    Attributes:
        groups: of this part.
        num_groups: of the whole step.
        totals: see `LossInputs.totals`.
        seeds: (groups,) of this part.
        step_statistics: the loss's, of the whole step.
        derivative: (rows, tokens): that of the step's loss by the scores of this part, in the order of the groups; None
            where the loss is derived pass by pass.
        scale: what the loss is multiplied by for the backward pass, see `loss_scaler`.
    """

    groups: Sequence[Group]
    num_groups: int
    totals: StepTotals
    seeds: Tensor
    step_statistics: Tensor | None
    derivative: Tensor | None = None
    scale: float = 1.0

    def of(self, objective: Objective, indices: Sequence[int]) -> StepPart:
        """A part of this part; its tensors are on the CPU, so that it can travel."""
        derivative = self.derivative
        if derivative is not None:
            derivative = derivative.cpu()[:, objective.plan(self.groups).columns(indices)]
        statistics = None if self.step_statistics is None else self.step_statistics.cpu()
        groups = [self.groups[i] for i in indices]
        return replace(
            self, groups=groups, seeds=self.seeds[list(indices)], step_statistics=statistics, derivative=derivative
        )


@dataclass(slots=True)
class StepProgress:
    """What a running step has accumulated: its losses, its tokens, what each pass gave, the loss's new state, and the
    means of other ranks' passes."""

    loss: Tensor
    num_tokens: int = 0
    observed: list[Observed] = field(default_factory=list)
    state: dict[str, float] = field(default_factory=dict)
    router_loss: Tensor | float = 0.0
    means: Means = field(default_factory=Means)


class StepPasses:
    """Runs the passes of steps, forward and backward.

    Args:
        objective: gives their losses.
        router_loss: what is added for a mixture's routers.
    """

    def __init__(
        self, model: nn.Module, objective: Objective, layout: BatchLayout, device: torch.device, router_loss: RouterLoss
    ) -> None:
        self.model = model
        self.objective = objective
        self._layout = layout
        self._device = device
        self._router_loss = router_loss

    def batches(self, groups: Sequence[Group], tokens_per_batch: int) -> Iterator[MicroBatch]:
        """The micro-batches of these groups."""
        return self._layout.batches(groups, tokens_per_batch, self.objective.needs.prompts)

    def add_gradients(self, part: StepPart, tokens_per_batch: int, step: StepProgress) -> None:
        """Forward and backward, pass by pass; adds to the gradients and to `step`."""
        objective, plan = self.objective, self.objective.plan(part.groups)
        statistics = None if part.step_statistics is None else to_device(part.step_statistics, self._device)
        for batch in self.batches(part.groups, tokens_per_batch):
            indices = list(batch.indices)
            with self._router_loss.collecting():
                scores = objective.score(self.model, batch.to(self._device), part.groups)
            balance = self._router_share(len(indices) / part.num_groups, step)
            step.num_tokens += batch.num_tokens
            step.loss += 0 * scores.values.detach().sum().float()  # nan where a log-prob is not finite
            if part.derivative is not None:
                columns = to_device(plan.columns(indices), part.derivative.device)
                chosen = part.derivative[:, columns].to(scores.values.device)
                with backward_turn(self.model):
                    (((scores.values * chosen).sum() + balance) * part.scale).backward()
                continue
            members = [part.groups[i] for i in indices]
            inputs = objective.inputs(members, scores, totals=part.totals, seeds=part.seeds[indices])
            found = objective.evaluate(members, inputs, statistics)
            loss = found.share_of(part.num_groups)
            with backward_turn(self.model):
                ((loss + balance) * part.scale).backward()
            step.loss += loss.detach().float()
            step.observed.append(Observed.of(found.inputs, found.output))
            if objective.needs.whole_step:
                step.state = found.output.state
        objective.passes.finish()

    def _router_share(self, share: float, step: StepProgress) -> Tensor | float:
        """What a pass with this share of the step's groups adds for its routers; the logged loss is without it."""
        balance = self._router_loss.take()
        if balance is None:
            return 0.0
        step.router_loss += share * balance.detach()
        return share * self._router_loss.coefficient * balance


# On a rank that follows


@dataclass(frozen=True, slots=True)
class Asked:
    """A rank's share of a step.

    Attributes:
        part: its groups.
        tokens_per_batch: of its passes.
        state: the loss's running state.
        reference: the log-probs of its groups where they are stored.
        checkpoint_all: whether every layer is checkpointed now, for want of memory.
    """

    part: StepPart
    tokens_per_batch: int
    state: dict[str, float]
    reference: dict[bytes, np.ndarray] | None
    checkpoint_all: bool


@dataclass(frozen=True, slots=True)
class Done:
    """What a rank's share of a step came to; `used` says which of the tensors that train have a gradient."""

    loss: float
    num_tokens: int
    means: Means
    router_loss: float
    used: list[bool]


def add_share(post: Post, asked: Asked) -> Done | None:
    """Add the gradients of a share; None where memory has run out, and then nothing is left of it."""
    passes: StepPasses = post.passes
    post.model.zero_grad(set_to_none=True)
    post.model.train()
    if asked.checkpoint_all:
        checkpoint_layers(post.model, 1)
    passes.objective.state = asked.state
    take_reference(passes.objective, asked.reference)
    step = StepProgress(torch.zeros((), device=post.device))
    try:
        passes.add_gradients(asked.part, asked.tokens_per_batch, step)
    except RuntimeError as error:
        if not can_try_again(error, post.model):
            raise
        return None
    means = Means()
    for inputs, output in read(step.observed):
        means.add(preference_metrics(inputs, output))
    return Done(step.loss.item(), step.num_tokens, means, float(step.router_loss), used_parameters(post.model))


def used_parameters(model: nn.Module) -> list[bool]:
    """Which of the tensors that train have a gradient."""
    return [parameter.grad is not None for parameter in trained_parameters(model)]


def take_reference(objective: Objective, values: dict[bytes, np.ndarray] | None) -> None:
    """Use the stored log-probs that came with a share."""
    if values is not None:
        assert isinstance(objective.reference, GivenReference)
        objective.reference.values = values
