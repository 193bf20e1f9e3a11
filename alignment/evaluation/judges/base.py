"""What every judge is asked and what it answers."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from alignment.errors import UserError
from alignment.evaluation.intervals import tango_interval
from alignment.evaluation.statistics.clusters import effective_count

if TYPE_CHECKING:  # it brings torch, which a list of what is cached does without
    from alignment.types import Group


@dataclass(frozen=True, slots=True)
class Item:
    """A prompt with the answers that a judge is asked about: one to score, two to compare.

    Attributes:
        prompt: its text.
        answers: their texts, in the order in which they are shown.
        meta: the other columns of the prompt's row, such as accepted answers.
        source: where the prompt comes from, for messages.
        group: the tokens of the prompt and of the answers, for a judge that scores tokens.
    """

    prompt: str
    answers: tuple[str, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)
    source: str = "the data"
    group: Group | None = None

    @property
    def is_same(self) -> bool:
        """Whether two answers are one and the same text."""
        return len(set(self.answers)) < len(self.answers)

    def only(self, index: int) -> Item:
        """The prompt with one of the answers."""
        group = None if self.group is None else self.group.only(index)
        return replace(self, answers=(self.answers[index],), group=group)

    def swapped(self) -> Item:
        """The two answers in the other order."""
        group = None if self.group is None else self.group.only(1, 0)
        return replace(self, answers=self.answers[::-1], group=group)


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a judge thinks of one answer. What a judge does not say is None.

    Attributes:
        score: the higher, the better; None if the judge gave none that can be read.
        correct: the answer is right.
        direct: the rules alone: at most so many words, without hedge, chatter or repetition; whether right or wrong.
        words: number of words, where the judge counts them.
        reasons: what was found, for people who read samples.
    """

    score: float | None
    correct: bool | None = None
    direct: bool | None = None
    words: int | None = None
    reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        right = [] if self.correct is None else ["right" if self.correct else "wrong"]
        score = "no readable score" if self.score is None else f"score {self.score:.4g}"
        return ", ".join([*right, score, *self.reasons])

    def as_json(self) -> dict[str, Any]:
        """For samples.jsonl, without what the judge does not say."""
        return {key: value for key, value in asdict(self).items() if value is not None or key == "score"}

    @classmethod
    def from_json(cls, kept: Mapping[str, Any]) -> Judgement:
        """What `as_json` has made."""
        return cls(**{**kept, "reasons": tuple(kept.get("reasons", ()))})


@dataclass(frozen=True, slots=True)
class Preference:
    """Which of two answers a judge prefers, asked in both orders.

    Attributes:
        shares: the first answer's share of the win, in [0, 1], shown first and shown second: 1 if it wins, 0.5 for a
            tie, or its probability. None for a verdict that cannot be read.
        weights: how much each verdict counts in `share`: Arena-Hard counts a strong one three times.
        reasons: what was found, for people who read samples.
    """

    shares: tuple[float | None, float | None]
    weights: tuple[int, int] = (1, 1)
    reasons: tuple[str, ...] = ()

    @property
    def outcome(self) -> int:
        """1 if the first answer wins in both orders, -1 if the second does; all else is a tie, 0.

        That is a tie in both orders, orders that disagree, and a verdict that cannot be read (Zheng et al. 2023,
        arXiv 2306.05685, section 3.4).
        """
        first, second = map(_sign, self.shares)
        return first if first == second else 0

    @property
    def share(self) -> float:
        """The first answer's share of the win over both orders; what cannot be read counts one half."""
        pairs = zip(self.shares, self.weights, strict=True)
        return sum(weight * (0.5 if share is None else share) for share, weight in pairs) / sum(self.weights)

    @property
    def unreadable(self) -> int:
        """How many of the two verdicts cannot be read."""
        return self.shares.count(None)

    @property
    def is_consistent(self) -> bool:
        """Whether both orders have the same verdict; of use where both can be read."""
        return _sign(self.shares[0]) == _sign(self.shares[1])

    def swapped(self) -> Preference:
        """What the judge says of the second answer and the first."""
        first, second = (None if share is None else 1 - share for share in self.shares)
        return Preference((second, first), self.weights[::-1], self.reasons)

    def as_json(self) -> dict[str, Any]:
        """For samples.jsonl."""
        return {"outcome": self.outcome, **asdict(self)}

    @classmethod
    def from_json(cls, kept: Mapping[str, Any]) -> Preference:
        """What `as_json` has made."""
        return cls(tuple(kept["shares"]), tuple(kept["weights"]), tuple(kept["reasons"]))


