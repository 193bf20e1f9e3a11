"""Shared fixtures: tiny random models that behave like the real ones, and real data where it is at hand."""

import functools
import gc
import itertools
import os
import signal
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import numpy as np
import pytest
import torch

from alignment.types import Group
from tests.helpers.composition import compose_options_once

compose_options_once()
torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is imported

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell's background jobs ignore Ctrl-C, and tests that press it would wait for ever.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run, and no time limit: others may share the machine.
hypothesis.settings.register_profile("suite", derandomize=True, deadline=None, database=None, max_examples=60)
hypothesis.settings.load_profile("suite")


def pytest_collection_finish() -> None:
    """No later collection walks the libraries and the tests again: a trainer collects at each of its ends."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def _what_a_module_leaves():
    """Nor what a module's tests leave behind: reports, caches, libraries that they were the first to load."""
    yield
    gc.collect()
    gc.freeze()


_NUMBERS = itertools.count()
SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


def shared_data(name: str) -> Path:
    """A folder of real data beside the checkout; the test is skipped, and says so, where there is none."""
    folder = SHARED_DATA / name
    if not folder.is_dir():
        pytest.skip(f"REAL DATA ABSENT: {name} is not beside the checkout, so this test did not run")
    return folder


@pytest.fixture(scope="session")
def _caches(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("caches")


@pytest.fixture(autouse=True)
def _own_cache(_caches):
    """No test reads or writes the user's cache, or another test's. A run makes the folder when it writes there.

    It has a patch of its own: a test that undoes its patches must not go on in the user's cache.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGNMENT_CACHE", str(_caches / str(next(_NUMBERS))))
        yield


CORE_LOSSES = ("dpo", "ipo", "kto", "orpo", "simpo", "beta_dpo", "bco", "tdpo1", "plackett_luce", "mpo")
"""Of each unit, quantity and kind of state one or more: what holds for every loss `make test` shows for these."""


def each(values, core):
    """Parameters of a test over a whole family, or tuples of them: what is not of its core belongs to the matrix."""
    parts = {value: value if isinstance(value, tuple) else (value,) for value in values}
    return [value if value in core else pytest.param(*parts[value], marks=pytest.mark.matrix) for value in values]


@functools.cache
def recommended_loss(name: str, *settings: str):
    """The loss as `loss=<name> loss.<setting>` gives it to a run; losses are pure, so tests may share one."""
    from alignment.config.compose import load_loss

    return load_loss(name, *settings)


TINY_SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
}


def tiny_config(vocab_size: int = 97, model_type: str = "qwen3", **overrides):
    """Two small layers, of a Qwen3 unless another architecture is named."""
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type, **(TINY_SIZES | {"vocab_size": vocab_size} | overrides))


def tiny_policy(dtype: torch.dtype = torch.float64, r: int | None = 4, seed: int = 0, trained: bool = False):
    """A tiny random Qwen3 with scoring and a LoRA adapter; `trained` gives the adapter an effect."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from alignment.scoring.logps import enable_scoring

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config()).to(dtype)
    model.requires_grad_(False)
    enable_scoring(model)
    if r is not None:
        torch.manual_seed(seed + 1)
        model = get_peft_model(model, LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear")).to(dtype)
        if trained:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_B" in name:
                        parameter.normal_(std=0.2)
    return model


def random_groups(num: int, k: int = 2, seed: int = 0, vocab: int = 97) -> list[Group]:
    """Groups of random tokens and random lengths."""
    rng = np.random.default_rng(seed)

    def tokens(low: int, high: int) -> np.ndarray:
        return rng.integers(0, vocab, rng.integers(low, high)).astype(np.int32)

    return [Group(tokens(1, 12), tuple(tokens(1, 15) for _ in range(k))) for _ in range(num)]


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory) -> Path:
    """A saved tiny Qwen3 with a byte-level tokenizer and a ChatML template."""
    from alignment.policy.tiny_model import write_tiny_model

    folder = tmp_path_factory.mktemp("tiny_qwen3")
    write_tiny_model(folder)
    return folder
