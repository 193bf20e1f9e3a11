"""Where torch lacks one of its private operations, or it computes something else, another way is taken."""

import logging

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from alignment.kernels import attention, base, mlp, norm, patch, rotary
from alignment.kernels import matmul as products
from alignment.kernels.matmul import add_matmul, matmul
from alignment.kernels.patch import patch_layers
from tests.helpers.families import FAMILIES
from tests.helpers.patched import PATCHED, assert_close, classes, compute, pair


def broken(*args, **kwargs):
    raise RuntimeError("no such schema")


def zeros(like):
    return lambda *args, **kwargs: torch.zeros_like(args[like])


@pytest.mark.parametrize("operation", [broken, lambda left, right, bias=None: left @ right - 1])
def test_products_without_onednn_are_torchs_own(operation, monkeypatch):
    monkeypatch.setattr(products, "_mkl_is_faster", lambda: False)
    monkeypatch.setattr(products, "_product", operation)
    products._has_onednn.cache_clear()
    try:
        assert not products._has_onednn()
        left, right = torch.randn(40, 6), torch.randn(6, 5)
        torch.testing.assert_close(matmul(left, right), left @ right, rtol=0, atol=0)
        summand = torch.randn(40, 5)
        torch.testing.assert_close(add_matmul(summand, left, right), torch.addmm(summand, left, right), rtol=0, atol=0)
    finally:
        products._has_onednn.cache_clear()


@pytest.mark.parametrize("operation", [broken, zeros(0)])
def test_an_mlp_whose_derivative_is_not_torchs_keeps_its_own_forward(operation, monkeypatch):
    monkeypatch.setattr(torch.ops.aten, "silu_backward", operation)
    mlp._activations.cache_clear()
    try:
        assert "PatchedLlamaMLP" not in classes(pair("llama")[1])
    finally:
        mlp._activations.cache_clear()
    monkeypatch.undo()
    assert "PatchedLlamaMLP" in classes(pair("llama")[1])


@pytest.mark.parametrize("operation", [broken, lambda *args, **kwargs: [torch.zeros_like(x) for x in args[1:4]]])
def test_attention_without_torchs_cpu_kernel_uses_masks(operation, monkeypatch):
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", operation)
    attention._has_cpu_kernel.cache_clear()
    try:
        assert not attention._has_cpu_kernel()
        row = (attention.PromptSpan(0, 3, (2, 4)),)
        inputs = [torch.randn(1, heads, 9, 8, requires_grad=True) for heads in (4, 2, 2)]
        attention.attend(*inputs, row, 0.3).sum().backward()
        assert all(x.grad.abs().max() > 0 for x in inputs)
    finally:
        attention._has_cpu_kernel.cache_clear()
    monkeypatch.undo()
    assert attention._has_cpu_kernel()


def test_rows_without_unsafe_view_can_be_written_to(monkeypatch):
    monkeypatch.setattr(base, "_HAS_UNSAFE_VIEW", False)
    own, changed = pair("llama", torch.float64)
    assert classes(changed) == PATCHED["llama"]
    assert_close(compute(changed), compute(own), 1e-12)


def test_the_first_probe_may_run_inside_a_checkpointed_layer():
    """Its saved tensors are not those of the layer, which has none of them when it is computed again."""
    row = (attention.PromptSpan(0, 3, (2, 4)),)
    q, k, v = (torch.randn(1, heads, 9, 8, requires_grad=True) for heads in (4, 2, 2))
    gradients = []
    for _ in range(2):
        attention._has_cpu_kernel.cache_clear()
        out = checkpoint(attention.attend, q, k, v, row, 0.3, use_reentrant=False)
        gradients.append(torch.autograd.grad(out.sin().sum(), q)[0])
    expected = torch.autograd.grad(attention.attend(q, k, v, row, 0.3).sin().sum(), q)[0]
    assert all(torch.equal(found, expected) for found in gradients)


def unforeseen(*args, **kwargs):
    raise KeyError("of a class that nobody has seen")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "name"),
    [
        (patch, "linear_class"),
        (patch, "mlp_class"),
        (patch, "norm_class"),
        (patch, "attention_class"),
        (patch, "_computes_the_same"),
        (norm, "_is_shifted"),
        (mlp, "_activation_of"),
        (rotary, "rotary_function"),
        (rotary, "_faster_rotary"),
    ],
)
def test_whatever_a_probe_raises_the_module_keeps_its_own_forward(module, name, monkeypatch, caplog):
    """One line for each class, and the model computes what it did."""
    patch.rotary_function.cache_clear()
    monkeypatch.setattr(module, name, unforeseen)
    try:
        with caplog.at_level(logging.INFO, logger="alignment.kernels.base"):
            own, changed = pair("qwen3")
        assert classes(changed) < PATCHED["qwen3"]
        lines = [record.getMessage() for record in caplog.records]
        assert lines and len(lines) == len(set(lines)) and all("KeyError" in line for line in lines)
        assert_close(compute(changed), compute(own), 1e-4)
    finally:
        patch.rotary_function.cache_clear()


@pytest.mark.parametrize(("device", "level"), [("cpu", logging.INFO), ("cuda", logging.WARNING)])
def test_on_a_gpu_a_failed_probe_is_a_warning(device, level, caplog):
    """Somebody pays for the GPU's speed, so that the error is not missed."""
    with caplog.at_level(logging.INFO, logger="alignment.kernels.base"):
        base.passed_over("A faster forward is", RuntimeError("no\nimage"), torch.device(device))
    [record] = caplog.records
    assert (record.levelno, record.getMessage()) == (
        level,
        "A faster forward is not used, because it failed here: RuntimeError: no.",
    )


@pytest.mark.parametrize("model_type", ["qwen3_5_text", "qwen3_next", "gpt_oss"])
def test_families_whose_norms_and_positions_are_others(model_type):
    """A norm with a gate and tables of half the width: what is not the usual form stays as it is."""
    [family] = [f for f in FAMILIES if f.model_type == model_type]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(family.config()).requires_grad_(False)
    ids = torch.arange(2, 14)[None]
    expected = model(input_ids=ids).logits
    patch_layers(model)
    assert classes(model)
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
