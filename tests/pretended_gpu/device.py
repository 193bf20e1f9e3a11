"""A GPU that is none: its tensors say `cuda:0`, compute on the CPU with real numbers, and refuse to be mixed.

It finds, without a GPU: tensors of two devices in one operation, factories that forget the device, moments at which
the host waits for the device, and what every branch on `device.type == "cuda"` computes. It cannot find what CUDA
kernels do, nor what memory they need.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Params4bit
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import alignment

GPU = torch.device("cuda", 0)
WAITS: collections.Counter[tuple[str, str]] = collections.Counter()
"""(kind, file:line of the project) of every moment at which the host waited for the device, since the last `clear`."""

_PROJECT = f"{Path(alignment.__file__).parent}/"
_HERE = torch.device("cpu")
_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
aten = torch.ops.aten
# CUDA takes index tensors from the CPU, and copies them over.
_INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
# How many values they return is known to the device alone.
_COUNTED = {aten.nonzero.default, aten.masked_select.default, aten._unique2.default}


class MixedDevices(RuntimeError):
    """An operation was given tensors on two devices."""


def _line() -> str:
    """Where the project is running now."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(_PROJECT):
            return f"{path.removeprefix(_PROJECT)}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"


def wait(kind: str) -> None:
    """Note that the host waits for the device."""
    WAITS[kind, _line()] += 1


