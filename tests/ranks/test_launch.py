"""One command that starts its own ranks: how it ends, and what it says."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.patience import patience

ROOT = Path(__file__).parents[2]


def launched(how: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.launched", how],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ("well", 0, ""),
        ("refused", 1, "Error: There is too little of it: get more."),
        ("killed", 1, "Error: Rank 1 was killed by SIGKILL; what it said is in /"),
    ],
)
def test_the_command_ends_as_its_ranks_do(how, code, said):
    """One sentence: that of the rank that failed, or the launcher's where it had no time for one."""
    process = launched(how)
    out, err = process.communicate(timeout=patience(90))
    assert process.returncode == code, err
    assert "is here" not in out  # the others write to files
    lines = [line for line in err.splitlines() if line]
    assert len(lines) == bool(said) and "".join(lines).startswith(said), err
    if how == "killed":
        [folder] = [word.rstrip(":") for word in err.split() if word.startswith("/")]
        assert any("rank 1 is here" in path.read_text() for path in Path(folder).rglob("stdout.log"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_ends_all_ranks_with_the_sentence_of_the_first(number):
    process = launched("waits")
    assert [process.stdout.readline() for _ in range(2)] == ["asking\n", "well\n"]
    time.sleep(0.2)
    process.send_signal(number)
    _, err = process.communicate(timeout=patience(60))
    assert process.returncode == 1
    assert [line for line in err.splitlines() if line] == ["Interrupted; continue with: this"]


@pytest.mark.slow
def test_a_stop_ends_all_although_a_rank_hangs():
    """Rank 0 waits for it in a collective, where Python obeys no signal."""
    process = launched("hangs")
    assert process.stdout.readline() == "asking\n"
    time.sleep(0.5)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=patience(60))
    assert time.monotonic() - started < patience(15) and process.returncode == 1
    [line] = [line for line in err.splitlines() if line]
    assert line == "Error: Told to stop, and another rank has not answered for 8 seconds: continue with resume=true."
