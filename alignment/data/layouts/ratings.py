"""Answers with ratings: single answers with a score or a thumb, and lists of answers; recast to lists and labels."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import re
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alignment.data.conversations.messages import found, list_in, messages_of
from alignment.data.layouts.columns import (
    ANSWERS,
    Numbered,
    Question,
    Reading,
    Record,
    named,
    number,
    plain,
    pop,
    pop_answer,
    whole,
)
from alignment.data.layouts.prompts import ASKED
from alignment.data.rows.row import BadRow, Rejected
from alignment.data.rows.sequences import SpilledList

CONVERSATIONS = ("messages", "conversations", "conversation")
LISTS = ("completions", "responses", "answers", "candidates", "outputs", "generations", "replies")
SCORES = ("score", "rating", "overallscore", "reward", "rewardscore", "qualityscore", "helpfulness", "pmscore")
SCORE_LISTS = ("scores", "ratings", "rewards", "overallscores")
RANKS = ("ranks", "rank")
THUMBS = ("thumbsup", "thumbs", "thumb", "feedback", "liked", "reaction", "label", "rating", "vote")
THUMBS_DOWN = ("thumbsdown", "thumbdown", "disliked")
_WORDS = {
    **dict.fromkeys(("up", "thumbsup", "thumbup", "👍", "like", "liked", "upvote", "good", "positive"), True),
    **dict.fromkeys(("true", "1", "yes", "desirable", "chosen", "accepted"), True),
    **dict.fromkeys(("down", "thumbsdown", "thumbdown", "👎", "dislike", "disliked", "downvote"), False),
    **dict.fromkeys(("bad", "negative", "false", "0", "no", "undesirable", "rejected"), False),
}
_COLOURS = re.compile("[\\s_:\N{VARIATION SELECTOR-16}\U0001f3fb-\U0001f3ff]+|(?<=[a-zA-Z])-")
"""What stands between the parts of a word, and the colour of a thumb."""


def thumb(value: Any) -> bool:
    """Whether a label says that an answer is good: a truth value, 0 or 1, or a word such as up, like, good, chosen.

    Raises:
        Rejected: it says neither.
    """
    if isinstance(value, str):
        word = _COLOURS.sub("", value).lower()
        value = _WORDS.get(word, whole(word))
    if value not in (True, False):
        raise Rejected("bad_label", "a label is true or false, or a word such as good or bad, up or down")
    return bool(value)


def scores_of(values: list[Any]) -> tuple[float, ...] | None:
    """One finite number per completion, or None if all are absent."""
    if all(value in (None, "") for value in values):  # a cell of a table is empty, not null
        return None
    try:
        scores = tuple(float(value) for value in values)
    except (TypeError, ValueError, OverflowError):
        raise Rejected("bad_score", f"the scores {values} are not {len(values)} numbers") from None
    if not all(math.isfinite(score) for score in scores):
        raise Rejected("bad_score", f"the scores {values} are not finite")
    return scores


def list_scores(record: Record) -> tuple[float, ...] | None:
    """The scores of a list: from the column `scores`, from `ranks`, or from its completions; None without any."""
    completions, values = (list_in(record.get(name), name) for name in ("completions", "scores"))
    if values is None and record.get("ranks") is not None:
        values = from_ranks(record["ranks"])
    if values is None:
        values = [c.get("overall_score") if is_rated(c) else with_rating(c)[1] for c in completions]
    if not isinstance(values, list) or len(values) != len(completions):
        raise Rejected("bad_score", f"column 'scores' does not hold {len(completions)} numbers")
    return scores_of(values)


def is_rated(completion: Any) -> bool:
    """Whether the completion is an object as in the original UltraFeedback."""
    return isinstance(completion, dict) and "response" in completion


def weight_of(value: Any) -> float:
    """The weight of a row, 1 if there is none."""
    try:
        weight = 1.0 if value in (None, "") else float(value)
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise Rejected(
            "bad_weight",
            f"a weight is a finite number, at least 0, not {value!r}; data.ignore=[weight] leaves the column out",
        )
    return weight


def from_ranks(ranks: Any) -> list[float]:
    """Scores in the order of ranks, of which 1 is the best: their negatives."""
    ranks = list_in(ranks, "ranks")
    if not isinstance(ranks, list):
        raise Rejected("bad_score", f"the ranks are {found(ranks)}, not one number for each completion")
    return [-number(rank, "rank") for rank in ranks]


def thumbs(records: Sequence[Record], usual: AbstractSet[str]) -> Reading | None:
    """The reading of single answers with a thumb; None where there are none."""
    label = next(
        (column for name in THUMBS if (column := named((name,), usual)) and _are_thumbs(records, column)), None
    )
    if label is None:
        return None
    question, answer = _asked(usual - {label})
    if not usual & {"messages", "conversations"} and (question is None or answer is None):
        return None
    down = named(THUMBS_DOWN, usual - {label})

    def recast(record: Record) -> list[Record]:
        record["label"] = pop(record, label)
        if down is not None and thumb(record["label"]) == thumb(pop(record, down)):
            raise Rejected("no_vote", f"the columns {label} and {down} say the same")
        if question is not None and answer is not None:
            prompt = question.take(record)
            record |= {"prompt": prompt, "completion": pop_answer(record, answer)}
        return [record]

    return Reading("", f"column {label} says whether an answer is good" if label != "label" else "", recast)


def _are_thumbs(records: Sequence[Record], column: str) -> bool:
    values = [record[column] for record in records if record.get(column) is not None]

    def reads(value: Any) -> bool:
        if plain(column) in SCORES and not isinstance(value, bool) and whole(value) is not None:
            return False
        try:
            return thumb(value) in (True, False)
        except Rejected:
            return False

    return 2 * sum(map(reads, values)) >= len(values) > 0


def _asked(usual: AbstractSet[str]) -> tuple[Question | None, str | None]:
    """The columns of the question and of the single answer."""
    question = Question.among(usual)
    taken = set() if question is None else {question.column, question.more}
    return question, named(ANSWERS, usual - taken)


def listed(records: Sequence[Record], usual: AbstractSet[str]) -> Reading | None:
    """The reading of lists of answers under other names; None where there are none."""
    question = Question.among(usual)
    answers = _list_of(LISTS, records, usual)
    scores, ranks = _list_of((*SCORE_LISTS, *SCORES), records, usual), _list_of(RANKS, records, usual)
    if question is None or answers is None or not (scores or ranks or _holds_ratings(records, answers)):
        return None  # other names do not say that the best answer stands first

    def recast(record: Record) -> list[Record]:
        completions = list_in(pop(record, answers), answers)
        if not isinstance(completions, list):
            raise Rejected("wrong_type", f"column '{answers}' holds {found(completions)}, not a list")
        rated = [with_rating(completion) for completion in completions]
        if scores is not None:
            values = list_in(pop(record, scores), scores)
        else:
            values = from_ranks(pop(record, ranks)) if ranks is not None else [score for _, score in rated]
        record |= {"prompt": question.take(record), "completions": [text for text, _ in rated], "scores": values}
        return [record]

    return Reading("", "", recast)


def _list_of(names: Sequence[str], records: Sequence[Record], usual: AbstractSet[str]) -> str | None:
    """The column of one of these names that holds lists."""
    lists = {c for c in usual if any(isinstance(list_in(record.get(c), c), list) for record in records)}
    return named(names, lists)


def _holds_ratings(records: Sequence[Record], column: str) -> bool:
    """Whether the items of a column's lists have a score or a rank each."""
    lists = [list_in(record.get(column), column) for record in records]
    return any(
        isinstance(item, dict) and named((*SCORES, *RANKS), item) is not None
        for items in lists
        if isinstance(items, list)
        for item in items
    )


