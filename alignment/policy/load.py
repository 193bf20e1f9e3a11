"""Load the base model and its tokenizer, quantised if asked; save the policy."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alignment.config.gpu import computes_in_bfloat16
from alignment.config.preflight import require_machine
from alignment.config.schema import Calibration, Device, Dtype, ModelConfig, QuantizationConfig
from alignment.errors import UserError, did_you_mean, require
from alignment.files import atomic_write_text, cache_dir
from alignment.kernels.base import in_words
from alignment.kernels.cpu_unpacking import mend_unpacking
from alignment.kernels.experts import patch_experts
from alignment.policy.architecture import (
    AUTO_ATTENTION,
    attentions,
    auto_class,
    build_model,
    show_decoder,
    unknown_architecture,
)
from alignment.policy.calibration import calibrate
from alignment.policy.chat_templates import settle_template
from alignment.policy.layers import disable_dropout
from alignment.policy.quantize import (
    NEVER_QUANTIZED,
    load_arguments,
    pack_model,
    packing_experts,
    settle_compute,
    unquantised,
)
from alignment.policy.residual_start import residual_start, save_with_start
from alignment.policy.stored import Checkpoint, describe_stored, require_loadable, require_stored
from alignment.policy.weight_parts import save_whole, weight_parts
from alignment.scoring.logps import check_scoring, enable_scoring

log = logging.getLogger(__name__)

_LARGE_ACTIVATIONS = ("gemma2", "gemma3")


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


def resolve_dtype(dtype: Dtype, device: torch.device, whole: bool = False) -> torch.dtype:
    """`auto` is bfloat16 on a GPU from Ampere on, float16 on an older one, which emulates that, and float32 on a CPU.

    A plan may ask for a GPU that this machine has not; it counts as a new one.

    Args:
        whole: whether weights of the model itself train, which need float32 in place of float16.
    """
    if dtype is Dtype.auto:
        if device.type == "cpu":
            return torch.float32
        if not torch.cuda.is_available() or computes_in_bfloat16():
            return torch.bfloat16
        return torch.float32 if whole else torch.float16
    return getattr(torch, dtype.value)


def load_tokenizer(config: ModelConfig, source: str, kept: Mapping[str, str] | None = None) -> Any:
    """The tokenizer, with the template and the end token that `model.chat_template` and `model.eos_token` ask for.

    Args:
        source: `tokenizer` of what `model_source` gives.
        kept: the templates that a run began with, which goes on where a file is gone.

    Raises:
        UserError: it cannot be loaded, or has no such template or token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            source, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except Exception as error:
        raise UserError(f"model.name={config.name}: its tokenizer cannot be loaded: {_why(error)}") from error
    if not tokenizer.get_vocab().keys() - {str(token) for token in tokenizer.added_tokens_decoder.values()}:
        raise UserError(
            f"model.name={config.name}: no tokenizer is there, only special tokens: put the tokenizer's files "
            f"(tokenizer.json or the vocabulary) beside the model."
        )
    settle_template(tokenizer, config, kept or {})
    if config.eos_token is not None:
        if config.eos_token not in tokenizer.get_vocab():
            added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
            raise UserError(
                f"model.eos_token: the tokenizer has no token {config.eos_token}"
                f"{did_you_mean(config.eos_token, added)}; its special tokens are {', '.join(added)}."
            )
        tokenizer.eos_token = config.eos_token
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


def end_with(folder: Path, stops: Sequence[int]) -> None:
    """Put the tokens that end an answer into the generation settings of a saved model; an adapter has none.

    Those of a base model know no end of turn, so that whoever generates with the trained one would get no end.
    """
    path = folder / "generation_config.json"
    if path.is_file():
        settings = json.loads(path.read_bytes()) | {"eos_token_id": list(stops)}
        atomic_write_text(path, json.dumps(settings, indent=2) + "\n")


