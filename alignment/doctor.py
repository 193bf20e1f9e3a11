"""`python -m alignment.doctor`: shows what this machine offers a run, and what it lacks.

Put its output into a bug report. It holds no secrets, no host name and no name of a user: a home folder is
written as ~.
"""

from __future__ import annotations

import getpass
import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

import torch
from huggingface_hub import constants, get_session, get_token

from alignment.config.gpu import (
    bitsandbytes_problem,
    compiler_problem,
    computes_in_bfloat16,
    driver_cuda,
    driver_version,
    gpu_problems,
    is_hidden,
    why_no_gpu,
)
from alignment.errors import CommandParser, ending_plainly
from alignment.files import cache_dir
from alignment.ranks.memory import available_memory
from alignment.runs.record import machine, named, versions
from alignment.runs.trackers.wandb import login_problem

_GIB = 2**30
_TIMEOUT = 5  # seconds
_LEAST_DISK = _GIB
_VARIABLES = (
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
    "CUDA_VISIBLE_DEVICES",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
    "ALIGNMENT_FUSED",
    "HF_HUB_OFFLINE",
    "WANDB_MODE",
)
"""Variables of the environment that change how a run goes and hold nothing private."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print what was found. Returns the exit status: 1 if something is lacking."""
    parser = CommandParser(
        prog="python -m alignment.doctor",
        description="Show what this machine offers a run and what it lacks, for you and for a bug report. Nothing "
        "private is in it.",
    )
    with ending_plainly():
        parser.parse_args(argv)
    for title, look in _SECTIONS.items():
        rows = _found(look)
        width = max(len(name) for name in rows)
        sys.stdout.write(f"{title}\n" + "".join(f"  {name:<{width}}  {value}\n" for name, value in rows.items()) + "\n")
    if lacking := problems():
        sys.stdout.write("This machine lacks\n" + "".join(f"  - {problem}\n" for problem in lacking))
        return 1
    sys.stdout.write(f"Nothing is lacking for runs on this machine's {'GPU' if _has_gpu() else 'CPU'}.\n")
    return 0


def problems() -> list[str]:
    """What this machine lacks, each with what to do in brackets. A machine that has no GPU lacks none."""
    found = gpu_problems() if _has_gpu() else [f"a usable GPU ({why_no_gpu()})"] if is_hidden() else []
    found += [problem for problem in (bitsandbytes_problem(_has_gpu()),) if problem]
    found += [problem for problem in (compiler_problem(),) if problem and _has_gpu()]
    for folder in _folders().values():
        there = _existing(folder)
        if not os.access(there, os.W_OK):
            found.append(f"leave to write in {_private(there)} (it is for {_private(folder)}: choose another)")
        elif (free := shutil.disk_usage(there).free) < _LEAST_DISK:
            found.append(f"disk space ({free / _GIB:.1f} GiB are free for {_private(folder)}: make room there)")
    return found


def _found(look: Callable[[], Mapping[str, str]]) -> Mapping[str, str]:
    """The rows of a section; a look that fails is a row too, because a bug report needs the rest."""
    try:
        return look()
    except Exception as error:
        return {"not found out": _private(f"{type(error).__name__}: {error}".splitlines()[0])}


def _has_gpu() -> bool:
    return torch.cuda.is_available()


def _software() -> dict[str, str]:
    names = {name: version or "not installed" for name, version in versions().items()}
    for name in ("triton", "huggingface-hub", "tokenizers"):
        try:
            names[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            names[name] = "not installed"
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else torch.version.hip or "CPUs alone"
    names["torch"] = f"{torch.__version__}, built for {built}"
    return {**names, "system": platform.platform()}


def _processor() -> dict[str, str]:
    facts = machine()
    return {
        "processor": named(facts),
        "vectors": facts["vectors"],
        "threads": f"{facts['cores']} usable, torch takes {torch.get_num_threads()}",
        "memory": f"{available_memory() / _GIB:.1f} GiB available",
    }


def _environment() -> dict[str, str]:
    return {name: os.environ.get(name, "not set") for name in _VARIABLES}


def _folders() -> dict[str, Path]:
    return {"cache": cache_dir(None), "hub cache": Path(constants.HF_HUB_CACHE), "this folder": Path.cwd()}


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def _storage() -> dict[str, str]:
    return {
        name: f"{_private(folder)}{'' if folder.exists() else ' (not there yet)'}, "
        f"{shutil.disk_usage(_existing(folder)).free / _GIB:.1f} GiB free"
        for name, folder in _folders().items()
    }


def _private(text: str | Path) -> str:
    """Without the home folder and without the names of user and host."""
    hidden = str(text)
    if len(Path.home().parts) > 1:
        hidden = hidden.replace(str(Path.home()), "~")
    for name, shown in ((platform.node(), "HOST"), (_user(), "USER")):
        if name:
            hidden = re.sub(rf"\b{re.escape(name)}\b", shown, hidden)
    return hidden


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        return ""


def _network() -> dict[str, str]:
    login = "logged in" if get_token() else "not logged in: public models and data sets alone"
    return {"hub": f"{_hub()}, {login}", "W&B": _wandb()}


def _hub() -> str:
    if constants.HF_HUB_OFFLINE:
        return "not asked, because HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=_TIMEOUT)
    except Exception as error:  # whatever the HTTP library calls a dead network
        return f"cannot be reached ({type(error).__name__}): only what is in its cache can be used"
    return "answers"


def _wandb() -> str:
    if importlib.util.find_spec("wandb") is None:
        return "not installed: runs are not tracked"
    # The reason may hold an address or a name.
    return "not logged in: a run says how it is tracked" if login_problem() else "logged in"


def _gpus() -> dict[str, str]:
    if not _has_gpu():
        return {"GPU": f"none ({why_no_gpu()})"}
    known = ".".join(map(str, driver_cuda() or ("unknown",)))
    rows = {
        "driver": f"{driver_version() or 'unknown'}, runs CUDA {known}",
        "kernels for": ", ".join(torch.cuda.get_arch_list()) or "unknown",
    }
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        total = torch.cuda.get_device_properties(index).total_memory
        rows[f"GPU {index}"] = (
            f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}, {total / _GIB:.1f} GiB"
        )
    free, _ = torch.cuda.mem_get_info()
    index = torch.cuda.current_device()
    rows["in use"] = f"GPU {index}: {free / _GIB:.1f} GiB free; a process uses one GPU"
    rows["dtype auto"] = "bfloat16" if computes_in_bfloat16() else "float16, because it is older than Ampere"
    rows["bitsandbytes"] = "lacking, see below" if bitsandbytes_problem(on_gpu=True) else "has its library for CUDA"
    rows["compiler"] = "lacking, see below" if compiler_problem() else "found, or Triton is not installed"
    return rows


_SECTIONS: dict[str, Callable[[], Mapping[str, str]]] = {
    "Software": _software,
    "Processor": _processor,
    "GPU": _gpus,
    "Storage": _storage,
    "Network": _network,
    "Environment": _environment,
}

if __name__ == "__main__":
    sys.exit(main())
