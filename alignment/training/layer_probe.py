"""What decoder layers of an unusual form keep for their backward pass, measured in two short passes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from alignment.kernels.base import in_words
from alignment.scoring.logps import autocast
from alignment.scoring.states import run_prompts
from alignment.training.layer_memory import Layer, has_states

log = logging.getLogger(__name__)

_LENGTHS = (64, 192)
"""Positions of the two passes; what they differ in is what a position keeps."""
_WORKING_STATES = 0.6
"""What a layer with states makes in its backward pass, by what it keeps: 0.3 to 0.9 in nine architectures."""


class _Kept:
    """A tensor for as long as the graph of a backward pass holds it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _kept_bytes(model: Any, layers: Sequence[nn.Module], length: int, forked: bool) -> list[int]:
    """Bytes that each layer's part of one pass keeps, weights and buffers aside; shared ones count where they are
    first."""
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: WeakKeyDictionary[_Kept, int] = WeakKeyDictionary()
    current = [len(layers)]  # outside of all layers

    def pack(tensor: Tensor) -> _Kept:
        holder = _Kept(tensor)
        kept[holder] = current[0]
        return holder

    def enter(index: int) -> Any:
        return lambda *_: current.__setitem__(0, index)

    device = next(model.parameters()).device
    tokens = torch.arange(length, device=device)[None] % 64

    def run(**inputs: Tensor) -> Tensor:
        hidden: Tensor = model.get_decoder()(use_cache=False, **inputs).last_hidden_state
        return hidden

    handles = [layer.register_forward_pre_hook(enter(i)) for i, layer in enumerate(layers)]
    handles += [layer.register_forward_hook(enter(len(layers))) for layer in layers]
    try:
        with saved_tensors_hooks(pack, lambda holder: holder.tensor), autocast(model, device), torch.enable_grad():
            positions = torch.arange(length, device=device)[None]
            hidden = run_prompts(run, model.get_decoder(), tokens, positions, None) if forked else run(input_ids=tokens)
        found = [0] * (len(layers) + 1)
        for holder, index in sorted(kept.items(), key=lambda item: item[1]):
            storage = holder.tensor.untyped_storage()
            if storage.data_ptr() not in known:
                known.add(storage.data_ptr())
                found[index] += storage.nbytes()
        del hidden
    finally:
        for handle in handles:
            handle.remove()
    return found[:-1]


def measured_layers(
    model: Any, layers: Sequence[Layer], modules: Sequence[nn.Module], forked: bool = False
) -> tuple[Layer, ...] | None:
    """The layers with what they keep as measured; None where the model cannot be run so.

    Args:
        model: loaded, with its adapter. It is run twice on a few tokens.
        layers: as they are counted.
        modules: the model's decoder layers.
        forked: whether passes hand states on. A GPU's fused kernels, which keep less, do not run then.
    """
    was_training = model.training
    device = next(model.parameters()).device
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            model.train()
            short, long = (_kept_bytes(model, modules, length, forked) for length in _LENGTHS)
    except Exception as error:  # whatever an unusual model does with a bare pass
        log.info("What the layers keep cannot be measured: %s.", in_words(error).rstrip("."))
        return None
    finally:
        model.train(was_training)
    found = []
    for layer, module, less, more in zip(layers, modules, short, long, strict=True):
        each = max(0, more - less) // (_LENGTHS[1] - _LENGTHS[0])
        working = max(layer.working, round(_WORKING_STATES * each)) if has_states(module) else layer.working
        found.append(Layer(layer.entering, each, working, max(0, less - each * _LENGTHS[0])))
    return tuple(found)
