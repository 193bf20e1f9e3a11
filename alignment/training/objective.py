"""From groups to a loss: scores of the policy and the reference, the loss's inputs, its value."""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn

from alignment.data.tokens.units import as_rows
from alignment.losses import Loss, LossInputs, LossOutput, Quantity, StepTotals
from alignment.ranks.shares import share_groups
from alignment.ranks.team import Post, Team, trained_parameters
from alignment.reference.base import Reference
from alignment.reference.cached import CachedReference
from alignment.reference.given import GivenReference
from alignment.reference.live import LiveReference
from alignment.scoring.head import Likeliest
from alignment.scoring.layout import BatchLayout, MicroBatch
from alignment.scoring.logps import in_passes, score_tokens
from alignment.scoring.token_plan import TokenPlan
from alignment.scoring.token_scores import TokenScores
from alignment.types import Group, MadeOnDemand, to_device


def mismatched_groups(loss: Loss, groups: Sequence[Group]) -> list[Group]:
    """The extra sequences that the loss wants scored for a step of these groups."""
    sequences = [group.only(k) for group in groups for k in range(len(group.completions))]
    return [replace(sequences[j], prompt=sequences[i].prompt) for i, j in loss.mismatched(len(groups))]


class _Asked(MadeOnDemand[Group]):
    """Groups for which a reference is asked, each made when it is read.

    Args:
        used: (groups,) which of the training groups.
        mismatched: (sequences, 3) of training groups: whose prompt, whose completion, and which of its completions.
    """

    def __init__(
        self, groups: Sequence[Group], used: np.ndarray, others: Sequence[Group], mismatched: np.ndarray
    ) -> None:
        self._groups = groups
        self._used = used
        self._others = others
        self._mismatched = mismatched

    def __len__(self) -> int:
        return len(self._used) + len(self._others) + len(self._mismatched)

    def item(self, place: int) -> Group:
        """See `MadeOnDemand`."""
        if place < len(self._used):
            return self._groups[int(self._used[place])]
        place -= len(self._used)
        if place < len(self._others):
            return self._others[place]
        prompt, completion, k = self._mismatched[place - len(self._others)].tolist()
        return replace(self._groups[completion].only(k), prompt=self._groups[prompt].prompt)

    def __iter__(self) -> Iterator[Group]:
        every = len(self._used) == len(self._groups)
        yield from self._groups if every else (self._groups[index] for index in self._used.tolist())
        yield from self._others
        yield from (self[index] for index in range(len(self._used) + len(self._others), len(self)))


def groups_to_reference(
    loss: Loss, groups: Sequence[Group], steps: Sequence[Sequence[int]], eval_groups: Sequence[Group]
) -> Sequence[Group]:
    """Every group for which these steps and the evaluation ask the reference."""
    used = np.unique(np.fromiter(chain.from_iterable(steps), dtype=np.int64))
    others = list(eval_groups)
    if eval_groups:
        others += mismatched_groups(loss, evaluated(loss, eval_groups))
    found = array("i")
    for step in steps:
        sequences: list[tuple[int, int]] | None = None
        for i, j in loss.mismatched(len(step)):
            if sequences is None:
                sequences = [(index, k) for index in step for k in range(len(groups[index].completions))]
            found.extend((sequences[i][0], *sequences[j]))
    return _Asked(groups, used, others, np.frombuffer(found, dtype=np.int32).reshape(-1, 3))


def evaluated(loss: Loss, groups: Sequence[Group]) -> Sequence[Group]:
    """Held-out groups in the unit of the loss: pairs become rows where it reads rows."""
    return as_rows(groups) if loss.requirements().unit == "row" else groups


def step_totals(groups: Sequence[Group]) -> StepTotals:
    """Counts over a whole step of groups, as `LossInputs.step_totals` makes them of its inputs."""
    preferred = [group for group in groups if group.labels is None or group.labels[0]]
    return StepTotals(
        items=len(groups),
        tokens=sum(group.scored_lengths[0] for group in preferred),
        prompt_tokens=sum(len(group.prompt) - 1 for group in preferred),
    )