def with_rating(completion: Any) -> tuple[Any, float | None]:
    """The text, or the messages, of a list's item, and its score where it, or its last message, has one.

    Raises:
        Rejected: it has no text, or its score is no number.
    """
    if isinstance(completion, list) and completion and isinstance(completion[-1], dict):
        last, rating = with_rating(completion[-1])
        return [*completion[:-1], last], rating
    if not isinstance(completion, dict):
        return completion, None
    text, score, rank = (named(names, completion) for names in ((*ANSWERS, "text", "content"), SCORES, RANKS))
    answer = completion.get(text) if text is not None else None
    if completion.keys() & {"role", "from"}:
        answer = {key: value for key, value in completion.items() if key not in (score, rank)}
    elif text is None:
        raise Rejected("missing_field", f"an answer has no text: its keys are {', '.join(map(str, completion))}")
    if score is not None:
        return answer, number(completion[score], score)
    return answer, None if rank is None else -number(completion[rank], rank)


@dataclass(frozen=True, slots=True)
class Gathered(Reading):
    """Rated single answers, those to one prompt gathered into a list. A record is recast to a list of one.

    Of each answer, 16 bytes that stand for its prompt are in memory; many answers wait in a file.
    """

    def ready(self, records: Iterable[Numbered], folder: Path | None) -> Iterator[Numbered]:
        """The lists, in the order in which their prompts come first; an answer without another one is left out."""
        answers: SpilledList[Numbered] = SpilledList(folder, pickle.dumps, pickle.loads)
        keys = bytearray()
        for file, row, record in self.each(records):
            if isinstance(record, dict):
                asks = [record["prompt"], *(record.get(name) for name in ASKED)]
                text = json.dumps(asks, sort_keys=True, default=str)
                keys += hashlib.blake2b(text.encode("ascii"), digest_size=16).digest()
                answers.append((file, row, record))
            else:
                yield file, row, record
        for places in equal_keys(keys):
            group = [answers[place] for place in places]
            file, row, first = group[0]
            if len(group) == 1:
                yield file, row, BadRow("single_answer", "its prompt has no second answer", file, row)
                continue
            others = [record for _, _, record in group[1:]]
            shared = {name: value for name, value in first.items() if all(r.get(name) == value for r in others)}
            joined = {name: [r[name][0] for r in (first, *others)] for name in ("completions", "scores")}
            yield file, row, shared | joined


