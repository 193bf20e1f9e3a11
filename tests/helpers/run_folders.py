"""Run folders made by hand, with known numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from alignment.comparison.members import read_member
from alignment.comparison.ranking import Comparison, compare
from alignment.comparison.tables import Table
from alignment.runs.record import RunRecord
from tests.helpers.commands import write_lines


def verdict(score: float) -> dict[str, Any]:
    return {"score": score, "correct": score > 0, "direct": True, "words": 3, "reasons": ["as made"]}


def pair_rows(right: Sequence[bool]) -> list[dict[str, Any]]:
    """Rows of held_out.jsonl: at the end the log-ratio ranks pair i rightly or not, as told; before, nothing does."""
    rows = []
    for moment in ("start", "final"):
        for i, wins in enumerate(right):
            accuracy = float(wins) if moment == "final" else 0.0
            rows.append({"moment": moment, "source": f"pairs:{i}", "key": f"k{i}", "nats/accuracies": accuracy})
    return rows


def make_run(
    folder: Path,
    loss: str = "dpo",
    settings: dict[str, Any] | None = None,
    seed: int = 0,
    *,
    right: Sequence[bool] = (True, True, True, False),
    scores: Sequence[float] | None = None,
    before: Sequence[float] | None = None,
    summary: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    keep_pairs: bool = True,
    steps: int = 24,
    kl: float = 3.0,
) -> Path:
    """A finished run whose reward accuracy is that of `right`.

    `scores` are the judge's of its answers to as many questions, `before` of those before the preference stage; without
    them nothing was asked. `summary` and `config` go over what is written.
    """
    settings = {"beta": 0.1} if settings is None else settings
    accuracy = sum(right) / len(right)
    record = RunRecord(folder)
    for step in range(0, steps + 1, steps // 4):
        done = step / steps
        record.log(
            "preference",
            step,
            "eval",
            {
                "loss": 0.69 - 0.2 * done,
                "nats/margins": 10 * accuracy * done,
                "nats/accuracies": accuracy * done,
                "rewards/accuracies": accuracy * done,
                "ranking/accuracies": 0.5 + 0.1 * done,
                "logps/chosen": -40 - 0.5 * done,
                "logps/rejected": -50 - 9 * done,
                "kl/offline": -kl * done,
            },
        )
    metrics = {"eval/nats/margins": 10 * accuracy, "eval/nats/accuracies": accuracy, "eval/kl/offline": -kl}
    evaluation: dict[str, Any] = {}
    if scores is not None:
        before = before if before is not None else [0.5] * len(scores)
        won = [0.5 + ((a > b) - (a < b)) / 2 for a, b in zip(scores, before, strict=True)]
        evaluation = {
            "prompts": len(scores),
            "answers": {
                name: {"n": len(given), "words": words, "correct": sum(s > 0 for s in given) / len(given)}
                for name, given, words in (("sft", before, 8.0), ("final", scores, 7.0))
            },
            "win_rate": {
                "final_vs_sft": {
                    "wins": won.count(1.0),
                    "ties": won.count(0.5),
                    "losses": won.count(0.0),
                    "rate": sum(won) / len(won),
                    "low": 0.51,
                    "high": 0.9,
                }
            },
        }
        record.write_samples(
            [
                {
                    "prompt": f"Question {i}?",
                    "sft": f"It is {i}.",
                    "final": f"{i} from {loss}",
                    "verdicts": {"sft": verdict(before[i]), "final": verdict(scores[i])},
                }
                for i in range(len(scores))
            ]
        )
    record.write_summary(
        {
            "recipe": "made",
            "status": "finished",
            "seed": seed,
            "stages": {
                "sft": {"steps": 8},
                "preference": {
                    "loss": loss,
                    "settings": settings,
                    "steps": steps,
                    "seconds": 12.5,
                    "tokens_per_second": 800.0,
                    "memory": {"measured": 2**30},
                    "metrics": metrics,
                },
            },
            "reference": {"mode": "cache", "identity": "a" * 64},
            "evaluation": evaluation,
            "data": {"preference": {"train": 100, "eval": len(right), "fingerprint": "f" * 64}},
            "git_commit": "c" * 40,
            **(summary or {}),
        }
    )
    whole = {"seed": seed, "model": {"name": "tiny"}, "data": {"source": "pairs.jsonl"}, "loss": settings}
    (folder / "config.yaml").write_text(yaml.safe_dump(whole | (config or {})))
    if keep_pairs:
        write_lines(folder / "held_out.jsonl", pair_rows(right))
    return folder


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_metrics(folder: Path, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    """Write other rows of metrics, without the checksums that tell a change."""
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        del row["crc32"]
    write_lines(path, change(rows))


def right(count: int, of: int = 20) -> list[bool]:
    """For `make_run`: so many pairs are ranked correctly, the first ones."""
    return [i < count for i in range(of)]


def compared(*folders: Path) -> Comparison:
    return compare([read_member(folder, folder.name) for folder in folders])


def row_of(table: Table, first: str) -> dict[str, str]:
    """The row of a table that begins with `first`, by its headings."""
    [row] = [row for row in table.rows if row[0] == first]
    return dict(zip(table.header, row, strict=True))


def change_values(run_dir: Path, value: float) -> None:
    """Give a member of a sweep this value at each of its rungs."""
    path = run_dir / "stages" / "preference" / "rungs.json"
    rungs = json.loads(path.read_text())
    path.write_text(json.dumps({share: rung | {"value": value} for share, rung in rungs.items()}))