def load_model(source: str, config: ModelConfig, **settings: Any) -> Any:
    """The language model in a folder or on the hub, as transformers loads it.

    Args:
        source: folder or hub id.
        config: its attention, and what to read of the source.
        settings: more of `from_pretrained`.

    Raises:
        UserError: transformers cannot load the model, or not with this attention.
    """
    attention = None if config.attention == AUTO_ATTENTION else config.attention
    shape = read_shape(source, config)
    kind = auto_class(shape)
    try:
        found = kind.from_pretrained(
            source,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            attn_implementation=attention,
            use_safetensors=True,
            **settings,
        )
    except (MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:
        # transformers looks at the attention before it reads any weight
        known = attentions(shape) if attention is not None else []
        if known and attention not in known:
            raise UserError(
                f"model.attention={attention}: a {shape.model_type} has {', '.join(known)}: choose one, or auto."
            ) from error
        if isinstance(error, ImportError) and attention in known:
            said = one_line(error).rstrip(".")
            raise UserError(f"model.attention={attention}: {said}; install it, or set model.attention=auto.") from error
        raise UserError(f"model.name={config.name} cannot be loaded: {_why(error)}") from error
    if Checkpoint.of(shape).is_dequantised:  # how its files were read: saving would pack plain weights again
        model: Any = found[0] if isinstance(found, tuple) else found
        model._weight_conversions = None
    return found


def _why(error: Exception) -> str:
    """Why transformers could not read files: in its words where it refuses them, else with what may be the reason."""
    if isinstance(error, OSError | ValueError | ImportError):
        return one_line(error)
    return f"its files may be damaged or incomplete, so fetch them again ({in_words(error)})."


def read_shape(source: str, config: ModelConfig) -> Any:
    """The configuration of the model in a folder or on the hub.

    Raises:
        UserError: it cannot be read.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source, revision=config.revision, trust_remote_code=config.trust_remote_code)
    except Exception as error:
        unknown = unknown_architecture(source, config.revision)
        raise UserError(f"model.name={config.name} cannot be loaded: {unknown or _why(error)}") from error


def load_base(
    config: ModelConfig,
    quantization: QuantizationConfig | None,
    source: str,
    device: torch.device,
    cache: Path | None = None,
    place: torch.device | None = None,
    whole: bool = False,
) -> nn.Module:
    """Load the base model, quantised if asked or stored so, with every weight frozen, ready to score completions.

    Embeddings, norms and the head keep the model's dtype: casting them to fp32 would cost gigabytes and buy nothing.
    Its own dropout is off: only that of an adapter acts, where the settings ask for it.

    Args:
        source: `base` of what `model_source` gives, or the folder of a whole trained model.
        device: where the model will compute, which decides its dtypes.
        cache: folder for what is calibrated; None: the user's cache.
        place: where it is loaded; None: there.
        whole: see `resolve_dtype`.

    Raises:
        UserError: a library is needed and missing, the model cannot be loaded, its files lack weights, or it is
            quantised already in another way than the settings ask for.
    """
    dtype, place = resolve_dtype(config.dtype, device, whole), place or device
    if config.dtype is Dtype.auto and device.type == "cuda" and dtype is not torch.bfloat16:
        name = str(dtype).removeprefix("torch.")
        log.info("This GPU is older than Ampere and does not compute in bfloat16: the model is in %s.", name)
    if quantization is not None:
        require_machine(device=Device.cpu if device.type == "cpu" else Device.cuda, quantization=quantization)
    compute = dtype if quantization is None else resolve_dtype(quantization.compute_dtype, device)
    if quantization is not None and quantization.compute_dtype is Dtype.auto and torch.float16 in (dtype, compute):
        compute = dtype
    shape = read_shape(source, config)
    if dtype is torch.float16 and shape.model_type.startswith(_LARGE_ACTIVATIONS):
        log.warning(
            "The activations of a %s may exceed 65504, where float16 ends: if the loss is not finite, set "
            "model.dtype=float32.",
            shape.model_type,
        )
    stored = Checkpoint.of(shape)
    require_loadable(config.name, stored, quantization)
    packs = stored.is_dequantised and quantization is not None
    calibration = Calibration.none if quantization is None else quantization.calibration
    require(
        calibration is Calibration.none or not stored.method,
        f"quantization.calibration={calibration.name} needs 16-bit weights, and model.name={config.name} is "
        f"quantised already: set quantization.calibration=none, or use the checkpoint that is not quantised.",
    )
    if device.type == "cpu" and (quantization is not None or stored.method == "bitsandbytes"):
        mend_unpacking()
    load = partial(load_model, source, config, dtype=dtype)
    makes_nf4 = quantization is not None and not stored.method
    plain = unquantised(build_model(shape, config.trust_remote_code)) if makes_nf4 else NEVER_QUANTIZED
    with packing_experts(quantization.double) if quantization is not None else nullcontext():
        model, found = load(
            **load_arguments(stored, quantization, compute, plain),
            device_map={"": "cpu" if packs else place},
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, in a sentence
        )
    _require_all_weights(config, model, found)
    require_stored(config.name, model, stored)
    if packs:
        assert quantization is not None
        pack_model(model, quantization, compute, place)
    elif stored.is_packed:
        settle_compute(model, compute)
    if calibration is not Calibration.none:
        calibrate(model, load, calibration, config.name, cache or cache_dir(None))
    describe_stored(model, config.name, stored, quantization)
    model.requires_grad_(False)
    disable_dropout(model)
    # The padding token is often the end-of-turn token too, whose embedding is trained with all others.
    model.get_input_embeddings().padding_idx = None
    for module in model.modules():
        # In eval mode on CPUs with AVX512-BF16 such a layer would repack its weight in place and lose its gradient.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    show_decoder(model)
    patch_experts(model)
    enable_scoring(model)
    check_scoring(model, model.get_input_embeddings().num_embeddings, place)
    return model


def _require_all_weights(config: ModelConfig, model: Any, found: dict[str, Any]) -> None:
    """Refuse a model that transformers would complete with random numbers, or has put an adapter into by itself."""
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(
            f"model.name={config.name} is an adapter on the hub: download it, and set model.name to its folder."
        )
    missing = sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"]), *_resized(model)})
    if missing:
        raise UserError(
            f"model.name={config.name}: its files lack {len(missing)} weights of a {type(model).__name__}, or have "
            f"them in another size (the first: {missing[0]}), so they would be random: use the whole model's files."
        )
    unused = sorted(found["unexpected_keys"])
    if unused:
        log.info("%d weights in the model's files are no part of it (the first: %s).", len(unused), unused[0])


def _resized(model: nn.Module) -> list[str]:
    """Weights of another size than their layer's: older transformers let them into a quantised model without a word."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            size = (module.num_embeddings, module.embedding_dim)
        elif type(module) is nn.Linear:  # not one of 4 bits: its weight is packed
            size = (module.out_features, module.in_features)
        else:
            continue
        if module.weight.shape != size:
            found.append(f"{name}.weight")
    return found


def save_policy(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Save the adapter (or the whole model without one) as safetensors, with the tokenizer and its template."""
    whole: Any = model
    if (parts := weight_parts(model)) is not None:
        save_whole(model, parts, folder)
    else:
        whole.save_pretrained(str(folder), safe_serialization=True)
    if (residual := residual_start(model)) is not None:
        save_with_start(folder, residual)
    tokenizer.save_pretrained(str(folder))
