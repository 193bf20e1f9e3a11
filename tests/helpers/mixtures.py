"""Tiny mixtures of experts: saved, or with packed experts and adapters of them."""

import torch
from transformers import AutoModelForCausalLM

from alignment.kernels.experts import patch_experts
from alignment.policy.adapter import _attached
from alignment.policy.quantize import _packed, stacks
from tests.conftest import tiny_config
from tests.helpers.policies import CPU, adapter, train_adapter

SIZES = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2, "head_dim": 16,
    },
}  # fmt: skip

TARGETS = {
    "qwen3_moe": ["gate_proj", "up_proj", "down_proj"],
    "mixtral": ["w1", "w2", "w3"],
    "gpt_oss": ["gate_up_proj", "down_proj"],
}
"""The experts, by the names that an adapter's settings have for them."""


def mixture_config(kind="qwen3_moe", **settings):
    """Wide enough that whole blocks of 64 values make up a row."""
    return tiny_config(300, kind, **{"hidden_size": 64, "intermediate_size": 64} | SIZES[kind] | settings)


def write_mixture(folder, kind="qwen3_moe", **settings):
    """Save one with weights that are large enough for differences to show."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(mixture_config(kind, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.08)
    model.save_pretrained(folder)
    return model


def mixture(kind, dtype=torch.float32, packed=False, targets=None, r=4):
    """A random mixture, perhaps with packed experts and with an adapter of them that has an effect."""
    torch.manual_seed(0)
    settings = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_config(mixture_config(kind), **settings).to(dtype).requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    for _, module, leaf in list(stacks(model)) if packed else ():
        module._parameters[leaf] = _packed(module._parameters[leaf], True, dtype, CPU)
    patch_experts(model)
    if targets is None:
        return model
    model = _attached(model, adapter(target_modules=targets, r=r, alpha=2 * r), 0)
    return train_adapter(model).to(dtype)
