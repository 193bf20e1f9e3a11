"""Adapters folded into copies of their weights while answers are drawn on a CPU.

A step of drawing has few rows, so an adapter's two small products and the calls around them take up to a third of it.
In 32 bits the sum of weight and update differs from the two products by rounding alone; where weights have 16 bits or
4, it would be another policy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alignment.kernels.base import original_class, rows_of, shaped
from alignment.kernels.linear import active_adapter, hooked, is_lora_layer
from alignment.kernels.matmul import add_matmul, matmul
from alignment.policy.sharding import is_sharded
from alignment.ranks.memory import available_memory

_SHARE_OF_MEMORY = 0.5
"""The copies may take so much of what is free; the caches of the answers need the rest."""
_PADDED_BELOW = 32
"""`matmul` pads fewer rows to so many, which takes a third longer at 16."""


@contextmanager
def folded(model: nn.Module, processes: int) -> Iterator[None]:
    """Let each layer with one plain LoRA multiply by weight and update at once, if memory for the copies is there.

    Parameters and saved files stay as they are, and so does the layer's own forward, which is back at the end.

    Args:
        model: in eval mode; nothing is folded where ranks hold parts of its base.
        processes: that do the same on this machine.
    """
    layers: list[Any] = [] if is_sharded(model) else [layer for layer in model.modules() if _folds(layer)]
    size = sum(layer.base_layer.weight.nbytes for layer in layers)
    if layers and size > _SHARE_OF_MEMORY * available_memory() / processes:
        layers = []
    try:
        for layer in layers:
            layer.forward = _forward(layer)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _folds(layer: Any) -> bool:
    if not is_lora_layer(layer) or hooked(layer, layer.base_layer):
        return False
    from peft.tuners import lora

    base = layer.base_layer
    if original_class(layer) is not lora.Linear or layer.fan_in_fan_out or original_class(base) is not nn.Linear:
        return False
    weight, adapter = base.weight, active_adapter(layer)
    exact = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.float64)
    return exact and adapter is not None and adapter[0] is not None and adapter[0].dtype is weight.dtype


@torch.no_grad()
def _forward(layer: Any) -> Callable[[Tensor], Tensor]:
    adapter = active_adapter(layer)
    assert adapter is not None
    a, b, scaling = adapter
    assert a is not None and b is not None
    matrix, bias = add_matmul(layer.base_layer.weight, b * scaling, a), layer.base_layer.bias

    def forward(x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        rows = rows_of(x)
        return shaped(matmul(rows, matrix.t(), bias), x) if len(rows) >= _PADDED_BELOW else F.linear(x, matrix, bias)

    return forward
