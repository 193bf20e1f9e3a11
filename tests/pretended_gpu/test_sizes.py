"""Bytes that a layer keeps and moves at the sizes of real models, counted on the meta device, with fused kernels."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from alignment.kernels import attention, linear
from alignment.kernels.attention import enable_shared_prompts
from alignment.kernels.base import is_patched
from alignment.kernels.fused import Fused
from alignment.kernels.patch import patch_layers
from alignment.policy.layers import decoder_layers
from alignment.scoring.layout import MicroBatch, SharedLayout, keys_per_position
from alignment.scoring.logps import enable_scoring
from alignment.training.layer_memory import layer_of
from alignment.training.qwen3_table import QWEN3, QWEN3_ALIKE
from alignment.types import Group
from tests.conftest import tiny_config
from tests.pretended_gpu.device import tensors_in

VALUE = torch.bfloat16
POSITIONS = 16384
SIZES = ("Qwen3-1.7B", "Qwen3-8B")


@pytest.fixture(autouse=True)
def _on_a_gpu(monkeypatch):
    """The meta device takes the routes of a GPU in 16 bits, as inside autocast."""
    autocast, enabled = torch.autocast, torch.is_autocast_enabled
    monkeypatch.setattr(attention, "_has_flash_kernel", lambda q: True)
    monkeypatch.setattr(linear, "_is_gpu", lambda x: True)
    monkeypatch.setattr(
        torch, "autocast", lambda kind, *a, **k: contextlib.nullcontext() if kind == "meta" else autocast(kind, *a, **k)
    )
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *a: a != ("meta",) and enabled(*a))


def layers_of(size: str, count: int) -> Any:
    """The first layers of a Qwen3 with an adapter, patched; by a tiny model, since meta tensors cannot be compared."""
    config = AutoConfig.for_model("qwen3", **(QWEN3[size] | {"num_hidden_layers": count}), **QWEN3_ALIKE)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    model, tiny = (
        get_peft_model(m.to(VALUE).requires_grad_(False), LoraConfig(r=32, target_modules="all-linear")).to(VALUE)
        for m in (model, AutoModelForCausalLM.from_config(tiny_config(num_hidden_layers=count)))
    )
    enable_scoring(model.get_base_model())
    patch_layers(tiny)
    kinds = {name: type(module) for name, module in tiny.named_modules() if is_patched(module)}
    assert len(kinds) == count * (7 + 4 + 1 + 1) + 1  # linear layers, norms, MLP, attention; the last norm
    for name, module in model.named_modules():
        if name in kinds:
            module.__class__ = kinds[name]
    enable_shared_prompts(model.get_base_model())
    return model.train()


def row_of(prompt: int, answers: tuple[int, ...]) -> tuple[MicroBatch, float]:
    """A pass of groups with these lengths, and its keys per position."""
    rng = np.random.default_rng(0)

    def tokens(length: int) -> np.ndarray:
        return rng.integers(0, 1000, length).astype(np.int32)

    groups = [Group(tokens(prompt), tuple(tokens(n) for n in answers))] * (POSITIONS // (prompt + sum(answers)))
    groups = [Group(np.roll(g.prompt, i), g.completions) for i, g in enumerate(groups)]
    (batch,) = SharedLayout().batches(groups, POSITIONS)
    return batch, keys_per_position(SharedLayout(), groups)


def run(model: Any, batch: MicroBatch) -> Tensor:
    """The last hidden states of a pass."""
    on_meta = batch.to(torch.device("meta"))
    return (
        model.get_base_model()
        .model(
            input_ids=on_meta.input_ids,
            position_ids=on_meta.position_ids,
            shared_row=batch.shared_row,
            attention_mask=torch.zeros(1, 1, 1, 1, dtype=torch.long, device="meta"),
            use_cache=False,
        )
        .last_hidden_state
    )


def kept_bytes(model: Any, batch: MicroBatch) -> int:
    """What a forward pass leaves for the backward pass: storages once, weights not."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, Any] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # held, so that no address is given out twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run(model, batch)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("prompt", "answers"), [(180, (330, 330)), (768, (128, 128)), (1500, (100, 100)), (1500, (100,) * 4)]
)
def test_kept_bytes_are_those_of_the_plan(size, prompt, answers):
    batch, keys = row_of(prompt, answers)
    totals = [kept_bytes(layers_of(size, count), batch) for count in (1, 2)]
    found = (totals[1] - totals[0]) / batch.input_ids.numel()
    layer, hidden = decoder_layers(layers_of(size, 1))[0], QWEN3[size]["hidden_size"]
    planned = layer_of(layer, hidden, VALUE.itemsize, 0, True, False, keys).saved
    assert found == pytest.approx(planned, rel=0.02)  # rows in the adapters' own width are not planned
    if len(answers) == 2:  # what `alignment.plan` says without the data
        assert found == pytest.approx(layer_of(layer, hidden, VALUE.itemsize, 0, True, False).saved, rel=0.1)


