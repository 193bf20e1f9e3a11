"""The parts of a kind of question: items, the short notations that its tables are written in, and draws by hash."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TypeVar

SEED = 20

T = TypeVar("T")


@dataclass(frozen=True)
class Item:
    """One thing to ask about: what stands in the question, the accepted answers (best first), some wrong ones."""

    x: str
    answers: tuple[str, ...]
    wrong: tuple[str, ...]


@dataclass(frozen=True)
class Kind:
    """A kind of question: phrasings with {x}, a full sentence with {x} and {a}, and the items."""

    name: str
    questions: tuple[str, ...]
    fact: str
    items: tuple[Item, ...]
    seen: bool = True
    verbatim: bool = False
    """The answer keeps its case at the start of a sentence (spelling, symbols)."""


def draw(salt: str) -> int:
    return int.from_bytes(blake2b(f"{SEED}:{salt}".encode(), digest_size=8).digest(), "big")


def pick(options: Sequence[T], salt: str) -> T:
    return options[draw(salt) % len(options)]


def shuffled(values: Iterable[T], salt: str, text: Callable[[T], str]) -> list[T]:
    return sorted(values, key=lambda value: (draw(f"{salt}:{text(value)}"), text(value)))


def entries(text: str) -> list[str]:
    return [" ".join(entry.split()) for entry in text.split(";")]


def table(text: str) -> tuple[Item, ...]:
    """Items of "x = answer|also accepted" entries; wrong answers are the other entries' answers."""
    rows = [entry.split(" = ") for entry in entries(text)]
    pairs = [(x, tuple(answer.split("|"))) for x, answer in rows]
    firsts = dict.fromkeys(answers[0] for _, answers in pairs)
    return tuple(Item(x, answers, tuple(a for a in firsts if a not in answers)) for x, answers in pairs)


def wrongly(text: str) -> tuple[Item, ...]:
    """Items of "x = answer|also accepted / wrong|also wrong" entries."""
    rows = [entry.replace(" / ", " = ").split(" = ") for entry in entries(text)]
    return tuple(Item(x, tuple(a.split("|")), tuple(w.split("|"))) for x, a, w in rows)


def choices(text: str) -> tuple[Item, ...]:
    """Items of "word: right wrong" entries, asked as "word: right or wrong" in either order."""
    items = []
    for entry in entries(text):
        word, rest = entry.split(":")
        right, wrong = rest.split()
        items.append(Item(f"{word}: {' or '.join(shuffled((right, wrong), word, str))}", (right,), (wrong,)))
    return tuple(items)


def numbers(values: Iterable[tuple[str, int]]) -> tuple[Item, ...]:
    """Items whose answer is a number; wrong answers lie near it."""
    return tuple(Item(x, (str(n),), tuple(str(n + d) for d in (1, -1, 2, 3, 10) if n + d > 0)) for x, n in values)


def counts(text: str) -> list[tuple[str, int]]:
    """(x, number) of "x = number" entries."""
    rows = (entry.split(" = ") for entry in entries(text))
    return [(x, int(n)) for x, n in rows]


def tuples(text: str) -> list[tuple[int, ...]]:
    """The numbers of "2 3, 4 5"."""
    return [tuple(map(int, part.split())) for part in text.split(",")]


def words(words: str, answer: Callable[[str], str], wrong: Callable[[str], Sequence[str]]) -> tuple[Item, ...]:
    """Items computed from single words."""
    items = []
    for word in words.split():
        right = answer(word)
        items.append(Item(word, (right,), tuple(dict.fromkeys(w for w in wrong(word) if w != right))))
    return tuple(items)


def cycle(text: str, step: int) -> tuple[Item, ...]:
    """Items whose answer is the name `step` places on, around a cycle."""
    names = text.split()
    n = len(names)
    return tuple(
        Item(x, (names[(i + step) % n],), tuple(names[(i + k * step) % n] for k in (2, -1, 3)))
        for i, x in enumerate(names)
    )
