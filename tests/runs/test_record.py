from __future__ import annotations

import html
import json
import math
import os
import re
import subprocess
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

import alignment
from alignment.errors import UserError
from alignment.files import atomic_write_bytes, atomic_write_text, redact
from alignment.runs import record as records
from alignment.runs.record import (
    Histogram,
    RunRecord,
    git_commit,
    machine,
    named,
    processor,
    read_margins,
    read_metrics,
    versions,
)
from alignment.runs.text import escape_markdown


def strict(line: str) -> dict:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(line, parse_constant=refuse)


def test_log_writes_valid_json_at_once_and_reads_back(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    record.log("sft", 1, "train", {"loss": math.nan, "grad_norm": math.inf, "low": -math.inf})
    record.log("preference", 0, "eval", {"rewards/margins": 0.1})
    lines = [strict(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [lines[0][k] for k in ("stage", "split", "step", "loss", "grad_norm", "low")] == [
        "sft",
        "train",
        1,
        "NaN",
        "Infinity",
        "-Infinity",
    ]
    assert lines[1]["time"].endswith("+00:00")
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(first["loss"])
    assert (first["grad_norm"], first["low"]) == (math.inf, -math.inf)
    assert second["rewards/margins"] == 0.1
    assert 0 <= first["wall_s"] <= second["wall_s"] < 5


def rows(*points: tuple[str, int]) -> str:
    return "".join(
        json.dumps({"stage": stage, "split": "train", "step": step, "time": "t", "wall_s": 100.0 + i, "loss": 1.0})
        + "\n"
        for i, (stage, step) in enumerate(points)
    )


def points(folder: Path) -> list[tuple[str, int]]:
    return [(row["stage"], row["step"]) for row in read_metrics(folder / "metrics.jsonl")]


ALL = (("sft", 0), ("sft", 1), ("sft", 2), ("preference", 0), ("preference", 1), ("preference", 2))


@pytest.mark.parametrize("torn", ["", '{"stage": "preference", "st', "\0\0\0"])
@pytest.mark.parametrize(
    ("stage", "step", "kept", "wall"),
    [
        ("preference", 1, ALL[:5], 104.0),
        ("preference", -1, ALL[:3], 102.0),
        ("preference", 2, ALL, 105.0),
        ("sft", 1, ALL[:2], 101.0),
        ("sft", -1, (), 0.0),
    ],
)
def test_rewind_forgets_later_steps_and_stages(
    tmp_path: Path, torn: str, stage: str, step: int, kept: tuple, wall: float
) -> None:
    (tmp_path / "metrics.jsonl").write_text(rows(*ALL) + torn)
    record = RunRecord(tmp_path)
    record.rewind(stage, step)
    assert points(tmp_path) == list(kept)
    record.log("preference", 7, "eval", {"loss": 2.0})
    assert points(tmp_path) == [*kept, ("preference", 7)]
    assert wall <= read_metrics(tmp_path / "metrics.jsonl")[-1]["wall_s"] < wall + 5, "time goes on where it stopped"
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl"], "no temporary file is left"


def test_a_kill_while_margins_are_forgotten_loses_none_of_those_before(tmp_path: Path, monkeypatch) -> None:
    record, margins = RunRecord(tmp_path), Histogram([0.0, 1.0], [3])
    for step in (0, 4, 8):
        record.log_margins(step, margins)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        patch.setattr(RunRecord, "log_margins", killed)
        with pytest.raises(KeyboardInterrupt):
            record.rewind("preference", 4)
    assert set(read_margins(tmp_path)) == {0, 4, 8}
    record.rewind("preference", 4)
    assert set(read_margins(tmp_path)) == {0, 4}


def test_metrics_that_lost_their_end_are_not_continued(tmp_path: Path) -> None:
    """The checkpoint is of a later step than the last row: whole lines are gone."""
    (tmp_path / "metrics.jsonl").write_text(rows(*ALL))
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged"):
        RunRecord(tmp_path).require("preference", 4, "train")


@pytest.mark.parametrize("old", ["loss", "1.5", "train", "crc32"])
def test_a_row_of_which_a_byte_has_changed_is_named(tmp_path: Path, old: str) -> None:
    """A changed digit is still a number, and another name is still a name: the checksum knows."""
    RunRecord(tmp_path).log("sft", 1, "train", {"loss": 1.5})
    path = tmp_path / "metrics.jsonl"
    assert len(read_metrics(path)) == 1
    path.write_text(path.read_text().replace(old, chr(ord(old[0]) ^ 1) + old[1:]))
    with pytest.raises(UserError, match=r"Line 1 of .*metrics\.jsonl"):
        read_metrics(path)


def test_every_cut_of_the_last_line_is_survived(tmp_path: Path) -> None:
    whole = rows(("sft", 1), ("sft", 2)).encode()
    start = whole.index(b"\n") + 1
    for cut in range(start, len(whole)):
        (tmp_path / "metrics.jsonl").write_bytes(whole[:cut])
        read = points(tmp_path)
        assert read == ([("sft", 1), ("sft", 2)] if cut == len(whole) - 1 else [("sft", 1)])
        RunRecord(tmp_path).log("sft", 3, "train", {"loss": 1.0})
        assert points(tmp_path) == [*read, ("sft", 3)]


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{",
        "[1]",
        '{"stage": "sft", "split": "train"}',
    ],
)
def test_a_broken_line_inside_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(rows(("sft", 1)) + line + "\n" + rows(("sft", 2)))
    with pytest.raises(UserError, match=r"Line 2 of .*metrics\.jsonl"):
        read_metrics(path)


def test_missing_metrics_are_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "file"
    atomic_write_text(path, "old ä")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(records.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        atomic_write_bytes(path, b"new")
    assert path.read_text("utf-8") == "old ä"
    assert os.listdir(path.parent) == ["file"]


def test_summary_and_samples(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    record.write_summary({"a": {"loss": math.nan, "path": Path("x/y")}, "n": [1, math.inf]})
    assert strict((tmp_path / "summary.json").read_text()) == {
        "a": {"loss": "NaN", "path": "x/y"},
        "n": [1, "Infinity"],
    }
    verdict = {"score": 0.85, "correct": True, "direct": False, "words": 16, "reasons": ["says 8", "long: 16 words"]}
    samples = [{"prompt": "Grüße\n# x", "start": "half \ud83d", "final": "<b>|", "verdicts": {"final": verdict}}]
    jsonl, markdown = record.write_samples(samples)
    assert [json.loads(line) for line in jsonl.read_text("utf-8").splitlines()] == samples
    assert "Grüße" in jsonl.read_text("utf-8")
    text = markdown.read_text("utf-8")
    assert "Before training" in text
    assert "After SFT" not in text
    assert "<b>" not in text
    assert "**Judged:** right, score 0.85, says 8, long: 16 words\n" in text


@pytest.mark.parametrize(
    ("key", "masked"),
    [
        ("token", True),
        ("hf_token", True),
        ("HF_TOKEN", True),
        ("apiKey", True),
        ("api-key", True),
        ("WANDB_API_KEY", True),
        ("password", True),
        ("client.secret", True),
        ("tokens_per_batch", False),
        ("max_new_tokens", False),
        ("tokenizer", False),
        ("keep_checkpoints", False),
        ("monkey", False),
        ("secretary", False),
    ],
)
def test_redact_goes_by_whole_words_at_any_depth(key: str, masked: bool) -> None:
    given = {"a": {"b": [{key: "s3cret"}]}, key: 5}
    value = "***" if masked else "s3cret"
    assert redact(given) == {"a": {"b": [{key: value}]}, key: "***" if masked else 5}
    assert given["a"]["b"][0][key] == "s3cret", "the original is not touched"
    assert redact({key: None}) == {key: None}


HOSTILE = [
    "a | b || c",
    "`code` ``` fence",
    "*bold* __init__ a_b_c _x_ ~~gone~~",
    "<script>alert(1)</script> <!-- & &amp; &lt;",
    "[link](javascript:x) ![image](y) [ref]: z",
    r"back\slash \| \\",
    "# heading $x$ $$y$$",
    "a_b _ c__d __e f__ (_g_)",
    "&#124; &copy;",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_escaped_text_is_inert_in_a_markdown_table(text: str) -> None:
    rendered = (
        MarkdownIt("commonmark")
        .enable(["table", "strikethrough"])
        .render(f"| a | b |\n| --- | --- |\n| {escape_markdown(text)} | end |\n")
    )
    cells = re.findall(r"<td>(.*?)</td>", rendered)
    assert len(cells) == 2, "the text does not add cells"
    assert "<" not in cells[0], "the text does not add markup"
    assert html.unescape(cells[0]) == text, "the reader sees what the model wrote"


def test_line_ends_and_control_characters() -> None:
    assert escape_markdown(" a\r\nb\rc\nd\u2028e ") == "a<br>b<br>c<br>d<br>e"
    assert escape_markdown("x\x1b[0m\x00\u202ey") == "x\ufffd&#91;0m\ufffd\ufffdy"
    assert escape_markdown("\ud800") == "?"
    assert escape_markdown("é　日本 👩‍🔬") == "é　日本 👩‍🔬"


def test_git_commit(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", *identity, *arguments]
        return subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True).stdout.strip()

    assert git_commit(tmp_path / "absent") is None
    git("init", "-q")
    assert git_commit(repository) is None, "no commit yet"
    (repository / "file").write_text("1")
    git("add", "file")
    git("commit", "-qm", "one")
    git("tag", "v1")
    assert git_commit(repository) == git("rev-parse", "HEAD")
    (repository / "file").write_text("2")
    assert git_commit(repository) == git("rev-parse", "HEAD") + "-dirty"


def test_environment_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "PACKAGES", ("torch", "no-such-package"))
    found = versions()
    assert found["alignment"] == alignment.__version__
    assert found["torch"]
    assert found["no-such-package"] is None
    facts = machine()
    assert facts["cpu"]
    assert facts["cores"] >= 1


@pytest.mark.parametrize(
    ("vendor", "family", "flags", "expected"),
    [
        ("GenuineIntel", 6, "fpu avx2 avx512f", "AVX-512, 512 bits"),
        ("AuthenticAMD", 25, "fpu avx2 avx512f avx512_bf16", "AVX-512 with bfloat16, 256 bits at a time"),
        ("AuthenticAMD", 26, "fpu avx2 avx512f avx512_bf16", "AVX-512 with bfloat16, 512 bits"),
        ("AuthenticAMD", 25, "fpu avx2", "AVX2, 256 bits"),
    ],
)
def test_the_processor_and_how_much_it_computes_at_a_time(vendor: str, family: int, flags: str, expected: str) -> None:
    info = (
        f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: 17\n"
        f"model name\t: Some CPU \nstepping\t: 1\nflags\t\t: {flags}\n"
    )
    facts = processor(info)
    assert facts == {"cpu": "Some CPU", "family": family, "model": 17, "stepping": 1, "vectors": expected}
    assert named(facts) == f"Some CPU, family {family}, model 17, stepping 1"


def test_a_system_that_tells_nothing_about_its_processor() -> None:
    facts = processor("")
    assert facts["family"] is facts["model"] is facts["stepping"] is None
    assert facts["vectors"]
    assert named(facts) == named({"cpu": facts["cpu"]}) == facts["cpu"]
