"""Two answers to one prompt and a verdict, as A/B tests, arenas and annotators write them: recast to pairs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

from alignment.config.data import Strengths, Ties
from alignment.data.conversations.messages import TURN, WRITTEN_MESSAGES, read_written
from alignment.data.layouts.columns import Question, Reading, Record, named, number, plain, pop, pop_answer, real, whole
from alignment.data.layouts.ratings import weight_of
from alignment.data.layouts.verdicts import Answers, Codes, Outcome, Winner, decide, is_verdict, majority, values_of
from alignment.data.rows.row import Rejected
from alignment.errors import UserError

STEMS = (
    *("response", "answer", "output", "completion", "reply", "generation", "candidate", "modeloutput"),
    *("continuation", "summary", "humanref", "text", "conversation"),
)
SUFFIXES = (("a", "b"), ("1", "2"), ("0", "1"), ("first", "second"), ("left", "right"))
VERDICTS = (
    *("winner", "overallpreference", "preferencestrength", "preference", "preferred", "humanpreference"),
    *("betterresponseid", "betterresponse", "better", "verdict", "judgment", "judgement", "vote", "votes", "choice"),
    *("chosen", "label", "labels"),
)
"""Plain names of the column that says which answer won, in the order in which one of several is taken."""
VOTES = re.compile(r"(annotator|annotation|rater|vote|judge|label|preference)\d+")
RATINGS = ("score", "rating", "reward")
_TEXTS = re.compile(r"""\s*\[\s*(['"]).*['"]\s+['"].*['"]\s*\]\s*""", re.DOTALL)
"""Several texts in brackets without commas."""


@dataclass(frozen=True, slots=True)
class Verdicts:
    """The settings of comparisons: what a verdict's values mean, and what ties and strengths become."""

    winner: Winner = field(default_factory=dict)
    ties: Ties = Ties.drop
    strengths: Strengths = Strengths.scores


@dataclass(frozen=True, slots=True)
class _Judge:
    """The columns that say which answer won.

    Attributes:
        columns: of the verdict or of the votes; with `hot`, each has a 1 where the first, the second or neither won.
        codes: what they mean; None where the higher rating wins.
        ratings: columns with one number for each answer.
        said: all this, for the log.
    """

    answers: Answers
    columns: tuple[str, ...]
    hot: bool
    codes: Codes | None
    ratings: tuple[str, str] | None
    said: str

    def judge(self, record: Record) -> tuple[Outcome, float | None, list[float] | None]:
        """The outcome, its strength and both ratings, where there are some. Their columns are taken out."""
        scores = None
        if self.ratings is not None:
            scores = [number(pop(record, column), column) for column in self.ratings]
        strength = None
        if self.hot:
            outcome = self._hot(record)
        elif self.codes is not None:
            outcome, strength = majority(record, self.columns, self.answers, self.codes)
        else:
            assert scores is not None
            outcome = (Outcome.tie, Outcome.first, Outcome.second)[(scores[0] > scores[1]) - (scores[0] < scores[1])]
        if self.hot or self.codes is not None:
            for column in self.columns:
                record.pop(column, None)
        return outcome, strength, scores

    def _hot(self, record: Record) -> Outcome:
        flags = [whole(record.get(column)) for column in self.columns]
        if flags == [0, 0]:
            return Outcome.tie
        if flags.count(1) != 1 or flags.count(0) != len(flags) - 1:
            raise Rejected("bad_verdict", f"of the columns {', '.join(self.columns)} one is 1 and the others are 0")
        return (Outcome.first, Outcome.second, Outcome.tie)[flags.index(1)]


def compared(records: Sequence[Record], usual: AbstractSet[str], verdicts: Verdicts, source: str) -> Reading | None:
    """The reading of records with two answers and a verdict; None where there are no two answers.

    Args:
        usual: the columns that most records have.

    Raises:
        UserError: no column says which answer won, or its values have several meanings.
    """
    answers = _two_answers(usual)
    if answers is None:
        return None
    rest = usual - {*answers.columns}
    question = Question.among(rest)
    if question is None and not any(_holds_turns(record.get(answers.columns[0])) for record in records):
        return None
    judge = _judge(records, rest, answers, verdicts, source)

    def recast(record: Record) -> list[Record]:
        # The verdict
        outcome, strength, scores = judge.judge(record)
        if outcome is Outcome.both_bad:
            raise Rejected("both_bad", "both answers are bad")
        if outcome is Outcome.tie and verdicts.ties is Ties.drop:
            raise Rejected("tie", "neither answer won")

        # The two answers, and what they share
        one, other = (pop_answer(record, column) for column in answers.columns)
        prompt = None if question is None else question.take(record)
        prompt, one, other = _conversations(prompt, one, other, record.get("turn"))
        if prompt is not None:
            record["prompt"] = prompt

        # Strengths and ties
        if strength and verdicts.strengths is Strengths.weights:
            record["weight"] = strength * weight_of(record.get("weight"))
        elif scores is None and strength is not None:
            scores = [0.0, strength] if outcome is Outcome.second else [strength, 0.0]
        first = _pair(record, one, other, scores)
        second = _pair(record, other, one, None if scores is None else scores[::-1])
        if outcome is not Outcome.tie:
            return [second if outcome is Outcome.second else first]
        half = weight_of(record.get("weight")) / 2
        return [first | {"weight": half}, second | {"weight": half}]

    return Reading("compared pairs", judge.said, recast)


def _pair(record: Record, chosen: Any, rejected: Any, scores: Sequence[float] | None) -> Record:
    pair = record | {"chosen": chosen, "rejected": rejected}
    return pair if scores is None else pair | {"score_chosen": scores[0], "score_rejected": scores[1]}


# ------------------------------------------------------------------------------------------------------- the columns


def _two_answers(usual: AbstractSet[str]) -> Answers | None:
    """The columns of two answers; None unless there are just two of one name."""
    by_name = {plain(column): column for column in usual}
    for stem in STEMS:
        for form in ("{stem}{which}", "model{which}{stem}", "{which}{stem}", "{stem}model{which}"):
            for suffixes in SUFFIXES:
                names = [form.format(stem=stem, which=which) for which in suffixes]
                others = {form.format(stem=stem, which=which) for which in (*"0123", "c")} - set(names)
                if by_name.keys() >= set(names) and not by_name.keys() & others:
                    return Answers((by_name[names[0]], by_name[names[1]]), suffixes)
    return None


def _judge(
    records: Sequence[Record], usual: AbstractSet[str], answers: Answers, verdicts: Verdicts, source: str
) -> _Judge:
    """What says which of the answers won."""
    first, second = answers.columns
    ratings = None
    for stem in RATINGS:
        one, other = (named((f"{stem}{which}",), usual) for which in answers.suffixes)
        if one is not None and other is not None:
            ratings = one, other
    hot = _one_hot(answers, usual)
    if hot:
        return _Judge(answers, hot, True, None, ratings, f"the columns {', '.join(hot)} say which answer won")
    columns = _verdict_columns(records, usual, answers, verdicts.winner)
    if columns:
        codes = decide(records, columns, answers, verdicts.winner, source, ratings is not None)
        if codes is not None:
            of = f"column {columns[0]} says" if len(columns) == 1 else f"most votes of {', '.join(columns)} say"
            return _Judge(
                answers, columns, False, codes, ratings, f"{of} which of {first} and {second} won{codes.said}"
            )
    if ratings is not None:
        return _Judge(answers, (), False, None, ratings, f"the higher of {' and '.join(ratings)} won")
    if (column := _of_fractions(records, usual)) is not None:
        raise UserError(
            f"{source}: the column {column} has numbers with fractions, which may mean several things: say which sign "
            f"stands for {first} and which for {second} with data.winner={{first: [negative], second: [positive], "
            "tie: [0]}."
        )
    raise UserError(
        f"{source} has two answers ({first}, {second}), and no column says which of them won: accepted are columns "
        f"such as winner, preference, label, score_a and score_b, or annotator1 and annotator2; data.columns="
        f"{{winner: ...}} names another one."
    )


def _one_hot(answers: Answers, usual: AbstractSet[str]) -> tuple[str, ...]:
    """The columns with a 1 where the first answer, the second, or neither won; the last one may be absent."""
    for form in ("winnermodel{}", "winner{}", "winmodel{}", "{}wins"):
        found = [named((form.format(which),), usual) for which in answers.suffixes]
        if None not in found:
            found.append(named(("winnertie", "winnermodeltie", "tie"), usual))
            return tuple(column for column in found if column is not None)
    return ()


def _verdict_columns(
    records: Sequence[Record], usual: AbstractSet[str], answers: Answers, winner: Winner
) -> tuple[str, ...]:
    """The column with the verdict, or those with one vote each; empty where there are none."""
    by_name = {plain(column): column for column in usual}
    votes = tuple(sorted(column for name, column in by_name.items() if VOTES.fullmatch(name)))
    for columns in [*((by_name[name],) for name in VERDICTS if name in by_name), *([votes] if len(votes) > 1 else [])]:
        found = [
            is_verdict(value, columns[0], record, answers, winner)
            for record in records
            for value in values_of(record, columns)
        ]
        if 2 * sum(found) >= len(found) > 0:
            return columns
    return ()


def _of_fractions(records: Sequence[Record], usual: AbstractSet[str]) -> str | None:
    """A column of verdicts with numbers that are not whole."""
    named_so = [column for column in sorted(usual) if plain(column) in VERDICTS]
    return next((c for c in named_so if any(real(r.get(c)) is not None for r in records)), None)


# ---------------------------------------------------------------------------------------------------- conversations


def _conversations(prompt: Any, one: Any, other: Any, turn: Any) -> tuple[Any, Any, Any]:
    """The prompt and both answers; or no prompt and two whole conversations, where the record has these.

    Arenas write a conversation as a list of questions and one list of answers for each side, or as two lists of
    messages with the number of the turn that was judged.
    """
    questions, *both = (_texts(value) for value in (prompt, one, other))
    if questions and all(answers and len(answers) == len(questions) for answers in both):
        first, second = (_turns(questions, answers or []) for answers in both)
        return None, first, second
    return prompt, _until(one, turn), _until(other, turn)


def _holds_turns(value: Any) -> bool:
    """Whether an answer is a whole conversation, which needs no prompt."""
    return isinstance(value, list) or (
        isinstance(value, str) and bool(WRITTEN_MESSAGES.match(value) or TURN.search(value))
    )


def _texts(value: Any) -> list[str] | None:
    """A list of texts, also where it is written as text; a missing one is empty.

    Raises:
        Rejected: it is written as numpy prints it, without commas, which is read as one text or not at all.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = read_written(value, "prompt")
        except Rejected:
            if _TEXTS.fullmatch(value):
                raise
            return None
    if not isinstance(value, list) or not all(text is None or isinstance(text, str) for text in value):
        return None
    return [text or "" for text in value]


def _turns(questions: Sequence[str], answers: Sequence[str]) -> list[dict[str, str]]:
    turns = zip(questions, answers, strict=True)
    return [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def _until(conversation: Any, turn: Any) -> Any:
    """A conversation up to its answer number `turn`."""
    if isinstance(conversation, str) and WRITTEN_MESSAGES.match(conversation):
        conversation = read_written(conversation, "conversation")
    number = whole(turn)
    if not isinstance(conversation, list) or number is None:
        return conversation
    speakers = [m.get("role", m.get("from")) if isinstance(m, dict) else None for m in conversation]
    ends = [place for place, speaker in enumerate(speakers, 1) if speaker in ("assistant", "gpt")]
    return conversation[: ends[number - 1]] if 1 <= number <= len(ends) else conversation
