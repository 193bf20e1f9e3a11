"""What a run needs of the machine, checked before anything is loaded."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from alignment.config.gpu import (
    bitsandbytes_problem,
    compiler_problem,
    computes_in_bfloat16,
    gpu_problems,
    is_hidden,
    why_no_gpu,
)
from alignment.config.places import is_on_hub
from alignment.config.schema import WHEEL_PREFIX, Device, Dtype, QuantizationConfig, RunConfig
from alignment.config.tracking import TRACKER_PACKAGES
from alignment.errors import UserError

log = logging.getLogger(__name__)

_UNREACHABLE = "not in the local cache, and the hub cannot be reached"
_TIMEOUT = 5  # seconds


def check_machine(config: RunConfig) -> None:
    """Refuse to start a run that would fail later for want of a GPU, a package, a model or a data set.

    Raises:
        UserError: everything that is missing, in one sentence, and what to do.
    """
    missing = _missing_on_machine(config.device, config.quantization)
    if _uses_gpu(config.device):
        missing += gpu_problems()
        if config.model.dtype is Dtype.bfloat16 and not computes_in_bfloat16():
            instead = "float32" if config.adapter is None else "float16"
            log.warning("This GPU is older than Ampere and emulates bfloat16: model.dtype=%s is faster.", instead)
        if config.sft is not None and (problem := compiler_problem()) is not None:  # TRL's head has no other way
            missing.append(problem)
    elif config.device is Device.auto and is_hidden():
        log.warning("This run is on the CPU, though the machine has a GPU: %s.", why_no_gpu())
    models = [config.model.name, None if config.onpolicy is None else config.onpolicy.weak]
    if config.loss is not None and config.loss.requirements().draws:
        models.append(config.distill.teacher)
    sources = {name: "model" for name in models if name is not None and not _is_local_model(name)}
    for data in (config.sft.data if config.sft else None, config.data if config.loss is not None else None):
        if data is not None:
            sources.update(dict.fromkeys(filter(is_on_hub, data.named), "data set"))
    absent: dict[str, list[str]] = {}
    for name, kind in sources.items():
        reason = _hub_problem(name, kind, ask=_UNREACHABLE not in absent)  # a dead network is waited for once
        if reason:
            absent.setdefault(reason, []).append(f"the {kind} {name}")
    missing += [f"{' and '.join(names)} ({reason})" for reason, names in absent.items()]
    asked = [] if config.tracking is None else [tracker_problem(name) for name in config.tracking.to]
    trackers = [problem for problem in asked if problem is not None]
    if missing:
        _refuse([*missing, *trackers], ", point model.name or data.source to local copies" if absent else "")
    _refuse(trackers, "", "set tracking=none")


def require_machine(*, device: Device = Device.auto, quantization: QuantizationConfig | None = None) -> None:
    """Refuse a device or a quantisation that this machine does not offer.

    Raises:
        UserError: torch sees no GPU, or bitsandbytes is not installed or not for this CUDA.
    """
    _refuse(_missing_on_machine(device, quantization), "")


def tracker_problem(name: str) -> str | None:
    """The packages that a service of `tracking.to` needs and this environment lacks; None where all are there."""
    lacking = [package for package in TRACKER_PACKAGES[name] if importlib.util.find_spec(package) is None]
    if not lacking:
        return None
    return f"{', '.join(lacking)} for tracking.to={name} (pip install 'alignment[{name}]')"


def _missing_on_machine(device: Device, quantization: QuantizationConfig | None) -> list[str]:
    missing = []
    on_gpu = _uses_gpu(device)
    if device is Device.cuda and not on_gpu:
        missing.append(f"a CUDA GPU ({why_no_gpu()})")
    if quantization is not None and (problem := bitsandbytes_problem(on_gpu)) is not None:
        missing.append(problem)
    return missing


def _uses_gpu(device: Device) -> bool:
    import torch

    return device is not Device.cpu and torch.cuda.is_available()


def _refuse(
    missing: list[str], remedy: str, instead: str = "try recipe=quickstart, which needs only a CPU and no network"
) -> None:
    if missing:
        raise UserError(f"This run lacks {', and '.join(missing)}: provide that{remedy}, or {instead}.")


def model_problem(name: str) -> str | None:
    """Why a model cannot be read, found out within seconds; None where nothing stands in the way."""
    return None if _is_local_model(name) else _hub_problem(name, "model", ask=True)


def _is_local_model(name: str) -> bool:
    return name.startswith((WHEEL_PREFIX, ".", "/", "~")) or Path(name).is_dir()


def _hub_problem(name: str, kind: str, *, ask: bool) -> str | None:
    """What stands in the way of a hub model or data set; None if it is cached or the hub answers for it.

    Without `ask` the hub counts as unreachable.
    """
    if kind == "model" and isinstance(try_to_load_from_cache(name, "config.json"), str):
        return None
    if kind == "data set" and _dataset_is_cached(name):
        return None
    if HF_HUB_OFFLINE:
        return "not in the local cache, and HF_HUB_OFFLINE is set"
    if not ask:
        return _UNREACHABLE
    try:
        api = HfApi()
        (api.model_info if kind == "model" else api.dataset_info)(name, timeout=_TIMEOUT)
    except RepositoryNotFoundError:
        return "the hub does not know it, or it is private and you are not logged in"
    except HfHubHTTPError as error:
        return f"the hub answered {error.response.status_code}"
    except Exception:  # whatever the HTTP library calls a dead network
        return _UNREACHABLE
    return None


def _dataset_is_cached(name: str) -> bool:
    from datasets.config import HF_DATASETS_CACHE

    return (Path(HF_DATASETS_CACHE) / name.replace("/", "___")).is_dir()
