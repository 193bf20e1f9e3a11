"""NF4 that is made while a model loads, of linear layers and of stacked experts, and plain weights again from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from alignment.config.schema import QuantizationConfig
from alignment.errors import require
from alignment.kernels.calibrated import CalibratedState, quantised_state
from alignment.kernels.eight_bit import row_scales, unpack_rows, use_weights_alone
from alignment.policy.stored import Checkpoint
from alignment.policy.targets import read_layers, router_layers

# Weights that the forward of state-space layers reads raw: packed to 4 bit they crash or lose their gradient.
NEVER_QUANTIZED = ["out_proj", "x_proj", "dt_proj", "lm_head"]
"""Modules that every quantised model leaves as they are; `unquantised` adds those that one architecture reads."""

_LARGEST = 2**31
"""bitsandbytes counts the values of a tensor in 32 bits."""


def unquantised(model: nn.Module) -> list[str]:
    """Names of the modules that a quantised model leaves as they are.

    Beside `NEVER_QUANTIZED` these are layers whose weights the model's own code reads, by the last part of their names,
    and linear layers that choose or weigh experts.

    Args:
        model: with or without its weights.
    """
    read = {name.rpartition(".")[2] for name in read_layers(model)}
    return [*NEVER_QUANTIZED, *sorted(read - set(NEVER_QUANTIZED)), *router_layers(model)]


def load_arguments(
    found: Checkpoint,
    quantization: QuantizationConfig | None,
    compute: torch.dtype,
    plain: Sequence[str] = NEVER_QUANTIZED,
) -> dict[str, Any]:
    """What `from_pretrained` is told about quantisation; where the checkpoint's own counts, nothing.

    Args:
        compute: dtype that NF4 layers compute in.
        plain: names of the modules that are left as they are.
    """
    if found.is_dequantised:
        from transformers.quantizers.auto import AutoQuantizationConfig

        return {"quantization_config": AutoQuantizationConfig.from_dict({**found.settings, "dequantize": True})}
    if found.method or quantization is None:
        return {}
    return {"quantization_config": _nf4(quantization, compute, plain)}


def _nf4(quantization: QuantizationConfig, compute: torch.dtype, plain: Sequence[str]) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=quantization.double,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=list(plain),
    )


def _is_among(name: str, plain: Sequence[str]) -> bool:
    """Whether a module of this name is left as it is, as transformers compares names."""
    return any(name.endswith(pattern) or name.startswith(f"{pattern}.") for pattern in plain)


# Stacked experts


def is_stack(name: str, module: nn.Module, parameter: Any) -> bool:
    """Whether a parameter holds the weights of all experts of a mixture, (experts, ., .).

    Args:
        name: of the parameter in its model; or of the module alone.
    """
    if parameter is None or parameter.ndim != 3 or not parameter.is_floating_point() or name.endswith("bias"):
        return False
    return parameter.numel() < _LARGEST and "expert" in f"{type(module).__name__}.{name}".lower()


def stacks(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(full name, module, name in the module) of every stack of experts that is not packed."""
    for path, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            if is_stack(f"{path}.{leaf}", module, parameter):
                yield f"{path}.{leaf}", module, leaf


def _packed(weight: Tensor, double: bool, dtype: torch.dtype, device: torch.device) -> Any:
    """A weight of any shape as bitsandbytes packs it, unpacked to `dtype`."""
    from bitsandbytes.nn import Params4bit

    made: Any = Params4bit(weight.detach(), requires_grad=False, compress_statistics=double, quant_type="nf4")
    made = made.to(device)
    made.quant_state.dtype = dtype
    return made


@contextmanager
def packing_experts(double: bool) -> Iterator[None]:
    """Let transformers pack stacked experts as it loads them, one stack at a time, as it does with linear layers."""
    from transformers.quantizers import auto

    own = auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"]
    auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] = _with_experts(own, double)
    try:
        yield
    finally:
        auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] = own


