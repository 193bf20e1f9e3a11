"""The frozen layers of a policy, computed in less time and with less memory, equal to their own forward up to rounding.

`patch_layers` gives modules that qualify a subclass of their own class with another forward. Parameters, names, saved
files and everything peft does with its layers stay as they are; a call that a lean forward is not made for (several
active adapters, dropout, merged weights, trained base weights, hooks) takes the module's own forward.

What a decoder layer keeps for its backward pass, in values per token of the dtype that it computes in, where h is the
hidden size, i the intermediate size, q and k the widths of all query heads and of all key heads together:

    2 h + 2 i + 2 q + 2 k

the inputs of both norms (2 h), whose outputs are computed again from them; the rotated queries and keys and the values
(q + 2 k); the output of the attention (q); gate and up (2 i). Norms on heads (Qwen3) keep their input too: q + k more.
On top come one fp32 value for each row of a norm (2, and one per head for norms on heads) and one per query head for
the attention's softmax; an attention that repeats keys and values for its query heads keeps 2 q in place of 2 k. A
layer whose norms are not of this kind (GPT-NeoX) keeps their outputs, 2 h more. Weights are referenced, not kept.
The layers' own forwards keep 2 h + 2 i and the rank of every adapter more (norm outputs, activation, its product with
up), and in 16 bits with an fp32 adapter an fp32 copy of every adapted layer's input besides.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from alignment.kernels.base import agree, normal
from alignment.kernels.linear import is_lora_layer, linear_class
from alignment.kernels.mlp import mlp_class
from alignment.kernels.norm import norm_class
from alignment.kernels.rotary import attention_class, rotary_function

log = logging.getLogger(__name__)


def patch_layers(model: nn.Module) -> None:
    """Let every module of the model that qualifies compute leanly from now on; a second call changes nothing.

    A module qualifies by its structure. Before it is changed, both forwards are compared on random input, once for
    each class and size; where they differ, the module is left alone and a log line says so.
    """
    verdicts: dict[Any, bool] = {}
    inside_adapters = {
        id(part)
        for module in model.modules()
        if is_lora_layer(module)
        for part in module.modules()
        if part is not module
    }
    for module in list(model.modules()):
        if id(module) in inside_adapters or any(p.is_meta for p in module.parameters()):
            continue
        lean = _lean_class(module)
        if lean is None:
            continue
        key = (lean, *((name, p.shape, p.dtype, p.requires_grad) for name, p in module.named_parameters()))
        if key not in verdicts:
            verdicts[key] = _proven(module, lean)
        if verdicts[key]:
            module.__class__ = lean


def _lean_class(module: nn.Module) -> type | None:
    if hasattr(type(module), "_lean_of") or "forward" in vars(module):
        return None
    found = (class_of(module) for class_of in (linear_class, mlp_class, norm_class, attention_class))
    return next((lean for lean in found if lean is not None), None)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


@torch.no_grad()
def _proven(module: nn.Module, lean: Any) -> bool:
    """Whether both forwards give the same on random input."""
    own: Any = type(module)
    if rotary_function(own) is not None:
        return True  # the only thing that differs has been compared by itself
    weight = next(module.parameters())
    stored = getattr(weight, "quant_state", None) or weight
    x = normal((8, stored.shape[-1]), weight.device, stored.dtype)
    with _evaluating(module), torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=x.dtype is torch.bfloat16):
        equal = agree(lean.forward(module, x), own.forward(module, x))
    if not equal:
        log.info("%s keeps its own forward: a lean one would give other values.", own.__name__)
    return equal
