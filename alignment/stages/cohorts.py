"""Which members of a sweep train together, and how their runs share one process."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig, OmegaConf

from alignment.config.schema import Device, RunConfig
from alignment.files import atomic_write_text, to_json
from alignment.losses import Quantity

if TYPE_CHECKING:
    from alignment.training.cohort import Member


log = logging.getLogger(__name__)

AUTO_WIDTH = 4
"""How many train at once where `trainer.cohort=auto` lets several do so."""

_OWN = ("seed", "loss", "optim", "adapter", "tracking", "resume")
"""Sections in which the members of a cohort may differ."""
_SHARED_LOOP = ("cohort", "joint_passes", "plan", "tokens_per_batch", "checkpoint_every")
"""Settings of the loop in which they may not: they are those of the passes."""


@dataclass(frozen=True, slots=True)
class SweepMember:
    """A member of a sweep before it runs: its folder, its configuration, and Hydra's part of that."""

    folder: Path
    node: DictConfig
    hydra: DictConfig
    config: RunConfig

    @property
    def choices(self) -> Mapping[str, str]:
        """The option that was chosen of every group."""
        return self.hydra.runtime.choices


@dataclass(slots=True)
class SweepCohort:
    """Members that train in one process, `width` at a time."""

    members: list[SweepMember]
    width: int
    has_run: bool = False

    def run(self, run: Callable[[SweepMember, Member], None]) -> None:
        """Run all of them; `run` is called in a greenlet of its own, and keeps a member's failure to itself.

        The first member is the one whose job this process is in, so its folder is made and its log is open.
        """
        from alignment.training.cohort import Cohort

        self.has_run = True
        log.info("%d members train together, %d at a time.", len(self.members), self.width)
        for member in self.members[1:]:
            _make_folder(member)

        def named(place: Member, member: SweepMember) -> None:
            _current.set(member.folder.name)
            run(member, place)

        with _own_logs(self.members):
            cohort = Cohort(self.width, self.members[0].config.trainer.joint_passes)
            results = cohort.run([partial(named, member=member) for member in self.members])
        for result in results:
            if isinstance(result, BaseException):
                raise result


def cohorts(members: Sequence[SweepMember]) -> list[SweepCohort]:
    """Those of the unfinished members that differ in nothing but what each can have of its own, where several do."""
    alike: dict[bytes, list[SweepMember]] = {}
    for member in members:
        # Other launchers give each member a process of its own.
        here = member.choices["hydra/launcher"] == "basic"
        if here and not (member.folder / "summary.json").exists() and _can_join(member.config):
            alike.setdefault(_shared_settings(member.config), []).append(member)
    found = [SweepCohort(group, min(len(group), _width(group[0].config))) for group in alike.values()]
    return [together for together in found if together.width > 1]


def _can_join(config: RunConfig) -> bool:
    """Whether it trains an adapter with passes of its own policy alone."""
    return (
        config.loss is not None
        and config.adapter is not None
        and Quantity.divergence not in config.loss.requirements().quantities
    )


def _shared_settings(config: RunConfig) -> bytes:
    settings = {key: value for key, value in asdict(config).items() if key not in _OWN}
    settings["trainer"] = {key: settings["trainer"][key] for key in _SHARED_LOOP}
    if settings["sft"] is not None:
        settings["sft"].pop("seed")
    return to_json(settings)


def _width(config: RunConfig) -> int:
    if isinstance(config.trainer.cohort, int):
        return config.trainer.cohort
    # On a CPU members take turns, which saves no more than a base to load.
    return AUTO_WIDTH if config.device is not Device.cpu and torch.cuda.is_available() else 1


def _make_folder(member: SweepMember) -> None:
    """What Hydra writes when a job begins: without it nobody could go on with the member by itself."""
    folder = member.folder / ".hydra"
    folder.mkdir(parents=True, exist_ok=True)
    task = OmegaConf.to_yaml(member.hydra.overrides.task)
    parts = {"overrides": task, "hydra": OmegaConf.to_yaml(OmegaConf.create({"hydra": member.hydra}))}
    for name, text in parts.items():
        atomic_write_text(folder / f"{name}.yaml", text)


_current: ContextVar[str] = ContextVar("member", default="")


class _From(logging.Filter):
    """Lets through what one member says, or what none does."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self._names = names

    def filter(self, record: logging.LogRecord) -> bool:
        return _current.get() in self._names


class _Named(logging.Formatter):
    """Puts the member's name before what it says."""

    def __init__(self, inner: logging.Formatter | None) -> None:
        super().__init__()
        self._inner = inner or logging.Formatter()

    def format(self, record: logging.LogRecord) -> str:
        name, text = _current.get(), self._inner.format(record)
        return f"[{name}] {text}" if name else text


@contextmanager
def _own_logs(members: Sequence[SweepMember]) -> Iterator[None]:
    """Every member's words in the log file of its own folder; the first one's is open already."""
    root = logging.getLogger()
    files = [handler for handler in root.handlers if isinstance(handler, logging.FileHandler)]
    undo: list[Callable[[], Any]] = []
    for console in root.handlers:
        if console not in files:
            undo.append(partial(console.setFormatter, console.formatter))
            console.setFormatter(_Named(console.formatter))
    for file in files:
        first = _From("", members[0].folder.name)
        file.addFilter(first)
        undo.append(partial(file.removeFilter, first))
        for member in members[1:]:
            own = logging.FileHandler(member.folder / Path(file.baseFilename).name)
            own.setFormatter(file.formatter)
            own.addFilter(_From(member.folder.name))
            root.addHandler(own)
            undo += [own.close, partial(root.removeHandler, own)]
    try:
        yield
    finally:
        for action in reversed(undo):
            action()
