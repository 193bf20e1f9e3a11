"""Tiny models of every family that GGUF files are written of."""

import torch
from transformers import AutoModelForCausalLM

from tests.conftest import tiny_config

LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
KINDS = {
    "llama": {"model_type": "llama", "tie_word_embeddings": True},
    "llama untied": {"model_type": "llama", "tie_word_embeddings": False, "rms_norm_eps": 1e-2},
    "llama scaled": {
        "model_type": "llama",
        "rope_parameters": LLAMA3 | {"original_max_position_embeddings": 64},
    },
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "head_dim": None},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},
}


def model_of(kind, vocabulary=320):
    """Weights that are large enough for differences to show; the vocabulary is larger than the tiny tokenizer's."""
    settings = {key: value for key, value in KINDS[kind].items() if value is not None or key != "head_dim"}
    config = tiny_config(vocabulary, **settings)
    if kind == "qwen2":
        del config.head_dim
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6) if parameter.ndim > 1 else parameter.add_(0.3 * torch.randn_like(parameter))
    return model
