"""The judges' cards on the page, and what a judge has said of the answers of runs against each other."""

import json

import pytest

from alignment.comparison import write_comparison
from alignment.comparison.between import read_between
from alignment.comparison.judge import answers_against_answers, judge_table
from alignment.comparison.sentences import cautions, not_available
from alignment.evaluation.judges.base import Item, Judge, Preference
from alignment.evaluation.judges.card import judge_card
from alignment.evaluation.judges.human_labels import HumanLabels
from alignment.runs.judge_table import judge_rows
from tests.helpers.commands import write_lines
from tests.helpers.run_folders import change_json, compared, make_run, row_of

OTHER = {"beta": 0.5}


class Pairwise(Judge):
    """Says of each pair what it is told to: shares of the first answer, shown first and shown second."""

    kind = "told"
    pointwise = False

    def __init__(self, said):
        self.said = said

    def description(self):
        return {"version": 1}

    def compare(self, items):
        return [Preference(one) for one in self.said[: len(items)]]

    def usage(self):
        return {"calls": 2 * len(self.said), "stored": 1, "troubles": {"time-out": 1}}


def judged_run(folder, said, humans=None, **settings):
    """A run whose final answers were compared with those after SFT, both orders told."""
    made = make_run(folder, scores=[0.5] * len(said), **settings)
    rows = [json.loads(line) for line in (made / "samples.jsonl").read_text().splitlines()]
    judge, pairs = Pairwise(said), []
    for row, shares in zip(rows, said, strict=True):
        del row["verdicts"]
        row["final"] += " indeed" * (shares[0] == 1)
        row["preferences"] = {"sft": Preference(shares).as_json()}
        pairs.append((Item(row["prompt"], (row["final"], row["sft"])), Preference(shares)))
    write_lines(made / "samples.jsonl", rows)
    summary = json.loads((made / "summary.json").read_text())
    card = judge_card(judge, pairs, (), humans)
    change_json(made / "summary.json", evaluation=summary["evaluation"] | {"judge": card})
    return made, card, pairs


WON, LOST, FIRST, TIED, UNREADABLE = (1.0, 1.0), (0.0, 0.0), (1.0, 0.0), (0.5, 0.5), (None, 1.0)


def test_the_card_of_one_run_is_that_of_its_report(tmp_path):
    write_lines(tmp_path / "labels.jsonl", [{"prompt": "Q?", "answers": ["a", "b"], "labels": [1, 1]}] * 2)
    humans = HumanLabels(tmp_path / "labels.jsonl")
    made, card, _ = judged_run(tmp_path / "a", [WON, LOST, FIRST, TIED, UNREADABLE], humans)
    table = judge_table(compared(made))
    assert table.caption == "The judge" and table.header == ["", "of the runs"]
    assert table.rows == judge_rows(card)
    names = [name for name, _ in table.rows]
    assert {"agrees with people", "the same verdict in both orders", "wins of the longer answer"} <= set(names)


def test_runs_with_the_same_judge_have_one_card_over_all_their_pairs(tmp_path):
    """One of two decided alike in both orders, and none of two: together one of four, not the mean of anything else."""
    a, card, first = judged_run(tmp_path / "a", [WON, FIRST])
    b, _, second = judged_run(tmp_path / "b", [FIRST, FIRST, FIRST], settings=OTHER)
    found = compared(a, b)
    table = judge_table(found)
    said = dict(table.rows)
    assert said["the same verdict in both orders"] == "20.0%"
    pooled = judge_card(Pairwise([WON, FIRST, FIRST, FIRST, FIRST]), [*first, *second])
    assert said["wins of the longer answer"] == dict(judge_rows(pooled))["wins of the longer answer"]
    assert (
        said["asked"].startswith("10 calls, 2 replies from the store")
        and said["attempts that failed"] == "2 x time-out"
    )
    assert "`python -m alignment.evaluate a b against=all` does that" in table.note
    change = json.loads((b / "summary.json").read_text())["evaluation"]
    change_json(b / "summary.json", evaluation=change | {"judge": card | {"identity": "0" * 64}})
    other = compared(a, b)
    assert judge_table(other).header == ["", "of a", "of b"] and judge_table(other).caption == "The judges"
    assert any("different judges" in kind for kind, _ in cautions(other))
    assert not any("different judges" in kind for kind, _ in cautions(found))


