"""A base too large for one GPU: each rank of a machine holds a part of the frozen weights of every layer.

The layers are units of torch's FSDP2, which gathers a layer's weights before it runs and frees them behind it. The
adapter, the norm in front of the head and the head are whole on every rank. A head is needed at the end of the forward
pass and at the start of the backward pass, so gathering it would take more memory at the peak than keeping it.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alignment.errors import UserError, require
from alignment.policy.adapter_kinds import plain_name
from alignment.policy.identity import fix_base_digest
from alignment.policy.layers import decoder_layers
from alignment.ranks.lockstep import Lockstep
from alignment.ranks.team import Team, trained_parameters
from alignment.scoring.logps import autocast, ran_out_of_memory

log = logging.getLogger(__name__)

LOCKSTEP = "_lockstep"
IDLE_TOKENS = 2
"""Of an idle pass: a single one would be a step of generation, which recurrent layers take without gradient."""


@dataclass(frozen=True, slots=True)
class Part:
    """A policy of whose base this rank holds a part, which `join_parts` makes usable.

    Attributes:
        model: the policy.
        units: what is gathered at a time.
        packed: for each unit its modules with weights in 4 bits, their names, and what unpacks them.
        group: of the machine's ranks, for numbers.
        device: where the part is.
    """

    model: nn.Module
    units: Sequence[nn.Module]
    packed: Sequence[list[tuple[nn.Module, str, Any]]]
    group: Any
    device: torch.device


def take_part(model: nn.Module, groups: tuple[Any, Any], device: torch.device) -> Part:
    """Keep a part of the base's layers, and give up the rest; nothing travels.

    Args:
        model: whole, with its adapter, on the CPU or where it will be.
        groups: from `Team.machine_groups`.
        device: where the part will be.

    Raises:
        UserError: the model is none that can be shared.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    require_shardable(model)
    fix_base_digest(model)  # while the weights are whole
    gathered, spoken = groups
    units = shared_units(model)
    whole = {p for name, p in model.named_parameters() if p.requires_grad or plain_name(name) is None}
    whole |= {p for p in model.parameters() if p.ndim == 0 or not p.is_contiguous()}
    packed = [list(_packed(unit)) for unit in units]
    mesh = DeviceMesh.from_group(gathered, device.type)
    for unit in units:
        fully_shard(unit, mesh=mesh, ignored_params=whole)
    for parameter in model.parameters():
        if not is_part(parameter):
            whole.add(parameter)
            parameter.data = parameter.data.to(device)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    fully_shard(_decoder(model), mesh=mesh, ignored_params=whole)
    first: Any = units[0]
    first.set_modules_to_backward_prefetch([first])  # in place of the embeddings, which a backward pass needs no more
    return Part(model, units, packed, spoken, device)


def join_parts(part: Part, team: Team) -> None:
    """Run passes in step with the other ranks from now on; every rank of the run must call this."""
    # bitsandbytes keeps what unpacks a weight on its parameter, and FSDP has one for the part and one for the whole
    for unit, states in zip(part.units, part.packed, strict=True):
        for put in (unit.unshard, unit.reshard):
            put()
            for module, name, state in states:
                module._parameters[name].quant_state = state

    # One pass after another, on all ranks
    model, decoder = part.model, _decoder(part.model)
    idle = functools.partial(_idle_pass, model, decoder, part.device)
    trained = functools.partial(trained_parameters, model)
    lockstep = Lockstep(part.group, idle, trained, part.device, team.ask_to_join, team.why_lost)
    decoder.forward = in_step(decoder.forward, decoder, lockstep)
    setattr(model, LOCKSTEP, lockstep)
    team.lockstep = lockstep


def _decoder(model: Any) -> Any:
    return model.get_base_model().get_decoder()


