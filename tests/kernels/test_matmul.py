"""Products by oneDNN, on any processor: rows in few different sizes give what torch gives."""

from pathlib import Path

import pytest
import torch

from alignment.kernels import matmul as products


@pytest.fixture
def by_onednn(monkeypatch):
    """oneDNN, also where torch's own products are faster."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("NO ONEDNN: this build of torch has none, so its products were not checked")
    monkeypatch.setattr(products, "_has_onednn", lambda: True)


@pytest.mark.usefixtures("by_onednn")
@pytest.mark.parametrize("rows", [1, 15, 16, 33, 256, 300, 1024, 1900])
def test_any_number_of_rows(rows):
    """Fewer rows than oneDNN takes, one piece, padded pieces, several pieces."""
    torch.manual_seed(rows)
    left, right, bias, wide = (torch.randn(shape) for shape in ((rows, 48), (48, 40), (40,), (rows, 40)))
    torch.testing.assert_close(products.matmul(left, right), left @ right, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(products.matmul(left, right, bias), left @ right + bias, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(products.transposed_matmul(left, wide), left.t() @ wide, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(products.add_matmul(wide, left, right), wide + left @ right, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("vendor", "capability", "has_mkl", "expected"),
    [
        ("AuthenticAMD", "AVX512", True, True),
        ("AuthenticAMD", "AVX2", True, False),
        ("AuthenticAMD", "AVX2", False, True),
        ("AuthenticAMD", "DEFAULT", False, True),
        ("GenuineIntel", "AVX512", True, False),
        ("GenuineIntel", "AVX512", False, True),
    ],
)
def test_the_processor_decides(vendor, capability, has_mkl, expected, monkeypatch):
    """MKL's code for AVX2, and for AVX-512 on Intel's, is faster than oneDNN's; elsewhere or without MKL it is not."""
    monkeypatch.setattr(Path, "read_text", lambda path: f"vendor_id\t: {vendor}\n")
    monkeypatch.setattr(Path, "exists", lambda path: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: has_mkl)
    monkeypatch.setattr(products, "_product", lambda left, right, bias=None: products._torch_product(left, right, bias))
    monkeypatch.setattr(products, "_binary_add", torch.addmm)
    products._has_onednn.cache_clear()
    try:
        assert products._has_onednn() == (expected and torch.backends.mkldnn.is_available())
    finally:
        products._has_onednn.cache_clear()