SAME = Preference((0.5, 0.5), reasons=("the same answer",))
"""Of two equal answers, which no judge needs to see."""


def _sign(share: float | None) -> int:
    return 0 if share is None else (share > 0.5) - (share < 0.5)


def compare(a: Judgement, b: Judgement) -> int:
    """1 if `a` scores higher, -1 if `b` does, 0 for a tie or a missing score; compare(a, b) == -compare(b, a)."""
    if a.score is None or b.score is None:
        return 0
    return (a.score > b.score) - (a.score < b.score)


def by_scores(a: Judgement, b: Judgement) -> Preference:
    """The preference that two scores make: the order of the answers has no part in it."""
    if a.score is None or b.score is None:
        return Preference((None, None))
    share = 0.5 + compare(a, b) / 2
    return Preference((share, share))


@dataclass(frozen=True, slots=True)
class WinRate:
    """Wins of the first over the second of each pair; `rate` counts a tie as one half, [`low`, `high`] is 95%."""

    wins: int
    ties: int
    losses: int
    rate: float
    low: float
    high: float


def win_rate(outcomes: Iterable[int], prompts: Sequence[Hashable] | None = None) -> WinRate:
    """How often the first of two answers wins: 1 for a win, 0 for a tie, -1 for a loss.

    Args:
        prompts: of each pair, where a prompt has several: these are not independent, so the interval is that of the
            number of independent pairs that they are worth.
    """
    found = list(outcomes)
    if not found:
        raise UserError("A win rate needs at least one pair of answers; evaluation.prompts must be at least 1.")
    n, wins, ties = len(found), found.count(1), found.count(0)
    rate = (wins + ties / 2) / n
    count = n if prompts is None else effective_count(found, prompts)
    return WinRate(wins, ties, n - wins - ties, rate, *tango_interval(rate, ties / n, count))


class Judge(ABC):
    """A judge of answers.

    Attributes:
        kind: its name in configurations.
        pointwise: whether it scores one answer at a time; if not, it only compares two.
    """

    kind: ClassVar[str]
    pointwise: bool = True

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """Everything that decides a judgement, as JSON values: version, model, prompt, settings. Never a secret."""

    @cached_property
    def identity(self) -> str:
        """64 hex digits, the same for judges that judge alike; nothing of this package's code is part of it."""
        text = json.dumps({"kind": self.kind, **self.description()}, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=32).hexdigest()

    def require(self, items: Sequence[Item]) -> None:  # noqa: B027, most judges need nothing
        """Refuse prompts that this judge cannot judge; their answers may still be unknown.

        Raises:
            UserError: what is missing, and where.
        """

    def score(self, items: Sequence[Item]) -> list[Judgement]:
        """The judgement of each item's only answer, in order."""
        raise UserError(f"The judge {self.kind} compares two answers and gives a single one no score.")

    def compare(self, items: Sequence[Item]) -> list[Preference]:
        """The preference between each item's two answers, in order."""
        scores = self.score([item.only(index) for item in items for index in (0, 1)])
        return [by_scores(a, b) for a, b in zip(scores[::2], scores[1::2], strict=True)]

    def usage(self) -> dict[str, Any]:
        """What judging has cost so far: calls, tokens, money. Empty for a judge that costs nothing."""
        return {}
