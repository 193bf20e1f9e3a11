"""What decoder layers of an unusual form keep for their backward pass, measured in one pass, layer by layer."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves, tree_map_only

from alignment.kernels.attention import goes_by_masks
from alignment.kernels.base import in_words, is_patched
from alignment.scoring.layout import MicroBatch
from alignment.scoring.logps import score
from alignment.training.layer_memory import Layer, is_counted

log = logging.getLogger(__name__)

_WORKING = 0.6
"""What a layer makes in its backward pass, by what it keeps: with states 0.3 to 0.9 in nine architectures."""


class _Kept:
    """A tensor for as long as the graph of a backward pass holds it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _Meter:
    """Counts what each call of a layer keeps, and lets go of it when the call ends: no two layers are held at once.

    Args:
        model: its weights and buffers are kept anyway.
        layers: that are measured, in order.
    """

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module]) -> None:
        self._known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        self._layers = layers
        embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
        trains = [any(p.requires_grad for p in part.parameters()) for part in (embeddings, *layers)]
        first = trains.index(True) - 1 if any(trains) else len(layers)
        self._reached = [index > first for index in range(len(layers))]
        self._kept: WeakSet[_Kept] = WeakSet()
        self.bytes = [0] * len(layers)

    def _pack(self, tensor: Tensor) -> _Kept:
        holder = _Kept(tensor)
        self._kept.add(holder)
        return holder

    def _enter(self, index: int, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        first = given[0] if given else named["hidden_states"]
        # Rotations and masks come from outside and are the same for all layers: they count once
        others = (x for x in tree_leaves((given, named)) if isinstance(x, Tensor) and x is not first)
        self._outside = {x.untyped_storage().data_ptr() for x in others}
        torch.set_grad_enabled(True)
        entering = first.detach().requires_grad_(self._reached[index])
        return ((entering, *given[1:]), named) if given else (given, {**named, "hidden_states": entering})

    def _leave(self, index: int, result: Any) -> Any:
        torch.set_grad_enabled(False)
        storages = [holder.tensor.untyped_storage() for holder in self._kept]
        found = {storage.data_ptr(): storage.nbytes() for storage in storages}
        self.bytes[index] += sum(size for address, size in found.items() if address not in self._known)
        self._known |= found.keys() & self._outside
        self._kept.clear()
        return tree_map_only(Tensor, Tensor.detach, result)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """While a pass runs."""
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(saved_tensors_hooks(self._pack, lambda holder: holder.tensor))
            for i, layer in enumerate(self._layers):
                before = layer.register_forward_pre_hook(
                    lambda _, given, named, i=i: self._enter(i, given, named), with_kwargs=True
                )
                stack.callback(before.remove)
                stack.callback(layer.register_forward_hook(lambda *called, i=i: self._leave(i, called[-1])).remove)
            yield


def is_usual(model: Any, modules: Sequence[nn.Module], batch: MicroBatch) -> bool:
    """Whether the layers of a loaded model compute this pass as they are counted.

    Attention and MLPs that `kernels` has left alone keep more, and so does attention that goes by masks: with a window
    shorter than a row, in 32 bits, or on a GPU older than Ampere.
    """
    if goes_by_masks(next(model.parameters()).device, model.dtype):
        return False
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    if isinstance(window, int) and batch.longest > window:
        return False
    parts = (part for layer in modules for part in layer.modules())
    fused = all(is_patched(part) for part in parts if hasattr(part, "q_proj") or hasattr(part, "up_proj"))
    return fused and all(map(is_counted, modules))


def measured_layers(
    model: Any, layers: Sequence[Layer], modules: Sequence[nn.Module], batch: MicroBatch
) -> tuple[Layer, ...] | None:
    """The layers with what they keep of this pass as measured; None where the model cannot be run so.

    Some attention keeps values for each pair of positions, so the pass should have rows as long as they get.

    Args:
        model: loaded, with its adapter.
        layers: as they are counted.
        modules: the model's decoder layers.
        batch: a pass in the layout of the stage, on the model's device. No gradient comes of it.
    """
    was_training = model.training
    device = next(model.parameters()).device
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            model.train()
            meter = _Meter(model, modules)
            with meter.reading():
                score(model, batch)
    except Exception as error:  # whatever an unusual model does with its layers
        log.info("What the layers keep cannot be measured: %s.", in_words(error).rstrip("."))
        return None
    finally:
        model.train(was_training)
    found = []
    for layer, size in zip(layers, meter.bytes, strict=True):
        each = max(0, size - layer.copies) // batch.positions
        working = max(layer.working, round(_WORKING * each))
        found.append(Layer(layer.entering, each, working, min(size, layer.copies)))
    return tuple(found)
