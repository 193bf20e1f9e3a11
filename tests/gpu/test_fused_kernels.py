"""The fused kernels on a real GPU: compiled, launched, and in agreement with the eager code."""

import pytest
import torch

from tests.gpu.micro import TINY, operations, unpacking

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="NO GPU: no fused kernel was compiled and run")


def test_every_kernel_agrees(caplog):
    refused = [o.what for o in operations(TINY, torch.device("cuda")) if not o.fused._usable(o.arguments)]
    assert not refused, caplog.text


def test_unpacked_weights_have_the_bits_of_bitsandbytes(caplog):
    pytest.importorskip("bitsandbytes", reason="NO BITSANDBYTES: 4-bit weights unchecked")
    operation = unpacking(TINY, torch.device("cuda"))
    assert operation.fused._usable(operation.arguments), caplog.text
