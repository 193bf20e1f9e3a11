"""What the ranks that follow do of a run besides their passes: load the policy, begin a stage and end it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from alignment.config.schema import AdapterConfig, RunConfig
from alignment.errors import UserError
from alignment.kernels.allocator import keep_freed_memory
from alignment.losses import Loss
from alignment.policy.identity import policy_identity
from alignment.policy.layers import as_found, checkpoint_layers, disable_dropout
from alignment.policy.load import resolve_device
from alignment.policy.sharding import shard_base
from alignment.ranks.team import Post, Team, trained_parameters
from alignment.reference.given import GivenReference
from alignment.reference.live import LiveReference
from alignment.scoring.layout import BatchLayout
from alignment.scoring.prompt_sharing import choose_layout
from alignment.stages.policy import PolicySource, load_policy
from alignment.stages.quiet import quieten_libraries
from alignment.training.elastic import elastic
from alignment.training.objective import Objective
from alignment.training.passes import StepPasses
from alignment.training.router import RouterLoss


def load_everywhere(team: Team, source: PolicySource, model: nn.Module) -> None:
    """Have the other ranks load the policy that this one has loaded.

    Raises:
        UserError: theirs is another.
    """
    own = policy_identity(model)[1]["base"]
    for rank, found in enumerate(team.tell(_load, source), 1):
        if found != own:
            raise UserError(
                f"Rank {rank} has loaded another model than rank 0 from {source.source.base}: give all machines the "
                f"same files and the same versions of torch, transformers and bitsandbytes."
            )
    if source.shared:
        device = resolve_device(source.config.device)
        team.run(_share, [None] * team.size, lambda _: shard_base(model, team, device))


def _share(post: Post, _: None) -> None:
    shard_base(post.model, post.team, post.device)


def _load(post: Post, source: PolicySource) -> str:
    quieten_libraries()
    post.device = resolve_device(source.config.device)
    if post.device.type == "cpu":
        keep_freed_memory()
    post.model = None  # the one before makes room first
    post.model = load_policy(source, post.device)
    found: str = policy_identity(post.model)[1]["base"]
    return found


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
    post.passes = post.trainer = post.layout = None
    post.stage.close()


@dataclass(frozen=True, slots=True)
class PreferenceBegun:
    """What a rank needs for its passes of a preference stage.

    Attributes:
        loss: of the stage.
        checkpoint_every: as planned.
        live: (positions of a pass, `reference.sync_mix`) of a live reference; None without one.
        router_aux_loss_coef: of the trainer.
    """

    loss: Loss
    checkpoint_every: int
    live: tuple[int, float] | None
    router_aux_loss_coef: float


def choose_together(team: Team | None, model: nn.Module, device: torch.device) -> BatchLayout:
    """The layout of passes: every rank chooses at the same time, since the passes that decide may break off."""
    if team is None:
        return choose_layout(model, device)
    layouts = team.run(_choose, [None] * team.size, lambda _: choose_layout(model, device), trained_parameters(model))
    return layouts[0]


def _choose(post: Post, _: None) -> BatchLayout:
    disable_dropout(post.model)
    layout = post.layout = choose_layout(post.model, post.device)
    return layout


def begin_preference(post: Post, begun: PreferenceBegun) -> None:
    """Be ready for shares of the preference stage; its policy is the one that the stage starts from."""
    model, device = post.model, post.device
    checkpoint_layers(model, begun.checkpoint_every)
    reference: LiveReference | GivenReference = GivenReference()
    if begun.live is not None:
        reference = LiveReference(model, post.layout, begun.live[0], device, begun.live[1])
    objective = Objective(begun.loss, model, reference, post.layout, device)
    router_loss = RouterLoss(model, begun.router_aux_loss_coef, "trainer.router_aux_loss_coef")
    post.passes = StepPasses(model, objective, post.layout, device, router_loss)
