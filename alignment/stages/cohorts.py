"""Which members of a sweep train together, and how their runs share one process."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from alignment.config.schema import Device, RunConfig
from alignment.config.sweep import SweepMember
from alignment.files import to_json
from alignment.losses import Quantity

if TYPE_CHECKING:
    from alignment.training.cohort import CohortSlot


log = logging.getLogger(__name__)

AUTO_WIDTH = 4
"""How many members train at once on a GPU with `trainer.cohort=auto`."""

_OWN = ("seed", "loss", "optim", "adapter", "tracking", "dashboard", "resume")
"""Sections in which the members of a cohort may differ."""
_SHARED_LOOP = ("cohort", "plan", "tokens_per_batch", "checkpoint_every")
"""Settings of the loop that must be the same, since they decide how the passes run."""


@dataclass(slots=True)
class SweepCohort:
    """Members that train in one process, `width` at a time."""

    members: list[SweepMember]
    width: int
    has_run: bool = False

    def run(self, run: Callable[[SweepMember, CohortSlot], None]) -> None:
        """Run all members; each call of `run` has a greenlet of its own, and must keep its failure to itself.

        The first member is the one whose job this process is in: its folder exists and its log is open.
        """
        from alignment.training.cohort import Cohort

        self.has_run = True
        log.info("%d members train together, %d at a time.", len(self.members), self.width)
        for member in self.members[1:]:
            member.make_folder()

        def named(slot: CohortSlot, member: SweepMember) -> None:
            _current.set(member.folder.name)
            run(member, slot)

        with _own_logs(self.members):
            cohort = Cohort(self.width)
            results = cohort.run([partial(named, member=member) for member in self.members])
        for result in results:
            if isinstance(result, BaseException):
                raise result


def cohorts(members: Sequence[SweepMember]) -> list[SweepCohort]:
    """Groups of unfinished members that can train together: they differ only in what each can have of its own."""
    alike: dict[bytes, list[SweepMember]] = {}
    for member in members:
        # Other launchers give each member a process of its own.
        here = member.choices["hydra/launcher"] == "basic"
        if here and not (member.folder / "summary.json").exists() and _can_join(member.config):
            alike.setdefault(_shared_settings(member.config), []).append(member)
    found = [SweepCohort(group, min(len(group), _width(group[0].config))) for group in alike.values()]
    return [together for together in found if together.width > 1]


def _can_join(config: RunConfig) -> bool:
    """Whether the run trains an adapter on data from files, and its loss needs only token scores of the policy."""
    return (
        config.loss is not None
        and config.adapter is not None
        and config.onpolicy is None
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
    # Members in turns save no more than the loading of the base, which is not worth the memory on a CPU.
    return AUTO_WIDTH if config.device is not Device.cpu and torch.cuda.is_available() else 1


_current: ContextVar[str] = ContextVar("member", default="")


class _From(logging.Filter):
    """Passes records of the members with these names; an empty name stands for no member."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self._names = names

    def filter(self, record: logging.LogRecord) -> bool:
        return _current.get() in self._names


class _Named(logging.Formatter):
    """Puts the name of the member before its lines."""

    def __init__(self, inner: logging.Formatter | None) -> None:
        super().__init__()
        self._inner = inner or logging.Formatter()

    def format(self, record: logging.LogRecord) -> str:
        name, text = _current.get(), self._inner.format(record)
        return f"[{name}] {text}" if name else text


@contextmanager
def _own_logs(members: Sequence[SweepMember]) -> Iterator[None]:
    """Send the lines of each member to the log file in its own folder; that of the first is open already."""
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
