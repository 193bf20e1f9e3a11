"""The policy: a causal LM, its quantisation, its adapter, and a fingerprint of what it computes."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdRef

from alignment.config import AdapterConfig, Device, Dtype, ModelConfig, QuantizationConfig
from alignment.errors import UserError
from alignment.lean import make_lean
from alignment.logps import check_scoring, enable_scoring
from alignment.wheel_model import PREFIX, wheel_model_folder

# Weights that the forward of state-space layers reads raw: packed to 4 bit they crash or lose their gradient.
NEVER_QUANTIZED = ["out_proj", "x_proj", "dt_proj", "lm_head"]
"""Names of modules that stay as they are in a quantised model."""

# None of them has a part in a log-prob; trainers write the tokenizer's special tokens and a router's loss into the
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
}


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") + "."


def resolve_device(device: Device) -> torch.device:
    """The device to train on.

    Raises:
        UserError: `device=cuda` without a visible GPU.
    """
    if device is Device.cuda and not torch.cuda.is_available():
        raise UserError(
            "This run needs a CUDA GPU and torch sees none: run it on a machine with one, or try recipe=quickstart, "
            "which needs only a CPU."
        )
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
    if config.name.startswith(PREFIX):
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
        path = Path(config.chat_template)
        if not path.is_file():
            raise UserError(f"model.chat_template: the file {path} does not exist.")
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(
    config: ModelConfig, quantization: QuantizationConfig | None, source: str, device: torch.device
) -> nn.Module:
    """Load the base model, quantised if asked, every weight frozen, able to score completions.

    Embeddings, norms and the head keep the model's dtype: casting them to fp32 would cost gigabytes and buy nothing.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = resolve_dtype(config.dtype, device)
    quantization_config = None
    if quantization is not None:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise UserError("quantization=nf4 needs the package bitsandbytes: install it, or set quantization=none.")
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
            f"model.name={config.name} cannot be loaded with model.attention={config.attention}: {_line(error)}"
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


def attach_adapter(model: nn.Module, config: AdapterConfig | None, seed: int) -> nn.Module:
    """Put a fresh LoRA adapter on the model, or free all weights for full fine-tuning."""
    if config is None:
        make_lean(model.requires_grad_(True))
        return model
    from peft import LoraConfig, get_peft_model

    target = config.target_modules[0] if config.target_modules == ["all-linear"] else config.target_modules
    lora = LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=target,
        init_lora_weights=True if config.init == "default" else config.init,  # type: ignore[arg-type]
        use_rslora=config.rslora,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # the same adapter whatever was drawn before, also when a run is resumed
        try:
            adapted = get_peft_model(model, lora)
        except (ValueError, TypeError) as error:
            raise UserError(f"adapter: {_line(error)}") from error
    make_lean(adapted)
    return adapted


def load_adapter(model: nn.Module, folder: Path) -> nn.Module:
    """Put a saved adapter on the base model, trainable; one of the same form that it has takes on the weights."""
    from peft import PeftModel

    if isinstance(model, PeftModel):
        model.load_adapter(str(folder), model.active_adapter, is_trainable=True, torch_device=str(model.device))
        return model
    adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    make_lean(adapted)
    return adapted


def is_adapted(model: nn.Module) -> bool:
    """Whether the model carries a peft adapter."""
    from peft import PeftModel

    return isinstance(model, PeftModel)


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout to 0: a policy whose log-probs are compared with a reference must be a function."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            # Attention, layer-drop and router noise have no module: their rate is a number that the forward reads.
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(module, name, 0.0)


def policy_identity(model: nn.Module) -> tuple[str, dict[str, Any]]:
    """Fingerprint of what the model computes: base weights, quantisation, compute dtype and effective adapters.

    An adapter whose update is zero (every fresh LoRA) leaves no trace, so its rank, scaling and seed do not matter.

    Returns:
        (64 hex digits, a description for people).
    """
    adapter = hashlib.blake2b(digest_size=32)
    num_adapted = 0
    config = model.config.to_dict()
    quantization = config.pop("quantization_config", None)
    for name, scaling, *weights in _updates(model):
        num_adapted += 1
        adapter.update(f"{name}:{scaling!r}".encode())
        for weight in weights:
            _update(adapter, weight)
    digests = {
        "base": _base_digest(model, config, quantization),
        "adapter": adapter.hexdigest() if num_adapted else None,
    }
    identity = hashlib.blake2b(_canonical(digests), digest_size=32).hexdigest()
    description = {
        "model": config.get("_name_or_path", ""),
        "model_type": config.get("model_type", ""),
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": "nf4" if quantization else "none",
        **digests,
    }
    return identity, description