def require_shardable(model: nn.Module) -> None:
    """Refuse a loaded policy with an adapter of whose base ranks cannot hold parts.

    Raises:
        UserError: what it has, and what to do.
    """
    advice = "set trainer.shard=off"
    name = type(model.get_base_model()).__name__
    require(bool(decoder_layers(model)), f"trainer.shard=node: the layers of {name} are not known: {advice}.")
    odd = (p.dtype for p in model.parameters() if not p.is_floating_point() and not hasattr(p, "quant_state"))
    if (dtype := next(odd, None)) is not None:
        raise UserError(
            f"trainer.shard=node shares weights of 16 or 32 bits and those of bitsandbytes in 4 bits, and this model "
            f"has some in {str(dtype).removeprefix('torch.')}: {advice}."
        )


def is_part(tensor: Tensor) -> bool:
    """Whether this rank holds a part of the tensor only."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def is_sharded(model: nn.Module) -> bool:
    """Whether ranks hold parts of the model's base."""
    return LOCKSTEP in vars(model)


@contextmanager
def backward_turn(model: nn.Module) -> Iterator[None]:
    """Run a backward pass inside the block, in step with the other ranks if they hold parts of the base.

    Raises:
        UserError: memory has run out in the midst of it, or another rank has ended.
    """
    lockstep: Lockstep | None = vars(model).get(LOCKSTEP)
    if lockstep is None:
        yield
        return
    lockstep.before_backward()
    try:
        yield
    except Exception as error:
        raise _meaning(lockstep, error) from error
    lockstep.after()


def in_turn(model: nn.Module, backward: Callable[..., None]) -> Callable[..., None]:
    """A trainer's function for backward passes that takes a `backward_turn`."""

    def turned(*args: Any, **kwargs: Any) -> None:
        with backward_turn(model):
            backward(*args, **kwargs)

    return turned


def shared_units(model: Any) -> list[nn.Module]:
    """What is gathered at a time: each layer, and then the embeddings where nothing else reads them."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    plain = isinstance(embeddings, nn.Embedding) and getattr(head, "weight", None) is not embeddings.weight
    return [*decoder_layers(model), *([embeddings] if plain else [])]


def _packed(unit: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    for module in unit.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if (state := getattr(parameter, "quant_state", None)) is not None:
                yield module, name, state


def _idle_pass(model: nn.Module, decoder: nn.Module, device: torch.device) -> Tensor:
    tokens = torch.zeros(1, IDLE_TOKENS, dtype=torch.int64, device=device)
    with autocast(model, device):
        hidden: Tensor = decoder(input_ids=tokens, use_cache=False).last_hidden_state
    return hidden


def in_step(forward: Callable[..., Any], root: Any, lockstep: Lockstep) -> Callable[..., Any]:
    """A function that runs forward passes in step with the other ranks; `root` is FSDP's module around all units."""

    @functools.wraps(forward)
    def turned(*args: Any, **kwargs: Any) -> Any:
        lockstep.before_forward()
        try:
            result = forward(*args, **kwargs)
        except Exception as error:
            if hasattr(root, "reset_iter_state"):  # a pass that tries something out fails on all ranks alike
                root.reset_iter_state()
            raise _meaning(lockstep, error) from error
        lockstep.after()
        return result

    return turned


def _meaning(lockstep: Lockstep, error: Exception) -> Exception:
    """What it means that a pass breaks off, for which other ranks may wait: the error itself where it says enough."""
    if not isinstance(error, RuntimeError):
        return error
    return _out_of_memory() if ran_out_of_memory(error) else lockstep.lost(error)


def _out_of_memory() -> UserError:
    return UserError(
        "A GPU has run out of memory, and ranks that share a base cannot take the step again: start a new run with a "
        "lower trainer.tokens_per_batch than the plan in this run's folder has, or with trainer.checkpoint_every=1."
    )


def can_try_again(error: RuntimeError, model: nn.Module) -> bool:
    """Whether a step may start again after this error, because a GPU has run out of memory.

    Raises:
        UserError: it has, and other ranks that share the base wait for the rest of the step.
    """
    if ran_out_of_memory(error) and is_sharded(model):
        raise _out_of_memory() from error
    return ran_out_of_memory(error)
