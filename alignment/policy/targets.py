"""`adapter.target_modules=auto`: the layers that an adapter can learn in, found by how a model is built and run.

They are the linear layers of the language model that its forward calls. On a plain architecture these are all linear
layers but the head, as peft's `all-linear` has them. Left out are

- towers for pictures and sound, and whatever else the forward does not call;
- routers and gates of a mixture of experts: they choose experts, and a change of theirs unsettles what these learnt;
- layers whose weight their block reads itself, as state-space blocks do for their fused kernels: an adapter there is
  passed by, on this machine or on the next;
- layers whose names peft takes for those of all experts.

Experts that are stacked in one weight are no layers; peft adapts them by names of their own.
"""

from __future__ import annotations

import ast
import functools
import inspect
import logging
import re
import textwrap
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from alignment.errors import UserError
from alignment.kernels.base import in_words

log = logging.getLogger(__name__)

AUTO = "auto"


def auto_targets(model: nn.Module) -> list[str]:
    """Names of the layers that `auto` adapts, in the order of the model.

    Args:
        model: a causal LM without an adapter, with its weights. It is run once, on a few tokens.

    Raises:
        UserError: there is no such layer.
    """
    names = linear_targets(model)
    try:
        learning = {_without_expert(name) for name in _with_gradient(model, names)}
        names = [name for name in names if _without_expert(name) in learning]
    except Exception as error:
        log.info("Which layers a forward calls is not known (%s): an adapter goes on all that may be.", in_words(error))
    if not names:
        raise UserError(
            f"adapter.target_modules=auto finds no layer of {type(model).__name__} that an adapter can learn in: name "
            f"layers, or set adapter=none."
        )
    rest = {own_name(name) for name in _linears(model).keys() - set(names)}
    if rest:
        log.info("No adapter goes on some of these layers, as target_modules=auto has it: %s.", ", ".join(sorted(rest)))
    return names


def linear_targets(model: nn.Module) -> list[str]:
    """What `auto` may adapt by the model's structure alone: on torch's meta device too, and without a run."""
    left_out = {*read_layers(model), *router_layers(model)}
    return _not_taken_for_experts(model, [name for name in _linears(model) if name not in left_out])


def router_layers(model: nn.Module) -> list[str]:
    """Names of the linear layers that choose or weigh experts."""
    causal: Any = model
    found = {id(layer) for layer in _routers(causal.get_decoder())}
    return [name for name, layer in model.named_modules() if id(layer) in found]


def read_layers(model: nn.Module) -> list[str]:
    """Names of the linear layers whose weight their block reads: it passes adapters by, and a packed one fails it."""
    found = []
    for name, module in model.named_modules():
        parent, _, leaf = name.rpartition(".")
        kind: Any = type(model.get_submodule(parent))
        if _is_linear(module) and leaf in _read_by(kind):
            found.append(name)
    return found


def _linears(model: Any) -> dict[str, nn.Module]:
    """The linear layers of the language model but its head, by name."""
    parts = {id(part) for part in model.get_decoder().modules()}
    vocabulary = model.get_input_embeddings().num_embeddings
    return {
        name: module
        for name, module in model.named_modules()
        if id(module) in parts and _is_linear(module) and getattr(module, "out_features", None) != vocabulary
    }


def own_name(layer: str) -> str:
    """The part of a layer's name that says what it is: the last one that is no number."""
    return next(part for part in reversed(layer.split(".")) if not part.isdigit())


def _is_linear(module: nn.Module) -> bool:
    """Linear layers of any kind, packed ones of other libraries too."""
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return isinstance(module, Conv1D) or all(isinstance(size, int) for size in sizes)


# Mixtures of experts


def _routers(decoder: nn.Module) -> Iterator[nn.Module]:
    """Linear layers that choose or weigh experts: named so, or beside experts, with one value for each or for all."""
    for name, layer in decoder.named_modules():
        if _is_linear(layer) and any(part.endswith("router") for part in name.split(".")):
            yield layer
    for block in decoder.modules():
        experts = {name: count for name, child in block.named_children() if (count := _num_experts(name, child))}
        for name, layer in block.named_modules() if experts else ():
            first, _, rest = name.partition(".")
            if first in experts or not isinstance(layer, nn.Linear):
                continue
            parent = block.get_submodule(name.rpartition(".")[0]) if rest else None
            alone = parent is None or sum(map(_is_linear, parent.modules())) == 1
            if first == "gate" or layer.out_features == 1 or (alone and layer.out_features in experts.values()):
                yield layer


def _num_experts(name: str, module: nn.Module) -> int:
    """How many experts the module holds, as a list or stacked in weights of three dimensions; 0 if it holds none."""
    if name == "experts" and isinstance(module, nn.ModuleList):
        return len(module)
    if isinstance(module, nn.Conv1d):
        return 0
    shapes = (getattr(p, "quant_state", p).shape for p in module.parameters(recurse=False))  # packed stacks too
    return max((shape[0] for shape in shapes if len(shape) == 3), default=0)


def _without_expert(name: str) -> str:
    """The name without the number of an expert: a few tokens do not reach all, and what holds for one holds for all.

    The first number is a layer's, and layers may differ.
    """
    numbers = list(re.finditer(r"(?<=\.)\d+(?=\.)", name))
    for found in reversed(numbers[1:]):
        name = f"{name[: found.start()]}*{name[found.end() :]}"
    return name


def _not_taken_for_experts(model: Any, names: list[str]) -> list[str]:
    """Without the layers that this peft would replace by all experts of a mixture, such as a shared expert's."""
    from peft import LoraConfig

    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # a peft that adapts what it is told
        return names
    config = LoraConfig(target_modules=list(names))
    convert_peft_config_for_transformers(config, model=model, conversions=None)
    kept = config.target_modules or ()
    return [name for name in names if name in kept]


# Weights that are read


@functools.cache
def _read_by(kind: Any) -> frozenset[str]:
    """Names of the submodules whose weight a class's own code reads, other than where it makes them.

    What every model inherits from transformers names no layer of one, and takes long to read.
    """
    found: set[str] = set()
    ends = PreTrainedModel if issubclass(kind, PreTrainedModel) else nn.Module
    for part in kind.__mro__[: kind.__mro__.index(ends)]:
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(part)))
        except (OSError, TypeError, SyntaxError):  # a class without a file
            continue
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef) and not re.match(r"_*(init|reset)", function.name):
                found |= set(re.findall(r"\bself\.(\w+)\.weight\b(?!\.(?:dtype|device|shape))", ast.unparse(function)))
    return frozenset(found)


# A run


def _with_gradient(model: Any, names: Collection[str]) -> Iterator[str]:
    """Names of the layers whose output, shifted as an adapter would shift it, changes what the model computes."""
    shifts: dict[str, Tensor] = {}

    def shift(name: str, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if name not in shifts:
            shifts[name] = torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
        return output + shifts[name]

    hooks = [model.get_submodule(name).register_forward_hook(functools.partial(shift, name)) for name in names]
    modes = {module: module.training for module in model.modules()}
    embeddings = model.get_input_embeddings()
    ids = (torch.arange(8, device=embeddings.weight.device) * 7919 % embeddings.num_embeddings)[None]
    try:
        model.train()  # as in a step: some blocks have a kernel of their own for it
        with torch.enable_grad():
            logits = model(input_ids=ids, use_cache=False).logits.float()
            gradients = torch.autograd.grad(logits.square().sum(), list(shifts.values()), allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    return (name for name, gradient in zip(shifts, gradients, strict=True) if gradient is not None)
