"""Two workers that take turns, as real processes with nothing in them but their turns."""

import os
import sys
import textwrap
import time
from dataclasses import replace

import pytest

from tests.bench.job import ROOT
from tests.bench.turns import Command, take_turns
from tests.helpers.patience import patience

WORKER = textwrap.dedent(
    """
    import sys, time
    from tests.bench.turns import pass_on
    diary, name, steps, status, done, go = sys.argv[1:]
    def write(what):
        with open(diary, "a") as file:
            file.write(f"{name} {what}\\n")
    write("setup")
    for step in range(int(steps)):
        pass_on(int(done), int(go))
        write(f"begins {step}")
        time.sleep(0.02)
        write(f"ends {step}")
    sys.exit(int(status))
    """
)


@pytest.fixture
def command(tmp_path):
    def make(name, steps, status=0):
        words = (sys.executable, "-c", WORKER, str(tmp_path / "diary"), name, str(steps), str(status))
        return Command(words, tmp_path / f"{name}.log", ROOT, dict(os.environ))

    return make


def diary(tmp_path):
    return (tmp_path / "diary").read_text().splitlines()


def test_workers_take_turns_from_their_setup_to_their_end(command, tmp_path):
    take_turns([command("a", 3), command("b", 2)])
    assert diary(tmp_path) == [
        "a setup",
        "b setup",
        *("a begins 0", "a ends 0", "b begins 0", "b ends 0"),
        *("a begins 1", "a ends 1", "b begins 1", "b ends 1"),
        *("a begins 2", "a ends 2"),
    ]


def test_a_failure_ends_them_all(command, tmp_path):
    """The second fails at its end; the first, which waits for its second step, never gets it."""
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"b.log ends with status 3"):
        take_turns([command("a", 100), command("b", 1, status=3)])
    assert diary(tmp_path)[-1] == "b ends 0"
    assert time.monotonic() - started < patience(30)


def test_a_worker_that_dies_while_it_waits_is_named(command, tmp_path):
    """As one does that the system kills when memory runs out; the second one's turn is long enough for that."""
    killer = command("b", 1)
    kill = "import os, signal, time; time.sleep(0.5); os.kill(int(open(sys.argv[1] + '.pid').read()), signal.SIGKILL)"
    words = (*killer.words[:2], f"import sys\n{kill}\n{WORKER}", *killer.words[3:])
    victim = command("a", 3)
    note = "import os, sys\nopen(sys.argv[1] + '.pid', 'w').write(str(os.getpid()))\n"
    first = replace(victim, words=(*victim.words[:2], note + WORKER, *victim.words[3:]))
    with pytest.raises(RuntimeError, match=r"a.log ends with status -9"):
        take_turns([first, replace(killer, words=words)])


def test_a_worker_ends_with_who_hands_out_the_turns(tmp_path):
    done, given = os.pipe()
    awaited, go = os.pipe()
    os.close(go)
    pid = os.fork()
    if pid == 0:
        from tests.bench.turns import pass_on

        try:
            pass_on(given, awaited)
        except SystemExit as ended:
            os._exit(7 if "gone" in str(ended) else 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert os.read(done, 1) == b"."
