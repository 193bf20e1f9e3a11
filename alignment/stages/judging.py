"""Held-out answers judged: scores, win rates of the last policy, and the card of the judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from alignment.config.schema import EvaluationConfig
from alignment.data.conversations.trajectories import readable
from alignment.data.rows.row import Row
from alignment.evaluation.judges.base import Item, Judgement, Preference, by_scores, win_rate
from alignment.evaluation.judges.card import judge_card
from alignment.evaluation.judges.human_labels import HumanLabels
from alignment.evaluation.judges.making import make_judge
from alignment.runs.record import RunRecord


class AnswersJudge:
    """Judges the answers to held-out rows.

    Args:
        cache: the folder in which judgements are kept.
        device: of a judge that is a model.

    Raises:
        UserError: the judge lacks something, or cannot judge a row.
    """

    def __init__(self, config: EvaluationConfig, rows: Sequence[Row], cache: Path, device: torch.device) -> None:
        self._rows = rows
        self._judge = make_judge(config, cache, device) if rows else None
        self._humans = None if config.human_labels is None else HumanLabels(Path(config.human_labels).expanduser())
        if self._judge is not None:
            self._judge.require(self._items())

    def __call__(self, answers: Mapping[str, Sequence[str]], record: RunRecord) -> dict[str, Any]:
        """Write the samples; lengths of the answers and, with a judge, scores and win rates of the last policy.

        Args:
            answers: of each moment (start, sft, final), one for each row.
        """
        scores, preferences = self._scores(answers), self._preferences(answers)
        if scores:
            preferences = {
                other: [by_scores(a, b) for a, b in zip(scores["final"], scores[other], strict=True)]
                for other in scores
                if other != "final"
            }
        rows = range(len(self._rows))
        record.write_samples([self._sample(i, answers, scores, preferences) for i in rows])
        result: dict[str, Any] = {"prompts": len(self._rows), "answers": {}}
        for name, texts in answers.items():
            entry: dict[str, Any] = {"n": len(texts), "words": sum(len(text.split()) for text in texts) / len(texts)}
            result["answers"][name] = entry | means(scores.get(name, ()))
        if preferences:
            result["win_rate"] = {
                f"final_vs_{other}": asdict(win_rate(one.outcome for one in found))
                for other, found in preferences.items()
            }
        if self._judge is not None:
            pairs = [
                (item, one)
                for other, found in preferences.items()
                for item, one in zip(self._items(answers["final"], answers[other]), found, strict=True)
            ]
            each = [one for found in scores.values() for one in found]
            result["judge"] = judge_card(self._judge, pairs, each, self._humans)
        return result

    def against(
        self, places: Sequence[int], texts: Sequence[str], before: Sequence[str]
    ) -> tuple[list[Judgement], list[Preference]]:
        """What the judge says of each text, an answer to the row of this place, and whether it beats the one before.

        Either is empty where the judge does not say it.
        """
        if self._judge is None:
            return [], []
        rows = [self._rows[i] for i in places]
        if not self._judge.pointwise:
            return [], self._judge.compare(self._items(texts, before, rows=rows))
        found, earlier = (self._judge.score(self._items(one, rows=rows)) for one in (texts, before))
        return found, [by_scores(a, b) for a, b in zip(found, earlier, strict=True)]

    def _items(self, *texts: Sequence[str], rows: Sequence[Row] | None = None) -> list[Item]:
        """The rows, all of them by default, with the answers of each of these, in order."""
        rows = self._rows if rows is None else rows
        answers = zip(*texts, strict=True) if texts else [()] * len(rows)
        return [Item(readable(row.prompt), own, row.meta, row.source) for row, own in zip(rows, answers, strict=True)]

    def _scores(self, answers: Mapping[str, Sequence[str]]) -> dict[str, list[Judgement]]:
        if self._judge is None or not self._judge.pointwise:
            return {}
        return {name: self._judge.score(self._items(texts)) for name, texts in answers.items()}

    def _preferences(self, answers: Mapping[str, Sequence[str]]) -> dict[str, list[Preference]]:
        """Of a judge that compares: the final answer with that of each other moment."""
        if self._judge is None or self._judge.pointwise:
            return {}
        return {
            other: self._judge.compare(self._items(answers["final"], texts))
            for other, texts in answers.items()
            if other != "final"
        }

    def _sample(
        self,
        index: int,
        answers: Mapping[str, Sequence[str]],
        scores: Mapping[str, Sequence[Judgement]],
        preferences: Mapping[str, Sequence[Preference]],
    ) -> dict[str, Any]:
        row = self._rows[index]
        sample: dict[str, Any] = {"prompt": readable(row.prompt)}
        sample |= {name: texts[index] for name, texts in answers.items()}
        if "kind" in row.meta:
            sample["kind"] = row.meta["kind"]
        if scores:
            sample["verdicts"] = {name: found[index].as_json() for name, found in scores.items()}
        elif preferences:
            sample["preferences"] = {name: found[index].as_json() for name, found in preferences.items()}
        if "start" in preferences:
            sample["winner"] = {1: "final", 0: "tie", -1: "start"}[preferences["start"][index].outcome]
        return sample


def means(judged: Sequence[Judgement]) -> dict[str, Any]:
    """Mean score, and shares of right and of direct answers, over those that have them."""
    found: dict[str, Any] = {}
    for name, values in (
        ("judge_score", [one.score for one in judged if one.score is not None]),
        ("correct", [one.correct for one in judged if one.correct is not None]),
        ("direct", [one.direct for one in judged if one.direct is not None]),
    ):
        if values:
            found[name] = sum(values) / len(values)
    return found
