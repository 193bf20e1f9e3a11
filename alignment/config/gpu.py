"""What a GPU and the libraries around it lack for a run. Each finding is a noun phrase with what to do in brackets."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sysconfig
from pathlib import Path
from typing import Any

LEAST_FREE = 2**30
"""Bytes that must be free on a GPU: its context and the libraries alone take half of that."""

_DRIVER = Path("/proc/driver/nvidia/version")


def driver_version() -> str | None:
    """The version of the NVIDIA driver that is loaded; None without one."""
    try:
        found = re.search(r"Module\s+(?:for \S+\s+)?([\d.]+)", _DRIVER.read_text())
    except OSError:
        return None
    return found[1] if found else "unknown"


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA that the driver runs; None without a driver, or where torch cannot ask."""
    import torch

    ask: Any = getattr(torch._C, "_cuda_getDriverVersion", None)
    number = 0 if ask is None else ask()
    return (number // 1000, number % 1000 // 10) if number else None


def why_no_gpu() -> str:
    """Why torch sees no GPU, and what to do."""
    import torch

    if torch.version.hip is None and torch.version.cuda is None:
        return "this torch is built for CPUs alone: install one built for CUDA, https://pytorch.org says how"
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides every GPU: unset it"
    known, built = driver_cuda(), torch.version.cuda
    if built is not None and known is not None and known[0] < int(built.partition(".")[0]):
        return (
            f"the driver runs CUDA {known[0]}.{known[1]} and this torch is built for {built}: update the driver, or "
            f"install a torch built for CUDA {known[0]}"
        )
    if driver_version() is None and torch.version.hip is None:
        return "no NVIDIA driver is loaded: install one, or choose device=cpu"
    return "torch sees none: see what nvidia-smi says"


def is_hidden() -> bool:
    """Whether the machine has a GPU's driver, but torch sees no GPU."""
    import torch

    return driver_version() is not None and not torch.cuda.is_available()


def gpu_problems() -> list[str]:
    """What the current GPU lacks. Call it only where torch sees one."""
    import torch

    index = torch.cuda.current_device()
    name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    problems = []
    if not _runs_on(torch.cuda.get_arch_list(), capability):
        problems.append(
            f"a torch with kernels for {name} (compute capability {capability[0]}.{capability[1]}; this torch has them "
            f"for {', '.join(torch.cuda.get_arch_list())}: install one built for another CUDA)"
        )
    try:
        free, total = torch.cuda.mem_get_info(index)
    except RuntimeError as error:
        said = str(error).strip().splitlines()[0]
        problems.append(f"a GPU that takes work ({name} says: {said}; end what uses it: nvidia-smi shows it)")
    else:
        if free < LEAST_FREE:
            problems.append(
                f"free memory on {name} ({free / 2**30:.1f} of {total / 2**30:.1f} GiB are free: end what uses it, "
                f"which nvidia-smi shows, or choose another GPU with CUDA_VISIBLE_DEVICES)"
            )
    return problems


def _runs_on(built_for: list[str], capability: tuple[int, int]) -> bool:
    """Whether machine code or portable code of this build runs on that GPU; True where the build does not say."""
    found = [re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", name) for name in built_for]
    builds = [(match[1], (int(match[2]), int(match[3]))) for match in found if match]
    return not builds or any(
        version <= capability and (kind == "compute" or version[0] == capability[0]) for kind, version in builds
    )


def computes_in_bfloat16() -> bool:
    """Whether the current GPU has arithmetic for bfloat16. Before Ampere torch emulates it, and says that it works."""
    import torch

    return torch.version.hip is not None or torch.cuda.get_device_capability() >= (8, 0)


def bitsandbytes_problem(on_gpu: bool) -> str | None:
    """What keeps bitsandbytes from packing weights, on a GPU or on a CPU."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return "the package bitsandbytes (pip install bitsandbytes, or set quantization=none)"
    if on_gpu and not _bitsandbytes_has_cuda():
        import torch

        return (
            f"bitsandbytes' library for CUDA {torch.version.cuda} (what is installed has none that loads: "
            f"pip install -U bitsandbytes, see what python -m bitsandbytes says, or set quantization=none)"
        )
    return None


def _bitsandbytes_has_cuda() -> bool:
    try:
        from bitsandbytes.cextension import lib
    except Exception:  # a library that does not load raises what it likes
        return False
    return bool(lib.compiled_with_cuda)


def compiler_problem() -> str | None:
    """What Triton lacks to build its launcher on this machine; None also where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    if not os.environ.get("CC") and shutil.which("gcc") is None and shutil.which("clang") is None:
        return "a C compiler, which Triton needs (install gcc, or name one in CC)"
    scheme = sysconfig.get_default_scheme()
    scheme = "posix_prefix" if scheme == "posix_local" else scheme  # Debian's holds no headers; Triton does the same
    elsewhere = os.environ.get("CPATH") or os.environ.get("C_INCLUDE_PATH")
    if not elsewhere and not (Path(sysconfig.get_path("include", scheme)) / "Python.h").exists():
        return "Python's headers, which Triton needs (install python3-dev, or the one of this Python's version)"
    return None
