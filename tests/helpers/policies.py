"""Policies for tests: tiny ones in every form, loaded from a folder or trained, and what they give by the book."""

import torch
from peft import LoraConfig, get_peft_model

from alignment.config.schema import Calibration, Dtype, ModelConfig, QuantizationConfig
from alignment.policy.load import load_base
from alignment.scoring.layout import FlatLayout
from alignment.scoring.logps import enable_scoring, join_scores, score_groups
from tests.conftest import tiny_config, tiny_policy
from tests.helpers.adapters import adapter as adapter

CPU = torch.device("cpu")
NF4 = QuantizationConfig(double=True, compute_dtype=Dtype.float32, calibration=Calibration.none)


def load(folder, quantization=None, dtype=Dtype.float32, attention="sdpa"):
    config = ModelConfig(
        name=str(folder),
        revision=None,
        dtype=dtype,
        attention=attention,
        chat_template=None,
        eos_token=None,
        trust_remote_code=False,
    )
    return load_base(config, quantization, str(folder), CPU)


def scores(model, groups):
    """Per-token log-probs of the groups, one pass."""
    return join_scores(groups, list(score_groups(model, groups, FlatLayout(), 10_000, CPU))).values


def train_adapter(model, seed=5, std=0.2):
    """Give the adapter an effect, as training would."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                parameter.normal_(std=std)
    return model


def start_of(kind):
    torch.manual_seed(0)
    if kind in ("pissa", "olora", "embedding"):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(tiny_config())
        model.requires_grad_(False)
        enable_scoring(model)
        if kind == "embedding":
            model = get_peft_model(model, LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]))
            return train_adapter(model)
        return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=kind))
    model = tiny_policy(torch.float32, r=None if kind == "full" else 4, trained=kind == "trained")
    return model.requires_grad_(True) if kind == "full" else model
