"""Starting Triton kernels with little time of the host."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_INT32 = 2**31 - 1


class TritonKernel:
    """Starts a Triton kernel, after the first time without Triton's own look-up, which takes longer than many kernels.

    Triton compiles a kernel for every kind of arguments, and what it compiled can be started by itself. The kind is the
    device, each constant, each tensor's dtype and alignment, and whether a number needs 64 bits. The kernel must not
    specialise on its numbers.

    Args:
        function: its arguments are tensors, then numbers, then constants.
        options: Triton's own.
    """

    def __init__(self, function: Any, **options: Any) -> None:
        self._function, self._options = function, options
        self._compiled: dict[Any, Any] = {}

    def __call__(
        self,
        blocks: int,
        tensors: tuple[Tensor, ...],
        numbers: tuple[float, ...],
        constants: tuple[Any, ...],
        num_warps: int = 4,
    ) -> None:
        """Start `blocks` programs of the kernel on the device of the first tensor."""
        kind = (
            tensors[0].device.index,
            num_warps,
            constants,
            *[(x.dtype, x.data_ptr() % 16 == 0) for x in tensors],
            *[n > _INT32 for n in numbers],
        )
        compiled = self._compiled.get(kind)
        if compiled is not None:
            compiled[blocks, 1, 1](*tensors, *numbers, *constants)
            return
        start = self._function[blocks, 1, 1]
        compiled = start(*tensors, *numbers, *constants, num_warps=num_warps, **self._options)
        # The interpreter compiles nothing. On AMD the kind is another, with the tensor's size.
        if hasattr(compiled, "launch_metadata") and torch.version.hip is None:
            self._compiled[kind] = compiled
