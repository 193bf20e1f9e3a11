"""Held-out answers while the preference stage trains: drawn, judged and kept every so many steps."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from alignment.data.conversations.trajectories import readable
from alignment.evaluation.judges.base import win_rate
from alignment.evaluation.sampling.answer import Finish
from alignment.files import read_sealed, write_sealed
from alignment.runs.tracking import Tracker
from alignment.stages.answers import HeldOutAnswers
from alignment.stages.judging import means
from alignment.stages.stage import Workspace


class AnswersDuring(TrainerCallback):
    """Has the held-out set evaluated at every look, and adds to that row what the policy answers by then.

    The looks are at the start, after every so many steps, and at the end. Each is kept in a file of its own. Nothing of
    the training changes: random numbers, weights and the model's mode are afterwards what they were.

    Args:
        answers: of the run; those of the policy that the stage begins with are the last ones so far.
        work: where the looks are kept.
        every: so many steps.
        also: after these steps, too.
    """

    def __init__(self, answers: HeldOutAnswers, work: Workspace, every: int, also: Collection[int]) -> None:
        self._answers = answers
        self._before = [list(answers.answers.values())[-1][i] for i in answers.few]
        self._folder = _folder(work)
        self._every = every
        self._also = also
        self._looks = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for an evaluation where a look is due; runs after what ends the training early."""
        step = state.global_step
        self._looks = step % self._every == 0 or step in self._also or control.should_training_stop
        control.should_evaluate = control.should_evaluate or self._looks

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **kwargs: Any) -> None:
        """Add what the policy answers to the row of an evaluation."""
        if self._looks and logs is not None and "eval_loss" in logs:
            with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
                found = self._look(state.global_step, model)
            logs.update({f"eval_answers/{name}": value for name, value in found.items()})

    def _look(self, step: int, model: nn.Module) -> dict[str, float]:
        asked, few = self._answers, self._answers.few
        drawn = asked.drawn(f"after step {step}" if step else "at the start of the stage", model, few)
        texts = asked.texts(drawn)
        judgements, preferences = asked.judge.against(few, texts, self._before)
        rows: list[dict[str, Any]] = [
            {
                "prompt": readable(asked.rows[place].prompt),
                "answer": text,
                "tokens": len(answer.tokens),
                "is_cut": answer.finish is Finish.length,
            }
            for place, text, answer in zip(few, texts, drawn, strict=True)
        ]
        for row, judgement in zip(rows, judgements):  # noqa: B905 - a judge that compares gives none
            row["verdict"] = judgement.as_json()
        for row, preference in zip(rows, preferences):  # noqa: B905 - nor has "none" any
            row["outcome"] = preference.outcome
        metrics = {
            "length": sum(row["tokens"] for row in rows) / len(rows),
            "cut_share": sum(row["is_cut"] for row in rows) / len(rows),
        }
        won = win_rate(one.outcome for one in preferences) if preferences else None
        if won is not None:
            metrics["win_rate"] = won.rate
        if (score := means(judgements).get("judge_score")) is not None:
            metrics["score"] = score
        kept = metrics | ({} if won is None else {"win_rate": asdict(won)})
        write_sealed(self._folder / f"{step:06d}.json", {"step": step, "metrics": kept, "answers": rows}, indent=2)
        return metrics


def _folder(work: Workspace) -> Path:
    return work.folder("preference") / "answers"


def looks(work: Workspace) -> list[dict[str, Any]]:
    """What an `AnswersDuring` has kept, in the order of the steps: step, metrics and answers of each look.

    Raises:
        UserError: a file is damaged.
    """
    return [read_sealed(path) for path in sorted(_folder(work).glob("*.json"))]


def send_samples(work: Workspace, tracker: Tracker) -> None:
    """Send the answers of all looks as a table; a cell is empty where the judge does not say it."""
    rows = [
        (look["step"], row["prompt"], row["answer"], row.get("verdict", {}).get("score"), row.get("outcome"))
        for look in looks(work)
        for row in look["answers"]
    ]
    if rows:
        tracker.table("answers/samples", ("step", "prompt", "answer", "score", "outcome"), rows)
