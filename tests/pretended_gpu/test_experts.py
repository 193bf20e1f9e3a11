"""Packed experts with an adapter on a GPU: one launch for all experts, no wait, and the numbers of the CPU."""

import pytest
import torch

from alignment.kernels import grouped
from alignment.kernels.base import is_patched
from alignment.kernels.experts import expert_layers, patch_experts
from tests.helpers.mixtures import TARGETS, mixture
from tests.pretended_gpu.device import GPU, WAITS, module_to_gpu, to_gpu, to_host
from tests.pretended_gpu.machine import pretended_gpu


def gradients(model, on):
    """Of a pass through one layer's experts, which has its waits counted: result, x, weights, and the adapter's."""
    layer = next(m for m in model.modules() if expert_layers(m)[1])
    generator = torch.Generator().manual_seed(0)
    x = on(torch.randn(40, 64, generator=generator).bfloat16()).requires_grad_()
    weights = on(torch.rand(40, 2, generator=generator).bfloat16()).requires_grad_()
    index = on(torch.randint(3, (40, 2), generator=generator))  # the last expert has no rows
    layer(x, index, weights)  # probes
    WAITS.clear()
    result = layer(x, index, weights)
    result.float().square().sum().backward()
    waits = dict(WAITS)
    trained = [p.grad for p in layer.parameters() if p.requires_grad]
    return [to_host(t).double() for t in (result.detach(), x.grad, weights.grad, *trained)], waits


def policy(kind):
    model = mixture(kind, torch.bfloat16, True, TARGETS[kind], r=8)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_experts_on_a_gpu_are_those_of_the_cpu(kind):
    """In bfloat16 with an adapter in fp32; forward and backward leave the host alone."""
    own = policy(kind)
    patch_experts(own)
    expected, _ = gradients(own, lambda x: x)
    with pretended_gpu():
        model = module_to_gpu(policy(kind))
        # transformers' other ways ask for operations that the pretended GPU has only on its host
        model.config._experts_implementation = "batched_mm"
        patch_experts(model)
        assert len([m for m in model.modules() if is_patched(m) and expert_layers(m)[1]]) == 2
        assert grouped._has_grouped(torch.bfloat16, GPU)
        found, waits = gradients(model, to_gpu)
    assert not waits
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 0.02 * other.norm()