def step_seeds(groups: Sequence[Group], seed: int, step: int) -> Tensor:
    """(groups,) int64 seeds that depend on a group's content, the run's seed and the step's number alone."""
    numbers = []
    for group in groups:
        digest = hashlib.blake2b(f"{seed}:{step}".encode(), digest_size=8)
        for key in group.keys():  # noqa: SIM118
            digest.update(key)
        numbers.append(int.from_bytes(digest.digest(), "little") >> 1)
    return torch.tensor(numbers, dtype=torch.int64)


@dataclass(frozen=True, slots=True)
class ScoresAsked:
    """Groups that a rank is to score for a step or an evaluation, without gradient.

    Attributes:
        groups: of this share.
        tokens_per_batch: of its passes.
        prompts: whether the prompts' tokens are scored too.
        plain: log-probs alone, not the quantities that the loss asks for.
        reference: what is stored of the groups, where a pass reads it.
    """

    groups: Sequence[Group]
    tokens_per_batch: int
    prompts: bool
    plain: bool
    reference: dict[bytes, np.ndarray] | None = None


Scored = tuple[tuple[int, ...], Tensor]
"""The groups of a pass, as indices, and the (rows, tokens) of its scores."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A loss evaluated on some groups.

    Attributes:
        inputs: what the loss was given.
        output: what it returned.
        losses: (items,) the losses, each times its group's weight from the data; differentiable where the inputs are.
    """

    inputs: LossInputs
    output: LossOutput
    losses: Tensor

    def share_of(self, num_items: int) -> Tensor:
        """What these items add to the mean loss of a step of `num_items` items."""
        return self.losses.sum() / num_items

    def mean(self) -> float:
        """The mean loss of these items."""
        return self.losses.double().mean().item()


def weighted(groups: Sequence[Group], losses: Tensor) -> Tensor:
    """(items,) the losses, each times its group's weight from the data."""
    if all(group.weight == 1.0 for group in groups):
        return losses
    return losses * to_device(torch.tensor([group.weight for group in groups], dtype=losses.dtype), losses.device)


class PassRunner:
    """Runs passes with gradient. A cohort's slot gives the turn to another training after each step."""

    def score(
        self, model: nn.Module, batch: MicroBatch, quantities: frozenset[Quantity], likeliest: Likeliest | None = None
    ) -> TokenScores:
        """Scores of one pass as `logps.score_tokens` gives them, differentiable."""
        return score_tokens(model, batch, quantities, likeliest)

    def finish(self) -> None:
        """Called after a step's last backward call."""


