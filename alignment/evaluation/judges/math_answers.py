"""Answers to mathematical questions against their solutions, by the package math-verify.

It parses expressions and LaTeX and compares by value. Its time limits ride on `signal.alarm`, which works in the main
thread of a process alone, and an expression can hang without them: so it runs in a process of its own, which is started
anew when an answer takes too long.
"""

from __future__ import annotations

import importlib.util
import json
import select
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

from alignment.errors import UserError
from alignment.evaluation.judges.base import Item, Judge, Judgement
from alignment.evaluation.judges.rules import accepted_answers

_PATIENCE = 30.0
"""Seconds for one answer; math-verify's own limits are 5 for each step."""
_START = 120.0
"""Seconds for the process to start: it imports a computer algebra system."""


class MathJudge(Judge):
    """1 for an answer whose value is that of an accepted one in the column `answer`, 0 for another.

    Raises:
        UserError: math-verify is not installed.
    """

    kind: ClassVar[str] = "math"

    def __init__(self) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise UserError(
                "evaluation.judge=math needs the package math-verify, which is not installed: "
                "pip install 'alignment[math]' brings it."
            )

    def description(self) -> dict[str, Any]:
        """The package's version decides what is equal."""
        return {"version": 1, "math-verify": metadata.version("math-verify")}

    def require(self, items: Sequence[Item]) -> None:
        """Refuse prompts without a solution."""
        for item in items:
            if not accepted_answers(item.meta):
                raise UserError(
                    f"evaluation.judge=math needs a column `answer` with the solution, and {item.source} has none; add "
                    f"it or set evaluation.judge=none."
                )

    def score(self, items: Sequence[Item]) -> list[Judgement]:
        """The score of each answer; None where the verdict takes too long."""
        found: list[Judgement] = []
        worker = _Worker()
        try:
            for item in items:
                said = worker.ask({"gold": accepted_answers(item.meta), "answer": item.answers[0]})
                if said is None:
                    worker.close()
                    worker = _Worker()
                found.append(_judgement(said))
        finally:
            worker.close()
        return found


def _judgement(said: dict[str, Any] | None) -> Judgement:
    if said is None:
        return Judgement(None, reasons=("no verdict in time",))
    if "correct" not in said:
        return Judgement(None, reasons=(str(said["error"]),))
    return Judgement(float(said["correct"]), said["correct"])


class _Worker:
    """The process that runs math-verify; one question at a time."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("math_worker.py")
        # -P: the modules beside the script are none that its libraries may take for theirs
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        if self._line(_START) is None:
            self.close()
            raise UserError(
                "evaluation.judge=math: math-verify does not start; python -c 'import math_verify' says why."
            )

    def ask(self, question: dict[str, Any]) -> dict[str, Any] | None:
        """The verdict; None if it takes too long, or the process has died."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            return None
        return self._line(_PATIENCE)

    def _line(self, seconds: float) -> dict[str, Any] | None:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        line = self._process.stdout.readline() if ready else b""
        return json.loads(line) if line else None

    def close(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
