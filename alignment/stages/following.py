"""What the ranks that follow do of a run besides their passes: load the policy, begin a stage and end it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from alignment.config.schema import AdapterConfig, RunConfig
from alignment.errors import require
from alignment.kernels.allocator import keep_freed_memory
from alignment.losses import Loss
from alignment.policy.adapter import has_adapter
from alignment.policy.full_shards import gathered_ends, join_shards, take_shards
from alignment.policy.identity import policy_identity
from alignment.policy.layers import as_found, checkpoint_layers, disable_dropout
from alignment.policy.load import resolve_device
from alignment.policy.reward_model import attach_reward_head
from alignment.policy.sharding import Part, join_parts, take_part
from alignment.ranks.memory import available_memory
from alignment.ranks.team import Post, Team, trained_parameters
from alignment.reference.frozen import FrozenPolicy
from alignment.reference.given import GivenReference
from alignment.reference.live import LiveReference
from alignment.scoring.ends import EndsLayout
from alignment.scoring.layout import BatchLayout
from alignment.scoring.prompt_sharing import choose_layout
from alignment.stages.policy import PolicySource, load_policy
from alignment.stages.quiet import quieten_libraries
from alignment.training.elastic import elastic
from alignment.training.memory import count_weights
from alignment.training.objective import Objective
from alignment.training.passes import StepPasses
from alignment.training.router import RouterLoss

log = logging.getLogger(__name__)


def load_everywhere(team: Team, source: PolicySource, model: nn.Module) -> None:
    """Have the other ranks load the policy that this one has loaded.

    Of a shared base each keeps its part before the next ranks load theirs, as far as main memory asks for that.

    Raises:
        UserError: theirs is another.
    """
    own, at_once, part = policy_identity(model)[1]["base"], team.size, None
    if source.shared:
        device, size = resolve_device(source.config.device), count_weights(model).base
        groups: Any = team.run(_meet, [source] * team.size, lambda _: team.machine_groups(device))[0]
        part = _taken(source.config, model, groups, device)
        at_once = max(1, available_memory() // size)
    turns = load_turns(team.size, team.place.local_size, at_once)
    if len(turns) > 1:
        log.info("Main memory has room for %d whole bases, so the other ranks load theirs in turn.", at_once)
    for turn in turns:
        sources = [source if rank in turn else None for rank in range(team.size)]
        for rank, found in enumerate(team.run(_load, sources, lambda _: None)):
            if rank in turn:
                require_same_model(rank, found, own, source.source.base)
    if part is not None:
        config = source.config
        team.run(_join, [config] * team.size, lambda config: _joined(config, part, team))


def require_same_model(rank: int, found: Any, own: str, name: Any) -> None:
    """Refuse what a rank has loaded if its digest is not that of rank 0's.

    Raises:
        UserError: it is another model.
    """
    require(
        found == own,
        f"Rank {rank} has loaded another model than rank 0 from {name}: give all machines the same files and the same "
        f"versions of torch, transformers and bitsandbytes.",
    )


def load_turns(size: int, local_size: int, at_once: int) -> list[list[int]]:
    """The ranks but the first in the order in which they load, so many of each machine at a time."""
    turns = [[r for r in range(1, size) if r % local_size // at_once == turn] for turn in range(local_size)]
    return [turn for turn in turns if turn]


def _meet(post: Post, source: PolicySource) -> None:
    post.device = resolve_device(source.config.device)
    post.machine = post.team.machine_groups(post.device)


def _load(post: Post, source: PolicySource | None) -> str | None:
    if source is None:
        return None
    quieten_libraries()
    post.device = resolve_device(source.config.device)
    if post.device.type == "cpu":
        keep_freed_memory()
    post.model = None  # the one before makes room first
    post.model = load_policy(source, post.device)
    found: str = policy_identity(post.model)[1]["base"]
    if source.shared:
        post.part = _taken(source.config, post.model, post.machine, post.device)
    return found


def _join(post: Post, config: RunConfig) -> None:
    _joined(config, post.part, post.team)


def _taken(config: RunConfig, model: nn.Module, groups: Any, device: torch.device) -> Part:
    """This rank's part of a base, or of the whole model where all of it trains."""
    return (take_shards if config.adapter is None else take_part)(model, groups, device)