class Objective:
    """A loss together with the policy and the reference that give it its inputs.

    Attributes:
        needs: the loss's requirements.
        passes: runs the passes of training steps, except those that need a second model beside the policy.
        reference: as given; on a rank that follows, the log-probs that came with its share.
        state: the loss's running state after the last step.
    """

    def __init__(
        self,
        loss: Loss,
        model: nn.Module,
        reference: Reference | GivenReference | None,
        layout: BatchLayout,
        device: torch.device,
        team: Team | None = None,
    ) -> None:
        self.loss = loss
        self.needs = loss.requirements()
        self.state = loss.initial_state()
        self.reference = reference
        self._model = model
        self._layout = layout
        self._device = device
        self._team = team
        self.passes = PassRunner()
        self._quantities = self.needs.quantities - {Quantity.entropy}

    def plan(self, groups: Sequence[Group]) -> TokenPlan:
        """Where the scored tokens of these groups stand."""
        return TokenPlan.of(groups, self.needs.prompts, ends=self.needs.rewards)

    def score(self, model: nn.Module, batch: MicroBatch, groups: Sequence[Group]) -> TokenScores:
        """Scores of one pass over some of these groups, differentiable where gradients are enabled."""
        if Quantity.divergence in self._quantities:
            assert isinstance(self.reference, LiveReference), "a divergence needs the reference itself"
            return score_tokens(model, batch, self._quantities, self.reference.other_model(batch))
        likeliest = self._likeliest([groups[i] for i in batch.indices]) if self.needs.likeliest else None
        if torch.is_grad_enabled():
            return self.passes.score(model, batch, self._quantities, likeliest)
        return score_tokens(model, batch, self._quantities, likeliest)

    def _likeliest(self, groups: Sequence[Group]) -> Likeliest:
        """The teacher's likeliest tokens at the tokens of these groups, with the log-probs that count."""
        assert isinstance(self.reference, CachedReference | GivenReference), "a teacher's log-probs are kept"
        found = self.reference.likeliest(groups)
        logps = found.logps.log_softmax(-1) if self.needs.renormalise else found.logps
        return Likeliest(to_device(found.ids, self._device), to_device(logps, self._device))

    def collect(self, groups: Sequence[Group], tokens_per_batch: int) -> TokenScores:
        """Scores of all groups, without gradient; every rank scores its share of them."""
        return self._collect(groups, self.plan(groups), tokens_per_batch, plain=False)

    def _collect(self, groups: Sequence[Group], plan: TokenPlan, tokens_per_batch: int, plain: bool) -> TokenScores:
        prompts = plan.prompt_offsets is not None
        whole: Tensor | None = None
        for indices, values in self._all_scored(groups, tokens_per_batch, prompts, plain):
            if whole is None:
                whole = torch.zeros(len(values), plan.num_tokens, dtype=values.dtype, device=self._device)
            whole[:, to_device(plan.columns(indices), self._device)] = to_device(values, self._device)
        assert whole is not None, "there is at least one group"
        return TokenScores(whole, frozenset() if plain else self._quantities)

    def _all_scored(
        self, groups: Sequence[Group], tokens_per_batch: int, prompts: bool, plain: bool
    ) -> Iterator[Scored]:
        """The scores of all groups, pass by pass, whichever rank runs it."""
        if self._team is None:
            yield from self.scored(ScoresAsked(groups, tokens_per_batch, prompts, plain))
            return
        shares = share_groups(groups, self._team.size)
        asked = [ScoresAsked([groups[i] for i in own], tokens_per_batch, prompts, plain) for own in shares]
        if self.needs.likeliest and isinstance(self.reference, CachedReference):
            asked = [replace(share, reference=self.reference.rows(share.groups)) for share in asked]
        weights = trained_parameters(self._model)
        found = self._team.run(score_share, asked, lambda own: list(self.scored(own)), weights)
        for own, passes in zip(shares, found, strict=True):
            for indices, values in passes:
                yield tuple(own[i] for i in indices), values

    def scored(self, asked: ScoresAsked) -> Iterator[Scored]:
        """The scores of this rank's share, pass by pass, on the device."""

        def run(batch: MicroBatch) -> TokenScores:
            return score_tokens(self._model, batch) if asked.plain else self.score(self._model, batch, asked.groups)

        passes = in_passes(run, asked.groups, self._layout, asked.tokens_per_batch, self._device, asked.prompts)
        for batch, scores in passes:
            yield batch.indices, scores.values

    def scores_at_reference(self, groups: Sequence[Group]) -> TokenScores | None:
        """What `collect` gives where the policy equals its reference; None where only a pass can tell."""
        if self.reference is None or self._quantities or self.needs.prompts:
            return None
        return TokenScores.stack(self.reference.logps(groups).values).to(self._device)

    def inputs(
        self,
        groups: Sequence[Group],
        scores: TokenScores,
        *,
        totals: StepTotals | None = None,
        seeds: Tensor | None = None,
    ) -> LossInputs:
        """The loss's inputs for groups that `score` or `collect` has scored."""
        plan = self.plan(groups)
        device = scores.values.device
        reference = None
        if Quantity.divergence in scores.quantities:  # the same pass gave the reference's log-probs
            reference = plan.policy(scores.other_logps.detach())
        elif self.reference is not None:
            reference = self.reference.logps(groups).to(device)
        quantities = {quantity: plan.policy(row) for quantity, row in scores.by_quantity().items()}
        if Quantity.entropy in self.needs.quantities:
            assert self.reference is not None
            quantities[Quantity.entropy] = self.reference.entropies(groups).to(device)
        return LossInputs(
            policy=plan.policy(scores.logps),
            reference=reference,
            labels=_labels(groups, device) if self.needs.unit == "row" else None,
            sizes=_sizes(groups, device) if self.needs.unit == "list" else None,
            scores=_scores(groups, device),
            prompts=plan.prompts(scores.logps),
            quantities=quantities,
            state=self.state,
            totals=totals,
            seeds=None if seeds is None else to_device(seeds, device),
            lengths=_lengths(groups, device) if self.needs.rewards else None,
            drawn=plan.policy(_drawn(groups, scores.logps)) if self.needs.draws and groups[0].drawn else None,
        )

    def evaluate(self, groups: Sequence[Group], inputs: LossInputs, step_statistics: Tensor | None) -> Evaluation:
        """The loss of these groups.

        Args:
            groups: the items of the inputs.
            inputs: from `inputs`, of the whole step or of a part of it.
            step_statistics: from `step_statistics`, of the whole step.
        """
        output = self.loss(inputs, step_statistics)
        return Evaluation(inputs, output, weighted(groups, output.losses))

    def mismatched(self, groups: Sequence[Group], tokens_per_batch: int | None) -> LossInputs | None:
        """The inputs of a whole step's mismatched sequences; without a budget those of a policy at its reference."""
        mismatched = mismatched_groups(self.loss, groups)
        if not mismatched:
            return None
        assert self.reference is not None
        plan = TokenPlan.of(mismatched)
        reference = self.reference.logps(mismatched).to(self._device)
        if tokens_per_batch is None:
            return LossInputs(reference, reference)
        scores = self._collect(mismatched, plan, tokens_per_batch, plain=True)
        return LossInputs(plan.policy(scores.logps), reference)

    def step_statistics(self, groups: Sequence[Group], tokens_per_batch: int | None) -> Tensor | None:
        """The loss's sums over the mismatched sequences of a whole step, as `mismatched`."""
        mismatched = self.mismatched(groups, tokens_per_batch)
        return None if mismatched is None else self.loss.step_statistics(mismatched)


