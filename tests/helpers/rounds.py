"""Runs with rounds for tests: a tiny policy, a judge whose words are kept, and where a run is killed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from alignment.config.compose import load
from alignment.evaluation.judges.base import Item, Judge, Judgement
from alignment.evaluation.judges.store import JudgementStore
from alignment.ranks.team import Team
from alignment.stages import chain as stage_chain
from alignment.stages import rounds as stage_rounds
from alignment.stages.chain import Chain
from tests.helpers.commands import pair, write_lines

ROUNDS = ("onpolicy=rounds", "onpolicy.every=3", "onpolicy.k=3")


class Killed(BaseException):
    """In place of a signal: nothing in between catches it."""


class HashJudge(Judge):
    """Scores a text by its hash, in five grades, and keeps what it has said.

    Attributes:
        asked: texts that were not known.
        killed_at: the question at which the run is killed.
    """

    kind: ClassVar[str] = "hash"

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self.asked = 0
        self.killed_at: int | None = None

    def description(self) -> dict[str, Any]:
        return {"version": 1}

    def score(self, items: Sequence[Item]) -> list[Judgement]:
        with JudgementStore(self._cache, self) as store:
            return [Judgement(float(score)) for score in store.replies(items, self._replies)]  # type: ignore[arg-type]

    def _replies(self, items: Sequence[Item]):
        for place, item in enumerate(items):
            self.asked += 1
            if self.asked == self.killed_at:
                raise Killed
            yield place, hashlib.blake2b(item.answers[0].encode()).digest()[0] % 5


def write_pairs(folder: Path) -> Path:
    """Twenty pairs in a file."""
    write_lines(folder / "pairs.jsonl", [pair(number) for number in range(1, 21)])
    return folder / "pairs.jsonl"


def make_easy(monkeypatch, made: Callable[[HashJudge], None] = lambda judge: None) -> None:
    """Rounds that a tiny random policy can have: answers that end, and a `HashJudge` where any judge is asked for."""

    def make(config, cache, device):
        if config.judge.name in ("none", "implicit"):
            return None
        judge = HashJudge(cache)
        made(judge)
        return judge

    monkeypatch.setattr(stage_rounds, "make_judge", make)
    # A random policy hardly ever writes an end of turn: let one token in five be one
    stops = stage_chain.stop_tokens
    monkeypatch.setattr(stage_chain, "stop_tokens", lambda *a: sorted({*stops(*a), *range(0, 256, 5)}))


class Project:
    """Runs of one tiny project, all with one cache unless they are given another.

    Attributes:
        data: its file.
        judge: of the rounds of the last chain.
        team: the ranks that share the runs.
    """

    def __init__(self, folder: Path, model: Path, data: Path, monkeypatch, team: Team | None = None) -> None:
        self.folder = folder
        self.data = data
        self.team = team
        self._model = model
        self._monkeypatch = monkeypatch

        make_easy(monkeypatch, lambda judge: setattr(self, "judge", judge))

    def chain(self, name: str, *settings: str, cache: str = "cache") -> Chain:
        """A chain in the folder of this name, with 8 steps of 2 pairs in rounds of 3."""
        self._monkeypatch.setenv("ALIGNMENT_CACHE", str(self.folder / cache))
        config = load(
            *("recipe=quickstart", "sft=none", "tracking=none", "device=cpu", f"model.name={self._model}"),
            *(() if "adapter=none" in settings else ("adapter.r=2",)),
            *(() if "reference=live" in settings else ("reference.spot_checks=0",)),
            "optim.lr=1e-2",
            *("evaluation.judge=none", "evaluation.prompts=2", "evaluation.max_new_tokens=6"),
            "evaluation.kl_prompts=0",
            f"data.source={self.data}",
            *("data.eval_source=null", "data.system=null", "data.limit=null", "data.eval_size=4"),
            "data.eval_limit=null",
            *("trainer.groups_per_step=2", "trainer.max_steps=8", "trainer.save_every=2", "trainer.log_every=1"),
            *(ROUNDS if not any(one.startswith("onpolicy=") for one in settings) else ()),
            *settings,
        )
        return Chain(config, self.folder / name, "quickstart", {}, team=self.team)

    def run(self, name: str, *settings: str, cache: str = "cache") -> dict[str, Any]:
        """The summary of such a run."""
        return self.chain(name, *settings, cache=cache).run()