def _joined(config: RunConfig, part: Part, team: Team) -> None:
    (join_shards if config.adapter is None else join_parts)(part, team)


@contextmanager
def followed(team: Team | None, config: RunConfig) -> Iterator[None]:
    """Let the other ranks do within the block what a stage does to its policy."""
    if team is None:
        yield
        return
    team.tell(_open_stage, config.adapter)
    yield
    team.tell(_close_stage)  # not after an error, with which the run ends


def _open_stage(post: Post, adapter: AdapterConfig | None) -> None:
    post.stage.enter_context(as_found(post.model))
    post.stage.enter_context(elastic(post.model, adapter))


def _close_stage(post: Post, _: None) -> None:
    post.passes = post.trainer = post.layout = post.steps = post.start = post.teacher = None
    post.stage.close()


@dataclass(frozen=True, slots=True)
class PreferenceBegun:
    """What a rank needs for its passes of a preference stage.

    Attributes:
        loss: of the stage.
        checkpoint_every: as planned.
        has_reference: whether the policy is compared with one.
        live: (positions of a pass, `reference.sync_mix`) of a live reference; None for stored log-probs.
        keeps_start: whether the policy as it is now is kept, for the KL after training and for rounds compared with it.
        router_aux_loss_coef: of the trainer.
    """

    loss: Loss
    checkpoint_every: int
    has_reference: bool
    live: tuple[int, float] | None
    keeps_start: bool
    router_aux_loss_coef: float


def choose_together(team: Team | None, model: nn.Module, device: torch.device) -> BatchLayout:
    """The layout of passes: every rank chooses at the same time, since the passes that decide may break off."""
    if team is None:
        return choose_layout(model, device)
    own = partial(_chosen, model, device)
    return team.run(_choose, [None] * team.size, lambda _: own(), trained_parameters(model))[0]


def _chosen(model: nn.Module, device: torch.device) -> BatchLayout:
    with gathered_ends(model):
        return choose_layout(model, device)


def _choose(post: Post, _: None) -> BatchLayout:
    disable_dropout(post.model)
    layout = post.layout = _chosen(post.model, post.device)
    return layout


def give_reward_head(
    team: Team | None, model: nn.Module, layout: BatchLayout, seed: int, turn_end: tuple[int, ...]
) -> EndsLayout:
    """Make the policy of every rank a reward model; the layout of its passes."""
    attach_reward_head(model, seed)
    if team is not None:
        team.tell(_give_reward_head, (seed, turn_end))
    return EndsLayout(layout, turn_end)


def _give_reward_head(post: Post, asked: tuple[int, tuple[int, ...]]) -> None:
    seed, turn_end = asked
    attach_reward_head(post.model, seed)
    post.layout = EndsLayout(post.layout, turn_end)


def frozen_start(model: nn.Module, reference: Any) -> FrozenPolicy | None:
    """A frozen copy of the policy as it is now; None where that is a second model that no live reference has."""
    if has_adapter(model):
        return FrozenPolicy(model)
    return reference.frozen if isinstance(reference, LiveReference) else None


def begin_preference(post: Post, begun: PreferenceBegun) -> None:
    """Be ready for shares of the preference stage; its policy is the one that the stage starts from."""
    model, device = post.model, post.device
    checkpoint_layers(model, begun.checkpoint_every)
    reference: LiveReference | GivenReference | None = GivenReference() if begun.has_reference else None
    if begun.live is not None:
        reference = LiveReference(model, post.layout, begun.live[0], device, begun.live[1])
    if begun.keeps_start:
        post.start = frozen_start(model, reference)
    objective = Objective(begun.loss, model, reference, post.layout, device)
    router_loss = RouterLoss(model, begun.router_aux_loss_coef, "trainer.router_aux_loss_coef")
    post.passes = StepPasses(model, objective, post.layout, device, router_loss)