def equal_keys(keys: bytes | bytearray) -> Iterator[list[int]]:
    """The places of each key, in the order in which the keys come first; each has 16 bytes."""
    words = np.frombuffer(keys, dtype=[("a", np.uint64), ("b", np.uint64)])
    _, first, which = np.unique(words, return_index=True, return_inverse=True)
    order = np.argsort(first[which], kind="stable")
    sizes = np.bincount(which, minlength=len(first))[np.argsort(first)]
    ends = np.cumsum(sizes)
    for start, end in zip(ends - sizes, ends, strict=True):
        yield order[start:end].tolist()


def rated(records: Sequence[Record], usual: AbstractSet[str]) -> Reading | None:
    """The reading of single answers with a number each; None where there are none."""
    question, answer = _asked(usual)
    score = next((c for name in (*SCORES, *RANKS) if (c := named((name,), usual)) and _are_numbers(records, c)), None)
    if question is None or score is None or (answer is None and plain(question.column) not in CONVERSATIONS):
        return None
    best = -1 if plain(score) in RANKS else 1

    def recast(record: Record) -> list[Record]:
        rating = best * number(pop(record, score), score)
        if answer is not None:
            prompt, completion = question.take(record), pop_answer(record, answer)
        else:
            turns = messages_of(question.take(record), question.column)
            prompt, completion = turns[:-1], turns[-1:]
        return [record | {"prompt": prompt, "completions": [completion], "scores": [rating]}]

    return Gathered("rated answers", f"column {score} ranks the answers to each prompt", recast)


def _are_numbers(records: Sequence[Record], column: str) -> bool:
    values = [record[column] for record in records if record.get(column) is not None]

    def reads(value: Any) -> bool:
        try:
            float(value)
        except (TypeError, ValueError, OverflowError):
            return False
        return not isinstance(value, bool)

    return 2 * sum(map(reads, values)) >= len(values) > 0


def asked(usual: AbstractSet[str]) -> Reading | None:
    """The reading of a prompt and an answer under other names, such as Alpaca's; None where they have ours."""
    question, answer = _asked(usual)
    if question is None or ("prompt" in usual and (answer is None or "completion" in usual)):
        return None

    def recast(record: Record) -> list[Record]:
        record["prompt"] = question.take(record)
        if answer is not None and "chosen" not in usual:
            record["completion"] = pop(record, answer)
        return [record]

    return Reading("", "", recast)
