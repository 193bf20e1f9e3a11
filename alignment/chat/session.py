"""A conversation with one policy, or with two that are asked the same: each goes on from its own answers."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from alignment.chat.heat import Heat, measure
from alignment.chat.opening import Guests
from alignment.chat.speaker import Speaker
from alignment.chat.votes import keep_vote
from alignment.data.rows.row import Message
from alignment.errors import UserError, did_you_mean, require
from alignment.evaluation.sampling.answer import Finish, Sampling, as_text

LETTERS = ("A", "B")
VOTES = ("a", "b", "tie")

Show = Callable[[int, str], None]
"""Is told the text of the answer in a column as far as it is drawn."""


class Stopped(Exception):
    """Somebody wants no more of an answer."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How answers are drawn; see `Sampling`."""

    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int = 0
    min_p: float = 0.0
    max_new_tokens: int = 256
    seed: int = 0

    def sampling(self, stops: tuple[int, ...]) -> Sampling:
        """As the policies are asked, whose own generation settings act as in an evaluation."""
        return Sampling(stops=stops, presets=True, **asdict(self))

    def changed(self, key: str, text: str) -> Settings:
        """With one more setting as it is written.

        Raises:
            UserError: there is no such setting, or it takes no such value.
        """
        kinds = {name: type(value) for name, value in asdict(Settings()).items()}
        if key not in kinds:
            raise UserError(f"There is no setting {key}{did_you_mean(key, kinds)}; there are {', '.join(kinds)}.")
        try:
            value = kinds[key](text)
        except ValueError:
            kind = "an integer" if kinds[key] is int else "a number"
            raise UserError(f"{key} must be {kind}, not '{text}'.") from None
        found = replace(self, **{key: value})
        found.sampling((0,))
        return found

    def __str__(self) -> str:
        return " ".join(f"{key}={value}" for key, value in asdict(self).items())


@dataclass(frozen=True, slots=True, eq=False)
class Reply:
    """What a policy has answered.

    Attributes:
        prompt, tokens: int32; the stop token is among the tokens.
        finish: None where somebody stopped it.
    """

    text: str
    prompt: np.ndarray
    tokens: np.ndarray
    finish: Finish | None

    @property
    def cut(self) -> str:
        """How it ended before its end; empty where it did not."""
        if self.finish is Finish.stop:
            return ""
        return "stopped" if self.finish is None else f"cut after {len(self.tokens)} tokens"


@dataclass(slots=True)
class Turn:
    """A question and its answers.

    Attributes:
        replies: of each policy, in the order in which they were named.
        settings: with which they were drawn.
        attempt: how often it was asked before.
        winner: the vote: a policy's number, or -1 for a tie; None without one.
    """

    question: str
    replies: list[Reply]
    settings: Settings
    attempt: int = 0
    winner: int | None = None


