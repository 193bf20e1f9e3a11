"""The elastic connection of IR-QLoRA (IEC, arXiv 2402.05445, section 3.3), folded into a plain LoRA at all times.

IEC adds to each unit of a LoRA averages of its input: `z = A x + beta_1 G(x)`, `y = B z + beta_2 E(z)`. With g the
greatest common divisor of a unit's widths, its input is averaged in g groups, and each average is repeated to the width
of the output. So the connection is a matrix P with g / inputs wherever the groups of output and input agree, and the
layer is a LoRA with A' = A + beta_1 P and B' = B + beta_2 Q: only the path of the training differs.

The adapter holds A' and B', so that forward passes, saved files, references and exports know a plain LoRA only. The
scalars are parameters beside it, with the gradient <dL/dA', P>. Each optimizer step is taken on A and B, and folded
again. Both scalars begin at 0 in every stage. One thing differs from the authors' code: where the adapter has dropout,
it acts on G(x) too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from alignment.config.adapters import AdapterConfig
from alignment.kernels.linear import is_lora_layer

_NAME = "lora_iec"
"""Of the scalars on a layer; peft saves with a checkpoint what is called lora_."""


def _connected(weight: Tensor) -> tuple[Tensor, float]:
    """The entries of a weight, (outputs, inputs), where P is not 0, as a view, and the value of P there."""
    rows, columns = weight.shape
    groups = math.gcd(rows, columns)
    view = weight.view(groups, rows // groups, groups, columns // groups)
    return view.diagonal(dim1=0, dim2=2), groups / columns


@dataclass(frozen=True, slots=True)
class _Unit:
    """One of the two matrices of a LoRA, and the scalar of its connection: `beta[index]`."""

    weight: nn.Parameter
    beta: nn.Parameter
    index: int

    def derive(self, _: Tensor) -> None:
        """Set the scalar's gradient from that of the matrix, once that is there."""
        assert self.weight.grad is not None
        entries, value = _connected(self.weight.grad.contiguous())
        if self.beta.grad is None:
            self.beta.grad = torch.zeros_like(self.beta)
        self.beta.grad[self.index] = entries.sum() * value

    def add(self, sign: int) -> None:
        """Fold the connection into the matrix (1), or take it out (-1)."""
        entries, value = _connected(self.weight.data)
        entries.add_(self.beta.data[self.index], alpha=sign * value)


@contextmanager
def elastic(model: nn.Module, config: AdapterConfig | None) -> Iterator[None]:
    """Let every LoRA of a linear layer train with elastic connections inside the block, where the settings ask for it.

    What is left is the plain adapter. `ElasticSteps` must be among the trainer's callbacks.
    """
    if config is None or not config.iec:
        yield
        return
    layers: list[Any] = [module for module in model.modules() if is_lora_layer(module)]
    handles = []
    for layer in layers:
        names = [name for name in layer.lora_A if layer.lora_A[name].weight.requires_grad]
        scalars = {name: layer.lora_A[name].weight.new_zeros(2) for name in names}
        layer.add_module(_NAME, nn.ParameterDict({name: nn.Parameter(beta) for name, beta in scalars.items()}))
        handles += [unit.weight.register_post_accumulate_grad_hook(unit.derive) for unit in _units(layer)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers:
            delattr(layer, _NAME)


def _units(layer: Any) -> Iterator[_Unit]:
    for name, beta in getattr(layer, _NAME, {}).items():
        yield _Unit(layer.lora_A[name].weight, beta, 0)
        yield _Unit(layer.lora_B[name].weight, beta, 1)


class ElasticSteps(TrainerCallback):
    """Has the optimizer step A and B themselves while the adapter holds them with their connections."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the steps between taking the connections out and folding them in again."""
        units = [unit for module in kwargs["model"].modules() for unit in _units(module)]
        if units:
            optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])  # accelerate wraps it
            optimizer.register_step_pre_hook(partial(_fold, units, -1))
            optimizer.register_step_post_hook(partial(_fold, units, 1))


@torch.no_grad()
def _fold(units: list[_Unit], sign: int, *_: Any) -> None:
    for unit in units:
        unit.add(sign)