def _product(a: Tensor, b: Tensor, out_dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
    result = a.to(out_dtype) @ b.to(out_dtype)
    return result if out is None else out.copy_(result)


def _sum_and_product(
    c: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype, *, beta: float = 1, alpha: float = 1, out: Any = None
) -> Tensor:
    result = beta * c.to(out_dtype) + alpha * _product(a, b, out_dtype)
    return result if out is None else out.copy_(result)


# Products of 16-bit tensors with a wider result exist on GPUs alone.
_ONLY_ON_GPUS: dict[Any, Callable[..., Tensor]] = {
    op: function
    for packets, function in (((aten.mm, aten.bmm), _product), ((aten.addmm, aten.baddbmm), _sum_and_product))
    for packet in packets
    for op in (getattr(packet, "dtype", None), getattr(packet, "dtype_out", None))
    if op is not None
}


def _mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """The value with the function applied to everything inside its lists, tuples and dicts."""
    kind = type(value)
    if kind is list or kind is tuple:
        return kind([_mapped(part, function) for part in value])
    if kind is dict:
        return {key: _mapped(part, function) for key, part in value.items()}
    return function(value)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors inside the value's lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(part)


LARGEST: list[int] = []
"""Bytes of the largest tensor for which the GPU has room; empty if it has room for all."""


def _require_room(x: Tensor) -> None:
    if x.nbytes > LARGEST[-1]:
        raise torch.cuda.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {x.nbytes} bytes.")


@contextlib.contextmanager
def room_for(num_bytes: int) -> Iterator[None]:
    """Inside, the GPU runs out of memory where a tensor takes more bytes than that."""
    LARGEST.append(num_bytes)
    try:
        yield
    finally:
        LARGEST.pop()


class GPUTensor(Tensor):
    """A CPU tensor, `on_host`, that says it is on the GPU."""

    on_host: Tensor

    @staticmethod
    def __new__(cls, on_host: Tensor) -> GPUTensor:
        assert type(on_host) is Tensor, type(on_host)
        # For C++ it is on the CPU, so that the autograd engine of a build without CUDA runs it.
        return Tensor._make_wrapper_subclass(
            cls, on_host.size(), strides=on_host.stride(), storage_offset=on_host.storage_offset(),
            dtype=on_host.dtype, layout=on_host.layout, device=on_host.device, requires_grad=False,
        )  # fmt: skip

    def __init__(self, on_host: Tensor) -> None:
        self.on_host = on_host

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return GPU

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"GPUTensor({self.on_host})"

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy: use Tensor.cpu() first")

    def data_ptr(self) -> int:
        return self.on_host.data_ptr()

    def untyped_storage(self) -> Any:
        return self.on_host.untyped_storage()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied: Any = GPUTensor(self.on_host.clone()).requires_grad_(self.requires_grad)
        if getattr(self, "_is_param", False):
            copied = nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.on_host.__reduce_ex__(protocol)  # loaded again, it is on the CPU until somebody moves it

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None:  # copies to the host are met in `GPUFunctions`
            kwargs["device"] = _HERE
        if func is aten.index_add.default and type(args[0]) is Tensor:
            # The backward pass of index_select makes its zeros where C++ believes the gradient to be.
            args = (to_gpu(args[0]), *args[1:])
        if func is aten._local_scalar_dense.default:
            wait("item")
        elif func in _COUNTED:
            wait("count")
        elif func in _INDEXED and any(x is not None and x.dtype is torch.bool for x in args[1]):
            wait("boolean index")
        for x in tensors_in((args, kwargs)):
            if not isinstance(x, GPUTensor) and x.dim() > 0:
                if func is aten.copy_.default:
                    wait("copy to the host" if x is args[0] else "copy to the device")
                elif func in _INDEXED:
                    wait("copy to the device")
                else:
                    raise MixedDevices(f"{func}: a CPU tensor of {tuple(x.shape)} among tensors on {GPU}, {_line()}")
        inner = _mapped((args, kwargs), lambda x: x.on_host if isinstance(x, GPUTensor) else x)
        out = _ONLY_ON_GPUS.get(func, func)(*inner[0], **inner[1])
        if func._schema.is_mutable and len(func._schema.returns) == 1 and func._schema.returns[0].alias_info:
            changed = kwargs.get("out", args[0])
            assert changed.shape == out.shape, f"{func} changes a shape in place, which is not modelled"
            return changed
        if LARGEST and not any(value.alias_info for value in func._schema.returns):
            for x in tensors_in(out):
                _require_room(x)
        return _mapped(out, lambda x: GPUTensor(x) if type(x) is Tensor else x)


class GPUWeights4bit(GPUTensor, Params4bit):
    """Packed weights of bitsandbytes on the GPU."""

    to, cpu, cuda = Tensor.to, Tensor.cpu, Tensor.cuda  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, packed: Params4bit) -> GPUWeights4bit:
        return GPUTensor.__new__(cls, packed.detach().as_subclass(Tensor))  # type: ignore[return-value]

    def __init__(self, packed: Params4bit) -> None:
        super().__init__(packed.detach().as_subclass(Tensor))
        vars(self).update({name: value for name, value in vars(packed).items() if name != "quant_state"})
        self.quant_state = None if packed.quant_state is None else _state_to_gpu(packed.quant_state)


def _state_to_gpu(state: Any) -> Any:
    moved = copy.copy(state)
    for name in ("absmax", "code", "offset"):
        if isinstance(value := getattr(state, name), Tensor):
            setattr(moved, name, to_gpu(value))
    if state.nested:
        moved.state2 = _state_to_gpu(state.state2)
    return moved


def to_gpu(x: Tensor) -> Tensor:
    """The tensor on the GPU, without its history."""
    return x if isinstance(x, GPUTensor) else GPUTensor(x.detach()).requires_grad_(x.requires_grad)


def to_host(x: Tensor) -> Tensor:
    """The tensor on the CPU, without its history, and without a wait that counts."""
    return x.on_host.detach() if isinstance(x, GPUTensor) else x.detach()


def module_to_gpu(module: nn.Module) -> nn.Module:
    """Move every parameter and buffer, tied ones once."""
    moved: dict[int, Any] = {}
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is None or isinstance(p, GPUTensor):
                continue
            if isinstance(p, Params4bit):
                part._parameters[name] = packed = GPUWeights4bit(p)
                if hasattr(part, "quant_state"):
                    part.quant_state = packed.quant_state
                continue
            if id(p) not in moved:
                moved[id(p)] = p, nn.Parameter(to_gpu(p.data), p.requires_grad)
            part._parameters[name] = moved[id(p)][1]
        for name, buffer in part._buffers.items():
            if buffer is not None and not isinstance(buffer, GPUTensor):
                part._buffers[name] = to_gpu(buffer)
    return module


