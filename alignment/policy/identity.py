"""The identity of a policy: a hash of everything that decides its log-probs. It keys the reference store."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdRef

from alignment.kernels.calibrated import is_calibrated
from alignment.kernels.eight_bit import row_scales
from alignment.policy.adapter_kinds import plain_name, updates
from alignment.policy.digest import hash_tensor
from alignment.policy.weight_parts import whole
from alignment.scoring.head import REWARD_HEAD

# These do not change a log-prob, and trainers write some of them (special tokens, a router's loss) into the
# configuration.
_VOLATILE_CONFIG_KEYS = {
    "_name_or_path",
    "transformers_version",
    "use_cache",
    "architectures",
    "dtype",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "output_router_logits",
    "router_aux_loss_coef",
}


def policy_identity(model: nn.Module) -> tuple[str, dict[str, Any]]:
    """A hash of base weights, quantisation, compute dtype and active adapters.

    An adapter without an effect, like every fresh LoRA, leaves no trace: its kind, rank and seed do not matter.

    Returns:
        (64 hex digits, a description for people).
    """
    adapter = hashlib.blake2b(digest_size=32)
    num_adapted = 0
    config = model.config.to_dict()
    quantization = config.pop("quantization_config", None)
    for update in updates(model):
        num_adapted += 1
        adapter.update(f"{update.name}:{update.form}".encode())
        for tensor in update.tensors:
            hash_tensor(adapter, tensor)
    digests = {
        "base": _base_digest(model, config, quantization),
        "adapter": adapter.hexdigest() if num_adapted else None,
    }
    identity = hashlib.blake2b(_canonical(digests), digest_size=32).hexdigest()
    description = {
        "model": config.get("_name_or_path", ""),
        "model_type": config.get("model_type", ""),
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": _in_words(quantization) + (", calibrated" if any(map(is_calibrated, model.modules())) else ""),
        **digests,
    }
    return identity, description


def _in_words(quantization: Any) -> str:
    """Such as nf4, int8 or gptq; none for plain weights."""
    if not quantization:
        return "none"
    if quantization.get("load_in_4bit"):
        return str(quantization.get("bnb_4bit_quant_type", "fp4"))
    method = quantization.get("quant_method", "quantised")
    return "int8" if quantization.get("load_in_8bit") else str(getattr(method, "value", method))


_PLACE_OF_HEAD = f"{REWARD_HEAD}.original_module."
"""In the names of what the head of a reward model's adapter is put in place of, which no base has."""

_last_read: tuple[Any, str] | None = None
_FIXED = "_base_digest"


def fix_base_digest(model: nn.Module) -> None:
    """Keep the digest of a frozen base on the model, for a time when its weights are not all here to be read."""
    setattr(model, _FIXED, policy_identity(model)[1]["base"])


def _base_digest(model: nn.Module, config: dict[str, Any], quantization: Any) -> str:
    """Digest of the base. Reading a frozen one takes seconds: it is read again only after its tensors were written."""
    global _last_read
    if (fixed := vars(model).get(_FIXED)) is not None:
        return fixed
    tensors = list(_base_tensors(model))
    described = _canonical(_without_volatile(config)) + _canonical(quantization)
    # Optimizers with their own kernels bypass torch's count of writes, so trainable tensors are always read.
    is_frozen = not any(tensor.requires_grad for _, tensor in tensors)
    state = described, [(name, WeakIdRef(t), t.data_ptr(), t._version) for name, t in tensors if is_frozen]
    if is_frozen and _last_read is not None and _last_read[0] == state:
        return _last_read[1]
    digest = hashlib.blake2b(described, digest_size=32)
    for name, tensor in tensors:
        digest.update(name.encode())
        hash_tensor(digest, whole(model, tensor))
        quantized = getattr(tensor, "quant_state", None)
        if quantized is not None:
            for key, value in sorted(quantized.as_dict().items()):
                digest.update(f"{name}.{key}".encode())
                hash_tensor(digest, value if isinstance(value, Tensor) else torch.tensor(list(repr(value).encode())))
    if is_frozen:
        _last_read = state, digest.hexdigest()
    return digest.hexdigest()


def trained_digest(model: nn.Module) -> str:
    """Digest of the tensors that train: an adapter that has no effect yet does not show in the policy's identity."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            digest.update(name.encode())
            hash_tensor(digest, parameter)
    return digest.hexdigest()


def _without_volatile(config: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_volatile(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _VOLATILE_CONFIG_KEYS
    }


def _base_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The base's weights under their names without peft, tied ones once.

    Buffers that are saved with a model, such as a router's correction bias, are weights too.
    """
    seen: set[int] = set()
    tensor: Tensor
    for name, tensor in model.named_parameters():
        plain = plain_name(name)
        if plain is None or id(tensor) in seen or _PLACE_OF_HEAD in name:
            continue
        seen.add(id(tensor))
        yield plain, tensor
    saved = model.state_dict().keys()
    for name, tensor in model.named_buffers():
        if name in saved and (plain := plain_name(name)) is not None:
            yield plain, tensor
    for name, module in model.named_modules():
        if (scales := row_scales(module)) is not None:
            yield f"{plain_name(name)}.scales", scales


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()