@dataclass(slots=True)
class Session:
    """A chat.

    Args:
        blind: the policies have letters for names until somebody has voted, and every conversation another order.
        chance: draws the order.

    Attributes:
        system: the system text; None for none.
        order: the policy of each column.
        is_known: somebody has voted, so that it is known which policy is in which column.
    """

    guests: Guests
    settings: Settings = field(default_factory=Settings)
    system: str | None = None
    blind: bool = False
    chance: random.Random = field(default_factory=random.Random)
    turns: list[Turn] = field(default_factory=list)
    order: list[int] = field(init=False)
    is_known: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        require(not self.blind or self.columns == 2, "A blind chat needs two policies: name a second one.")
        self.reset()

    @property
    def columns(self) -> int:
        """Policies that answer."""
        return len(self.guests.speakers)

    @property
    def hides(self) -> bool:
        """Whether names are hidden now."""
        return self.blind and not self.is_known

    @property
    def titles(self) -> list[str]:
        """Of the columns, for people."""
        names = [self._speaker(column).name for column in range(self.columns)]
        if self.columns == 1:
            return names
        return [*LETTERS] if self.hides else [f"{a}: {name}" for a, name in zip(LETTERS, names, strict=True)]

    @property
    def last(self) -> Turn:
        """The last question.

        Raises:
            UserError: nothing was asked yet.
        """
        require(bool(self.turns), "Nothing was asked yet.")
        return self.turns[-1]

    def reply(self, column: int) -> Reply:
        """The last answer in a column."""
        return self.last.replies[self.order[column]]

    # What you do

    def set_system(self, text: str | None) -> None:
        """Another system text, or none, with which a new conversation begins."""
        self.system = text
        self.reset()

    def reset(self) -> None:
        """Begin a new conversation."""
        self.turns = []
        self.is_known = False
        self.order = list(range(self.columns))
        if self.blind:
            self.chance.shuffle(self.order)

    def renew(self) -> bool:
        """Begin a new conversation where the names of a blind one are known; returns whether they were."""
        renews = self.blind and self.is_known
        if renews:
            self.reset()
        return renews

    def ask(self, question: str, show: Show) -> None:
        """Ask, in a new conversation where `renew` says so; `show` may raise `Stopped`, which ends one answer.

        Raises:
            UserError: the policies cannot be asked this; the conversation is as it was.
        """
        self.renew()
        self.turns.append(self._turn(self.turns, question, 0, show))

    def retry(self, show: Show) -> None:
        """Ask the last question again; the answers are other ones, unless they are greedy."""
        require(not (self.blind and self.is_known), "The names are known: ask again in a new conversation.")
        last = self.last
        self.turns[-1] = self._turn(self.turns[:-1], last.question, last.attempt + 1, show)

    def undo(self) -> str:
        """Take the last question back, and return it."""
        question = self.last.question
        self.turns.pop()
        return question

    def vote(self, vote: str, file: Path) -> None:
        """Say whose answers are better, and keep it in a file.

        Raises:
            UserError: there is nothing to vote on, the answer must not be learnt, or the file cannot be written.
        """
        require(vote in VOTES, f"A vote is one of {', '.join(VOTES)}, not '{vote}'.")
        require(self.columns == 2, "A vote needs two policies side by side.")
        turn = self.last
        require(turn.winner is None, "You have voted on these answers: ask on, or draw other ones with /retry.")
        column = None if vote == "tie" else VOTES.index(vote)
        if column is not None:
            self._require_learnable(column)
        keep_vote(file, self._row(vote))
        turn.winner = -1 if column is None else self.order[column]
        self.is_known = True

    def heat(self, column: int) -> Heat | None:
        """What alignment changed in the last answer of a column; None where the answer is empty.

        Raises:
            UserError: nothing to compare with, or the comparison would say which policy it is.
        """
        require(not self.hides, "The heat line would tell which policy is which: vote first.")
        reply = self.reply(column)
        pair = self.guests.pairs[self.order[column]]
        if pair is None:
            name = self._speaker(column).name
            raise UserError(f"{name} is a plain model: it began with nothing that it could be compared with.")
        return measure(*pair, reply.prompt, reply.tokens) if len(reply.tokens) else None

    def saved(self) -> dict[str, Any]:
        """All of it, in JSON.

        Raises:
            UserError: it would say which policy is which.
        """
        require(not self.hides, "The file would tell which policy is which: vote first.")
        names = [speaker.name for speaker in self.guests.speakers]
        return {
            "policies": names,
            "system": self.system,
            "turns": [
                {
                    "question": turn.question,
                    "settings": asdict(turn.settings),
                    "attempt": turn.attempt,
                    "answers": [
                        {"policy": name, "text": reply.text, "tokens": reply.tokens.tolist(), "cut": reply.cut or None}
                        for name, reply in zip(names, turn.replies, strict=True)
                    ],
                    "winner": None if turn.winner is None else "tie" if turn.winner < 0 else names[turn.winner],
                }
                for turn in self.turns
            ],
        }

    # How

    def _speaker(self, column: int) -> Speaker:
        return self.guests.speakers[self.order[column]]

    def _turn(self, before: Sequence[Turn], question: str, attempt: int, show: Show) -> Turn:
        found: dict[int, Reply] = {}
        for column, number in enumerate(self.order):
            found[number] = self._reply(number, before, question, attempt, partial(show, column))
        return Turn(question, [found[number] for number in range(self.columns)], self.settings, attempt)

    def _reply(
        self, number: int, before: Sequence[Turn], question: str, attempt: int, show: Callable[[str], None]
    ) -> Reply:
        speaker = self.guests.speakers[number]
        tokenizer, stops = speaker.questions.tokenizer, speaker.stops
        prompt = speaker.prompt([*self._messages(number, before), {"role": "user", "content": question}])
        tokens: list[int] = []

        def hear(_: Sequence[int], new: Sequence[int]) -> None:
            tokens.extend(new)
            show(as_text(tokenizer, tokens, stops))

        finish = None
        with suppress(Stopped):
            finish = speaker.answer(prompt, attempt, self.settings.sampling(stops), hear).finish
        return Reply(as_text(tokenizer, tokens, stops), prompt, np.array(tokens, np.int32), finish)

    def _messages(self, number: int, turns: Sequence[Turn]) -> list[Message]:
        """The conversation with one policy: its own answers."""
        found: list[Message] = [] if self.system is None else [{"role": "system", "content": self.system}]
        for turn in turns:
            found.append({"role": "user", "content": turn.question})
            found.append({"role": "assistant", "content": turn.replies[number].text})
        return found

    def _require_learnable(self, column: int) -> None:
        """Refuse a vote for what should not be learnt: answers that do not end, or that are the other's equal."""
        number, name = self.order[column], LETTERS[column]
        for turn in self.turns:
            reply = turn.replies[number]
            if reply.cut or not reply.text:
                is_last = turn is self.turns[-1]
                raise UserError(
                    f"{f'An answer of {name} was {reply.cut}' if reply.cut else f'An answer of {name} is empty'}, and "
                    f"whoever learns it would learn to end there: vote for the other one, or "
                    f"{'draw others with /retry' if is_last else 'begin anew with /reset'}."
                )
        texts = {tuple(turn.replies[number].text for turn in self.turns) for number in self.order}
        require(len(texts) == 2, "Both answers are the same, so neither is better: vote tie, or /retry.")

    def _row(self, vote: str) -> dict[str, Any]:
        both = {
            f"conversation_{letter.lower()}": self._messages(number, self.turns)
            for letter, number in zip(LETTERS, self.order, strict=True)
        }
        names = {f"model_{a.lower()}": self._speaker(column).name for column, a in enumerate(LETTERS)}
        winner = vote if vote == "tie" else f"model_{vote}"
        return {**both, "winner": winner, **names, "blind": self.blind, "settings": asdict(self.last.settings)}
