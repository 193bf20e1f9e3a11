"""The generator of the bundled quickstart set: short questions with checkable answers, the same bytes every time.

Three files: `quickstart_sft.jsonl` teaches a small model the task with right answers in mixed styles;
`quickstart_train.jsonl` prefers direct, right answers to wrong, padded, hedged and evasive ones;
`quickstart_eval.jsonl` holds other items of the same kinds of question and whole kinds that occur nowhere else.

Run it in a checkout; it writes into the package:

    python -m tests.data.make_quickstart [--out DIR] [--check]

Every choice is drawn from a hash of the seed and of the text that it concerns. So the bytes depend on neither Python's
version nor its random module, and a kind of question that you add last leaves all other rows as they were.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from alignment.data.sources.opening import BUNDLED
from alignment.errors import UserError
from tests.data.quickstart_set import held_out, numbers_and_letters, words
from tests.data.quickstart_set.items import Item, Kind, pick, shuffled

EVAL_ITEMS_SEEN = 2
EVAL_ITEMS_UNSEEN = 7
TRAIN_ROWS = 18
SFT_ROWS = 8
# Half of the rejected answers are as short as the chosen ones, so that length alone does not tell them apart.
FLAWS = (
    "wrong", "padded", "wrong", "hedged", "wrong", "wrong_padded", "wrong", "padded", "wrong", "evasive",
    "wrong", "hedged", "wrong", "padded", "wrong", "wrong_padded", "wrong", "hedged", "evasive", "padded",
)  # fmt: skip
STYLES = ("sentence", "padded", "direct", "padded")

Row = dict[str, Any]

KINDS: tuple[Kind, ...] = (*words.KINDS, *numbers_and_letters.KINDS, *held_out.KINDS)

OPENERS = (
    "Great question!", "That is a good question.", "Sure, I can help with that!", "Of course! Let me explain.",
    "Thank you for asking!", "I am happy to help you today.", "Let me think about that for a moment.",
    "Well, here is what you asked for:", "Absolutely, let's look at this together.",
)  # fmt: skip
CLOSERS = (
    "I hope this helps!", "Feel free to ask me more.", "Let me know if you need anything else.",
    "Is there anything else you want to know?", "Thanks for asking me!", "I hope that answers your question.",
)  # fmt: skip
HEDGES = (
    "I'm not sure, but it could be {a}.", "Maybe it is {a}, but I can't be certain.", "I think it might be {a}.",
    "Perhaps {a}, but please check that.", "It is probably {a}, as far as I know.", "I guess it may be {a}.",
)  # fmt: skip
EVASIONS = (
    "That depends on many things.", "I don't know.", "There are many possible answers to that.", "It is hard to say.",
    "You can look that up in a book.", "I cannot answer that question.", "Why do you want to know that?",
    "That is an interesting topic with a long history.",
)  # fmt: skip


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


@dataclass(frozen=True)
class _Question:
    """One item in one phrasing: the prompt, and answers to it in every style."""

    kind: Kind
    item: Item
    prompt: str

    def direct(self, answer: str) -> str:
        return f"{answer if self.kind.verbatim else _capitalised(answer)}."

    def sentence(self, answer: str) -> str:
        return _capitalised(self.kind.fact.format(x=self.item.x, a=answer))

    def padded(self, answer: str) -> str:
        opener, closer = pick(OPENERS, f"opener:{self.prompt}"), pick(CLOSERS, f"closer:{self.prompt}")
        sentence = self.sentence(answer)
        return pick((f"{opener} {sentence}", f"{sentence} {closer}"), f"shape:{self.prompt}")

    def rejected(self, flaw: str) -> str:
        right, wrong = self.item.answers[0], pick(self.item.wrong, f"wrong:{self.prompt}")
        match flaw:
            case "wrong":
                return pick((self.sentence(wrong),) * 4 + (self.direct(wrong),), f"style:{self.prompt}")
            case "padded":
                return self.padded(right)
            case "wrong_padded":
                return self.padded(wrong)
            case "hedged":
                return pick(HEDGES, f"hedge:{self.prompt}").format(a=right)
            case "evasive":
                return pick(EVASIONS, f"evasion:{self.prompt}")
        raise AssertionError(flaw)

    def pair(self, flaw: str) -> Row:
        return {
            "prompt": [{"role": "user", "content": self.prompt}],
            "chosen": [{"role": "assistant", "content": self.sentence(self.item.answers[0])}],
            "rejected": [{"role": "assistant", "content": self.rejected(flaw)}],
            "kind": self.kind.name,
            "answer": list(self.item.answers),
            "flaw": flaw,
        }

    def demonstration(self, style: str) -> Row:
        answer: str = {"direct": self.direct, "sentence": self.sentence, "padded": self.padded}[style](
            self.item.answers[0]
        )
        return {
            "prompt": [{"role": "user", "content": self.prompt}],
            "completion": [{"role": "assistant", "content": answer}],
            "kind": self.kind.name,
            "answer": list(self.item.answers),
            "style": style,
        }


def _questions(kind: Kind, items: Iterable[Item], salt: str) -> list[_Question]:
    asked = (_Question(kind, item, _capitalised(q.format(x=item.x))) for item in items for q in kind.questions)
    return shuffled(asked, f"{salt}:{kind.name}", lambda question: question.prompt)


def rows() -> dict[str, list[Row]]:
    """The rows of every file, by file name."""
    train: list[Row] = []
    sft: list[Row] = []
    held_out: dict[bool, list[Row]] = {True: [], False: []}
    for k, kind in enumerate(KINDS):
        items = shuffled(kind.items, f"items:{kind.name}", lambda item: item.x)
        cut = EVAL_ITEMS_SEEN if kind.seen else EVAL_ITEMS_UNSEEN
        for i, item in enumerate(items[:cut]):
            question = _questions(kind, [item], "eval")[0]
            held_out[kind.seen].append(question.pair(FLAWS[(7 * k + i) % len(FLAWS)]) | {"seen_kind": kind.seen})
        if kind.seen:
            questions = _questions(kind, items[cut:], "train")
            sft += [q.demonstration(STYLES[(k + i) % len(STYLES)]) for i, q in enumerate(questions[:SFT_ROWS])]
            pairs = questions[SFT_ROWS : SFT_ROWS + TRAIN_ROWS]
            train += [q.pair(FLAWS[(7 * k + i) % len(FLAWS)]) for i, q in enumerate(pairs)]

    def mixed(part: list[Row]) -> list[Row]:
        return shuffled(part, "order", lambda row: row["prompt"][0]["content"])

    # Seen and unseen kinds take turns, so that the first few rows already hold both.
    turns = zip_longest(mixed(held_out[True]), mixed(held_out[False]))
    return {
        "quickstart_sft.jsonl": mixed(sft),
        "quickstart_train.jsonl": mixed(train),
        "quickstart_eval.jsonl": [row for turn in turns for row in turn if row is not None],
    }


def files() -> dict[str, bytes]:
    """The bytes of every file, by file name: UTF-8 JSON lines."""
    return {
        name: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part).encode()
        for name, part in rows().items()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the files, or with --check compare them with those that are there (status 1 where they differ)."""
    parser = argparse.ArgumentParser(prog="python -m tests.data.make_quickstart", description="The quickstart set.")
    parser.add_argument("--out", type=Path, default=BUNDLED, help="folder of the three files (default: the package's)")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a file differs")
    options = parser.parse_args(arguments)
    made = files()
    if options.check:
        differ = [
            name
            for name, data in made.items()
            if not (options.out / name).is_file() or (options.out / name).read_bytes() != data
        ]
        if differ:
            raise UserError(f"In {options.out} these files differ from what the generator writes: {', '.join(differ)}.")
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    for name, data in made.items():
        (options.out / name).write_bytes(data)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(str(error))
