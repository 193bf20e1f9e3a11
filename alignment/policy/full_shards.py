"""A whole model that trains and is too large for one GPU: each rank of a machine trains a part of every weight.

The layers are units of torch's FSDP2, embeddings that are not the head are another, and what is left, such as the last
norm and the head, is the unit of the whole model. A unit's weights are gathered before it runs, and again for its
backward pass, which adds up the gradients of all ranks, of which each keeps its part. So a pass that one rank derives
is derived by all: those with nothing to do derive two tokens, with gradients of zero.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from alignment.errors import UserError, require
from alignment.policy.layers import decoder_layers
from alignment.policy.sharding import IDLE_TOKENS, LOCKSTEP, Part, in_step, shared_units
from alignment.policy.weight_parts import WeightParts, set_weight_parts, weight_parts
from alignment.ranks.lockstep import Lockstep
from alignment.ranks.team import IN_PARTS, Team
from alignment.scoring.logps import autocast


def take_shards(model: nn.Module, groups: tuple[Any, Any], device: torch.device) -> Part:
    """Keep a part of every weight, and give up the rest; nothing travels.

    Args:
        model: whole, on the CPU or where it will be.
        groups: from `Team.machine_groups`.
        device: where the part will be.

    Raises:
        UserError: the model is none that can be shared.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    units = shared_units(model)
    require_parts(model, units)
    gathered, spoken = groups
    mesh = DeviceMesh.from_group(gathered, device.type)
    scalars = {p for p in model.parameters() if p.ndim == 0}
    for parameter in model.parameters():
        parameter.data = parameter.data.to(device) if parameter in scalars else parameter.data.contiguous()
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    is_wide = all(p.dtype.itemsize >= 4 for p in model.parameters() if p.requires_grad)
    policy = MixedPrecisionPolicy(reduce_dtype=None if is_wide else torch.float32)
    for unit in (*units, model):
        sharded: Any = fully_shard(
            unit, mesh=mesh, ignored_params=scalars, mp_policy=policy, reshard_after_forward=True
        )
        sharded.set_gradient_divide_factor(1.0)  # gradients of a step are sums over its passes
        sharded.set_force_sum_reduction_for_comms(True)
    return Part(model, units, (), spoken, device)


def join_shards(part: Part, team: Team) -> None:
    """Run passes in step with the other ranks from now on; every rank of the run must call this."""
    model: Any = part.model
    parts = WeightParts(model, team, team.across_machines(part.device), part.device)
    idle = functools.partial(_idle_pass, model, part.device)
    lockstep = Lockstep(part.group, idle, lambda: (), part.device, team.ask_to_join, team.why_lost)
    model._call_impl = in_step(model._call_impl, model, lockstep)  # around FSDP's hooks, which gather
    setattr(model, LOCKSTEP, lockstep)
    setattr(model, IN_PARTS, True)
    set_weight_parts(model, parts)
    team.lockstep = lockstep


@contextmanager
def gathered_ends(model: Any) -> Iterator[None]:
    """Keep what is left beside layers and embeddings whole within the block, for passes through the decoder alone.

    Every rank must enter it at the same time. Nothing happens to other models.
    """
    if weight_parts(model) is None:
        yield
        return
    model.unshard()
    for switch in (model.set_reshard_after_forward, model.set_reshard_after_backward):
        switch(False, recurse=False)
    yield
    for switch in (model.set_reshard_after_forward, model.set_reshard_after_backward):
        switch(True, recurse=False)
    model.reshard()


def _idle_pass(model: nn.Module, device: torch.device) -> Tensor:
    tokens = torch.zeros(1, IDLE_TOKENS, dtype=torch.int64, device=device)
    with autocast(model, device):
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits


def require_parts(model: nn.Module, units: list[nn.Module]) -> None:
    """Refuse a loaded model of which ranks cannot train parts.

    Args:
        units: what is gathered at a time, beside what is left.

    Raises:
        UserError: what it has, and what to do.
    """
    advice = "set trainer.shard=off, or choose an adapter"
    name = type(model).__name__
    require(bool(decoder_layers(model)), f"trainer.shard=node: the layers of {name} are not known: {advice}.")
    for parameter in model.parameters():
        if not parameter.is_floating_point() or (parameter.ndim == 0 and parameter.requires_grad):
            raise UserError(f"trainer.shard=node cannot split some weights of a {name} among ranks: {advice}.")
    for title, module in model.named_modules():
        # Ranks with other tokens would add up the gradients of other experts
        if isinstance(module, nn.ModuleList) and title.endswith("experts"):
            raise UserError(
                f"trainer.shard=node: not all ranks use all experts of a {name}, which are modules: {advice}."
            )
    inside = {id(p) for unit in units for p in unit.parameters()}
    left = [p for p in model.parameters() if id(p) not in inside]
    for weights in (*(list(unit.parameters()) for unit in units), left):
        if len({p.dtype for p in weights if p.requires_grad}) > 1:
            raise UserError(f"trainer.shard=node: weights of one layer of a {name} train in several dtypes: {advice}.")