_last_read: tuple[Any, str] | None = None


def _base_digest(model: nn.Module, config: dict[str, Any], quantization: Any) -> str:
    """Digest of the base. A frozen one takes seconds to read and is read once: until somebody writes to its tensors."""
    global _last_read
    tensors = list(_base_tensors(model))
    described = _canonical(_lasting(config)) + _canonical(quantization)
    # Optimizers with kernels of their own write past torch's count of writes: what trains is always read.
    is_frozen = not any(tensor.requires_grad for _, tensor in tensors)
    state = described, [(name, WeakIdRef(t), t.data_ptr(), t._version) for name, t in tensors]
    if is_frozen and _last_read is not None and _last_read[0] == state:
        return _last_read[1]
    digest = hashlib.blake2b(described, digest_size=32)
    for name, tensor in tensors:
        digest.update(name.encode())
        _update(digest, tensor)
        quantized = getattr(tensor, "quant_state", None)
        if quantized is not None:
            for key, value in sorted(quantized.as_dict().items()):
                digest.update(f"{name}.{key}".encode())
                _update(digest, value if isinstance(value, Tensor) else torch.tensor(list(repr(value).encode())))
    if is_frozen:
        _last_read = state, digest.hexdigest()
    return digest.hexdigest()


def _lasting(config: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _lasting(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _VOLATILE_CONFIG_KEYS
    }


def _updates(model: nn.Module) -> Iterator[tuple[str, float, Tensor, Tensor]]:
    """(layer, scaling, A, B) of every active LoRA update that is not zero, on linear layers and on embeddings."""
    from peft.tuners.lora import LoraLayer

    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        for key in layer.active_adapters:
            if key in layer.lora_A:
                a, b = layer.lora_A[key].weight, layer.lora_B[key].weight
            elif key in layer.lora_embedding_A:
                a, b = layer.lora_embedding_A[key], layer.lora_embedding_B[key]
            else:
                continue
            if a.any() and b.any():
                yield name, layer.scaling[key], a, b  # type: ignore[misc]


def _base_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights without the adapter's, under the names they have without peft, tied ones once.

    Buffers that are saved with a model (a router's correction bias) are weights too.
    """
    seen: set[int] = set()
    tensor: Tensor
    for name, tensor in model.named_parameters():
        if ".lora_" in name or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        yield name.removeprefix("base_model.model.").replace(".base_layer.", "."), tensor
    saved = model.state_dict().keys()
    for name, tensor in model.named_buffers():
        if name in saved:
            yield name.removeprefix("base_model.model.").replace(".base_layer.", "."), tensor


def _update(digest: Any, tensor: Tensor) -> None:
    digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
    digest.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data)


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()


def starts_at_base(model: nn.Module) -> bool:
    """Whether switching the adapter off gives the same policy: every update is zero and the base was not edited."""
    if not is_adapted(model):
        return False
    if any(config.init_lora_weights not in (True, "gaussian") for config in model.peft_config.values()):
        return False
    return next(_updates(model), None) is None


class FrozenStart:
    """The policy as it is now, kept beside the one that trains: the live reference, which `mix` moves.

    With a fresh LoRA that is the base with the adapter off; with a trained adapter frozen tensors that take the places
    of the adapter's own while the reference is asked; without an adapter a copy of the whole model.

    A mixed adapter is exact in weight space. Mixing A with A and B with B would mix their products wrongly, so that
    updates are laid side by side instead: for the shares s_i of the updates B_i A_i that were met,
    sum_i s_i B_i A_i = [s_1 B_1, s_2 B_2, ...] [A_1; A_2; ...]. The rank grows by the policy's with every mix, until
    the oldest share is lost in rounding and its update is dropped: 17 times the rank for a mix of 0.6 in fp32.

    Attributes:
        kind: which of these it is, in words.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._copy: nn.Module | None = None
        self._adapter: dict[str, nn.Parameter] = {}
        self._shares: list[float] = []
        if not is_adapted(model):
            self.kind = "copy of the model"
            self._copy = copy.deepcopy(model).requires_grad_(False)
            del self._copy.forward  # bound to the original: the copy needs its own
            enable_scoring(self._copy)
        elif starts_at_base(model):
            self.kind = "adapter switched off"
        else:
            self.kind = "frozen copy of the adapter"
            self.mix(1.0)

    @torch.no_grad()
    def mix(self, share: float) -> None:
        """Become `share` times the policy as it is now, and 1 - share times what this was."""
        if self._copy is not None:
            for parameter, trained in zip(self._copy.parameters(), self._model.parameters(), strict=True):
                parameter.lerp_(trained, share)
            return
        own = {name: p.detach() for name, p in self._model.named_parameters() if p.requires_grad}
        shares = [old * (1 - share) for old in self._shares]
        least = torch.finfo(next(iter(own.values())).dtype).eps
        lost = next((i for i, old in enumerate(shares) if old >= least), len(shares))
        self._shares = [*shares[lost:], share]
        for name, tensor in own.items():
            is_up = ".lora_B." in name or ".lora_embedding_B." in name
            parts = [share * tensor if is_up else tensor.clone()]
            if len(self._shares) > 1:
                axis = 1 if is_up else 0
                gone = lost * tensor.shape[axis]
                kept = self._adapter[name].narrow(axis, gone, self._adapter[name].shape[axis] - gone)
                parts.insert(0, (1 - share) * kept if is_up else kept)
            self._adapter[name] = nn.Parameter(torch.cat(parts, 1 if is_up else 0), requires_grad=False)

    @contextmanager
    def active(self) -> Iterator[nn.Module]:
        """The model to score the reference with."""
        if self._copy is not None:
            yield self._copy
        elif not self._adapter:
            with self._model.disable_adapter():
                yield self._model
        else:
            own = self._put(self._adapter)
            try:
                yield self._model
            finally:
                self._put(own)

    def _put(self, tensors: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Put tensors in their places in the model; returns those that were there."""
        replaced = {}
        for name, tensor in tensors.items():
            place, _, key = name.rpartition(".")
            module = self._model.get_submodule(place)
            replaced[name] = module._parameters[key]
            module._parameters[key] = tensor
        return replaced  # type: ignore[return-value]

    def state(self) -> dict[str, Tensor]:
        """What `load_state` needs to make this again of a model with the same start."""
        if self._copy is not None:
            return {name: p.detach() for name, p in self._copy.named_parameters()}
        return {**self._adapter, "shares": torch.tensor(self._shares, dtype=torch.float64)}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Become what `state` was taken from."""
        if self._copy is not None:
            for name, parameter in self._copy.named_parameters():
                parameter.copy_(state[name])
            return
        self._shares = state["shares"].tolist()
        device = next(self._model.parameters()).device
        self._adapter = {
            name: nn.Parameter(tensor.to(device), requires_grad=False)
            for name, tensor in state.items()
            if name != "shares"
        }

    def close(self) -> None:
        """Drop the copy."""
        self._copy = None
        self._adapter = {}


def check_adapter_gradients(model: nn.Module) -> None:
    """After a backward pass: every trainable tensor has a gradient.

    Raises:
        UserError: some have none, as where a fused kernel reads a layer's weight past its adapter.
    """
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if missing:
        raise UserError(
            f"{len(missing)} trainable tensors received no gradient (the first: {missing[0]}): take these layers out "
            f"of adapter.target_modules, their adapter would never learn."
        )


def save_policy(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Save the adapter (or the whole model without one) as safetensors, with the tokenizer and its template."""
    model.save_pretrained(str(folder), safe_serialization=True)
    tokenizer.save_pretrained(str(folder))
