"""bitsandbytes' unpacking of 4-bit weights on a CPU, mended where it is wrong."""

from __future__ import annotations

import importlib
import logging
import math
import warnings
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_OPERATOR = "bitsandbytes::dequantize_4bit"


@cache  # what it returns is kept by that: a registration ends with its object
def mend_unpacking() -> torch.library.Library | None:
    """Have 4-bit weights unpacked to their values on this processor.

    With AVX-512, bitsandbytes 0.50 takes the statistics of wrong blocks where a row is no whole number of blocks. The
    same bytes as a matrix with one block a row come out right. Where the two differ, such weights are unpacked that way
    from here on, whoever unpacks them. Weights with whole blocks in a row, as nearly all models have, are left alone.

    Returns:
        What has replaced the operator's kernel; None where nothing is wrong.
    """
    importlib.import_module("bitsandbytes")  # it defines the operator
    unpack = torch.library.get_kernel(_OPERATOR, "CPU")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)

    def by_blocks(
        packed: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        count, whole = math.prod(shape), list(shape)
        if shape[-1] % blocksize:
            whole = [count // blocksize, blocksize] if count % blocksize == 0 else [1, count]
        found: Tensor = unpack.call_boxed(keys, packed, absmax, blocksize, quant_type, whole, dtype)
        return found.view(tuple(shape))

    packed = torch.arange(96, dtype=torch.uint8)[:, None]
    rows = (packed, torch.tensor([1.0, 2.0, 3.0]), 64, "nf4", [2, 96], torch.float32)
    if torch.equal(unpack.call_boxed(keys, *rows), by_blocks(*rows)):
        return None
    log.info("bitsandbytes unpacks rows that are no whole number of blocks wrongly on this processor: mended.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a kernel is replaced
        mended = torch.library.Library("bitsandbytes", "IMPL")
        mended.impl("dequantize_4bit", by_blocks, "CPU", allow_override=True)
    return mended