def score_share(post: Post, asked: ScoresAsked) -> list[Scored]:
    """What a rank that follows has scored, on the CPU."""
    if asked.reference is not None:
        post.passes.objective.reference.values = asked.reference
    return [(indices, values.cpu()) for indices, values in post.passes.objective.scored(asked)]


def _labels(groups: Sequence[Group], device: torch.device) -> Tensor:
    return to_device(torch.tensor([label for group in groups for label in group.labels or ()]), device)


def _sizes(groups: Sequence[Group], device: torch.device) -> Tensor:
    return to_device(torch.tensor([len(group.completions) for group in groups]), device)


def _lengths(groups: Sequence[Group], device: torch.device) -> Tensor:
    return to_device(torch.tensor([length for group in groups for length in group.scored_lengths]), device)


def _drawn(groups: Sequence[Group], logps: Tensor) -> Tensor:
    """(tokens,) log-probs of the completions' tokens when they were drawn, like these."""
    values = np.concatenate([values for group in groups for values in group.drawn or ()])
    return to_device(torch.from_numpy(values), logps.device).to(logps.dtype)


def _scores(groups: Sequence[Group], device: torch.device) -> Tensor | None:
    if all(group.scores is None for group in groups):
        return None
    scores = [s for group in groups for s in group.scores or (math.nan,) * len(group.completions)]
    return to_device(torch.tensor(scores, dtype=torch.float64), device)
