"""What stands for torch's flash kernel of variable lengths where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Reference = Callable[[Tensor, Tensor, Tensor, Any, float], Tensor]
"""(queries, H, D) from q, k, v, the row's `_Lengths` and the scale, differentiable."""


def stands_in(attention: Any, reference: Reference) -> list[tuple[Any, str, Any]]:
    """(owner, name, value) that make the reference the kernel; its backward is autograd's.

    Args:
        attention: the module `alignment.kernels.attention`.
        reference: see `Reference`.
    """

    def forward(q: Tensor, k: Tensor, v: Tensor, lengths: Any, scale: float) -> tuple[Tensor, ...]:
        out = reference(q, k, v, lengths, scale)
        return out, out.new_zeros(out.shape[1::-1]), out.new_zeros(2), out.new_zeros(1)

    def backward(
        gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: tuple[Tensor, ...], lengths: Any, scale: float
    ) -> tuple[Tensor, ...]:
        assert kept[0].shape == gradient.shape == q.shape and len(kept) == 4
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in (q, k, v)]
            return torch.autograd.grad(reference(*inputs, lengths, scale), inputs, gradient)

    return [(attention, "_flash_forward", forward), (attention, "_flash_backward", backward)]
