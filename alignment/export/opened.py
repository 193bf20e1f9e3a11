"""The policy that is exported: of a finished run, or a saved adapter or model."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from alignment.config.compose import load as compose
from alignment.config.resume import finished_run
from alignment.config.schema import Device, Dtype, RunConfig
from alignment.config.typed_text import typed_path
from alignment.errors import UserError, did_you_mean
from alignment.files import digests
from alignment.policy.adapter import load_adapter
from alignment.policy.float_weights import FloatWeights
from alignment.policy.load import load_base
from alignment.policy.reward_model import holds_reward_model
from alignment.policy.saved_adapter import read_adapter, require_known_form
from alignment.policy.source import ADAPTER_FILE
from alignment.runs.folder import read_run
from alignment.stages.finished import Questions
from alignment.stages.policy import PolicySource, load_policy

E = TypeVar("E", bound=Enum)

_FINAL = ("adapter", "model")
_ENDED = ("finished", "stopped")


@dataclass(frozen=True)
class Opened:
    """A policy that can be exported.

    Attributes:
        name: for people, files and servers.
        run: folder of its run; None for a policy of none.
        saved: folder of its adapter, or of its whole model.
        asked: its tokenizer, stop tokens, base and device.
    """

    name: str
    run: Path | None
    saved: Path
    asked: Questions

    @property
    def config(self) -> RunConfig:
        """Of the run, or for a policy of none the defaults."""
        return self.asked.config

    @property
    def adapter(self) -> dict[str, Any] | None:
        """The adapter's settings, as peft writes them; None for a whole model."""
        path = self.saved / ADAPTER_FILE
        return json.loads(path.read_bytes()) if path.is_file() else None

    @property
    def rewards(self) -> bool:
        """Whether it is a reward model."""
        return holds_reward_model(self.saved)

    @cached_property
    def contents(self) -> dict[str, str]:
        """Digest of each of its files."""
        return digests(self.saved)

    @property
    def made(self) -> PolicySource:
        """What it is loaded from."""
        asked, folder = self.asked, self.run or self.saved
        return PolicySource(asked.config, asked.source, asked.cache, folder / "spectrum.json", self.saved)

    def load(self) -> nn.Module:
        """The policy, with its adapter as one.

        Raises:
            UserError: it, or its base, is gone or cannot be loaded.
        """
        if self.run is not None:
            return load_policy(self.made, self.asked.device)
        source, config = self.asked.source, self.config
        base = load_base(config.model, None, source.base, self.asked.device, self.asked.cache)
        return load_adapter(base, self.saved, FloatWeights(source.base, config.model.revision))


def open_policy(folder: Path, device: str | None = None, dtype: str | None = None) -> Opened:
    """Open what a folder holds.

    Args:
        folder: of a finished run, or of a saved adapter or model.
        device: in place of the run's.
        dtype: of the merged weights, in place of the run's.

    Raises:
        UserError: it is neither, the run is not finished, or its policy cannot be used.
    """
    folder = folder.expanduser().absolute()
    if folder.name in _FINAL and (folder.parent / "config.yaml").is_file():
        folder = folder.parent
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}: name the folder of a finished run, or of a saved adapter.")
    run, name = None, folder.name
    if (folder / ADAPTER_FILE).is_file() or (folder / "config.json").is_file():
        saved, plain = folder, ("sft=none", "adapter=none", "tracking=none", "evaluation.judge=none")
        config = compose(typed_path("model.name", folder), *plain)
    else:
        run, summary = folder, read_run(folder).summary
        if (status := summary.get("status")) not in _ENDED:
            raise UserError(f"{run} cannot be exported, because it is {status or 'not finished'}.")
        recipe = str(summary.get("recipe")).replace("/", "-")
        name = name if recipe in name else f"{recipe}-{name}"
        config, _ = finished_run(run)
        saved = run / ("adapter" if config.adapter is not None else "model")
        if not saved.is_dir():
            raise UserError(f"{run} cannot be exported, because its policy {saved} is gone.")
        if config.adapter is not None:
            read_adapter(saved)
    if device is not None:
        config = replace(config, device=_named("device", device, Device))
    if dtype is not None:
        config = replace(config, export=replace(config.export, dtype=_named("dtype", dtype, Dtype)))
    asked = Questions(config, folder)
    if run is None and asked.source.adapter is not None:
        require_known_form(folder, read_adapter(folder), whole=True)
    return Opened(name, run, saved, asked)


def _named(key: str, value: str, kind: type[E]) -> E:
    names = [member.name for member in kind]
    if value not in names:
        raise UserError(f"{key} must be one of {', '.join(names)}, not '{value}'{did_you_mean(value, names)}.")
    return kind[value]
