"""One command that starts its own ranks: how it ends, what it says, and what it leaves."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from filelock import FileLock

from alignment.ranks import launch, lifeline
from alignment.ranks.place import LOCK
from tests.helpers.launched import OBEYED
from tests.helpers.patience import patience

ROOT = Path(__file__).parents[2]


def launched(how: str, temporary: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.launched", how],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"TMPDIR": str(temporary)},
    )  # fmt: skip


def left(temporary: Path) -> set[str]:
    """Names of the folders that launchers have there, once no process is left that was started with this place."""
    limit = time.monotonic() + patience(10)
    while any(f"TMPDIR={temporary}\0".encode() in environment for environment in environments()):
        assert time.monotonic() < limit, "a process is left"
        time.sleep(0.05)
    return {path.name.removeprefix("alignment-ranks-") for path in temporary.iterdir()}


def environments() -> list[bytes]:
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            found.append(path.read_bytes())
    return found


def folder_of(temporary: Path, name: str, is_locked: bool = True, days: float = 0) -> Path:
    """What a launcher has left: with its lock if it was killed or lives."""
    folder = temporary / f"alignment-ranks-{name}"
    folder.mkdir()
    if is_locked:
        (folder / LOCK).touch()
    os.utime(folder, (time.time() - days * 86400,) * 2)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ("well", 0, ""),
        ("refused", 1, "Error: There is too little of it: get more."),
        ("killed", 1, "Error: Rank 1 was killed by SIGKILL; what it said is in /"),
    ],
)
def test_the_command_ends_as_its_ranks_do(how, code, said, tmp_path):
    """One sentence: that of the rank that failed, or the launcher's where it had no time for one.

    The output of a rank that has died is kept for days, and what other launchers have left is removed.
    """
    lives = folder_of(tmp_path, "lives")
    folder_of(tmp_path, "was killed")
    folder_of(tmp_path, "was named", is_locked=False, days=6)
    folder_of(tmp_path, "is old", is_locked=False, days=8)
    with FileLock(lives / LOCK):
        process = launched(how, tmp_path)
        out, err = process.communicate(timeout=patience(90))
    assert process.returncode == code, err
    assert "is here" not in out  # the others write to files
    lines = [line for line in err.splitlines() if line]
    assert len(lines) == bool(said) and "".join(lines).startswith(said), err
    if how == "killed":
        [folder] = [word.rstrip(":") for word in err.split() if word.startswith("/")]
        assert any("rank 1 is here" in path.read_text() for path in Path(folder).rglob("stdout.log"))
    assert len(left(tmp_path) - {"lives", "was named"}) == (how == "killed")
    assert left(tmp_path) >= {"lives", "was named"}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stop_ends_all_ranks_with_the_sentence_of_the_first(number, tmp_path):
    """Also where the launcher is killed, whose ranks have a session of their own; the next one removes its folder."""
    process = launched("waits", tmp_path)
    assert [process.stdout.readline() for _ in range(2)] == ["asking\n", "well\n"]
    time.sleep(0.2)
    process.send_signal(number)
    _, err = process.communicate(timeout=patience(60))
    killed = number is signal.SIGKILL
    assert process.returncode == (-number if killed else 1)
    assert [line for line in err.splitlines() if line] == ["Interrupted; continue with: this"]
    assert len(left(tmp_path)) == killed


@pytest.mark.slow
def test_a_stop_ends_all_although_a_rank_hangs(tmp_path):
    """Rank 0 waits for it in a collective, where Python obeys no signal; it does so before its launcher kills."""
    assert lifeline._OWN_STOP_SECONDS < launch._SHUTDOWN_SECONDS < 15
    process = launched("hangs", tmp_path)
    assert process.stdout.readline() == "asking\n"
    time.sleep(0.5)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=patience(60))
    assert time.monotonic() - started < patience(15) and process.returncode == 1
    said = f"Told to stop, and another rank has not answered for {OBEYED} seconds: continue with resume=true."
    assert [line for line in err.splitlines() if line] == [f"Error: {said}"]
    assert not left(tmp_path)
