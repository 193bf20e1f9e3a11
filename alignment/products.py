"""Matrix products on plain tensors, by the fastest exact routine that this torch has."""

from __future__ import annotations

import torch
from torch import Tensor

# On CPUs that are not Intel's, torch's own float32 products run the code for an older instruction set (110 against
# 250 GFLOP/s per thread on an AMD EPYC with AVX-512). oneDNN, in the same torch, has no such preference.
_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _by_onednn(left: Tensor) -> bool:
    return _ONEDNN and left.dtype is torch.float32 and left.device.type == "cpu" and left.numel() > 0


def matmul(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """`left @ right + bias`; nothing is recorded for autograd.

    Args:
        left: (m, k), best row-major where it is large.
        right: (k, n) of the same dtype and device; a transposed view costs nothing.
        bias: (n,).

    Returns:
        (m, n), new memory.
    """
    if _by_onednn(left):
        return torch.ops.mkldnn._linear_pointwise(left, right.t(), bias, "none", [], "")
    return left @ right if bias is None else torch.addmm(bias, left, right)


def add_matmul(summand: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`summand + left @ right` in new memory, shapes (m, n), (m, k), (k, n); nothing is recorded for autograd."""
    if _by_onednn(left):
        return torch.ops.mkldnn._linear_pointwise.binary(left, summand, right.t(), None, "add")
    return torch.addmm(summand, left, right)