class _Copy(torch.autograd.Function):
    """A copy to the other device; the gradient comes back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.on_host.clone() if isinstance(x, GPUTensor) else GPUTensor(x.detach().clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.on_host if isinstance(gradient, GPUTensor) else to_gpu(gradient)


class _Meant(torch.autograd.Function):
    """For a result that was on the GPU all along, whatever C++ said; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return GPUTensor(x.detach().clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return to_gpu(gradient)


def _moved(func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    """`to`, `cpu` and `cuda`, told by their arguments."""
    x, *rest = args
    wanted, dtype = x.device, x.dtype
    for value in (*rest, *kwargs.values()):
        if isinstance(value, Tensor):
            wanted, dtype = value.device, value.dtype
        elif isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, str | torch.device):
            wanted = torch.device(value)
    if func is not Tensor.to:
        wanted = _HERE if func is Tensor.cpu else GPU
    asynchronous = bool(kwargs.get("non_blocking"))
    pinned = getattr(x, "_is_pinned", False)
    if wanted.type != x.device.type:
        to_device = wanted.type == "cuda"
        if not asynchronous or (to_device and not pinned):
            wait(f"copy to the {'device' if to_device else 'host'}")
        if x.requires_grad and torch.is_grad_enabled():
            x = _Copy.apply(x)
        else:
            x = to_gpu(x.detach().clone()) if to_device else x.on_host.clone()
    return x if x.dtype is dtype else Tensor.to(x, dtype)


def _pinned(x: Tensor) -> Tensor:
    copied = x.clone()
    copied._is_pinned = True  # type: ignore[attr-defined]
    return copied


def _has_gpu_tensor(values: Any) -> bool:
    return any(isinstance(x, GPUTensor) for x in tensors_in(values))


def _is_gpu(device: Any) -> bool:
    return device is not None and not isinstance(device, int) and torch.device(device).type == "cuda"


def _placed(out: Any, given: Any) -> Any:
    """A result of tensors on the GPU is there as well, also where C++ made it on the CPU, as `pad_sequence` does."""
    if type(out) is not Tensor or not _has_gpu_tensor(given):
        return out
    return _Meant.apply(out) if out.requires_grad else to_gpu(out)


class GPUFunctions(TorchFunctionMode):
    """Takes `cuda` out of the arguments of functions, which would want a build with CUDA, and puts results there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return _moved(func, args, kwargs)
        if func is Tensor.tolist and isinstance(args[0], GPUTensor):
            wait("tolist")
            return args[0].on_host.tolist()
        if func is Tensor.as_subclass and isinstance(args[0], GPUTensor):
            assert args[1] is Tensor
            return to_gpu(args[0].on_host)
        if func == _SET_DATA and isinstance(args[0], GPUTensor):
            args[0].on_host = to_gpu(args[1]).on_host
            return func(*args)
        if func is torch._C._nn.pad_sequence:
            waits = WAITS.copy()  # C++ fills a tensor where it believes its arguments to be: no copies on a GPU
            out = _placed(func(*args, **kwargs), args)
            WAITS.clear()
            WAITS.update(waits)
            return out
        if func is Tensor.pin_memory:
            return _pinned(args[0])
        if func is Tensor.is_pinned:
            return getattr(args[0], "_is_pinned", False)
        if _is_gpu(kwargs.get("device")):
            kwargs["device"] = _HERE
            out = func(*args, **kwargs)
            if func in (torch.tensor, torch.as_tensor, Tensor.new_tensor):
                wait("copy to the device")
            return out if isinstance(out, GPUTensor) or _has_gpu_tensor(args) else to_gpu(out)
        out = func(*args, **kwargs)
        if func is Tensor.new_tensor and isinstance(out, GPUTensor):
            wait("copy to the device")
        return _placed(out, (args, kwargs))
