"""A model's decoder layers, their checkpointing and their dropout, and what a stage may not leave on a model."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from alignment.errors import UserError


def decoder_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The language model's layers that can be checkpointed, in order; empty if transformers cannot checkpoint them."""
    causal: Any = model
    decoder = causal.get_decoder() if hasattr(model, "get_decoder") else model
    return [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout to 0: a policy that is compared with a reference must give the same log-probs every time."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            # Attention dropout, layer drop and router noise have no module; the forward reads a number.
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(module, name, 0.0)


_recompute: Any = functools.partial(checkpoint, use_reentrant=False)


def checkpoint_layers(model: nn.Module, every: int) -> bool:
    """Checkpoint the first of every `every` decoder layers: the backward pass recomputes its activations.

    The Trainer's own switch stays off: it would also make the embeddings' output require a gradient, and the backward
    pass would go through the first layer for nothing.

    Args:
        model: with or without an adapter.
        every: 0 for no layer.

    Returns:
        Whether any layer changed.

    Raises:
        UserError: the layers of this model cannot be checkpointed.
    """
    layers = decoder_layers(model)
    if every and not layers:
        raise UserError(
            f"trainer.checkpoint_every={every}: the layers of {type(model).__name__} cannot be checkpointed, so set it "
            f"to 0."
        )
    changed = False
    for index, layer in enumerate(layers):
        chosen = bool(every) and index % every == 0
        changed = changed or chosen != layer.gradient_checkpointing
        layer.gradient_checkpointing = chosen
        layer._gradient_checkpointing_func = _recompute
    return changed


_SWITCHES = ("use_cache", "output_router_logits", "router_aux_loss_coef")
_WRAPPERS = ("forward", "_original_forward", "gradient_checkpointing", "_gradient_checkpointing_func")


def _wrappers(module: nn.Module) -> dict[str, Any]:
    return {name: vars(module)[name] for name in _WRAPPERS if name in vars(module)}


def _hooks(module: nn.Module) -> dict[str, dict[int, Any]]:
    return {name: own for name, own in vars(module).items() if name.endswith("_hooks") and isinstance(own, dict)}


@contextmanager
def as_found(model: Any) -> Iterator[None]:
    """Leave a model as it was found: no wrapper, hook, flag or switch of a trainer outlives the block.

    TRL and accelerate replace forwards, register hooks on the embeddings and switch the cache off, and would slow down
    or change whatever the next stage computes.
    """
    modules = [
        (module, _wrappers(module), {name: dict(own) for name, own in _hooks(module).items()})
        for module in model.modules()
    ]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    configs = {id(config): config for config in (model.config, model.config.get_text_config())}.values()
    switches = [(c, name, getattr(c, name)) for c in configs for name in _SWITCHES if hasattr(c, name)]
    try:
        yield
    finally:
        for module, wrappers, hooks in modules:
            for name in _wrappers(module):
                delattr(module, name)
            vars(module).update(wrappers)
            for name, own in _hooks(module).items():  # in place: who registered a hook earlier can still remove it
                own.clear()
                own.update(hooks.get(name, {}))
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        for config, name, value in switches:
            setattr(config, name, value)
