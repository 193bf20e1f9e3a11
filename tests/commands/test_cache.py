"""`python -m alignment.cache`: what it shows, what it removes, and how it ends."""

from __future__ import annotations

import os
import re
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import alignment
from alignment.cache import main
from alignment.files import CacheKind
from alignment.reference.keyed_store import damaged_files
from alignment.reference.store import ReferenceStore
from alignment.stages.store import StageStore
from tests.helpers.endings import refusal_of

OLD, NEW = "ab" + "1" * 62, "ab" + "2" * 62


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with two policies: OLD, 3 sequences of 1000 tokens, unused for 40 days, and NEW, 1 sequence."""
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("ALIGNMENT_CACHE", str(tmp_path))
    with ReferenceStore(CacheKind.reference.under(tmp_path)) as store:
        store.register(
            OLD, {"model": "lab/old[bold]", "quantization": "nf4", "adapter": "0a1b" * 16, "dtype": "bfloat16"}
        )
        store.put(OLD, {bytes([index] * 32): np.full(1000, -1, np.float32) for index in range(3)})
        store.register(NEW, {"model": "lab/new"})
        store.put(NEW, {bytes(32): np.full(7, -1, np.float32)})
        change(tmp_path, "UPDATE identities SET last_used = ? WHERE identity = ?", time.time() - 40 * 86400, OLD)
    return tmp_path


def change(folder: Path, statement: str, *values: object) -> None:
    with sqlite3.connect(CacheKind.reference.under(folder)) as connection:
        connection.execute(statement, values)
    connection.close()


def left(folder: Path) -> set[str]:
    with ReferenceStore(CacheKind.reference.under(folder)) as store:
        return {info.identity for info in store.identities()}


STAGE, OLD_STAGE, ANSWERS = "0c" * 16, "0d" * 16, "0e" * 16


def put_stages(folder: Path) -> StageStore:
    """Two results of 5 bytes and what is said of them, and answers; OLD_STAGE was not used for 40 days."""
    (folder / "policy").mkdir()
    (folder / "policy" / "weights").write_bytes(b"12345")
    stages = StageStore(CacheKind.stages.under(folder))
    for key in (STAGE, OLD_STAGE):
        content = {"description": {"stage": "sft", "model": "lab/new[bold]"}, "result": {"steps": 77}}
        stages.put(key, folder / "policy", content)
    stages.put(ANSWERS, None, {"description": {"stage": "answers", "model": "lab/new[bold]"}, "answers": [[1]]})
    long_ago = time.time() - 40 * 86400
    os.utime(stages.folder / OLD_STAGE / "entry.json", (long_ago, long_ago))
    return stages


def test_list_shows_the_stages(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = put_stages(folder)
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    [new] = (line for line in lines if STAGE[:12] in line)
    [old] = (line for line in lines if OLD_STAGE[:12] in line)
    for shown in ("sft", "lab/new[bold]", " 77 "):
        assert shown in new and shown in old
    assert lines.index(new) < lines.index(old)
    [answers] = (line for line in lines if ANSWERS[:12] in line)
    assert "answers" in answers and "lab/new[bold]" in answers
    assert str(stages.folder) in lines[-1]


def test_verify_drops_a_damaged_stage(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = put_stages(folder)
    (stages.folder / STAGE / "policy" / "weights").write_bytes(b"12346")
    assert main(["verify"]) == 1
    out = capsys.readouterr().out
    assert f"The result {STAGE[:12]} was damaged" in out and "2 results of stages are sound" in out
    assert "4 sequences" in out
    assert main(["verify"]) == 0


@pytest.mark.parametrize(
    ("arguments", "kept", "policies"),
    [
        (["--older-than", "30d"], {STAGE, ANSWERS}, {NEW}),
        (["--older-than", "50d"], {STAGE, OLD_STAGE, ANSWERS}, {OLD, NEW}),
        (["--identity", STAGE[:4]], {OLD_STAGE, ANSWERS}, {OLD, NEW}),
        (["--identity", ANSWERS[:4]], {STAGE, OLD_STAGE}, {OLD, NEW}),
        (["--identity", NEW], {STAGE, OLD_STAGE, ANSWERS}, {OLD}),
        (["--max-mb", "0"], set(), set()),
        (["--max-mb", "1"], {STAGE, OLD_STAGE, ANSWERS}, {OLD, NEW}),
        (["--all"], set(), set()),
    ],
)
def test_prune_of_stages(folder: Path, arguments: list[str], kept: set[str], policies: set[str]) -> None:
    stages = put_stages(folder)
    assert main(["prune", *arguments]) == 0
    assert {stage.key for stage in stages.stored()} == kept
    assert left(folder) == policies


def test_a_cache_of_stages_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put_stages(tmp_path)
    assert main(["list", "--path", str(tmp_path)]) == 0
    assert STAGE[:12] in capsys.readouterr().out


def test_list_shows_every_policy(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (old,) = (line for line in lines if OLD[:12] in line)
    (new,) = (line for line in lines if NEW[:12] in line)
    for shown in (" 3 ", " 3,000 ", " 0.0 ", "lab/old[bold], bfloat16, nf4, adapter 0a1b0a1b0a1b"):
        assert shown in old
    assert time.strftime("%Y-%m-%d") in new
    assert time.strftime("%Y-%m-%d") not in old
    assert " 7 " in new
    assert lines.index(new) < lines.index(old), "most recently used first"
    assert str(CacheKind.reference.under(folder)) in lines[-1]


@pytest.mark.parametrize("command", [[], ["prune"]])
def test_help_is_short(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0 and len(lines) <= 20 and max(map(len, lines)) <= 80


@pytest.mark.parametrize("command", [["list"], ["verify"], ["prune", "--all"]])
def test_an_absent_cache_is_no_error_and_is_not_created(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--path", str(tmp_path / "none")]) == 0
    assert "No reference log-probs are stored in" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


def test_verify_of_a_sound_store(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify"]) == 0
    assert "4 sequences are sound" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["a truncated file", "a changed value"])
def test_verify_says_that_the_file_was_set_aside(folder: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    if damage == "a changed value":
        change(folder, "UPDATE logps SET value = zeroblob(length(value)) WHERE row = 4")
    else:
        os.truncate(CacheKind.reference.under(folder), 10_000)
    assert main(["verify"]) == 1
    out = capsys.readouterr().out
    assert "The store was damaged (" in out and "0 sequences are sound" in out
    (kept,) = damaged_files(CacheKind.reference.under(folder))
    assert main(["verify"]) == 0, "the fresh file is sound"
    capsys.readouterr()
    assert main(["list"]) == 0
    assert kept.name in capsys.readouterr().out
    assert main(["prune", "--all"]) == 0
    assert not kept.exists()


@pytest.mark.parametrize(
    ("arguments", "kept", "summary"),
    [
        (["--older-than", "30d"], {NEW}, "1 policies removed"),
        (["--older-than", "50d"], {OLD, NEW}, "0 policies removed"),
        (["--identity", OLD[:5]], {NEW}, "Removed ab1111111111 (lab/old[bold]): 3 sequences."),
        (["--identity", NEW], {OLD}, "Removed ab2222222222 (lab/new): 1 sequences."),
        (["--max-mb", "0"], set(), "2 policies removed"),
        (["--max-mb", "1"], {OLD, NEW}, "0 policies removed"),
        (["--all"], set(), "2 policies removed"),
    ],
)
def test_prune(
    folder: Path, arguments: list[str], kept: set[str], summary: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prune", *arguments]) == 0
    assert summary in capsys.readouterr().out
    assert left(folder) == kept


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "The following arguments are required"),
        (["lisst"], "(did you mean list?)"),
        (["list", "--paht", "x"], "Unrecognized arguments: --paht x (did you mean --path?)"),
        (["prune"], "One of the arguments --older-than --identity --max-mb --all is required"),
        (["prune", "--all", "--identity", "a"], "not allowed with argument"),
        (["prune", "--older-than", "a month"], "such as 30d is wanted, not 'a month'"),
        (["prune", "--older-than", "-3d"], "expected one argument"),
        (["prune", "--max-mb", "1.5"], "whole number of megabytes such as 500 is wanted, not '1.5'"),
        (["prune", "--identity", "ab"], "'ab' begins ab1111111111, ab2222222222"),
        (["prune", "--identity", "ff"], "'ff' begins none"),
        (["prune", "--identity", ""], "'' begins none"),
    ],
)
def test_a_mistake_is_one_sentence(
    folder: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal_of(main, arguments)
    assert said.startswith("Error: ") and message in said and said.endswith(".")
    assert capsys.readouterr().out == ""
    assert left(folder) == {OLD, NEW}


@pytest.mark.slow
def test_as_a_module(folder: Path) -> None:
    """It starts at once: no library of models is imported."""
    command = [sys.executable, "-X", "importtime", "-m", "alignment.cache"]
    listed = subprocess.run([*command, "list", "--path", str(folder)], capture_output=True, text=True, check=False)
    assert listed.returncode == 0
    assert OLD[:12] in listed.stdout
    imported = {line.rpartition("|")[2].strip() for line in listed.stderr.splitlines()}
    assert "alignment.stages.store" in imported and not imported & {"torch", "transformers", "peft"}
    mistaken = subprocess.run([*command[:1], *command[3:], "lost"], capture_output=True, text=True, check=False)
    assert mistaken.returncode == 1
    assert "Traceback" not in mistaken.stderr


# Entries that are files: every kind but reference and stages, which have stores of their own

FILES = [kind for kind in CacheKind if kind not in (CacheKind.reference, CacheKind.stages)]


def put_files(cache: Path) -> dict[CacheKind, tuple[Path, Path]]:
    """Of every kind a new entry of 5 bytes and one that was not used for 40 days, a lock and what a crash has left."""
    entries = {}
    for number, kind in enumerate(FILES):
        folder = kind.under(cache)
        folder.mkdir(parents=True)
        new, old = (folder / f"{number}{letter}".ljust(32, "7") for letter in "ab")
        for path in (new, old):
            path.write_bytes(b"12345")
        if kind is CacheKind.models:
            new.unlink()
            new.mkdir()
            (new / "weights").write_bytes(b"12345")
        long_ago = time.time() - 40 * 86400
        os.utime(old, (long_ago, long_ago))
        (folder / f"{old.name}.lock").touch()
        (folder / ".partial").touch()
        entries[kind] = new, old
    return entries


def remaining(cache: Path) -> set[str]:
    return {path.name for kind in FILES for path in kind.under(cache).glob("[!.]*") if path.suffix != ".lock"}


def test_every_kind_is_listed_and_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With its size, its age, what it is; locks and what a crash has left are no entries."""
    entries = put_files(tmp_path)
    put_stages(tmp_path)
    with ReferenceStore(CacheKind.reference.under(tmp_path)) as store:
        store.register(OLD, {"model": "lab/old"})
    assert main(["list", "--path", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    for kind, (new, old) in entries.items():
        for path in (new, old):
            [line] = [line for line in lines if path.name[:12] in line]
            assert f" {kind.place} " in line and " 0.0 " in line and kind.holds in line
    assert not any("lock" in line or "partial" in line for line in lines)
    assert any(OLD[:12] in line for line in lines) and any(STAGE[:12] in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [(["--older-than", "30d"], "new"), (["--max-mb", "1"], "both"), (["--max-mb", "0"], ""), (["--all"], "")],
)
def test_every_kind_is_pruned(tmp_path: Path, arguments: list[str], kept: str) -> None:
    """By age, by size, or all of it."""
    entries = put_files(tmp_path)
    assert main(["prune", "--path", str(tmp_path), *arguments]) == 0
    expected = {"new": slice(1), "both": slice(2), "": slice(0)}[kept]
    assert remaining(tmp_path) == {path.name for pair in entries.values() for path in pair[expected]}


@pytest.mark.parametrize("kind", FILES)
def test_one_entry_is_pruned_by_its_name(tmp_path: Path, kind: CacheKind) -> None:
    """And no other entry of any kind."""
    entries = put_files(tmp_path)
    whole = remaining(tmp_path)
    assert main(["prune", "--path", str(tmp_path), "--identity", entries[kind][0].name[:4]]) == 0
    assert remaining(tmp_path) == whole - {entries[kind][0].name}


def test_nobody_writes_into_the_cache_but_by_a_kind() -> None:
    """Code that puts a name of its own behind the cache folder would keep what the command does not know."""
    package = Path(alignment.__file__).parent
    own = re.compile(r"\bcache(?:_dir\([^)]*\))? / ")
    found = [path.name for path in package.rglob("*.py") if own.search(path.read_text(encoding="utf-8"))]
    assert found == ["files.py"], "ask CacheKind.<kind>.under(cache)"
    used = "".join(path.read_text(encoding="utf-8") for path in package.rglob("*.py"))
    assert all(f"CacheKind.{kind.name}.under(" in used for kind in CacheKind)
