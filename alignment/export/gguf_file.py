"""GGUF files of plain models: weights under llama.cpp's names, in a type that Python can make, and what readers need.

Written here are the families whose files can be read back for a check: Llama (SmolLM, Mistral), Qwen2, Qwen3.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alignment.errors import UserError, did_you_mean
from alignment.export.vocabulary import add_vocabulary, unknown_tokenizer

TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
"""What weights may be stored in."""
FOR_CONVERTER = TYPES[:4]
"""What llama.cpp's own converter makes of these."""
_BELOW_8_BITS = TYPES[4:]
_ENDS = ("token_embd.weight", "output.weight")
"""Embeddings and head: where weights have less than 8 bits, these keep 8, as small models lose most there."""
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""llama.cpp's name for each of transformers' model types."""
_SAMPLING = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
"""Generation settings that a file can have, by llama.cpp's names."""
_SAMPLING["repetition_penalty"] = "penalty_repeat"


def require_type(kind: str) -> None:
    """Refuse a type that is not made here, with the command that makes it where llama.cpp has one.

    Raises:
        UserError: it is none of `TYPES`.
    """
    if kind in TYPES:
        return
    if re.fullmatch(r"(iq|q|tq)\d\w*|mxfp4\w*", kind):
        raise UserError(
            f"type={kind} is made by llama.cpp's own program: export type=f16, and then run "
            f"llama-quantize NAME-f16.gguf NAME-{kind}.gguf {kind.upper()}; made here are {', '.join(TYPES)}."
        )
    raise UserError(f"There is no type {kind}{did_you_mean(kind, TYPES)}; accepted are {', '.join(TYPES)}.")


def unknown_model(config: Any, tokenizer: Any) -> str | None:
    """What of a model the files made here cannot say, in words; None if nothing."""
    kind = config.model_type
    if kind not in _ARCHITECTURES:
        return f"a {kind} is none of the families that are written here ({', '.join(_ARCHITECTURES)})"
    rope = config.rope_parameters.get("rope_type", "default")
    if rope not in ("default", "llama3") or config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        return f"its positions are scaled ({rope})"
    odd = {"attention_bias": kind != "qwen2" and bool(getattr(config, "attention_bias", False))}
    odd["mlp_bias"] = bool(getattr(config, "mlp_bias", False))
    odd["sliding_window"] = kind == "mistral" and config.sliding_window is not None
    odd["use_sliding_window"] = bool(getattr(config, "use_sliding_window", False))
    odd["hidden_act"] = config.hidden_act != "silu"
    if found := next((key for key, is_odd in odd.items() if is_odd), None):
        return f"it has {found}={getattr(config, found)}"
    return unknown_tokenizer(tokenizer)


def tensor_type(name: str, shape: Sequence[int], kind: str) -> str:
    """The type of one tensor in a file of a type.

    Args:
        name: in the file.
        shape: of the weight.
        kind: one of `TYPES`.
    """
    if len(shape) < 2:
        return "f32"
    if kind in _BELOW_8_BITS and name in _ENDS:
        kind = "q8_0"
    return "f16" if kind.startswith("q") and shape[-1] % 32 else kind


@cache
def _names(architecture: str, layers: int) -> Any:
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    number = next(number for number, named in MODEL_ARCH_NAMES.items() if named == architecture)
    return get_tensor_name_map(number, layers)


def gguf_name(architecture: str, layers: int, name: str) -> str | None:
    """The name in a file of a parameter of transformers; None where llama.cpp has none.

    Args:
        architecture: by llama.cpp's name.
        layers: of the model.
        name: of the parameter.
    """
    return _names(architecture, layers).get_name(name, try_suffixes=(".weight", ".bias"))


def as_type(weight: Tensor, kind: str) -> np.ndarray:
    """A weight in fp32 as it is stored: numbers, or the bytes of blocks."""
    from gguf import GGMLQuantizationType, quantize

    return quantize(weight.detach().float().cpu().contiguous().numpy(), GGMLQuantizationType[kind.upper()])


@dataclass(frozen=True, slots=True)
class GGUFContents:
    """What goes into a file.

    Attributes:
        model: plain weights in fp32.
        tokenizer: of the policy.
        stops: the tokens that end an answer.
        generation: settings of the policy's generation.
        name: for people.
    """

    model: Any
    tokenizer: Any
    stops: Sequence[int]
    generation: Mapping[str, Any]
    name: str


@torch.no_grad()
def write_gguf(contents: GGUFContents, kind: str, path: Path) -> None:
    """Write a file; the model is one that `unknown_model` has nothing against.

    Args:
        contents: of the file.
        kind: one of `TYPES`.
        path: of the file.

    Raises:
        UserError: a weight that has no name in such files.
    """
    from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter, LlamaFileType

    model, config = contents.model, contents.model.config
    architecture = _ARCHITECTURES[config.model_type]
    writer = GGUFWriter(path, architecture)
    writer.add_type("model")
    writer.add_name(contents.name)
    _add_shape(writer, config, architecture)
    writer.add_file_type(LlamaFileType["ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    for key, theirs in _SAMPLING.items():
        if (value := contents.generation.get(key)) is not None:
            getattr(writer, f"add_sampling_{theirs}")(value)
    add_vocabulary(writer, contents.tokenizer, config.vocab_size, contents.stops)

    for name, weight in _tensors(model, architecture):
        stored = tensor_type(name, weight.shape, kind)
        writer.add_tensor(name, as_type(weight, stored), raw_dtype=GGMLQuantizationType[stored.upper()])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_shape(writer: Any, config: Any, architecture: str) -> None:
    """What the architecture needs beside the weights."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if architecture == "llama":
        writer.add_rope_dimension_count(head)


def _tensors(model: Any, architecture: str) -> Iterator[tuple[str, Tensor]]:
    """Name and weight of each tensor of a file."""
    config = model.config
    if config.rope_parameters.get("rope_type") == "llama3":
        yield "rope_freqs.weight", rope_factors(model)
    for name, weight in model.named_parameters():
        theirs = gguf_name(architecture, config.num_hidden_layers, name)
        if theirs is None:
            raise UserError(f"to=gguf: the weight {name} has no name in a GGUF file of a {config.model_type}.")
        if architecture == "llama" and (found := re.search(r"\.(q|k)_proj\.", name)):
            heads = config.num_attention_heads if found[1] == "q" else config.num_key_value_heads
            weight = _as_pairs(weight, heads)
        yield theirs, weight


def _as_pairs(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection in llama.cpp's order for this architecture.

    transformers rotates component i of a head with i + half; llama.cpp rotates neighbours, 2i with 2i + 1.
    """
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def rope_factors(model: Any) -> Tensor:
    """(head size / 2,) by which the model's rotation of each pair is slower than without scaling."""
    rotary, config = model.model.rotary_emb, model.config
    scaled = rotary.inv_freq.float()
    exponents = torch.arange(len(scaled), device=scaled.device, dtype=torch.float32) / len(scaled)
    return 1 / config.rope_parameters["rope_theta"] ** exponents / scaled