def test_scores_have_a_card_and_no_order(tmp_path):
    made = make_run(tmp_path / "a", scores=[1.0, 0.0, 0.5])
    assert judge_table(compared(made)) is None, "without a card nobody knows the judge"
    summary = json.loads((made / "summary.json").read_text())["evaluation"]
    change_json(made / "summary.json", evaluation=summary | {"judge": {"kind": "rules", "identity": "r" * 64}})
    said = dict(judge_table(compared(made)).rows)
    assert said["pairs, of these with two equal answers"] == "3, 0" and said["unreadable"] == "0 of 6 verdicts"
    assert "the same verdict in both orders" not in said and said["wins of the longer answer"].startswith("50.0%")


# Against each other


@pytest.fixture
def evaluated(tmp_path):
    """A has two seeds and B one. By prompt, A's first seed wins, wins, ties and its second wins, loses, loses."""
    identity = {"a0": "1", "a1": "2", "b": "3"}
    for name, number in identity.items():
        make_run(
            tmp_path / name, settings=OTHER if name == "b" else None, seed=int(name == "a1"),
            summary={"model": {"final_identity": number * 64}},
        )  # fmt: skip
    policies = [{"name": name, "identity": number * 64} for name, number in identity.items()]
    policies.append({"name": "after SFT", "identity": "9" * 64})
    card = {
        "kind": "llm",
        "identity": "e" * 64,
        "pairs": 8,
        "same": 0,
        "unreadable": 0,
        "verdicts": 16,
        "consistent": 0.75,
    }
    found = {"win_rate": {"policies": policies, "matches": [], "judge": card}}
    (tmp_path / "evaluation.json").write_text(json.dumps(found))
    rows = []
    for first, second, outcomes in (("a0", "b", (1, 1, 0)), ("b", "a1", (-1, 1, 1)), ("a0", "after SFT", (1, 1, 1))):
        for number, outcome in enumerate(outcomes):
            rows.append({"prompt": f"Q{number}?", "policies": [first, second], "outcome": outcome})
    write_lines(tmp_path / "evaluation_pairs.jsonl", rows)
    return tmp_path


def comparison(folder):
    found = compared(*(folder / name for name in ("a0", "a1", "b")))
    found.between = read_between(folder, found.members)
    return found


def test_variants_meet_by_the_pairs_that_a_judge_has_compared(evaluated):
    """By prompt (1 + 1) / 2, (1 + 0) / 2, (1/2 + 0) / 2: 0.583 in mean, one won, one tied, one lost."""
    [table] = answers_against_answers(comparison(evaluated))
    assert table.caption.startswith("Answers against answers, judged by llm: ")
    cells = row_of(table, "DPO, beta 0.1")
    assert cells["DPO, beta 0.5"].startswith("58.3%") and cells["DPO, beta 0.5"].endswith("1 / 1 / 1")
    assert row_of(table, "DPO, beta 0.5")["DPO, beta 0.1"].startswith("41.7%")
    assert table.note.endswith("evaluation.html has win rates at equal length.")
    card = judge_table(comparison(evaluated))
    assert card.header == ["", "between the runs"] and dict(card.rows)["the same verdict in both orders"] == "75.0%"


def test_several_answers_to_a_prompt_are_one_item(evaluated):
    rows = [
        {"prompt": "Q?", "policies": ["a0", "b"], "outcome": outcome} for outcome in (1, 1, 0, -1)
    ]  # fmt: skip
    write_lines(evaluated / "evaluation_pairs.jsonl", [*rows, {"prompt": "R?", "policies": ["a0", "b"], "outcome": 1}])
    assert comparison(evaluated).between.shares == {("a0", "b"): {"Q?": 0.625, "R?": 1.0}}


def test_verdicts_on_a_run_that_was_trained_anew_do_not_count(evaluated):
    change_json(evaluated / "b" / "summary.json", model={"final_identity": "4" * 64})
    found = comparison(evaluated)
    assert found.between.shares == {} and answers_against_answers(found) == []
    change_json(evaluated / "b" / "summary.json", model={})
    assert comparison(evaluated).between.shares, "an old run without identity is known by its name"


def test_the_page_has_them_and_a_broken_file_is_named(evaluated):
    write_comparison([evaluated], evaluated)
    page = (evaluated / "comparison.html").read_text()
    assert "judged by llm" in page and "between the runs" in page
    (evaluated / "evaluation.json").write_text("{")
    found = comparison(evaluated)
    assert [line for line in not_available(found) if line.startswith("evaluation.json cannot be read")]
    (evaluated / "evaluation_pairs.jsonl").unlink()
    assert comparison(evaluated).between is None
