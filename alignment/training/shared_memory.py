"""What a rank holds of a base that it shares with others, by arithmetic and as loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from alignment.policy.layers import decoder_layers
from alignment.policy.sharding import is_part, is_sharded, shared_units
from alignment.training.memory import Weights, count_weights

_PACKED = 0.5
"""Bytes of a weight in 4 bits; its scales are whole on every rank."""
_COPIES = 3
"""Of a layer: its weights, those that arrive for the next one, and what is copied out of the message they came in."""


def _with_gathered(weights: Weights, layers: Sequence[float], embeddings: float) -> Weights:
    """The weights beside those of layers and embeddings, in bytes, that are whole for a moment."""
    gathered, arriving = _COPIES * max(layers, default=0), (_COPIES - 1) * embeddings  # with these nothing else arrives
    return replace(weights, gathered=round(gathered), arriving=round(arriving))


def shared_weights(weights: Weights, model: nn.Module, value: int, ranks: int) -> Weights:
    """The weights on one of so many ranks that share the base.

    Args:
        weights: of a policy with the whole base.
        model: its base, on the meta device.
        value: bytes per weight that is not quantised.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    layers = [sum(p.numel() for p in layer.parameters()) for layer in decoder_layers(model)]
    embeddings = sum(p.numel() for unit in shared_units(model)[len(layers) :] for p in unit.parameters())
    ends = (total - sum(layers)) * value
    each = (weights.base - ends) / max(1, sum(layers))
    scales = (each - _PACKED) * sum(layers) if weights.quantised else 0.0
    shared = weights.base - ends - scales + embeddings * value
    here = replace(weights, base=round(weights.base - shared + shared / ranks))
    return _with_gathered(here, [each * count for count in layers], embeddings * value)


def weights_here(model: nn.Module) -> Weights:
    """The weights of a loaded policy on this rank, and those that it gathers where it has parts."""
    weights = count_weights(model)
    if not is_sharded(model):
        return weights
    units = [sum(p.numel() * p.element_size() for p in u.parameters() if is_part(p)) for u in shared_units(model)]
    count = len(decoder_layers(model))
    return _with_gathered(weights, units[:count], sum(units[count:]))
