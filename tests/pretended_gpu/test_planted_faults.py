"""What the checks of this folder are for: each fault, planted, is found."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from alignment.kernels import attention
from alignment.scoring import logps
from alignment.scoring.layout import FlatLayout, SharedLayout
from tests.pretended_gpu.passes import check_pass, on_the_cpu


@pytest.fixture(autouse=True)
def _expected():
    """What is right is computed before a fault is planted."""
    for dtype in (torch.float32, torch.bfloat16):
        on_the_cpu(dtype)


def test_a_mask_on_the_cpu(monkeypatch, caplog):
    attend = F.scaled_dot_product_attention

    def faulty(*args, attn_mask=None, **kwargs):
        mask = None if attn_mask is None else attn_mask & torch.ones(attn_mask.shape, dtype=torch.bool)
        return attend(*args, attn_mask=mask, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", faulty)
    with pytest.raises(AssertionError, match="the probe refuses"):
        check_pass(SharedLayout(), torch.float32)
    assert "a CPU tensor of" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("layout", [FlatLayout(), SharedLayout()], ids=["flat", "shared"])
def test_a_wait_inside_a_pass(layout, monkeypatch):
    head = logps.score_hidden

    def faulty(module, hidden, *args):
        assert hidden.sum().item() < 1e9
        return head(module, hidden, *args)

    monkeypatch.setattr(logps, "score_hidden", faulty)
    with pytest.raises(AssertionError, match="the host waits"):
        check_pass(layout, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [FlatLayout(), SharedLayout()], ids=["flat", "shared"])
def test_hidden_states_in_32_bits(layout, monkeypatch):
    forward = Qwen3DecoderLayer.forward
    monkeypatch.setattr(Qwen3DecoderLayer, "forward", lambda self, *a, **k: forward(self, *a, **k).float())
    with pytest.raises(AssertionError, match="hidden states are"):
        check_pass(layout, torch.bfloat16)


@pytest.mark.slow
def test_log_probs_in_16_bits(monkeypatch):
    head = logps.score_hidden
    monkeypatch.setattr(logps, "score_hidden", lambda *args: head(*args).bfloat16())
    with pytest.raises(AssertionError, match=r"log-probs and gradients are|differ"):
        check_pass(FlatLayout(), torch.bfloat16)


def test_a_causal_mask_that_is_off_by_one(monkeypatch):
    """Every query of a completion sees one position less, as if causality were aligned elsewhere."""
    tables = attention._variable_lengths

    def faulty(row, device):
        lengths = tables(row, device)
        return replace(lengths, keys=lengths.keys.roll(1))

    faulty.cache_clear = tables.cache_clear
    monkeypatch.setattr(attention, "_variable_lengths", faulty)
    with pytest.raises(AssertionError, match=r"the probe refuses|log-probs differ"):
        check_pass(SharedLayout(), torch.bfloat16)
