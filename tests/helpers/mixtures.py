"""Tiny mixtures of experts, saved in every form that checkpoints have."""

import torch
from transformers import AutoModelForCausalLM

from tests.conftest import tiny_config

SIZES = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2, "head_dim": 16,
    },
}  # fmt: skip


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
