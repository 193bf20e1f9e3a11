"""Fused kernels on CUDA: which operations have one, whether it agrees with the eager code, and what runs if not.

`ALIGNMENT_FUSED=0` in the environment turns all of them off.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from alignment.kernels.base import in_words

log = logging.getLogger(__name__)

_Result = TypeVar("_Result")

DEVICE_TYPES = {"cuda"}
_TOLERANCES = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""Largest difference from the eager result, relative to its largest value, by dtype; no other dtype is fused."""


@functools.cache
def _kernels() -> Any:
    """The module of Triton kernels; None, and one warning that says why, where they cannot be used."""
    if os.environ.get("ALIGNMENT_FUSED", "1") == "0":
        return None
    try:
        return importlib.import_module("alignment.kernels.triton_kernels")
    except Exception as error:
        log.warning("Triton is not usable, so no kernel is fused and training is slower: %s.", in_words(error))
        return None


def is_fused(x: Tensor) -> bool:
    """Whether kernels are fused for tensors like this one."""
    return x.device.type in DEVICE_TYPES and x.dtype in _TOLERANCES and _kernels() is not None


class Fused(Generic[_Result]):
    """An operation with a fused kernel. It runs on CUDA; elsewhere, and wherever it fails, the eager function does.

    For each combination of dtypes and options, the kernel is compared with the eager function before its first use. If
    they disagree or the kernel fails, a warning says so and the eager function runs for the rest of the process.

    Args:
        eager: its first argument is a tensor on the device in question.
        name: of the kernel in `triton_kernels`, with the same arguments. Both may write to the same arguments.
        fits: whether the kernel covers these arguments. They all have a dtype that kernels compute in.
        examples: from one call's arguments to smaller random ones with the same dtypes and options.
        exact: whether the kernel must give the same bits.
    """

    def __init__(
        self,
        eager: Callable[..., _Result],
        name: str,
        fits: Callable[..., bool],
        examples: Callable[..., list[tuple[Any, ...]]],
        exact: bool = False,
    ) -> None:
        functools.update_wrapper(self, eager)
        self.eager, self.name = eager, name
        self._fits, self._examples = fits, examples
        self._tolerances = dict.fromkeys(_TOLERANCES, 0.0) if exact else _TOLERANCES
        self._computes: dict[Any, bool] = {}
        self._agrees: dict[Any, bool] = {}
        self._failed = False

    def __call__(self, *args: Any) -> _Result:
        """The operation's result, by the kernel where it can be used."""
        if not self._usable(args):
            return self.eager(*args)
        try:
            return self._run(args)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            self._give_up(in_words(error))
        return self.eager(*args)

    def _run(self, args: tuple[Any, ...]) -> _Result:
        device = args[0].device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self._kernel()(*args)
        return self._kernel()(*args)

    def _kernel(self) -> Callable[..., _Result]:
        kernel: Callable[..., _Result] = getattr(_kernels(), self.name)
        return kernel

    def _usable(self, args: Any) -> bool:
        # A step asks this thousands of times while the GPU waits, so it must take few microseconds.
        device = args[0].device
        if self._failed or device.type not in DEVICE_TYPES or args[0].numel() == 0 or _kernels() is None:
            return False
        key = (device, *map(_kind, args))
        computes = self._computes.get(key)
        if computes is None:
            computes = self._computes[key] = all(
                x.dtype in _TOLERANCES for x in args if isinstance(x, Tensor) and x.is_floating_point()
            )
        if not computes or not self._fits(*args):
            return False
        if key not in self._agrees:
            self._agrees[key] = self._compare(args)
        return self._agrees[key]

    @torch.no_grad()
    def _compare(self, args: Any) -> bool:
        """Whether both give the same on examples; they write only to copies."""
        try:
            for example in self._examples(*args):
                found, expected = self._run(_copied(example)), self.eager(*_copied(example))
                if reason := _difference(found, expected, self._tolerances):
                    return self._give_up(reason)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            return self._give_up(in_words(error))
        return True

    def _give_up(self, reason: str) -> bool:
        self._failed = True
        log.warning("The fused kernel %s is not used, so training is slower: %s.", self.name, reason)
        return False


def _kind(argument: Any) -> Any:
    """What makes a kernel another one: a tensor's dtype, an option, whether there is a number or shape; not which."""
    if isinstance(argument, Tensor):
        return argument.dtype
    return type(argument) if isinstance(argument, (float, tuple)) else argument


def _copied(example: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.clone() if isinstance(x, Tensor) else x for x in example)


def _difference(found: Any, expected: Any, tolerances: dict[torch.dtype, float]) -> str:
    """In words, how two results differ beyond rounding; empty if they do not."""
    pairs = zip(found, expected, strict=True) if isinstance(expected, tuple) else [(found, expected)]
    for one, other in pairs:
        if one is None and other is None:
            continue
        if one is None or other is None or one.shape != other.shape or one.dtype is not other.dtype:
            return "its result has another form than the eager one"
        difference, size = (one.double() - other.double()).abs().max().item(), other.double().abs().max().item()
        if not difference <= tolerances[other.dtype] * size:
            return f"it differs by {difference:.2g} from the eager result, whose largest value is {size:.2g}"
    return ""
