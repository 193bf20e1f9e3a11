"""The answers of policies judged against each other: win rates, also without length, and a common scale."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

from alignment.assessment.entrants import Entrants
from alignment.assessment.page import questions, win_rate_tables
from alignment.assessment.task import Result
from alignment.comparison.between import PAIRS
from alignment.config.judging import LOOKING_UP
from alignment.errors import UserError
from alignment.evaluation.judges.base import Item, Judge, Judgement, Preference, by_scores, win_rate
from alignment.evaluation.judges.card import judge_card
from alignment.evaluation.judges.human_labels import HumanLabels
from alignment.evaluation.judges.making import make_judge
from alignment.evaluation.statistics.bradley_terry import strengths
from alignment.evaluation.statistics.length_control import length_controlled
from alignment.evaluation.statistics.prediction_powered import mended_mean
from alignment.stages.finished import OpenedPolicy
from alignment.stages.judging import means

Pair = tuple[int, int]


class Judged:
    """The verdicts on the answers of entrants.

    Args:
        judge: of scores: all policies meet each other, which costs nothing more; else the matches alone.

    Attributes:
        scores: of a judge that scores, the verdicts on each policy's answers, prompt by prompt.
        preferences: of each two policies that met, those of each pair of answers, prompt by prompt.
    """

    def __init__(self, field: Entrants, judge: Judge) -> None:
        self._field = field
        self._judge = judge
        self.scores: list[list[Judgement]] = []
        if judge.pointwise:
            self.scores = [judge.score(self.items(i)) for i in range(len(field.policies))]
        self.preferences: dict[Pair, list[Preference]] = {}
        met = combinations(range(len(field.policies)), 2) if judge.pointwise else field.matches
        for i, j in dict.fromkeys([*field.matches, *met]):
            if judge.pointwise:
                found = [by_scores(a, b) for a, b in zip(self.scores[i], self.scores[j], strict=True)]
            else:
                found = judge.compare(self.items(i, j))
            self.preferences[i, j] = found

    @property
    def prompts(self) -> list[int]:
        """The number of the prompt of each pair of answers."""
        return [number for number, several in enumerate(self._field.answers[0]) for _ in several]

    def items(self, *policies: int) -> list[Item]:
        """The prompts with an answer of each of these policies; a prompt comes as often as it was answered."""
        questions = self._field.policies[0].questions
        each = zip(*(self._field.answers[policy] for policy in policies), strict=True)
        return [
            Item(text, answers, row.meta, row.source)
            for row, text, several in zip(questions.rows, questions.texts, each, strict=True)
            for answers in zip(*several, strict=True)
        ]

    def found(self, humans: HumanLabels | None) -> dict[str, Any]:
        """All that is told of the verdicts, as JSON values: "policies", "matches", "judge"."""
        return {
            "policies": self._policies(),
            "matches": [self._match(*match, humans) for match in self._field.matches],
            "judge": self._card(humans),
        }

    def pairs(self) -> list[dict[str, Any]]:
        """Each pair of answers of a match, for people who would label some of them."""
        names = self._field.names
        return [
            {"prompt": item.prompt, "answers": list(item.answers), "policies": [names[i], names[j]], **said.as_json()}
            for i, j in self._field.matches
            for item, said in zip(self.items(i, j), self.preferences[i, j], strict=True)
        ]

    def _policies(self) -> list[dict[str, Any]]:
        scale = self._scale()
        rows = []
        for number, name in enumerate(self._field.names):
            texts = [text for several in self._field.answers[number] for text in several]
            row: dict[str, Any] = {
                "name": name,
                "identity": self._field.policies[number].identity,
                "answers": len(texts),
                "words": sum(len(text.split()) for text in texts) / len(texts),
                "characters": sum(map(len, texts)) / len(texts),
            }
            if self.scores:
                row |= means(self.scores[number])
            rows.append(row | ({"strength": scale[number]} if scale else {}))
        return rows

    def _match(self, i: int, j: int, humans: HumanLabels | None) -> dict[str, Any]:
        items, preferences = self.items(i, j), self.preferences[i, j]
        gaps = [len(item.answers[0]) - len(item.answers[1]) for item in items]
        shares, names = self._shares(i, j), self._field.names
        found = {
            "first": names[i],
            "second": names[j],
            **asdict(win_rate([one.outcome for one in preferences], self.prompts)),
            "longer_by": sum(gaps) / len(gaps),
            "length_controlled": asdict(length_controlled(shares, gaps, self.prompts, self._difficulties(i, j))),
        }
        labels = [] if humans is None else humans.compare(items)
        return found | ({"humans": mended} if (mended := self._mended(shares, labels)) is not None else {})

    def _difficulties(self, i: int, j: int) -> list[float] | None:
        """gamma_x of each pair: how often the other policies of the runs win against the second one, as a logit.

        None where no other one met it.
        """
        others = [self._shares(other, j) for other in range(self._field.runs) if other not in (i, j)]
        wins: dict[int, list[float]] = {}
        for shares in filter(None, others):
            for prompt, share in zip(self.prompts, shares, strict=True):
                wins.setdefault(prompt, []).append(share)
        if not wins:
            return None
        gamma = {
            prompt: math.log((sum(shares) + 0.5) / (len(shares) - sum(shares) + 0.5)) for prompt, shares in wins.items()
        }
        return [gamma[prompt] for prompt in self.prompts]

    def _mended(self, shares: Sequence[float], labels: Sequence[Preference]) -> dict[str, Any] | None:
        """The win rate mended by people's labels, prompt by prompt; None where they have labelled too few, or all."""
        prompts: dict[int, tuple[list[float], list[float], list[float]]] = {}
        for prompt, share, label in zip(self.prompts, shares, labels, strict=bool(labels)):
            said, judged, rest = prompts.setdefault(prompt, ([], [], []))
            if label.unreadable:
                rest.append(share)
            else:
                said.append(0.5 + label.outcome / 2)
                judged.append(share)
        labelled = [(_mean(said), _mean(judged)) for said, judged, _ in prompts.values() if said]
        others = [_mean(rest) for said, _, rest in prompts.values() if not said]
        if len(labelled) < 2 or len(others) < 2:
            return None
        return asdict(mended_mean([said for said, _ in labelled], [judged for _, judged in labelled], others))

    def _scale(self) -> list[dict[str, Any]]:
        """The strengths of three policies or more; empty where not all of them met, not even by way of others."""
        if len(self._field.policies) < 3:
            return []
        pairs = [pair for pair in self.preferences for _ in self.prompts]
        shares = [share for pair in self.preferences for share in self._shares(*pair)]
        try:
            found = strengths(pairs, shares, self.prompts * len(self.preferences), len(self._field.policies))
        except ValueError:
            return []
        return [asdict(one) for one in found]

    def _shares(self, i: int, j: int) -> list[float]:
        """The share that i has of each win over j; empty where they did not meet."""
        turned = (i, j) not in self.preferences
        found = self.preferences.get((j, i) if turned else (i, j), ())
        return [0.5 + (-one.outcome if turned else one.outcome) / 2 for one in found]

    def _card(self, humans: HumanLabels | None) -> dict[str, Any]:
        pairs = [
            pair
            for match in self._field.matches
            for pair in zip(self.items(*match), self.preferences[match], strict=True)
        ]
        return judge_card(self._judge, pairs, [one for scores in self.scores for one in scores], humans)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


