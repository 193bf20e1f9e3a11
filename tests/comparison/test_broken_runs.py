"""Runs whose files are missing, broken or half-written: what is there is compared, and the rest is named."""

import json
import re

import pytest

from alignment import report
from alignment.comparison import write_comparison
from alignment.comparison.members import read_member
from alignment.comparison.ranking import compare
from tests.comparison.folders import change_json, make_run

FILES = ("config.yaml", "summary.json", "metrics.jsonl", "samples.jsonl", "held_out.jsonl")


def numbers(new):
    return lambda data: re.sub(rb"(?<=[: ])-?\d+(\.\d+)?\b", new, data)


DAMAGE = {
    "removed": None,
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "binary": lambda data: b"\xff\xfe{\x00\n" * 3,
    "list": lambda data: b"[1, 2]\n",
    "text": lambda data: b'"words"\n',
    "deep": lambda data: b"[" * 100_000 + b"\n",
    "nested": lambda data: b'{"a": ' * 200 + b"1" + b"}" * 200 + b"\n",
    "nan": numbers(b"NaN"),
    "strings": numbers(b'"many"'),
    "huge": numbers(b"9" * 400),
    "vast": numbers(b"1e999"),
}


def harmless(name, damage):
    """Settings may be anything; so may be what stands in a file beside what is read of it."""
    return name == "config.yaml" and damage in ("nan", "strings", "huge", "vast")


def test_every_file_broken_in_every_way(tmp_path):
    """One sweep of whole members and of one for each file and damage: one page."""
    for seed in (0, 1):
        make_run(tmp_path / f"{seed}-whole", seed=seed, scores=[1.0, 0.0, 1.0])
    broken = [(name, damage) for name in FILES for damage in DAMAGE]
    for number, (name, damage) in enumerate(broken, 2):
        path = make_run(tmp_path / f"{number}-{damage}", scores=[1.0, 0.0, 1.0], seed=number) / name
        change = DAMAGE[damage]
        if change is None:
            path.unlink()
        else:
            path.write_bytes(change(path.read_bytes()))
    assert report.main([str(tmp_path)]) == 0
    said = (tmp_path / "comparison.md").read_text().split("## Not available")[1]
    for number, (name, damage) in enumerate(broken, 2):
        about = [line for line in said.splitlines() if line.startswith(f"- {number}-{damage}: ")]
        assert any(name in line for line in about) or harmless(name, damage), (name, damage, about)
    assert "-whole" not in said


@pytest.mark.parametrize("name", ["samples.jsonl", "held_out.jsonl"])
def test_of_a_half_written_file_whole_lines_are_used(tmp_path, name):
    folder = make_run(tmp_path / "a", scores=[1.0, 0.0, 1.0, 0.0])
    path = folder / name
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:-1], lines[-1][:20]]))
    member = read_member(folder, "a")
    assert len(member.run.samples) == 4 - (name == "samples.jsonl")
    assert len(member.pairs) == 4 - (name == "held_out.jsonl")
    [problem] = member.run.problems
    assert problem.startswith(f"{name} cannot be read whole: 1 of its {len(lines)} lines, line {len(lines)} first")


def test_without_its_configuration_a_member_keeps_its_place_beside_the_other_seeds(tmp_path):
    folders = [
        make_run(tmp_path / f"{beta}-{seed}", settings={"beta": beta}, seed=seed)
        for beta in (0.1, 0.5)
        for seed in (0, 1)
    ]
    (folders[0] / "config.yaml").write_text("")
    found = compare([read_member(folder, folder.name) for folder in folders])
    assert [(variant.label, variant.seeds) for variant in found.variants] == [
        ("DPO, beta 0.1", [0, 1]),
        ("DPO, beta 0.5", [0, 1]),
    ]


def test_shares_that_are_none_are_not_ranked(tmp_path):
    make_run(tmp_path / "a", right=[True, False])
    odd = make_run(tmp_path / "b", settings={"beta": 0.5}, right=[True, False])
    summary = json.loads((odd / "summary.json").read_text())
    summary["stages"]["preference"]["metrics"]["eval/nats/accuracies"] = 1e300
    change_json(odd / "summary.json", stages=summary["stages"])
    found = compare([read_member(tmp_path / name, name) for name in "ab"])
    assert [variant.label for variant in found.ranked] == ["DPO, beta 0.1"]


def test_half_of_an_emoji_ends_no_report(tmp_path):
    folder = make_run(tmp_path / "a", scores=[1.0])
    text = (folder / "samples.jsonl").read_text()
    (folder / "samples.jsonl").write_text(text.replace("0 from dpo", "cut \\ud83d"))
    make_run(tmp_path / "b", settings={"beta": 0.5}, scores=[1.0])
    assert "cut ?" in write_comparison([tmp_path], tmp_path).read_text()
