"""The report's tables of rounds and of looks at held-out answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alignment.runs.folder import RunFiles
from alignment.runs.progress_tables import ABOUT_ROUNDS, looks_table, rounds_table
from alignment.runs.report import write_report
from tests.helpers.run_folders import change_json, make_run

LOOKS = [
    {
        "step": 0, "score": 0.25, "length": 12.5, "cut_share": 0.0,
        "win_rate": {"wins": 0, "ties": 4, "losses": 0, "rate": 0.5, "low": 0.25, "high": 0.75},
    },
    {
        "step": 8, "score": 0.5, "length": 10.0, "cut_share": 0.125,
        "win_rate": {"wins": 2, "ties": 1, "losses": 1, "rate": 0.625, "low": 0.3, "high": 0.875},
    },
]  # fmt: skip


def stage(**told: Any) -> dict[str, Any]:
    return {"stages": {"preference": told}}


def made_round(number: int, **metrics: float) -> dict[str, float]:
    return {"onpolicy/round": float(number)} | {f"onpolicy/{name}": value for name, value in metrics.items()}


def row(step: int, **metrics: float) -> dict[str, Any]:
    return {"stage": "preference", "split": "train", "step": step} | {f"onpolicy/{k}": v for k, v in metrics.items()}


def test_a_row_for_every_look():
    assert looks_table(stage(answers=LOOKS)) == (
        ["step", "judge score", "win rate", "95% interval", "tokens", "cut"],
        [
            ["0", "0.25", "50.0%", "25.0% to 75.0%", "12.5", "0.0%"],
            ["8", "0.5", "62.5%", "30.0% to 87.5%", "10", "12.5%"],
        ],
    )


def test_what_no_look_has_is_no_column():
    """Of a judge that compares, and of none."""
    compared = [{key: value for key, value in look.items() if key != "score"} for look in LOOKS]
    assert looks_table(stage(answers=compared))[0] == ["step", "win rate", "95% interval", "tokens", "cut"]
    plain = [{key: value for key, value in look.items() if key not in ("score", "win_rate")} for look in LOOKS]
    assert looks_table(stage(answers=plain))[0] == ["step", "tokens", "cut"]
    assert looks_table(stage()) == ([], [])


def test_a_row_for_every_round():
    """What a round is made of is in the summary, and how far the policy moved in the rows of the metrics."""
    made = [
        made_round(1, informative=0.25, score_mean=0.1, score_best=0.5, **{"dropped/tie": 0.5, "dropped/cut": 0.25}),
        made_round(2, informative=0.5, score_mean=0.2, score_best=0.75, **{"dropped/tie": 0.0, "dropped/cut": 0.0}),
    ]
    metrics = [row(1, round=1.0), row(4, kl_round=0.5), row(5, round=2.0, kl_start=0.75), row(8, kl_round=0.125)]
    header, rows, about = rounds_table(RunFiles(Path(), summary=stage(rounds=made), metrics=metrics))
    assert header == [
        "round", "informative", "mean score", "best score", "KL to start", "KL of round", "dropped",
    ]  # fmt: skip
    assert rows == [
        ["1", "25.0%", "0.1", "0.5", "-", "0.5", "tie 50.0%, cut 25.0%"],
        ["2", "50.0%", "0.2", "0.75", "0.75", "0.125", "-"],
    ]
    assert about == ABOUT_ROUNDS


def test_of_many_rounds_some_are_shown():
    """Among them the first and the last."""
    made = [made_round(number, informative=number / 100) for number in range(1, 98)]
    _, rows, about = rounds_table(RunFiles(Path(), summary=stage(rounds=made)))
    numbers = [int(cells[0]) for cells in rows]
    assert len(numbers) == 20 and (numbers[0], numbers[-1]) == (1, 97) and numbers == sorted(set(numbers))
    assert all(cells[1] == f"{number:.1f}%" for number, cells in zip(numbers, rows, strict=True))
    assert about.startswith("20 of 97 rounds. ")


def test_a_run_without_a_summary_has_the_rounds_of_its_rows():
    metrics = [row(1, round=1.0, informative=0.25), row(5, round=2.0, informative=0.5)]
    assert rounds_table(RunFiles(Path(), metrics=metrics))[1] == [["1", "25.0%"], ["2", "50.0%"]]


def test_the_report_has_them_where_they_are(tmp_path):
    folder = make_run(tmp_path / "run")
    plain = write_report(folder).read_text()
    assert "## Answers during training" not in plain and "## Rounds" not in plain
    rounds = [made_round(1, informative=0.25)]
    change_json(folder / "summary.json", **stage(loss="dpo", metrics={}, answers=LOOKS, rounds=rounds))
    found = write_report(folder).read_text()
    assert "| 8 | 0.5 | 62.5% | 30.0% to 87.5% | 10 | 12.5% |" in found and "| 1 | 25.0% |" in found
    assert found.index("## Answers during training") < found.index("## Rounds") < found.index("## What ran")


def test_any_summary_makes_a_table():
    """Values of no known form are shown as they are, or left out."""
    for broken in (None, 3, "x", [None, 3], [{"step": "<b>", "win_rate": {"low": 1}}], [{}]):
        looks_table(stage(answers=broken))
        rounds_table(RunFiles(Path(), summary=stage(rounds=broken)))
