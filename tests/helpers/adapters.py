"""Adapters for tests: the settings of a plain LoRA, and others by what differs."""

from alignment.config.adapters import AdapterConfig


def adapter(**settings) -> AdapterConfig:
    """A LoRA of rank 4 and alpha 8 on all linear layers, with these settings instead."""
    defaults = {
        "kind": "lora", "r": 4, "alpha": 8, "block_size": None, "dropout": 0.0, "target_modules": ["all-linear"],
        "exclude_modules": [], "layers_to_transform": None, "rank_pattern": {}, "alpha_pattern": {},
        "modules_to_save": [], "trainable_tokens": [], "init": "default", "rslora": False, "lr_ratio": 1.0,
        "iec": False,
    }  # fmt: skip
    return AdapterConfig(**(defaults | settings))
