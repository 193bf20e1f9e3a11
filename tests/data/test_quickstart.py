"""The bundled set: reproducible, disjoint, true where truth can be computed, and not to be won by length alone."""

import json
import re
from collections import Counter
from datetime import date, timedelta

import pytest

from alignment.errors import UserError
from alignment.evaluation.judges.base import compare
from alignment.evaluation.judges.rules import judge
from tests.data import make_quickstart as quickstart

PARTS = ("sft", "train", "eval")


def load(part):
    with (quickstart.BUNDLED / f"quickstart_{part}.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


ROWS = {part: load(part) for part in PARTS}
PAIRS = ROWS["train"] + ROWS["eval"]


def text(row, key="prompt"):
    (message,) = row[key]
    assert message["role"] == ("user" if key == "prompt" else "assistant")
    return message["content"]


def test_files_are_what_the_generator_writes(tmp_path):
    assert quickstart.main(["--check"]) == 0
    assert quickstart.main(["--out", str(tmp_path)]) == 0
    for name, data in quickstart.files().items():
        assert (tmp_path / name).read_bytes() == data == (quickstart.BUNDLED / name).read_bytes()
    assert sum(map(len, quickstart.files().values())) < 1_000_000
    (tmp_path / "quickstart_eval.jsonl").write_text("")
    with pytest.raises(UserError, match=r"differ.*quickstart_eval\.jsonl\.$"):
        quickstart.main(["--out", str(tmp_path), "--check"])


def test_sizes_and_balance():
    assert len(ROWS["train"]) >= 500
    assert len(ROWS["sft"]) >= 240
    assert len(ROWS["eval"]) >= 120
    seen = [row["seen_kind"] for row in ROWS["eval"]]
    assert 0.4 < sum(seen) / len(seen) < 0.6
    assert 0.4 < sum(seen[:16]) / 16 < 0.6
    flaws = Counter(row["flaw"] for row in ROWS["train"])
    assert set(flaws) == {"wrong", "padded", "hedged", "evasive", "wrong_padded"}
    assert min(flaws.values()) >= 0.08 * len(ROWS["train"])
    styles = Counter(row["style"] for row in ROWS["sft"])
    assert styles["padded"] == pytest.approx(len(ROWS["sft"]) / 2, rel=0.1)


def test_no_prompt_occurs_twice():
    prompts = [re.sub(r"\W+", " ", text(row)).casefold() for part in PARTS for row in ROWS[part]]
    assert [p for p, n in Counter(prompts).items() if n > 1] == []


def test_held_out_items_and_kinds_are_held_out():
    """No question about a held-out item stands in training in any phrasing, and no unseen kind does."""
    trained = {row["kind"] for part in ("sft", "train") for row in ROWS[part]}
    unseen = {row["kind"] for row in ROWS["eval"] if not row["seen_kind"]}
    assert len(trained) >= 25
    assert len(unseen) >= 6
    assert not trained & unseen
    assert {row["kind"] for row in ROWS["eval"] if row["seen_kind"]} == trained
    asked = {
        q.prompt: (kind.name, item.x)
        for kind in quickstart.KINDS
        for item in kind.items
        for q in quickstart._questions(kind, [item], "test")
    }
    held_out = {asked[text(row)] for row in ROWS["eval"]}
    assert not held_out & {asked[text(row)] for part in ("sft", "train") for row in ROWS[part]}


def test_chosen_beats_rejected():
    for row in PAIRS:
        chosen, rejected = judge(text(row, "chosen"), row["answer"]), judge(text(row, "rejected"), row["answer"])
        assert chosen.direct, row
        assert chosen.score == 1.0, row
        assert compare(chosen, rejected) == 1, row
        assert rejected.correct == (row["flaw"] in ("padded", "hedged")), row
        assert not (rejected.direct and row["flaw"] in ("padded", "hedged", "wrong_padded")), row


def test_demonstrations_are_right():
    for row in ROWS["sft"]:
        verdict = judge(text(row, "completion"), row["answer"])
        assert verdict.correct, row
        assert verdict.direct == (row["style"] != "padded"), row


def test_length_alone_does_not_decide():
    """Taking the shorter answer, a coin where they are even, must be wrong in a good share of the pairs."""
    for part in ("train", "eval"):
        lengths = [(len(text(r, "chosen").split()), len(text(r, "rejected").split())) for r in ROWS[part]]
        accuracy = sum((c < r) + (c == r) / 2 for c, r in lengths) / len(lengths)
        assert 0.5 < accuracy < 0.85
    shorts = [r for r in PAIRS if len(text(r, "rejected").split()) <= len(text(r, "chosen").split())]
    assert len(shorts) > len(PAIRS) / 4


def test_chosen_answers_are_one_short_sentence():
    """The same style everywhere: a sentence that ends where its fact ends and names the first accepted answer."""
    for row in PAIRS:
        chosen = text(row, "chosen")
        assert row["answer"][0].casefold() in chosen.casefold(), row
        assert chosen.endswith("."), row
        assert 3 <= len(chosen.split()) <= 8, row


def test_texts_are_short():
    for part in PARTS:
        for row in ROWS[part]:
            assert len(text(row).split()) <= 14
            for key in {"chosen", "rejected", "completion"} & set(row):
                assert 1 <= len(text(row, key).split()) <= 25


def test_a_kind_leaves_the_others_alone(monkeypatch):
    """Dropping the last kind in training drops its rows and changes no others."""
    last = [kind for kind in quickstart.KINDS if kind.seen][-1]
    monkeypatch.setattr(quickstart, "KINDS", tuple(kind for kind in quickstart.KINDS if kind is not last))
    made = quickstart.rows()
    for part in ("sft", "train"):
        assert made[f"quickstart_{part}.jsonl"] == [row for row in ROWS[part] if row["kind"] != last.name]


# Independent recomputation of every answer that can be computed, from the prompt's words alone.

WEEK = [(date(2024, 1, 1) + timedelta(days=i)).strftime("%A") for i in range(7)]  # 2024-01-01 was a Monday
YEAR = [date(2024, m, 1).strftime("%B") for m in range(1, 13)]


def numbers(prompt):
    return [int(n) for n in re.findall(r"\d+", prompt)]


def quoted(prompt, kind):
    """The one item of the kind that the prompt names."""
    known = [item.x for k in quickstart.KINDS if k.name == kind for item in k.items]
    words = re.findall(r"\w+", prompt.lower())
    (found,) = [x for x in known if x.lower() in words]
    return found


def either(prompt):
    return re.search(r"(\w+) or (\w+)", prompt.split(":")[-1].split(",")[-1]).groups()


def operands(prompt):
    a, b = numbers(prompt)
    return a, b


def beside(names, step):
    def answer(prompt):
        (i,) = [i for i, name in enumerate(names) if re.search(rf"\b{name}\b", prompt)]
        return names[(i + step) % len(names)]

    return answer


def roman(prompt):
    numeral = re.search(r"\b[IVX]+\b", prompt)[0]
    values = [{"I": 1, "V": 5, "X": 10}[c] for c in numeral]
    return sum(-v if any(w > v for w in values[i + 1 :]) else v for i, v in enumerate(values))


def next_letter(prompt):
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    return alphabet[alphabet.index(re.search(r"\b[A-Z]\b", prompt)[0]) + 1]


COMPUTED = {
    "add": lambda p: sum(operands(p)),
    "subtract": lambda p: operands(p)[0] - operands(p)[1],
    "multiply": lambda p: sum(operands(p)[0] for _ in range(operands(p)[1])),
    "double": lambda p: numbers(p)[0] * 2,
    "half": lambda p: numbers(p)[0] / 2,
    "larger": lambda p: sorted(operands(p))[1],
    "smaller": lambda p: sorted(operands(p))[0],
    "next_number": lambda p: numbers(p)[0] + 1,
    "sort": lambda p: ", ".join(str(n) for n in range(1000) if n in numbers(p)),
    "count_letters": lambda p: sum(1 for _ in quoted(p, "count_letters")),
    "first_letter": lambda p: quoted(p, "first_letter")[0].upper(),
    "last_letter": lambda p: quoted(p, "last_letter")[-1].upper(),
    "reverse": lambda p: "".join(reversed(quoted(p, "reverse"))),
    "next_letter": next_letter,
    "next_day": beside(WEEK, 1),
    "day_before": beside(WEEK, -1),
    "next_month": beside(YEAR, 1),
    "alphabetical": lambda p: sorted(either(p))[0],
    "roman": roman,
    "odd_even": lambda p: "odd" if numbers(p)[0] & 1 else "even",
}


@pytest.mark.parametrize("kind", COMPUTED)
def test_computed_answers_are_true(kind):
    rows = [row for part in PARTS for row in ROWS[part] if row["kind"] == kind]
    assert len(rows) >= 7
    for row in rows:
        truth = COMPUTED[kind](text(row))
        truth = str(int(truth)) if isinstance(truth, float) and truth.is_integer() else str(truth)
        assert row["answer"] == [truth], text(row)


def test_units_by_the_calendar():
    """Those of the remembered numbers that the standard library knows."""
    answers = {item.x: item.answers[0] for kind in quickstart.KINDS if kind.name == "unit" for item in kind.items}
    day, hour = timedelta(days=1), timedelta(hours=1)
    assert answers["hours are in a day"] == str(day // hour)
    assert answers["minutes are in an hour"] == str(hour // timedelta(minutes=1))
    assert answers["days are in January"] == str((date(2023, 2, 1) - date(2023, 1, 1)).days)
    assert answers["days are in April"] == str((date(2023, 5, 1) - date(2023, 4, 1)).days)
    assert answers["days are in a week"] == str(len(WEEK))
    assert answers["months are in a year"] == str(len(YEAR))


def test_no_wrong_answer_is_accepted():
    for kind in quickstart.KINDS:
        for item in kind.items:
            assert item.wrong, (kind.name, item.x)
            for wrong in item.wrong:
                assert not judge(wrong, item.answers).correct, (kind.name, item.x, wrong)
