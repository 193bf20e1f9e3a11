"""Tiny checkpoints that also see."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from tests.helpers.families import SIZES

_POSITIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
_SEEING = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
}
KINDS = {
    "gemma3": {
        "text_config": SIZES | {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
        "vision_config": _SEEING | {"patch_size": 8},
        "mm_tokens_per_image": 4,
    },
    "qwen3_vl": {
        "text_config": SIZES | {"rope_parameters": _POSITIONS},
        "vision_config": {
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
    },
    "mistral3": {
        "text_config": SIZES | {"model_type": "mistral", "sliding_window": None},
        "vision_config": _SEEING | {"model_type": "pixtral", "patch_size": 8},
    },
    "llama4": {
        "text_config": SIZES | {"num_local_experts": 2, "intermediate_size_mlp": 64, "moe_layers": [1]},
        "vision_config": _SEEING
        | {"patch_size": 8, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
    },
}


def write_seeing_model(kind: str, folder: Path) -> Path:
    """A random model of the kind, saved as checkpoints are."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **KINDS[kind])
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    return folder
