"""Several policies on one tiny base."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from alignment.kernels.attention import enable_shared_prompts
from alignment.kernels.patch import patch_layers
from alignment.scoring.layout import FlatLayout, SharedLayout
from alignment.scoring.logps import enable_scoring
from alignment.training.cohort import share
from tests.bench.layers import quantise
from tests.conftest import tiny_config

LAYOUTS = {"shared": SharedLayout, "flat": FlatLayout}


def frozen_base(dtype=torch.float64, nf4=False, kind="qwen3"):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(tiny_config(model_type=kind)).to(dtype).requires_grad_(False)
    if nf4:
        quantise(base, dtype)
    enable_scoring(base)
    return base


def policy_on(base, r=4, alpha=8, seed=1, targets="all-linear", shared=True, patched=True):
    """A policy on the base's tensors whose adapter has an effect; `seed` decides the adapter."""
    torch.manual_seed(seed)
    model = get_peft_model(share(base), LoraConfig(r=r, lora_alpha=alpha, target_modules=targets))
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(base.dtype)
            if "lora_B" in name:
                parameter.data.normal_(std=0.2)
    if patched:
        patch_layers(model)
    if shared:
        assert enable_shared_prompts(model.get_base_model())
    return model.train()
