"""Faster forwards with less memory for the frozen layers of a policy, equal to the original ones up to rounding.

`patch_layers` replaces the class of each module that qualifies by a subclass with another forward. Parameters, names,
saved files and everything that peft does with its layers stay the same. Calls that the patched forward does not cover
(several active adapters, dropout, merged weights, trained base weights, hooks) use the original forward.

A patched decoder layer keeps this many values per token for its backward pass, in the dtype that it computes in. h is
the hidden size, i the intermediate size, q and k are the widths of all query heads and of all key heads together:

    2 h + 2 i + 2 q + 2 k

These are the inputs of both norms (2 h), from which their outputs are recomputed; the rotated queries and keys and the
values (q + 2 k); the output of the attention (q); gate and up (2 i). Norms on heads (Qwen3) keep their input too: q + k
more. Each row of a norm adds one fp32 value (2, and one per head for norms on heads), and the attention's softmax adds
one per query head. An attention that repeats keys and values for its query heads keeps 2 q instead of 2 k. A layer with
other norms (GPT-NeoX) keeps their outputs, 2 h more. Weights are referenced, not kept.

On a GPU each adapted layer also keeps its input times the adapter's `a`, as wide as the rank. In 16 bits with an fp32
adapter every device keeps a 16-bit copy of the adapter's weights, whatever the number of tokens.

The original forwards keep 2 h + 2 i and the rank of every adapter more (norm outputs, activation, its product with
up). In 16 bits with an fp32 adapter they also keep an fp32 copy of every adapted layer's input.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from alignment.kernels.base import all_close, is_patched, normal_values, passed_over
from alignment.kernels.experts import patch_experts
from alignment.kernels.linear import is_lora_layer, linear_class
from alignment.kernels.mlp import mlp_class
from alignment.kernels.norm import norm_class
from alignment.kernels.rotary import attention_class, rotary_function

log = logging.getLogger(__name__)


def patch_layers(model: nn.Module) -> None:
    """Patch every module of the model that qualifies; a second call changes nothing.

    A module qualifies by its structure. Before it is changed, both forwards are compared on random input, once for
    each class and size. Where they differ, or where anything fails on the way, the module keeps its own and one log
    line for its class says so.
    """
    patch_experts(model)
    verdicts: dict[Any, bool] = {}
    failed: set[str] = set()
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
        name = type(module).__name__
        try:
            _patch(module, verdicts)
        except Exception as error:  # whatever a class that nobody has seen does with what a probe asks of it
            if name not in failed:
                failed.add(name)
                passed_over(f"A faster forward of {name} is", error, next(model.parameters()).device)


def _patch(module: nn.Module, verdicts: dict[Any, bool]) -> None:
    """Change the module's class if it qualifies and passes the comparison; verdicts hold for all of its form."""
    patched = _patched_class(module)
    if patched is None:
        return
    key = (patched, *((name, p.shape, p.dtype, p.requires_grad) for name, p in module.named_parameters()))
    if key not in verdicts:
        verdicts[key] = False  # also where the comparison fails
        verdicts[key] = _computes_the_same(module, patched)
    if verdicts[key]:
        module.__class__ = patched


def _patched_class(module: nn.Module) -> type | None:
    if is_patched(module) or "forward" in vars(module):
        return None
    found = (class_of(module) for class_of in (linear_class, mlp_class, norm_class, attention_class))
    return next((patched for patched in found if patched is not None), None)


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
def _computes_the_same(module: nn.Module, patched: Any) -> bool:
    """Whether both forwards give the same on random input."""
    own: Any = type(module)
    if rotary_function(own) is not None:
        return True  # only the rotary function differs, and `rotary_function` has compared it
    weight = next(module.parameters())
    stored = getattr(weight, "quant_state", None) or weight
    dtype = stored.dtype if stored.dtype.is_floating_point else torch.float32  # int8 takes any
    x = normal_values((8, stored.shape[-1]), weight.device, dtype)
    halves = x.dtype in (torch.bfloat16, torch.float16)
    with _evaluating(module), torch.autocast(x.device.type, dtype=x.dtype, enabled=halves):
        equal = all_close(patched.forward(module, x), own.forward(module, x))
    if not equal:
        log.info("%s keeps its own forward: the faster one gives other values here.", own.__name__)
    return equal
