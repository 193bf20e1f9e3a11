"""What a rank holds of a model that it shares with others, by arithmetic and as loaded; who can share one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from alignment.config.schema import ReferenceMode, RunConfig
from alignment.losses import Quantity
from alignment.policy.layers import decoder_layers
from alignment.policy.sharding import is_part, is_sharded, shared_units
from alignment.policy.weight_parts import weight_parts
from alignment.training.memory import Weights, count_weights
from alignment.training.optimizers import OPTIMIZERS, steps_parts

_PACKED = 0.5
"""Bytes of a weight in 4 bits; its scales are whole on every rank."""
_COPIES = 3
"""Of a layer: its weights, those that arrive for the next one, and what is copied out of the message they came in."""
_SUMMED = 4
"""Bytes of a gradient while those of all ranks are added up."""


def why_whole(config: RunConfig) -> str | None:
    """Why the ranks of a machine cannot train parts of a whole model, and what to do; None where they can."""
    if config.adapter is not None:
        return None
    stages = {
        "optim": None if config.loss is None else config.optim,
        "sft.optim": None if config.sft is None else config.sft.optim,
    }
    for key, optim in stages.items():
        if optim is not None and not steps_parts(optim.name):
            known = ", ".join(name for name in OPTIMIZERS if steps_parts(name))
            return (
                f"{key}.name={optim.name} needs whole weights or saves states of another form: choose one of {known}, "
                f"an adapter, or trainer.shard=off"
            )
    if config.loss is None:
        return None
    needs = config.loss.requirements()
    asks = needs.reference or config.reference.for_metrics
    if Quantity.divergence in needs.quantities or (asks and config.reference.mode is ReferenceMode.live):
        return (
            "a live reference would be a second whole model: set reference=cached and a loss of log-probs, choose an "
            "adapter, or set trainer.shard=off"
        )
    if needs.rewards:
        return "the head of a reward model is added when the stage begins: choose an adapter, or set trainer.shard=off"
    if needs.density_weights:
        return "loss.density_weights=true embeds prompts outside of passes: set it to false, or set trainer.shard=off"
    return None


def _with_gathered(weights: Weights, layers: Sequence[float], embeddings: float) -> Weights:
    """The weights beside those of layers and embeddings, in bytes, that are whole for a moment."""
    gathered, arriving = _COPIES * max(layers, default=0), (_COPIES - 1) * embeddings  # with these nothing else arrives
    return replace(weights, gathered=round(gathered), arriving=round(arriving))


def _with_derived(weights: Weights, layers: Sequence[int], embeddings: int, ends: int, value: int) -> Weights:
    """The weights beside those that are whole for a moment where all train, and the gradients of these.

    Args:
        layers, embeddings, ends: numbers of weights of what is gathered at a time; the ends stay for a whole pass.
        value: bytes of a weight.
    """
    summed = value + max(value, _SUMMED)  # a gradient, and what is sent of it
    layer = max(layers, default=0)
    gathered = layer * (_COPIES * value + summed) + ends * 2 * value
    last = max(embeddings, ends) * ((_COPIES - 1) * value + summed)
    return replace(weights, gathered=gathered, arriving=last)


def shared_weights(weights: Weights, model: nn.Module, value: int, ranks: int) -> Weights:
    """The weights on one of so many ranks that share the base, or the whole model where it trains.

    Args:
        weights: of a policy with the whole base.
        model: its base, on the meta device.
        value: bytes per weight that is not quantised.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    layers = [sum(p.numel() for p in layer.parameters()) for layer in decoder_layers(model)]
    embeddings = sum(p.numel() for unit in shared_units(model)[len(layers) :] for p in unit.parameters())
    if not weights.adapter:
        trained = {each: -(-count // ranks) for each, count in weights.trained.items()}
        here = replace(weights, base=-(-weights.base // ranks), trained=trained)
        return _with_derived(here, layers, embeddings, total - sum(layers) - embeddings, value)
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
    count, units = len(decoder_layers(model)), shared_units(model)
    if (parts := weight_parts(model)) is not None:
        numbers = [sum(p.numel() for p in unit.parameters()) for unit in units]
        total, value = sum(p.numel() for p in parts.parameters), parts.parameters[0].element_size()
        return _with_derived(weights, numbers[:count], sum(numbers[count:]), total - sum(numbers), value)
    sizes = [sum(p.numel() * p.element_size() for p in u.parameters() if is_part(p)) for u in units]
    return _with_gathered(weights, sizes[:count], sum(sizes[count:]))