PRODUCTS = {"mm", "addmm_", "_flash_attention_forward", "_flash_attention_backward"}
_VIEWS = {"view", "detach", "transpose", "slice", "expand", "alias", "squeeze", "unsqueeze", "split", "select", "t"}
_VIEWS |= {"empty", "permute", "unbind", "_reshape_alias", "_unsafe_view", "empty_like", "split_with_sizes"}
_VIEWS |= {"new_empty", "promote_types"}


@dataclass
class Traffic(TorchDispatchMode):
    """Bytes that operations read and write, by name, and the floating-point operations of products.

    A fused operation reads its arguments and writes its results, whatever the eager one in its place does.
    """

    moved: collections.Counter[str] = field(default_factory=collections.Counter)
    flops: collections.Counter[str] = field(default_factory=collections.Counter)
    calls: collections.Counter[str] = field(default_factory=collections.Counter)
    fusing: bool = False

    def __post_init__(self) -> None:
        super().__init__()

    def note(self, name: str, *values: Any) -> None:
        """Count one operation on these arguments and results."""
        self.moved[name] += sum(x.nbytes for x in tensors_in(values))
        self.calls[name] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if not self.fusing and name not in _VIEWS:
            if name == "copy_":
                self.note(name, args)
            else:
                self.note(name, args, kwargs or {}, out)
            if name in ("mm", "addmm_"):
                left, right = args[-2:]
                self.flops[name] += 2 * left.numel() * right.shape[1]
        return out

    @contextlib.contextmanager
    def fused(self, patch: pytest.MonkeyPatch | None) -> Iterator[None]:
        """Inside, operations that have a fused kernel count as that; without a patch they count as they are."""
        if patch is None:
            yield
            return

        def call(operation: Fused[Any], *args: Any) -> Any:
            self.fusing = True
            out = operation.eager(*args)
            self.fusing = False
            self.note(operation.name, args, out)
            return out

        with patch.context() as inside:
            inside.setattr(Fused, "__call__", call)
            yield


def traffic_of(size: str, batch: MicroBatch, patch: pytest.MonkeyPatch | None) -> tuple[Any, Any, Any]:
    """(bytes, operations, calls) of one layer's forward and backward pass."""
    found = []
    for count in (1, 2):
        model = layers_of(size, count)
        traffic = Traffic()
        with traffic.fused(patch), traffic:
            run(model, batch).sum().backward()
        found.append((traffic.moved, traffic.flops, traffic.calls))
    return tuple(collections.Counter({k: b[k] - a[k] for k in b if b[k] != a[k]}) for a, b in zip(*found, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_moved_bytes(size, monkeypatch):
    """Fused, all beside the products moves a third of its bytes, and frozen weights have two products, not three.

    A kernel more in every layer is a launch of about 5 microseconds more, in 28 or 36 layers.
    """
    batch, _ = row_of(180, (330, 330))
    positions = batch.input_ids.numel()
    (eager, *_), (fused, flops, calls) = (traffic_of(size, batch, patch) for patch in (None, monkeypatch))
    beside, before = (sum(n for name, n in moved.items() if name not in PRODUCTS) for moved in (fused, eager))
    assert beside <= 0.3 * before
    weights = sum(p.numel() for n, p in decoder_layers(layers_of(size, 1))[0].named_parameters() if "base_layer" in n)
    assert sum(flops.values()) == pytest.approx(2 * 2 * weights * positions, rel=0.1)
    assert sum(calls.values()) <= 125
