"""What `alignment.evaluate` has measured beside win rates is in the comparison of the same folder."""

import json

from alignment.comparison import write_comparison
from alignment.comparison.members import read_member
from alignment.comparison.other_tasks import other_tasks
from tests.helpers.run_folders import make_run


def share(value: float) -> dict:
    return {"n": 4, "share": value, "low": value - 0.1, "high": value + 0.1}


FOUND = {
    "policies": ["a", "renamed", "after SFT"],
    "identities": {"a": "1" * 64, "renamed": "2" * 64, "after SFT": "3" * 64},
    "cautions": [],
    "ifeval": {
        "policies": [
            {"name": "a", "prompts": share(0.5), "instructions": share(0.625)},
            {"name": "after SFT", "prompts": share(0.2), "instructions": share(0.2)},
        ]
    },
    "implicit": {"policies": [{"name": "renamed", "sum": share(0.75), "mean": share(0.7)}]},
    "perplexity": {
        "policies": [{"name": "a", "nats_per_token": 1.25, "perplexity": 3.49}],
        "matches": [{"first": "a", "second": "after SFT", "more": 0.05, "low": 0.01, "high": 0.09}],
    },
    "lm_eval:mine": {"policies": [{"name": "a", "results": {"mine": {"acc,none": 0.4, "acc_stderr,none": 0.1}}}]},
    "win_rate": {"policies": [{"name": "a", "identity": "1" * 64}], "matches": []},
}


def test_every_task_has_its_columns_and_a_run_is_known_by_its_policy(tmp_path):
    """Under whatever name; the policy before the stage is no run, and a run that was trained anew was not measured."""
    folders = [
        make_run(tmp_path / name, seed=seed, summary={"model": {"final_identity": identity}})
        for seed, (name, identity) in enumerate((("a", "1" * 64), ("b", "2" * 64), ("renamed", "9" * 64)))
    ]
    (tmp_path / "evaluation.json").write_text(json.dumps(FOUND))
    members = [read_member(folder, folder.name) for folder in folders]
    table = other_tasks(tmp_path, members, {member.name: member.name for member in members})
    a, b = (dict(zip(table.header, row, strict=True)) for row in table.rows)
    assert a == {
        "run": "a",
        "IFEval, prompts followed": "50.0%\n(40.0% to 60.0%)",
        "IFEval, instructions followed": "62.5%\n(52.5% to 72.5%)",
        "implicit reward is right, sum": "-",
        "implicit reward is right, mean per token": "-",
        "held-out SFT text, nats per token": "1.25",
        "forgotten since after SFT": "+0.0500\n(+0.0100 to +0.0900)",
        "mine, acc": "0.4",
    }
    assert b["run"] == "b" and b["implicit reward is right, sum"] == "75.0%\n(65.0% to 85.0%)"
    write_comparison([tmp_path], tmp_path)
    assert "### Other tasks" in (tmp_path / "comparison.md").read_text()
    assert "62.5%" in (tmp_path / "comparison.html").read_text()
    (tmp_path / "evaluation.json").write_text(json.dumps({"win_rate": FOUND["win_rate"]}))
    assert other_tasks(tmp_path, members, {}) is None
