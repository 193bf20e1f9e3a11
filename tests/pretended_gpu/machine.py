"""A machine with one or more pretended GPUs: what torch and the libraries say and do on it."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import peft.utils.save_and_load
import safetensors.torch
import torch
import trl  # noqa: F401  # while it can see that there is no GPU
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import alignment.config.gpu
import alignment.kernels.attention
from alignment.kernels import fused, log_probs, mlp, nf4, norm, rotary
from alignment.kernels.fused import Fused
from tests.helpers.flash import stands_in
from tests.pretended_gpu.device import GPU, WAITS, GPUFunctions, GPUTensor, module_to_gpu, to_gpu, to_host, wait

NAME = "Pretended GPU"
_autocast = torch.autocast


class _Autocast(_autocast):  # type: ignore[misc, valid-type]
    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


def flash_reference(q: Tensor, k: Tensor, v: Tensor, lengths: Any, scale: float) -> Tensor:
    """What torch's flash kernel for variable lengths computes: each sequence alone, causal, aligned at its end.

    Args:
        q: (queries, H, D), 16 bits.
        k, v: (keys, H_kv, D).
        lengths: with (sequences + 1,) int32 each, where each sequence starts, and the end; and the longest sequence.
        scale: of the products.
    """
    ends_q, ends_k = lengths.query_ends, lengths.key_ends
    assert ends_q.dtype is ends_k.dtype is torch.int32 and ends_q.is_contiguous() and ends_k.is_contiguous()
    assert all(isinstance(x, GPUTensor) for x in (q, k, v, ends_q, ends_k))
    assert q.is_contiguous() and k.is_contiguous() and v.is_contiguous()
    assert q.dtype is k.dtype is v.dtype and q.dtype in (torch.bfloat16, torch.float16)
    found = []
    queries, keys = (to_host(ends).tolist() for ends in (ends_q, ends_k))
    for q_start, q_end, k_start, k_end in zip(queries, queries[1:], keys, keys[1:], strict=False):
        own, seen, values = q[q_start:q_end], k[k_start:k_end], v[k_start:k_end]
        assert 0 < len(own) <= lengths.most_queries and len(own) <= len(seen) <= lengths.most_keys
        seen, values = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (seen, values))
        products = torch.einsum("qhd,khd->hqk", own.float(), seen.float()) * scale
        late = torch.ones(len(own), len(seen), dtype=torch.bool, device=q.device).triu(len(seen) - len(own) + 1)
        weights = products.masked_fill(late, float("-inf")).softmax(-1)
        found.append(torch.einsum("hqk,khd->qhd", weights, values.float()))
    return torch.cat(found).to(q.dtype)


def _cuda(capability: tuple[int, int], memory: int, count: int) -> dict[str, Any]:
    """What torch.cuda has."""
    properties = types.SimpleNamespace(name=NAME, total_memory=memory, major=capability[0], minor=capability[1])
    event = mock.MagicMock()
    event.return_value.synchronize = lambda: wait("synchronize")
    stream = types.SimpleNamespace(
        synchronize=lambda: wait("synchronize"), wait_event=lambda e: None, wait_stream=lambda s: None
    )
    return {
        "is_available": lambda: True,
        "is_bf16_supported": lambda *a, **k: capability >= (8, 0),
        "device_count": lambda: count,
        "current_device": lambda: 0,
        "set_device": lambda *a: None,
        "get_arch_list": lambda: ["sm_80", "sm_90"],
        "get_device_name": lambda *a: NAME,
        "get_device_capability": lambda *a: capability,
        "get_device_properties": lambda *a: properties,
        "mem_get_info": lambda *a: (memory, memory),
        "memory_allocated": lambda *a: 0,
        "memory_reserved": lambda *a: 0,
        "max_memory_allocated": lambda *a: 0,
        "max_memory_reserved": lambda *a: 0,
        "reset_peak_memory_stats": lambda *a: None,
        "empty_cache": lambda: None,
        "synchronize": lambda *a: wait("synchronize"),
        "current_stream": lambda *a: stream,
        "Event": event,
        "manual_seed": lambda *a: None,
        "manual_seed_all": lambda *a: None,
        "get_rng_state": lambda *a: torch.get_rng_state(),
        "set_rng_state": lambda *a: None,
    }


def _libraries() -> Iterator[tuple[Any, str, Any]]:
    """(owner, name, value) of what would reach for CUDA in C++."""
    load = AutoModelForCausalLM.from_pretrained.__func__  # type: ignore[attr-defined]
    module_to = nn.Module.to
    load_file = peft.utils.save_and_load.safe_load_file
    flatten = safetensors.torch._flatten_as_ptr
    engine = torch.autograd.graph._engine_run_backward
    enabled, autocast_dtype = torch.is_autocast_enabled, torch.get_autocast_dtype
    set_autocast = torch.set_autocast_enabled

    def from_pretrained(cls: Any, *args: Any, device_map: Any = None, **kwargs: Any) -> Any:
        with mock.patch.object(torch.cuda, "is_available", return_value=False):
            loaded = load(cls, *args, **kwargs)
        if device_map is not None and torch.device(next(iter(device_map.values()))).type == "cuda":
            module_to_gpu(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    def to(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        if device is None or device.type != "cuda":
            return module_to(self, *args, **kwargs)
        module_to_gpu(self)
        return self if dtype is None else module_to(self, dtype)

    def read(path: Any, device: Any = "cpu", **kwargs: Any) -> dict[str, Tensor]:
        tensors = load_file(path, device="cpu", **kwargs)
        return tensors if torch.device(device).type == "cpu" else {n: to_gpu(t) for n, t in tensors.items()}

    def run_backward(*args: Any, **kwargs: Any) -> Any:
        with GPUFunctions():  # torch has switched it off around the call of the engine
            return engine(*args, **kwargs)

    def here(kind: str = "cuda") -> str:  # torch, too, speaks of CUDA where no device is named
        return "cpu" if kind == "cuda" else kind

    yield AutoModelForCausalLM, "from_pretrained", classmethod(from_pretrained)
    yield nn.Module, "to", to
    yield nn.Module, "cuda", lambda self, *a: module_to_gpu(self)
    yield peft.utils.save_and_load, "safe_load_file", read
    yield safetensors.torch, "_flatten_as_ptr", lambda t, keep: flatten({n: to_host(x) for n, x in t.items()}, keep)
    yield torch.autograd, "_engine_run_backward", run_backward
    yield alignment.config.gpu, "_bitsandbytes_has_cuda", lambda: True
    yield torch, "autocast", _Autocast
    yield torch, "is_autocast_enabled", lambda *a: enabled(here(*a))
    yield torch, "get_autocast_dtype", lambda *a: autocast_dtype(here(*a))
    generator = torch.Generator
    yield torch, "Generator", lambda device="cpu": generator(here(torch.device(device).type))
    yield torch.cuda.random, "get_rng_state", lambda *a: torch.get_rng_state()
    yield torch.cuda.random, "set_rng_state", lambda *a: None
    yield torch, "set_autocast_enabled", lambda kind, value: set_autocast(here(kind), value)


def _fused_operations() -> list[Fused[Any]]:
    return [
        value
        for module in (log_probs, mlp, nf4, norm, rotary)
        for value in vars(module).values()
        if isinstance(value, Fused)
    ]


@contextlib.contextmanager
def _fused_kernels() -> Iterator[None]:
    """The routes of fused kernels are taken, and the eager functions stand in for the kernels."""
    operations = _fused_operations()
    kernels = types.SimpleNamespace(**{operation.name: operation.eager for operation in operations})
    with mock.patch.object(fused, "_kernels", return_value=kernels):
        try:
            yield
        finally:
            failed = [operation.name for operation in operations if operation._failed]
            for operation in operations:
                operation._failed = False
    assert not failed, f"{failed} gave up on their kernels"


@contextlib.contextmanager
def pretended_gpu(
    capability: tuple[int, int] = (9, 0), memory: int = 24 * 2**30, count: int = 1
) -> Iterator[torch.device]:
    """Inside, this machine has that many GPUs, all of them the same; yields the first.

    Args:
        capability: compute capability.
        memory: bytes of each.
    """
    with contextlib.ExitStack() as stack:
        for name, value in _cuda(capability, memory, count).items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        for owner, name, value in _libraries():
            stack.enter_context(mock.patch.object(owner, name, value))
        attention = alignment.kernels.attention
        for change in stands_in(attention, flash_reference):
            stack.enter_context(mock.patch.object(*change))
        stack.callback(attention._variable_lengths.cache_clear)
        stack.enter_context(_fused_kernels())
        stack.enter_context(GPUFunctions())
        AcceleratorState._reset_state(True)
        stack.callback(AcceleratorState._reset_state, True)
        WAITS.clear()
        yield GPU
