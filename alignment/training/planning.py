"""The plan of a stage: made once its policy is loaded, kept in the run folder, compared with the memory measured."""

from __future__ import annotations

import logging
import resource
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alignment.config.schema import RunConfig
from alignment.files import read_sealed, write_sealed
from alignment.policy.adapter import starts_at_base
from alignment.policy.layers import decoder_layers
from alignment.policy.sharding import is_sharded
from alignment.ranks.memory import available_memory
from alignment.ranks.shares import largest_share
from alignment.ranks.team import Post, Team
from alignment.scoring.layout import MicroBatch
from alignment.training.budget import Plan, Room, describe_checkpointing, make_plan
from alignment.training.cohort import CohortSlot
from alignment.training.layer_probe import is_usual, measured_layers
from alignment.training.memory import (
    GIB,
    USABLE_SHARE,
    reference_bytes,
    sizes_of,
)
from alignment.training.optimizers import optimizer_estimate
from alignment.training.shared_memory import weights_here

log = logging.getLogger(__name__)


def _taken(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return available_memory()


def _rank_memory(device: torch.device, team: Team) -> int:
    """Bytes that a rank may still take: a GPU is its own, the main memory is that of all ranks on its machine."""
    return _free(device) if device.type == "cuda" else _free(device) // team.place.local_size


def free_memory(post: Post, _: None) -> int:
    """What a rank that follows may still take."""
    return _rank_memory(post.device, post.team)


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak: torch's tensors since `plan_stage` on a GPU, the process since its start on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def plan_stage(
    model: nn.Module,
    config: RunConfig,
    *,
    supervised: bool,
    folder: Path,
    device: torch.device,
    longest: int,
    widest: MicroBatch | None = None,
    keys_per_position: float = 1.0,
    slot: CohortSlot | None = None,
    refreshes: int = 0,
    team: Team | None = None,
    beside: int = 0,
) -> Plan:
    """How a stage runs its steps on this machine as it is now; a resumed stage keeps the plan that it began with.

    Args:
        model: the policy, loaded.
        config: of the run. Numbers that are set are kept, null ones are planned.
        supervised: True for the SFT stage, False for the preference stage.
        folder: of the stage; plan.json is written there, or read if it exists.
        device: where the policy is.
        longest: positions of the largest group of the data, or of the longest conversation.
        widest: a pass of it, in which layers of an unusual form are measured; None leaves them estimated.
        keys_per_position: that a GPU's attention keeps, as `layout.keys_per_position` counts them.
        slot: in the cohort that the stage trains in. Each member has its own gradients and optimizer states.
        refreshes: how often the reference follows the policy.
        team: the ranks that share the steps; the one with the least memory counts.
        beside: bytes of models that come into memory while the stage trains.
    """
    # A resumed stage has its plan already
    path = folder / "plan.json"
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    if path.exists():
        plan = Plan.from_dict(read_sealed(path))
        log.info("Plan from the start of the stage: %s.", _sentence(plan))
        return plan

    # What the policy needs, and the optimizers of all members
    stage = config.sft if supervised else config
    assert stage is not None
    trainer, adapter = stage.trainer, config.adapter
    weights = weights_here(model)
    policy: Any = model
    sizes = sizes_of(
        model,
        weights,
        value=policy.dtype.itemsize,
        optimizer=stage.optim.name,
        projected=stage.optim.target_modules,
        master_weights=stage.optim.master_weights,
        device=device.type,
        dropout=supervised and adapter is not None and adapter.dropout > 0,
        supervised=supervised,
        keys_per_position=keys_per_position,
    )
    modules = decoder_layers(model)
    layers = None
    readable = bool(modules) and not is_sharded(model)  # whose weights come and go
    if widest is not None and readable and (sizes.estimate or not is_usual(policy, modules, widest)):
        layers = measured_layers(model, sizes.layers, modules, widest.to(device))
    if layers is not None:
        sizes = replace(sizes, layers=layers, estimate="")
    members = 1 if slot is None else slot.width
    sizes = replace(sizes, gradients=members * sizes.gradients, optimizer=members * sizes.optimizer)

    # The room for it, beside what a live reference keeps
    taken, copied = _taken(device), 0
    if not supervised:
        at_base = starts_at_base(model)
        copied = reference_bytes(config.reference, weights, whole=adapter is None, at_base=at_base, refreshes=refreshes)
    other = max(0, taken - weights.base - weights.adapter) + copied + beside
    free = _free(device)
    if team is not None:
        free = min(team.run(free_memory, [None] * team.size, lambda _: _rank_memory(device, team)))
    room = Room(device.type, taken + round(USABLE_SHARE[device.type] * free), other)
    groups = largest_share(trainer.groups_per_step, 1 if team is None else team.size)
    plan = make_plan(
        sizes,
        room,
        longest=longest,
        step_tokens=groups * longest,
        tokens_per_batch=trainer.tokens_per_batch,
        checkpoint_every=trainer.checkpoint_every,
    )

    # Say it and keep it
    log.info("Plan: %s.", _sentence(plan))
    if plan.estimate:
        log.info("Its activations are a rough estimate: %s.", plan.estimate)
    if states := optimizer_estimate(stage.optim.name):
        log.info("Its optimizer states are an estimate: %s.", states)
    if not plan.fits:
        log.warning(
            "This stage may run out of memory: its largest group has %d positions, and a pass of it with %s needs "
            "%.1f GiB, but only %.1f GiB are usable.",
            longest,
            describe_checkpointing(plan.checkpoint_every),
            plan.needs.total / GIB,
            plan.limit / GIB,
        )
    write_sealed(path, plan.to_dict(), indent=2)
    return plan


def _sentence(plan: Plan) -> str:
    return (
        f"{describe_checkpointing(plan.checkpoint_every)}, up to {plan.tokens_per_batch} positions a pass, "
        f"{plan.needs.total / GIB:.1f} GiB at the peak"
    )


def memory_result(plan: Plan, device: torch.device, tokens_per_batch: int) -> dict[str, int]:
    """The memory of a finished stage, for its record; logs it too.

    Args:
        plan: of the stage.
        device: where it ran.
        tokens_per_batch: the budget at the end, which is smaller than planned if memory ran out.

    Returns:
        {"predicted", "measured": bytes at the peak, "tokens_per_batch", "checkpoint_every"}.
    """
    measured = peak_memory(device)
    log.info("Peak memory: %.1f GiB, planned %.1f GiB.", measured / GIB, plan.needs.total / GIB)
    return {
        "predicted": plan.needs.total,
        "measured": measured,
        "tokens_per_batch": tokens_per_batch,
        "checkpoint_every": plan.checkpoint_every,
    }
