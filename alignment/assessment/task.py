"""What a task of an evaluation is given, and what it finds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from alignment.assessment.entrants import Entrants
from alignment.comparison.answers import Question
from alignment.comparison.tables import Table


@dataclass(frozen=True, slots=True)
class Result:
    """What a task has found.

    Attributes:
        found: as JSON values.
        tables: the same for people.
        cautions: what a careful reader would question.
        questions: some prompts with the answers of every policy.
        note: on their selection.
        lines: rows of a file of its own, by the file's name.
    """

    found: Mapping[str, Any]
    tables: Sequence[Table]
    cautions: Sequence[str] = ()
    questions: Sequence[Question] = ()
    note: str = ""
    lines: Mapping[str, Sequence[Any]] = field(default_factory=dict)


class Task(Protocol):
    """A task. Making it checks that it can be done; nothing is drawn or judged before all of them are made."""

    def __init__(self, entrants: Entrants) -> None: ...

    def run(self) -> Result:
        """Do it."""
        ...
