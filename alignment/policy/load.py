"""Load the base model and its tokenizer, quantised if asked; save the policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from alignment.config.preflight import require_machine
from alignment.config.schema import WHEEL_PREFIX, Device, Dtype, ModelConfig, QuantizationConfig
from alignment.errors import UserError
from alignment.policy.wheel_model import wheel_model_folder
from alignment.scoring.logps import check_scoring, enable_scoring

# Weights that the forward of state-space layers reads raw: packed to 4 bit they crash or lose their gradient.
NEVER_QUANTIZED = ["out_proj", "x_proj", "dt_proj", "lm_head"]
"""Modules that a quantised model leaves as they are."""


def one_line(error: Exception) -> str:
    """The message of an exception as one sentence on one line."""
    return " ".join(str(error).split()).rstrip(".") + "."


def resolve_device(device: Device) -> torch.device:
    """The device to train on.

    Raises:
        UserError: `device=cuda` without a visible GPU.
    """
    require_machine(device=device)
    if device is Device.cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def resolve_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU and float32 on a CPU, where 16-bit arithmetic is mostly emulated."""
    if dtype is Dtype.auto:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, dtype.value)


def model_source(config: ModelConfig, cache: Path) -> str:
    """What transformers can load: a folder, or the hub id as it is.

    Raises:
        UserError: a local folder that does not exist or holds no model.
    """
    if config.name.startswith(WHEEL_PREFIX):
        return str(wheel_model_folder(config.name, cache))
    path = Path(config.name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"model.name: the folder {path} holds no config.json, so it is not a model.")
        return str(path)
    if config.name.startswith((".", "/", "~")):
        raise UserError(f"model.name: the folder {config.name} does not exist.")
    return config.name


def load_tokenizer(config: ModelConfig, source: str) -> Any:
    """The model's tokenizer, with `model.chat_template` in place of its own template if one is given."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        source, revision=config.revision, trust_remote_code=config.trust_remote_code
    )
    if config.chat_template is not None:
        path = Path(config.chat_template).expanduser()
        if not path.is_file():
            raise UserError(f"model.chat_template: the file {path} does not exist.")
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def own_stop_tokens(config: ModelConfig, source: str) -> list[int]:
    """The EOS tokens of the model's own generation settings; empty where it has none."""
    from transformers import GenerationConfig

    try:
        own = GenerationConfig.from_pretrained(source, revision=config.revision or "main").eos_token_id
    except (OSError, ValueError):  # no such file, or one that is not to be read
        return []
    return list(own) if isinstance(own, list) else [own] if own is not None else []


def load_base(
    config: ModelConfig, quantization: QuantizationConfig | None, source: str, device: torch.device
) -> nn.Module:
    """Load the base model, quantised if asked, with every weight frozen, ready to score completions.

    Embeddings, norms and the head keep the model's dtype: casting them to fp32 would cost gigabytes and buy nothing.

    Args:
        source: what `model_source` gives.

    Raises:
        UserError: bitsandbytes is needed and missing, or transformers cannot load the model.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = resolve_dtype(config.dtype, device)
    quantization_config = None
    if quantization is not None:
        require_machine(quantization=quantization)
        quantization_config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=quantization.double,
            bnb_4bit_compute_dtype=resolve_dtype(quantization.compute_dtype, device),
            llm_int8_skip_modules=NEVER_QUANTIZED,
        )
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            source,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            dtype=dtype,
            attn_implementation=config.attention,
            quantization_config=quantization_config,
            device_map={"": device},
            use_safetensors=True,
        )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"model.name={config.name} cannot be loaded with model.attention={config.attention}: {one_line(error)}"
        ) from error
    model.requires_grad_(False)
    # The padding token is often the end-of-turn token too, whose embedding is trained with all others.
    model.get_input_embeddings().padding_idx = None
    for module in model.modules():
        # In eval mode on CPUs with AVX512-BF16 such a layer would repack its weight in place and lose its gradient.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    enable_scoring(model)
    check_scoring(model, model.get_input_embeddings().num_embeddings, device)
    return model


def save_policy(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Save the adapter (or the whole model without one) as safetensors, with the tokenizer and its template."""
    model.save_pretrained(str(folder), safe_serialization=True)
    tokenizer.save_pretrained(str(folder))
