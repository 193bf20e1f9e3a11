"""A model's decoder layers, their checkpointing and their dropout."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from alignment.errors import UserError


def decoder_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The layers that can be checkpointed, in order; empty if transformers cannot checkpoint this model."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


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