class WinRates:
    """The task `win_rate`: the answers of each match compared.

    Raises:
        UserError: there is no judge, or it cannot judge the prompts.
    """

    def __init__(self, field: Entrants) -> None:
        self._field = field
        asked = field.policies[0].questions
        config = asked.config.evaluation
        judge = make_judge(config, asked.cache, asked.device)
        if judge is None:
            raise UserError("tasks=win_rate needs a judge, and the run had none: set judge=rules, llm or another one.")
        rows = zip(asked.rows, asked.texts, strict=True)
        judge.require([Item(text, (), row.meta, row.source) for row, text in rows])
        self._judge = judge
        labels = config.human_labels
        self._humans = None if labels is None else HumanLabels(Path(labels).expanduser())

    def run(self) -> Result:
        """Win rates, policies and the judge's card; the pairs of answers go into a file of their own."""
        judged = Judged(self._field, self._judge)
        found = judged.found(self._humans)
        shown, note = questions(self._field, judged.preferences, judged.scores)
        return Result(
            found,
            win_rate_tables(found),
            list(_cautions(self._field, self._judge, found)),
            shown,
            note,
            {PAIRS: judged.pairs()},
        )


def _cautions(field: Entrants, judge: Judge, found: Mapping[str, Any]) -> Iterator[str]:
    """What a careful reader would question."""
    trained = [policy.name for policy in field.policies if _has_learnt_from(policy, judge)]
    if trained:
        yield (
            f"The judge is the one that made the training data of {', '.join(trained)}: a policy learns what its judge "
            f"likes, so judge it with another one."
        )
    card = found["judge"]
    if card["unreadable"] > 0.1 * max(1, card["verdicts"]):
        yield f"{card['unreadable']} of {card['verdicts']} verdicts could not be read, and count as ties."
    for match in found["matches"]:
        if abs(match["rate"] - match["length_controlled"]["rate"]) > 0.1:
            yield (
                f"Length explains part of the win rate of {match['first']} against {match['second']}: its answers are "
                f"{abs(match['longer_by']):.0f} characters {'longer' if match['longer_by'] > 0 else 'shorter'} in mean."
            )
    if len(field.policies) > 2 and not all("strength" in row for row in found["policies"]):
        yield (
            "The policies have no common scale, because not all of them met, not even by way of others: give them one "
            "opponent with against=."
        )
    if card.get("humans") and not any("humans" in match for match in found["matches"]):
        yield (
            "People's labels are of other pairs than these, so they tell how far the judge agrees, but mend no win "
            "rate: label a random part of evaluation_pairs.jsonl for that."
        )


def _has_learnt_from(policy: OpenedPolicy, judge: Judge) -> bool:
    """Whether a policy was trained on its own answers as this judge has scored them, and not looked up."""
    questions = policy.questions
    own = questions.config.onpolicy if policy.run is not None and policy.moment == "final" else None
    if own is None or not own.pairs.is_judged or own.judge.name != judge.kind or judge.kind in LOOKING_UP:
        return False
    try:
        trained = make_judge(own, questions.cache, questions.device)
    except UserError:  # its model or key is gone, so that it is not the one that judges here
        return False
    return trained is not None and trained.identity == judge.identity
