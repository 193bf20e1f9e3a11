"""Every option of an adapter for tests, and what their starts are made from."""

from pathlib import Path

import pytest

OPTIONS = {
    "lora": {},
    "rslora": {"rslora": True},
    "lora_plus": {"lr_ratio": 4.0},
    "gaussian": {"init": "gaussian"},
    "orthogonal": {"init": "orthogonal"},
    "zero_a": {"init": "zero_a"},
    "eva": {"init": "eva"},
    "pissa": {"init": "pissa"},
    "pissa_niter_2": {"init": "pissa_niter_2", "rslora": True, "rank_pattern": {"q_proj": 2}},
    "olora": {"init": "olora"},
    "corda": {"init": "corda"},
    "loftq": {"init": "loftq"},
    "dora": {"kind": "dora"},
    "patterns": {
        "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 3.0}, "exclude_modules": ["k_proj"],
        "layers_to_transform": [1],
    },
    "whole head": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_tokens": [3, 7]},
    "vera": {"kind": "vera", "r": 8, "alpha": None},
    "oft": {"kind": "oft", "r": None, "alpha": None, "block_size": 8},
    "boft": {"kind": "boft", "r": None, "alpha": None, "block_size": 4},
}  # fmt: skip
"""Every option, by what differs from a plain LoRA."""

PACKED = ("lora", "dora", "zero_a", "pissa", "olora", "corda", "eva", "loftq", "tokens", "vera", "oft", "boft")
"""The options that are tried on NF4 too."""
_CORE = {
    ("patterns", None), ("dora", "nf4"), ("pissa_niter_2", None), ("corda", "nf4"), ("loftq", "nf4"), ("eva", None),
    ("whole head", None), ("tokens", None), ("vera", "nf4"), ("oft", "nf4"), ("boft", None),
}  # fmt: skip
_PLAIN = ("lora", "lora_plus", "gaussian", "rslora")
"""On a float base they are what all other tests train, but for numbers."""


def adapter_cases():
    """Parameters (option, bits) of a test: those that are not of the core belong to the matrix."""
    names = [name for name in OPTIONS if name not in ("loftq", *_PLAIN)]
    for case in [(name, None) for name in names] + [(name, "nf4") for name in PACKED]:
        marks = () if case in _CORE else pytest.mark.matrix
        yield pytest.param(*case, marks=marks, id=f"{case[0]}-{case[1] or 'fp32'}")


each_case = pytest.mark.parametrize(("option", "bits"), list(adapter_cases()))
"""Every option, on a float base (None) and where it is tried on NF4 ("nf4"); all but a core belong to the matrix."""


def start_sources(folder: Path, cache: Path):
    """Float weights of a model's folder, a cache, and some sequences of random tokens."""
    from alignment.policy.adapter_start import StartSources
    from alignment.policy.float_weights import FloatWeights
    from tests.conftest import random_groups

    data = [group.prompt for group in random_groups(12, seed=3)]
    return StartSources(FloatWeights(str(folder), None), cache, lambda: data)
