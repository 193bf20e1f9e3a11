"""Where the time of one step goes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

_FORWARD, _DECODER = "policy forward", "policy decoder"
_MATRIX_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "_addmm_activation", "_linear_pointwise")


def kind_of(operator: str) -> str:
    """What an operator does, by its name: attention, a matrix product, or anything else."""
    name = operator.rpartition("::")[2].lower()
    if "attention" in name or "flex" in name:
        return "attention"
    if name in _MATRIX_PRODUCTS or "gemm" in name or "mkldnn_linear" in name:
        return "matrix products"
    return "elementwise, copies and the rest"


def _marked(module: nn.Module, label: str, stack: ExitStack) -> None:
    """Have the profiler see the module's forward under this label, until the stack is closed."""
    open_calls: list[Any] = []

    def enter(*_: Any) -> None:
        call = record_function(label)
        call.__enter__()
        open_calls.append(call)

    def leave(*_: Any) -> None:
        open_calls.pop().__exit__(None, None, None)

    stack.enter_context(_removing(module.register_forward_pre_hook(enter)))
    stack.enter_context(_removing(module.register_forward_hook(leave)))


def _removing(handle: Any) -> ExitStack:
    stack = ExitStack()
    stack.callback(handle.remove)
    return stack


def _in_head(event: Any) -> bool:
    """Whether an event lies in the policy's forward pass, but not in its decoder: that is the head and its losses."""
    parent, inside = event, False
    while parent is not None:
        if parent.name == _DECODER:
            return False
        inside = inside or parent.name == _FORWARD
        parent = parent.cpu_parent
    return inside


def profile_step(model: Any, step: Callable[[], object], trace: Path | None = None) -> dict[str, Any]:
    """Take a step under torch's profiler; `trace` is a file for what it saw, in Chrome's format.

    The head's gradient is made in its forward pass (for a frozen head), so that all of it counts as head; what
    autograd computes for one that trains counts by its operators.

    Returns:
        {"seconds": self time of all operators, on the GPU where there is one,
         "shares": kind of work -> its share of that,
         "operators": [[name, calls, share], ...] of the 15 that take longest,
         "wall": seconds of the step under the profiler,
         "kernels": [[name, calls, milliseconds], ...] of the 40 GPU kernels that take longest}.
    """
    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with ExitStack() as stack:
        _marked(model, _FORWARD, stack)
        _marked(model.get_decoder(), _DECODER, stack)
        with profile(activities=activities) as found:
            started = perf_counter()
            step()
            if cuda:
                torch.cuda.synchronize()
            wall = perf_counter() - started
    if trace is not None:
        found.export_chrome_trace(str(trace))
    time: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    kernels: dict[str, list[float]] = {}
    for event in found.events():
        if event.device_type != DeviceType.CPU:  # a kernel: its time stands at the operator that launched it too
            count = kernels.setdefault(event.name[:150], [0, 0.0])
            count[0] += 1
            count[1] += event.device_time / 1e3
            continue
        own = event.self_device_time_total if cuda else event.self_cpu_time_total
        time[event.name] += own
        calls[event.name] += 1
        kinds["head" if _in_head(event) else kind_of(event.name)] += own
    total = sum(time.values())
    return {
        "seconds": total / 1e6,
        "shares": {kind: own / total for kind, own in kinds.most_common()},
        "operators": [[name, calls[name], own / total] for name, own in time.most_common(15)],
        "wall": wall,
        "kernels": [[name, *count] for name, count in sorted(kernels.items(), key=lambda item: -item[1][1])[:40]],
    }
