"""What a run needs of the machine, checked before anything is loaded."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from alignment.config import DataConfig, Device, RunConfig
from alignment.errors import UserError
from alignment.wheel_model import PREFIX

_LOCAL_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")


def check_machine(config: RunConfig) -> None:
    """Refuse to start a run that would fail later for want of a GPU, a package, a model or a data set.

    Raises:
        UserError: everything that is missing, in one sentence, and what to do.
    """
    import torch

    missing = []
    if config.device is Device.cuda and not torch.cuda.is_available():
        missing.append("a CUDA GPU (torch sees none)")
    if config.quantization is not None and importlib.util.find_spec("bitsandbytes") is None:
        missing.append("the package bitsandbytes (pip install bitsandbytes)")
    sources: dict[str, str] = {config.model.name: "model"}
    for data in (config.sft.data if config.sft else None, config.data if config.loss is not None else None):
        if data is not None:
            sources.update(dict.fromkeys(_hub_sources(data), "dataset"))
    for name, kind in sources.items():
        if kind == "dataset" or not _is_local_model(name):
            problem = _hub_problem(name, kind)
            if problem:
                missing.append(problem)
    if missing:
        raise UserError(
            f"This run lacks {', and '.join(missing)}: provide that, point model.name or data.source to local copies, "
            f"or try recipe=quickstart, which needs only a CPU and no network."
        )


def _hub_sources(data: DataConfig) -> list[str]:
    sources = [source for source in (data.source, data.eval_source) if source is not None]
    return [
        source
        for source in sources
        if not source.startswith(("bundled:", ".", "/", "~"))
        and not source.endswith(_LOCAL_SUFFIXES)
        and not Path(source).exists()
    ]


def _is_local_model(name: str) -> bool:
    return name.startswith((PREFIX, ".", "/", "~")) or Path(name).is_dir()


def _hub_problem(name: str, kind: str) -> str | None:
    """What stands in the way of a hub model or data set; None if it is cached or the hub answers for it."""
    if kind == "model" and isinstance(try_to_load_from_cache(name, "config.json"), str):
        return None
    if kind == "dataset" and _dataset_is_cached(name):
        return None
    if HF_HUB_OFFLINE:
        return f"the {kind} {name} (not in the local cache, and HF_HUB_OFFLINE is set)"
    try:
        api = HfApi()
        if kind == "model":
            api.model_info(name, timeout=10)
        else:
            api.dataset_info(name, timeout=10)
    except RepositoryNotFoundError:
        return f"the {kind} {name} (the hub does not know it, or it is private and you are not logged in)"
    except HfHubHTTPError as error:
        return f"the {kind} {name} (the hub answered {error.response.status_code})"
    except Exception:  # whatever the HTTP library calls a dead network
        return f"the {kind} {name} (the hub cannot be reached and no local copy is cached)"
    return None


def _dataset_is_cached(name: str) -> bool:
    from datasets.config import HF_DATASETS_CACHE

    return (Path(HF_DATASETS_CACHE) / name.replace("/", "___")).is_dir()
