"""Digests of tensors: what they hold, not where or how they are kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def hash_tensor(digest: Any, tensor: Tensor) -> None:
    """Add shape, dtype and every value of a tensor to a digest of hashlib."""
    digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
    digest.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data)
