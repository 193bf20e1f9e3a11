"""The task `ifeval`: how many verifiable instructions the answers of each policy follow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from alignment.assessment.entrants import Entrants
from alignment.assessment.task import Result
from alignment.comparison.tables import Table
from alignment.errors import UserError
from alignment.evaluation.intervals import wilson_interval
from alignment.evaluation.judges.base import Item
from alignment.evaluation.judges.ifeval import InstructionJudge, problem_of
from alignment.evaluation.statistics.clusters import effective_count
from alignment.runs.text import percent

_NOTE = (
    "By IFEval's strict rules. A prompt is followed if all its instructions are. Intervals are Wilson's, at the number "
    "of independent cases that all answers and instructions of a prompt are worth together."
)


class Instructions:
    """The accuracy over prompts and over instructions, of the prompts whose instructions can all be checked.

    Raises:
        UserError: no prompt has instructions that can be checked.
    """

    def __init__(self, field: Entrants) -> None:
        self._field = field
        asked = field.policies[0].questions
        problems = {number: problem_of(row.meta) for number, row in enumerate(asked.rows)}
        self._checked = [number for number, problem in problems.items() if problem is None]
        self._left_out = len(problems) - len(self._checked)
        if not self._checked:
            raise UserError(
                f"tasks=ifeval cannot check {asked.rows[0].source}, nor any other prompt: {problems[0]}. Give prompts "
                f"of IFEval with questions=FILE."
            )

    def run(self) -> Result:
        """The two accuracies of every policy."""
        found = [
            {"name": name, **self._accuracies(self._field.answers[number])}
            for number, name in enumerate(self._field.names)
        ]
        left_out = f" {self._left_out} prompts have instructions that cannot be checked and are left out."
        table = Table(
            "Verifiable instructions",
            ["policy", "prompts", "prompts followed", "instructions followed"],
            [
                [row["name"], str(len(self._checked)), _cell(row["prompts"]), _cell(row["instructions"])]
                for row in found
            ],
            _NOTE + (left_out if self._left_out else ""),
            is_numbers=True,
        )
        return Result({"policies": found, "prompts": len(self._checked), "left_out": self._left_out}, [table])

    def _accuracies(self, answers: Sequence[Sequence[str]]) -> dict[str, Any]:
        rows = self._field.policies[0].questions.rows
        places = [number for number in self._checked for _ in answers[number]]
        items = [Item("", (text,), rows[number].meta) for number in self._checked for text in answers[number]]
        judged = InstructionJudge().score(items)
        whole = [float(bool(one.correct)) for one in judged]
        each: list[float] = []
        prompts: list[int] = []
        for number, one in zip(places, judged, strict=True):
            count = len(rows[number].meta["instruction_id_list"])
            each += [1.0] * (count - len(one.reasons)) + [0.0] * len(one.reasons)
            prompts += [number] * count
        return {"prompts": _share(whole, places), "instructions": _share(each, prompts)}


def _share(values: Sequence[float], prompts: Sequence[int]) -> dict[str, float]:
    share = sum(values) / len(values)
    low, high = wilson_interval(share, effective_count(values, prompts))
    return {"n": len(values), "share": share, "low": low, "high": high}


def _cell(found: dict[str, float]) -> str:
    return f"{percent(found['share'])} ({percent(found['low'])} to {percent(found['high'])})"
