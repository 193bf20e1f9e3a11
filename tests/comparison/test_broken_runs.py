"""Runs whose files are missing, broken or half-written: what is there is compared, and the rest is named."""

import errno
import json
import os
from pathlib import Path

import pytest

from alignment import report
from alignment.comparison import write_comparison
from alignment.comparison.members import read_member
from alignment.comparison.ranking import compare
from tests.helpers.endings import refusal_of
from tests.helpers.run_folders import change_json, change_metrics, make_run

FILES = ("config.yaml", "summary.json", "metrics.jsonl", "samples.jsonl", "held_out.jsonl")


DAMAGE = {
    "removed": None,
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2 - 5],
    "binary": lambda data: b"\xff\xfe{\x00\n" * 3,
    "list": lambda data: b"[1, 2]\n",
    "text": lambda data: b'"words"\n',
    "deep": lambda data: b"[" * 100_000 + b"\n",
}


@pytest.mark.slow
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
    report.main([str(tmp_path)])
    said = (tmp_path / "comparison.md").read_text().split("## Not available")[1]
    for number, (name, damage) in enumerate(broken, 2):
        about = [line for line in said.splitlines() if line.startswith(f"- {number}-{damage}: ")]
        assert any(name in line for line in about), (name, damage, about)
    assert "-whole" not in said


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "held_out.jsonl"])
def test_a_last_line_that_was_cut_off_is_told_and_the_others_are_used(tmp_path, name):
    folder = make_run(tmp_path / "a", scores=[1.0, 0.0, 1.0, 0.0])
    path = folder / name
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:-1], lines[-1][:20]]))
    member = read_member(folder, "a")
    assert len(member.run.metrics) == 5 - (name == "metrics.jsonl")
    assert len(member.run.samples) == 4 - (name == "samples.jsonl")
    assert len(member.pairs) == 4 - (name == "held_out.jsonl")
    assert member.run.problems == [f"{name} was cut off in its last line, as happens when a run is killed."]


@pytest.mark.parametrize("broken", [b"\x00\x00", b"[1]", b"{}", b"[" * 99999])
def test_a_file_with_a_broken_line_is_told_and_not_used(tmp_path, broken):
    folder = make_run(tmp_path / "a")
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines[:2], broken, *lines[3:], b""]))
    member = read_member(folder, "a")
    assert member.run.metrics == []
    assert member.run.problems == ["Line 3 of metrics.jsonl cannot be read."]


def test_an_accuracy_that_is_no_share_is_left_out_and_named(tmp_path):
    """Written by hand into each file that has some: the report is made, and says so."""
    folder = make_run(tmp_path / "a")
    change_metrics(folder, lambda rows: [row | {"rewards/accuracies": -2} for row in rows])
    path = folder / "held_out.jsonl"
    path.write_text(path.read_text().replace('accuracies": ', 'accuracies": 7'))
    stages = json.loads((folder / "summary.json").read_text())["stages"]
    stages["preference"]["metrics"]["eval/rewards/accuracies"] = 1.5
    change_json(folder / "summary.json", stages=stages)
    report.main([str(folder)])
    said = (folder / "report.md").read_text().split("## Not available")[1]
    assert "summary.json has eval/rewards/accuracies=1.5, which is no share, so it is left out." in said
    assert said.count("metrics.jsonl has ") == 1
    member = read_member(folder, "a")
    assert any(one.startswith("held_out.jsonl has nats/accuracies=7") for one in member.run.problems)


def test_a_difference_over_fewer_items_than_the_means_says_so(tmp_path):
    """Of pair k2, which b ranks wrongly, b's row is lost: the means stay those of all four pairs."""
    make_run(tmp_path / "a", right=[True, True, True, True])
    make_run(tmp_path / "b", settings={"beta": 0.5}, right=[True, False, False, True])
    write_comparison([tmp_path], tmp_path)
    text = (tmp_path / "comparison.md").read_text()
    assert "50.0 points behind the first (95%" in text
    assert " of 4 pairs that both kept" not in text
    path = tmp_path / "b" / "held_out.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:6] + lines[7:]))
    write_comparison([tmp_path], tmp_path)
    text = (tmp_path / "comparison.md").read_text()
    assert "33.3 points behind the first, on the 3 of 4 pairs that both kept (95%" in text
    assert "<br>on 3 of 4 |" in text
    assert "50.0% (15.0 to 85.0)" in text.replace("<br>", " ")


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


def test_half_of_an_emoji_ends_no_report(tmp_path):
    folder = make_run(tmp_path / "a", scores=[1.0])
    text = (folder / "samples.jsonl").read_text()
    (folder / "samples.jsonl").write_text(text.replace("0 from dpo", "cut \\ud83d"))
    make_run(tmp_path / "b", settings={"beta": 0.5}, scores=[1.0])
    assert "cut ?" in write_comparison([tmp_path], tmp_path).read_text()


def test_a_page_that_cannot_be_written_is_named_and_the_others_are_there(tmp_path):
    make_run(tmp_path / "a")
    (tmp_path / "comparison.csv").mkdir()
    (tmp_path / "comparison.md").symlink_to("nowhere")
    said = refusal_of(report.main, [str(tmp_path)])
    assert said == f"Error: {tmp_path / 'comparison.csv'} cannot be written: Is a directory."
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["comparison.html", "comparison.md"]


def test_a_member_that_cannot_be_opened_is_named_and_the_others_are_compared(tmp_path, monkeypatch):
    make_run(tmp_path / "0-a")
    make_run(tmp_path / "1-b", settings={"beta": 0.5})
    is_file = Path.is_file

    def refuse(path):
        if path.parent.name == "1-b":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", refuse)
    report.main([str(tmp_path)])
    said = (tmp_path / "comparison.md").read_text()
    assert f"1-b: {tmp_path / '1-b'} cannot be opened: Permission denied." in said
    assert "0-a" not in said.split("## Not available")[1]


def test_everything_of_a_run_may_be_folders(tmp_path):
    make_run(tmp_path / "0-a", scores=[1.0])
    odd = make_run(tmp_path / "1-b", scores=[1.0])
    for name in FILES[1:]:
        (odd / name).unlink()
        (odd / name).mkdir()
    report.main([str(tmp_path)])
    said = [line for line in (tmp_path / "comparison.md").read_text().splitlines() if line.startswith("- 1-b: ")]
    assert all(any(f"{name} cannot be read: Is a directory." in line for line in said) for name in FILES[1:])
    report.main([str(odd)])