def _with_experts(own: Any, double: bool) -> Any:
    from transformers.core_model_loading import ConversionOps

    def stack_at(model: nn.Module, name: str) -> bool:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        return is_stack(name, module, module._parameters.get(leaf))

    class Pack(ConversionOps):
        def __init__(self, layers: ConversionOps) -> None:
            self._layers = layers

        def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
            model, made = kwargs["model"], {}
            for name, value in input_dict.items():
                weight = value[0] if isinstance(value, list) else value
                if stack_at(model, name):
                    if weight.shape != model.get_parameter(name).shape:
                        raise ValueError(f"{name} has another size in the files than in the model")
                    made[name] = _packed(weight, double, model.get_parameter(name).dtype, weight.device)
                else:
                    made |= self._layers.convert({name: value}, *args, **kwargs)
            return made

    class WithExperts(own):
        def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
            if super().param_needs_quantization(model, param_name, **kwargs):
                return True
            return not self.pre_quantized and stack_at(model, param_name)

        def get_quantize_ops(self) -> Any:
            return Pack(super().get_quantize_ops())

    return WithExperts


def pack_model(model: Any, quantization: QuantizationConfig, compute: torch.dtype, device: torch.device) -> None:
    """Pack a plain model that is in main memory into NF4 on its device, weight by weight, as loading in NF4 would.

    For checkpoints that transformers can only turn into plain weights.
    """
    from bitsandbytes.nn import Linear4bit
    from transformers.quantizers.auto import AutoHfQuantizer

    plain = unquantised(model)
    for name, layer in [(n, m) for n, m in model.named_modules() if type(m) is nn.Linear]:
        if _is_among(name, plain) or layer is model.get_output_embeddings():
            continue
        packed: Any = Linear4bit(
            layer.in_features, layer.out_features, False, compute, quantization.double, "nf4", device="meta"
        )
        packed.bias = layer.bias
        packed.weight = _packed(layer.weight, quantization.double, layer.weight.dtype, device)
        packed.source_cls = nn.Linear
        model.set_submodule(name, packed)
    for _, module, leaf in list(stacks(model)):
        weight = module._parameters[leaf]
        assert weight is not None
        module._parameters[leaf] = _packed(weight, quantization.double, weight.dtype, device)
    model.to(device)
    settings = _nf4(quantization, compute, plain)
    model.hf_quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=False)
    model.config.quantization_config = settings
    model.quantization_method = settings.quant_method
    model.is_quantized = model.is_loaded_in_4bit = True


def settle_compute(model: nn.Module, dtype: torch.dtype) -> None:
    """Have the 4-bit layers of a checkpoint compute in the run's dtype; the checkpoint keeps that of its making.

    Its layers in 8 bits compute in the dtype of their inputs.
    """
    for module in model.modules():
        use_weights_alone(module)
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None and hasattr(module, "compute_dtype"):
            module.compute_dtype, module.compute_type_is_set = dtype, True  # type: ignore[assignment]
            state.dtype = dtype


# Plain weights again, for a merge


def plain_weight(layer: Any, name: str = "weight") -> Tensor:
    """(out, in) of a linear layer, or a stack of experts: a weight as it is stored, unpacked, in fp32.

    Raises:
        UserError: it is stored in a form that cannot be unpacked.
    """
    weight = layer._parameters.get(name)
    require(
        weight is not None and (weight.is_floating_point() or is_packed_by_bitsandbytes(weight)),
        f"export.merge=true: the weights of a {type(layer).__name__} cannot be unpacked: set export.merge=false and "
        f"use the adapter on its base.",
    )
    state = getattr(weight, "quant_state", None)
    if state is not None:
        from bitsandbytes.functional import dequantize_4bit

        unpacked = dequantize_4bit(weight.data, state).float()
        constants = quantised_state(layer) if name == "weight" else None
        return constants.add_to(unpacked) if isinstance(constants, CalibratedState) else unpacked
    if (scales := row_scales(layer)) is not None:
        return unpack_rows(weight, scales)
    return weight.detach().float()


def is_packed_by_bitsandbytes(weight: Any) -> bool:
    """Whether a weight is in 4 or 8 bits of bitsandbytes."""
    return getattr(weight, "quant_state", None) is not None or weight.dtype is torch.int8


def without_packing(model: Any, dtype: torch.dtype) -> Any:
    """A model that was loaded packed, in plain weights that can be written; any other one as it is."""
    if not getattr(model, "is_quantized", False):
        return model
    model = model.dequantize(dtype)
    del model._weight_conversions  # how its files were read, which has no way back; the architecture's own remain
    return model
