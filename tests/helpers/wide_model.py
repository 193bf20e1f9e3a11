"""A tiny Qwen3 whose layers are as wide as a block of 4-bit weights, saved."""

from pathlib import Path

import torch

from tests.conftest import tiny_config


def save_wide_model(folder: Path, vocab_size: int = 97) -> Path:
    """Two layers of width 64 and 128, with weights as large as trained ones' outliers make them."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(
        tiny_config(vocab_size, hidden_size=64, intermediate_size=128, head_dim=16)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4).add_(torch.randn(len(parameter), 1) * 0.02)
    model.save_pretrained(folder)
    return folder
