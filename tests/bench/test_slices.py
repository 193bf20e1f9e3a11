"""Real processes that share the machine in slices, with nothing in them but what is measured."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from itertools import groupby

import psutil
import pytest

from tests.bench.job import ROOT
from tests.bench.slices import Side, run_sides
from tests.bench.turns import Command
from tests.helpers.patience import patience

BUSY = """
import sys, time
for _ in range(60):
    end = time.process_time() + 0.01
    while time.process_time() < end:
        pass
    with open("diary", "a") as diary:
        diary.write(sys.argv[1])
"""


@pytest.fixture
def command(tmp_path):
    def make(code, *arguments):
        log = tmp_path / f"{len(list(tmp_path.glob('*.log')))}.log"
        log.touch()
        return Command((sys.executable, "-S", "-c", textwrap.dedent(code), *arguments), log, tmp_path, dict(os.environ))

    return make


def blocks(tmp_path):
    return [(name, len(list(group))) for name, group in groupby((tmp_path / "diary").read_text())]


@pytest.mark.slow
def test_sides_run_in_turns_and_only_their_own_time_counts(command, tmp_path):
    started = time.monotonic()
    found = {name: spent for name, _, spent in run_sides([Side(n, (command(BUSY, n),)) for n in "ab"], 0.2)}
    elapsed = time.monotonic() - started
    counts = blocks(tmp_path)
    assert sum(count for name, count in counts if name == "a") == 60
    # Side by side they would change at almost every one of the 120 letters; one after the other there are two blocks.
    assert 4 <= len(counts) <= elapsed / 0.2 + 2
    for spent in found.values():
        assert 0.6 <= spent.user + spent.system <= spent.seconds + 0.05
    assert sum(spent.seconds for spent in found.values()) == pytest.approx(elapsed, rel=0.2)


@pytest.mark.slow
def test_a_share_is_so_many_slices_in_a_row(command, tmp_path):
    list(run_sides([Side("a", (command(BUSY, "a"),), share=5), Side("b", (command(BUSY, "b"),))], 0.05))
    written = (tmp_path / "diary").read_text()
    assert written[: written.rindex("a")].count("b") < 30


def outside(code, folder):
    """A small process that runs the code; what is larger would count in the peaks of those that it starts."""
    head = f"""
    import os, pathlib, signal, sys
    from tests.bench.slices import Side, run_sides
    from tests.bench.turns import Command
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup, under which tests may run, has it ignored
    def side(name, *codes):
        folder = pathlib.Path({str(folder)!r})
        words = [(sys.executable, "-S", "-c", code, name) for code in codes]
        return Side(name, tuple(Command(w, folder / f"{{name}}.log", folder, dict(os.environ)) for w in words))
    """
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(head) + code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


def test_commands_of_a_side_follow_each_other_with_a_peak_of_their_own(tmp_path):
    large = "held = bytearray(200 << 20)\nfor i in range(0, len(held), 4096): held[i] = 1"
    code = f"for name, number, spent in run_sides([side('a', {large!r}, '')]): print(number, spent.peak_bytes >> 20)"
    out, _ = outside(code, tmp_path).communicate()
    numbers, peaks = zip(*(map(int, line.split()) for line in out.splitlines()), strict=True)
    assert numbers == (0, 1)
    assert 200 <= peaks[0] < 260
    assert peaks[1] < 100


def test_a_failure_ends_its_side_alone(command, tmp_path):
    fails, never = command("import sys; sys.exit('broken')"), command("open('ran', 'w')")
    running = run_sides([Side("a", (fails, never)), Side("b", (command(BUSY, "b"),))], 0.05)
    assert next(running)[0] == "b"
    with pytest.raises(RuntimeError, match=r"ends with status 1:\nbroken"):
        next(running)
    assert blocks(tmp_path) == [("b", 60)]
    assert not (tmp_path / "ran").exists()


NOTE_AND_SLEEP = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(3600)"


def gone(path, seconds=5.0):
    """Whether the process that noted its id there ends in time."""
    pid, end = int(path.read_text()), time.monotonic() + patience(seconds)
    while time.monotonic() < end:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True  # whoever has inherited it is slow to take note of its end
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.slow
def test_who_stops_listening_ends_them_all(command, tmp_path):
    sides = [Side("a", (command(NOTE_AND_SLEEP, "pid"),)), Side("b", (command(""),))]
    running = run_sides(sides, 1.0)
    assert next(running)[0] == "b"
    running.close()
    assert gone(tmp_path / "pid")


@pytest.mark.slow
def test_stopped_processes_end_with_who_stopped_them(tmp_path):
    """The second side runs when the process is killed, the first one is stopped, and would be so for ever."""
    process = outside(f"list(run_sides([side(n, {NOTE_AND_SLEEP!r}) for n in 'ab'], 1.0))", tmp_path)
    end = time.monotonic() + patience(30)
    while not (tmp_path / "b").exists() or not (tmp_path / "b").read_text():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.communicate()
    try:
        assert gone(tmp_path / "a")
    finally:
        os.kill(int((tmp_path / "b").read_text()), signal.SIGKILL)
