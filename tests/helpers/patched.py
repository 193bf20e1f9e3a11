"""Tiny models before and after their layers are patched, and what both compute."""

import copy

import torch

from alignment.kernels import base
from alignment.kernels.patch import patch_layers
from tests.bench.layers import adapted_model

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}


MODELS = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen3": {},
    "gemma": {"hidden_activation": "gelu_pytorch_tanh"},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "mlp_only_layers": [1],
        "experts_implementation": "eager",
    },
    "gpt_neox": {},
}


PATCHED = {
    "llama": {"PatchedLinear", "PatchedLlamaMLP", "PatchedLlamaRMSNorm", "PatchedLlamaAttention"},
    "qwen3": {"PatchedLinear", "PatchedQwen3MLP", "PatchedQwen3RMSNorm", "PatchedQwen3Attention"},
    "gemma": {"PatchedLinear", "PatchedGemmaMLP", "PatchedGemmaRMSNorm", "PatchedGemmaAttention"},
    "qwen3_moe": {
        *("PatchedLinear", "PatchedQwen3MoeMLP", "PatchedQwen3MoeRMSNorm", "PatchedQwen3MoeAttention"),
        "PatchedParamWrapper",
    },
    "gpt_neox": {"PatchedLinear", "PatchedGPTNeoXAttention"},
}


FEW, MANY = (1, 5), (2, 40)  # rows for two small products, and for a weight formed with the update


def tiny(kind="llama", dtype=torch.float32, nf4=False, **settings):
    """A tiny model whose norms and biases matter, with an adapter that has an effect."""
    model = adapted_model(kind, SIZES | MODELS[kind] | settings, dtype, nf4, r=4)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name or name.endswith("bias") or "lora_B" in name:
                p.add_(0.2 * torch.randn(p.shape, generator=generator).to(p.dtype))
    return model.to(dtype)


def pair(*args, **settings):
    own = tiny(*args, **settings)
    changed = copy.deepcopy(own)
    patch_layers(changed)
    return own, changed


def compute(model, shape=MANY, autocast=None):
    """Logits and the gradients of everything that can have one, of a random linear function of the logits."""
    embeddings = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(5)
    x = 8 * torch.randn(*shape, embeddings.shape[1], generator=generator)
    x = x.to(embeddings).requires_grad_()
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        logits = model(inputs_embeds=x, use_cache=False).logits
    model.zero_grad()
    logits.backward(torch.randn(logits.shape, generator=generator).to(logits))
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), "x": x.grad, **gradients}


def assert_close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype is value.dtype, name
        assert found[name].stride() == value.stride(), name
        error = (found[name].double() - value.double()).norm() / value.double().norm().clamp_min(1e-30)
        assert error <= tolerance, f"{name}: {error:.2g}"


def classes(model):
    return {type(m).__name__ for m in model.modules() if base.is_patched(m)}


def lora_layers(model):
    return [m for m in model.modules() if hasattr(m, "lora_A")]
