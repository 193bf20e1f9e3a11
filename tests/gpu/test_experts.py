"""Packed experts with an adapter on CUDA: the numbers of the CPU, by products of groups where the GPU has them."""

import copy

import pytest
import torch

from alignment.kernels import grouped
from alignment.kernels.base import is_patched
from alignment.kernels.experts import patch_experts
from tests.helpers.mixtures import TARGETS, mixture

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="NO GPU: torch sees no CUDA device, so nothing in this file was checked"
)


def compute(model):
    device = next(model.parameters()).device
    ids = (torch.arange(60) * 7 % 290).view(3, 20).to(device)
    logits = model(ids, use_cache=False).logits
    logits.float().log_softmax(-1).square().mean().backward()
    return torch.cat([p.grad.double().cpu().flatten() for p in model.parameters() if p.requires_grad]), logits


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
def test_experts_on_cuda_are_those_of_the_cpu(kind, dtype, tolerance):
    """The gradient of the adapter, and the logits; in bfloat16 all experts are one launch from Ampere on."""
    model = mixture(kind, dtype, True, TARGETS[kind], r=8)
    on_gpu = copy.deepcopy(model).to("cuda")
    for one in (model, on_gpu):
        patch_experts(one)
        assert sum(is_patched(m) and hasattr(m, "parameter_name") for m in one.modules()) == 2
    expected, logits = compute(model)
    found, other = compute(on_gpu)
    assert (found - expected).norm() <= tolerance * expected.norm()
    assert (other.double().cpu() - logits.double()).norm() <= tolerance * logits.double().norm()
    ampere = torch.cuda.get_device_capability() >= (8, 0)
    assert grouped._has_grouped(torch.bfloat16, torch.device("cuda", torch.cuda.current_device())) or not ampere
