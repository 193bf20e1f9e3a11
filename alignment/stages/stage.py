"""The shape that the stages of a run share: where they work, how they are run, and the typed result that they leave."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import nn

from alignment.files import damaged, digests, read_sealed, write_sealed
from alignment.ranks.team import Team
from alignment.training.callbacks import LogFunction
from alignment.training.cohort import CohortSlot

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Workspace:
    """Where and with what the stages of one run work.

    Attributes:
        run_dir: folder of the run.
        cache: folder that all runs share.
        device: where the policy is.
        tokenizer: of the policy.
        slot: the run's slot in the cohort that it trains in, if it does.
        final_policy: where the policy of the last stage is saved.
        team: the ranks that share the work; None for one process.
    """

    run_dir: Path
    cache: Path
    device: torch.device
    tokenizer: Any
    slot: CohortSlot | None
    final_policy: Path
    team: Team | None = None

    def folder(self, stage: str) -> Path:
        """The folder of a stage."""
        return self.run_dir / "stages" / stage

    def once(self, name: str, make: Callable[[], T]) -> T:
        """Something that is the same for all members of a cohort: the first of them makes it."""
        return make() if self.slot is None else self.slot.once(name, make)


@dataclass(kw_only=True, slots=True)
class StageResult:
    """What a stage reports. `done.json` holds it; the stage counts as done from the moment that this file exists.

    Attributes:
        steps: optimizer steps.
        metrics: the last training log and the last evaluation.
        memory: bytes predicted and measured, and how the steps were run (see `memory_result`).
        seconds: the whole stage.
        tokens_per_second: while it trained.
        taken_over: key of the stored result that this run has reused instead of training.
    """

    optional: ClassVar[tuple[str, ...]] = ("taken_over", "stopped", "rounds", "answers")
    """Left out of the file where they are None."""

    steps: int
    metrics: dict[str, float]
    memory: dict[str, int]
    seconds: float
    tokens_per_second: float
    taken_over: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As `done.json` holds it."""
        return {key: value for key, value in asdict(self).items() if value is not None or key not in self.optional}

    def summary(self) -> dict[str, Any]:
        """As `summary.json` has it under the name of the stage."""
        return self.to_dict()


@dataclass(kw_only=True, slots=True)
class PreferenceResult(StageResult):
    """What the preference stage reports.

    Attributes:
        loss: its name.
        settings: of the loss.
        start: the loss before the first update beside what its formula gives, and the identity of the policy.
        reference: how the reference log-probs came about.
        kl: from the final policy to the one that the stage began with, where it was sampled.
        cohort: size of the cohort that the run has trained in.
        stopped: where and why the training was stopped early.
        rounds: the metrics of each round whose groups the policy has drawn.
        answers: of each look at held-out answers on the way: its step and its metrics, the win rate with its interval.
    """

    loss: str
    settings: dict[str, Any]
    start: dict[str, Any]
    reference: dict[str, Any]
    kl: dict[str, Any] | None
    cohort: dict[str, int] | None
    stopped: dict[str, Any] | None = None
    rounds: list[dict[str, float]] | None = None
    answers: list[dict[str, Any]] | None = None

    def summary(self) -> dict[str, Any]:
        """Without what `summary.json` has in places of its own: reference, KL, cohort."""
        return {key: value for key, value in self.to_dict().items() if key not in ("reference", "kl", "cohort")}


class Stage(Protocol):
    """One stage of a run.

    Attributes:
        name: of its folder, and in the metrics.
        title: its name in log lines.
        seed: set before it begins.
        policy: folder where the policy is saved that it ends with.
        result_type: class of its result.
    """

    name: str
    title: str
    seed: int
    policy: Path
    result_type: type[StageResult]

    def key(self, model: nn.Module) -> str | None:
        """Name under which other runs find the stage's result; None where it is not kept for others."""
        ...

    def run(self, model: nn.Module, log_metrics: LogFunction) -> StageResult:
        """Train the policy in place, from the newest checkpoint if there is one."""
        ...


def write_result(folder: Path, result: StageResult, policy: Path) -> None:
    """Mark the stage of this folder as done, with this policy."""
    write_sealed(folder / "done.json", {"result": result.to_dict(), "policy": digests(policy)}, indent=2)


def read_result(folder: Path, kind: type[StageResult]) -> StageResult | None:
    """The result of the stage of this folder; None while it is not done.

    Raises:
        UserError: the file is damaged, or none of this version's.
    """
    path = folder / "done.json"
    if not path.exists():
        return None
    found = read_sealed(path)["result"]
    known = {field.name: field for field in fields(kind)}
    needed = {name for name, field in known.items() if field.default is MISSING}
    if not isinstance(found, dict) or not needed <= found.keys() <= known.keys():
        raise damaged(path)
    return kind(**found)


def require_whole(folder: Path, policy: Path) -> None:
    """Refuse what a finished stage has left if it is not as the stage left it, whether it is needed again or not.

    Raises:
        UserError: a file in the folder of the stage, or of its policy, has changed.
    """
    for path in folder.glob("*.json"):
        read_sealed(path)
    if read_sealed(folder / "done.json")["policy"] != digests(policy):
        raise damaged(policy)
