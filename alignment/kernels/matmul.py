"""Matrix products on plain tensors by the fastest exact routine of this torch. Autograd records nothing.

On CPUs other than Intel's, torch's own float32 products (MKL's) never use AVX-512: 110 GFLOP/s per thread on an AMD
EPYC that has it, against 250 with oneDNN. On one that has AVX2 at most, torch's own are the faster ones: 90 against 75
on an AMD EPYC of family 25, model 1. So they are on Intel's: on a Xeon of family 6, model 207, in turns with the sizes
of a 135M model, oneDNN takes 1.07 times as long for 1024 rows, 1.2 for 128, 1.4 for 300 and 2.4 for 16. It comes with
torch, but it compiles code for every new shape (about 1 ms) and keeps it (about 0.5 MiB, beyond its own limit). So
numbers of rows are cut into few different sizes.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from alignment.kernels.base import passed_over

_LARGEST = 1024
_UNIT = 32
_FEWEST = 16
"""With fewer rows a product is as fast without oneDNN."""


def _mkl_is_faster() -> bool:
    """Whether torch multiplies by MKL, and MKL has code for all vectors of this processor."""
    if not torch.backends.mkl.is_available():
        return False
    info = Path("/proc/cpuinfo")
    described = info.read_text() if info.exists() else platform.processor()
    return "GenuineIntel" in described or torch.backends.cpu.get_cpu_capability() == "AVX2"


@functools.cache
def _has_onednn() -> bool:
    """Whether this torch multiplies by oneDNN: the operation is private to torch, so it is tried and compared.

    The processor decides which routine is faster, and not a measurement: a run must round like the one it continues.
    """
    if _mkl_is_faster():
        return False
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    left, right, bias = torch.arange(96.0).view(32, 3), torch.arange(12.0).view(3, 4), torch.arange(4.0)
    summand = torch.ones(32, 4)
    try:
        found = _product(left, right, bias), _binary_add(summand, left, right)
    except Exception as error:
        passed_over("oneDNN's product is", error)
        return False
    expected = left @ right + bias, summand + left @ right
    return all(torch.allclose(one, other) for one, other in zip(found, expected, strict=True))


def _by_onednn(left: Tensor) -> bool:
    return left.dtype is torch.float32 and left.device.type == "cpu" and left.numel() > 0 and _has_onednn()


def _pieces(num_rows: int) -> Iterator[tuple[slice, int]]:
    """Row ranges of 1024, 512 and 256 rows, then the rest; with each, the number of rows that it is padded to."""
    start = 0
    while start < num_rows:
        left = num_rows - start
        size = min(_LARGEST, 1 << (left.bit_length() - 1)) if left >= 8 * _UNIT else left
        padded = size if size < _FEWEST else -(-size // _UNIT) * _UNIT
        yield slice(start, start + size), padded
        start += size


def _padded(rows: Tensor, size: int) -> Tensor:
    return rows if len(rows) == size else F.pad(rows, (0, 0, 0, size - len(rows)))


def _product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(left, right.t(), bias, "none", [], "")


def _binary_add(summand: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.binary(left, summand, right.t(), None, "add")


def _torch_product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    return left @ right if bias is None else torch.addmm(bias, left, right)


def matmul(rows: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """`rows @ right + bias` for any number of rows.

    Args:
        rows: (m, k), row-major.
        right: (k, n) of the same dtype and device; a transposed view costs nothing.
        bias: (n,).

    Returns:
        (m, n), new memory.
    """
    if not _by_onednn(rows) or len(rows) < _FEWEST:
        return _torch_product(rows, right, bias)
    parts = []
    for s, size in _pieces(len(rows)):
        product = _product if size >= _FEWEST else _torch_product
        parts.append(product(_padded(rows[s], size), right, bias)[: s.stop - s.start])
    whole = len(parts) == 1 and len(rows) == size
    return parts[0] if whole else torch.cat(parts)


def transposed_matmul(left: Tensor, right: Tensor) -> Tensor:
    """`left.T @ right` for any number of rows: a sum over them.

    Args:
        left: (m, p), row-major; better the narrower of the two.
        right: (m, q), row-major, of the same dtype and device.

    Returns:
        (p, q), new memory.
    """
    if not _by_onednn(left) or len(left) < _FEWEST:
        return left.t() @ right
    total: Tensor | None = None
    for s, size in _pieces(len(left)):
        product = _product if size >= _FEWEST else _torch_product
        part = product(_padded(left[s], size).t(), _padded(right[s], size))
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def add_matmul(summand: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`summand + left @ right` in new memory: (m, n), (m, k), (k, n). Call it with few different shapes."""
    if _by_onednn(left):
        return _binary_add(summand, left, right)
    return torch.addmm(summand, left, right)


def wide_matmul(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` in fp32 or better, on CUDA also summed in fp32: (m, k) and (k, n) to (m, n)."""
    if left.device.type == "cuda" and left.dtype is not torch.float32 and _has_wide_product(left.dtype, left.device):
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).to(torch.promote_types(left.dtype, torch.float32))


@functools.cache
def _has_wide_product(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this torch and this device multiply 16 bits into fp32."""
    left, right = torch.eye(16, dtype=dtype, device=device), torch.full((16, 16), 3.0, dtype=dtype, device=device)
    try:
        found = torch.mm(left, right, out_dtype=torch.float32)
    except Exception as error:
        passed_over("A product of 16 bits into fp32 is", error, device)
        return False
    return found.dtype is torch.float32 and bool((found == 3.0).all())
