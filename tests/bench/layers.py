"""One decoder layer, forward and backward: patched against peft's own layers, in time and in bytes kept for backward.

    python -m tests.bench.layers [--tokens 1000] [--repetitions 9] [--nf4]

The layer has the shape of SmolLM2-135M's, random weights in fp32 and LoRA r=16 on all its linear layers. Both forms run
in turns in one process, on the threads that OMP_NUM_THREADS gives; the table shows the fastest and the median of each.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

from alignment.kernels.patch import patch_layers

SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "num_hidden_layers": 2,
    "vocab_size": 64,
    "head_dim": 64,
    "max_position_embeddings": 8192,
}


def adapted_model(kind: str, settings: dict[str, Any], dtype: torch.dtype, nf4: bool = False, r: int = 16) -> nn.Module:
    """A random frozen model with an adapter that has an effect."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).to(dtype)
    model.requires_grad_(False)
    if nf4:
        quantise(model, dtype)
    model = get_peft_model(model, LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return model


def quantise(model: nn.Module, dtype: torch.dtype) -> None:
    """Put NF4 layers in place of all linear layers but the head."""
    from bitsandbytes.nn import Linear4bit

    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            layer = Linear4bit(
                module.in_features,
                module.out_features,
                bias=module.bias is not None,
                compute_dtype=dtype,
                quant_type="nf4",
                compress_statistics=True,
            )
            layer.load_state_dict(module.state_dict())
            layer.support_avx512bf16_for_cpu = False
            model.set_submodule(name, layer.to("cpu").requires_grad_(False))
    model.is_loaded_in_4bit = True  # type: ignore[assignment]  # what peft asks for


class Saved:
    """Within it, `num_bytes` grows by the storage of every tensor that autograd keeps, each once, without weights."""

    def __init__(self, model: nn.Module) -> None:
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
        self._kept: list[Tensor] = []
        self.num_bytes = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self._kept.append(tensor)  # or its memory might be given to the next one
            self.num_bytes += storage.nbytes()
        return tensor

    def __enter__(self) -> Saved:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)


class Layer:
    """The second decoder layer of a model, with what a call of it needs."""

    def __init__(self, model: nn.Module, num_tokens: int) -> None:
        base = model.get_base_model().model  # type: ignore[operator, union-attr]
        self._layer: Any = base.layers[1]  # type: ignore[index, union-attr]
        x = torch.randn(1, num_tokens, base.config.hidden_size, generator=torch.Generator().manual_seed(1))  # type: ignore[union-attr, arg-type]
        self._positions = base.rotary_emb(x, torch.arange(num_tokens)[None])  # type: ignore[operator, union-attr]
        self.x = x.requires_grad_()
        self.gradient = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))

    def forward(self) -> Tensor:
        """(1, tokens, hidden size)."""
        return self._layer(self.x, position_embeddings=self._positions, attention_mask=None)

    def step(self) -> float:
        """Seconds of one forward and backward."""
        started = time.perf_counter()
        self.forward().backward(self.gradient)
        return time.perf_counter() - started


def compare(num_tokens: int, repetitions: int, nf4: bool) -> dict[str, dict[str, float]]:
    """Milliseconds, fastest and median, and KiB kept per token, of "peft" and of "patched"."""
    model = adapted_model("llama", SHAPE, torch.float32, nf4)
    patched = copy.deepcopy(model)
    patch_layers(patched)
    layers = {"peft": Layer(model, num_tokens), "patched": Layer(patched, num_tokens)}
    kept = {}
    for (name, layer), whole in zip(layers.items(), (model, patched), strict=True):
        with Saved(whole) as saved:
            output = layer.forward()
        output.backward(layer.gradient)
        kept[name] = saved.num_bytes / num_tokens / 1024
    times: dict[str, list[float]] = {name: [] for name in layers}
    for _ in range(repetitions):
        for name, layer in layers.items():
            times[name].append(1e3 * layer.step())
    return {
        name: {"ms": min(times[name]), "median ms": statistics.median(times[name]), "KiB/token": kept[name]}
        for name in layers
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--nf4", action="store_true")
    arguments = parser.parse_args()
    found = compare(arguments.tokens, arguments.repetitions, arguments.nf4)
    for key in found["peft"]:
        peft, patched = found["peft"][key], found["patched"][key]
        print(f"{key:>10}  peft {peft:8.2f}  patched {patched:8.2f}  patched/peft {patched / peft:.2f}")


if __name__ == "__main__":
    main()
