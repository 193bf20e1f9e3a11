"""The command in several ranks: the files of one run, the numbers of one process, and any number of ranks goes on."""

import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from alignment.ranks.team import RankLost
from tests.conftest import each
from tests.helpers.patience import patience
from tests.helpers.ranks import command_in_ranks
from tests.helpers.ranks import in_ranks as team_in_ranks
from tests.helpers.runs import TINY, assert_whole, at_row, metric_rows, only_run, run, summary, weights
from tests.helpers.tiny_runs import project

__all__ = ["project"]

PLAIN = (*TINY, "adapter.dropout=0", "evaluation.every=3", "model.dtype=float64")
"""Dropout masks are those of a rank. In float64 rounding hides nothing."""
_BY_PASS = ("entropy", "mean_token_accuracy")


def in_ranks(project: Path, cwd: Path, size: int, *arguments: str, patches=None):
    cwd.mkdir(exist_ok=True)
    return command_in_ranks(size, "--config-dir", str(project), *arguments, cwd=cwd, patches=patches)


def assert_equal(folder: Path, expected: Path) -> None:
    """The same but for the order of sums: metrics, answers, identities of references, and weights that moved by 0.1.

    Norms compute in float32 and AdamW enlarges what they round.
    """
    found, wanted = weights(folder), weights(expected)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-13, msg=name)
    rows = [[{k: v for k, v in row.items() if k not in _BY_PASS} for row in metric_rows(f)] for f in (folder, expected)]
    assert [row.keys() for row in rows[0]] == [row.keys() for row in rows[1]]
    for row, other in zip(*rows, strict=True):
        named = ("stage", "split", "step")
        assert [row[key] for key in named] == [other[key] for key in named]
        for key in row.keys() - set(named):
            assert row[key] == pytest.approx(other[key], rel=1e-6, abs=1e-6), (row["stage"], row["step"], key)
    for name in ("samples.jsonl",):
        assert (folder / name).read_text() == (expected / name).read_text()
    assert_whole(folder)


def write_nothing() -> None:
    """End this process at once if it writes, renames or removes anything."""
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def watch(event: str, arguments: tuple) -> None:
        opened = event == "open" and arguments[2] is not None and arguments[2] & writing and arguments[0] != os.devnull
        made = event == "os.mkdir" and not os.path.isdir(arguments[0])
        if opened or made or event in ("os.rename", "os.remove", "os.rmdir", "sqlite3.connect"):
            os.write(2, f"{event} {arguments}\n".encode())
            os._exit(WROTE)

    sys.addaudithook(watch)


WROTE = 77


def write_too(post, folder: Path) -> None:
    """A task in which a rank that follows writes."""
    write_nothing()
    (folder / "mine.txt").write_text("me too")


def tell_to_write(team, folder: Path) -> None:
    try:
        team.tell(write_too, folder)
    except RankLost:
        (folder / "lost").touch()


@pytest.mark.slow
def test_a_second_writer_is_seen(tmp_path):
    """What shows below that rank 0 alone writes turns red where another does."""
    assert team_in_ranks(2, tmp_path / "output", tell_to_write, tmp_path) == [0, WROTE]
    assert (tmp_path / "lost").exists() and not (tmp_path / "mine.txt").exists()


def killed_at(stage: str, step: int) -> None:
    at_row(stage, step, signal.SIGKILL)


def killed_before_it_is_whole(checkpoint: str) -> None:
    """When all of a checkpoint of the preference stage is written, and before it counts."""
    from alignment.training import callbacks

    write = callbacks.write_sealed

    def writing(path: Path, *arguments) -> None:
        if path.parts[-4:] == ("preference", "checkpoints", checkpoint, "complete"):
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, *arguments)

    callbacks.write_sealed = writing


@pytest.mark.slow
def test_ranks_do_the_run_of_one_and_any_number_goes_on(project, tmp_path):
    """SFT, reference, preference stage, evaluation: one folder that rank 0 alone writes; killed, then resumed.

    Four ranks share three held-out pairs, so that one of them has none.
    """
    settings = (*PLAIN, "data.eval_limit=3")
    alone = tmp_path / "alone"
    assert run(project, alone, *settings).code == 0
    expected = only_run(alone)

    # Both stages in four ranks
    four = in_ranks(project, tmp_path / "four", 4, *settings, patches=dict.fromkeys((1, 2, 3), write_nothing))
    assert [ended.code for ended in four] == [0] * 4, four[0].err + four[1].err
    assert all((ended.out, ended.err) == ("", "") for ended in four[1:])
    found = only_run(tmp_path / "four")
    assert_equal(found, expected)
    shared, single = summary(found), summary(expected)
    assert shared["machine"].pop("ranks") == 4
    assert shared["stages"]["preference"]["steps"] == single["stages"]["preference"]["steps"]

    # Two ranks, then one; and the other way round
    cut = tmp_path / "cut"
    killed = in_ranks(
        project, cut, 2, *settings, patches={0: partial(killed_before_it_is_whole, "checkpoint-6"), 1: write_nothing}
    )
    assert killed[0].code == -signal.SIGKILL
    assert [ended.err for ended in killed[1:]] == [""]
    assert run(project, cut, f"resume={only_run(cut)}").code == 0
    assert_equal(only_run(cut), expected)
    other = tmp_path / "other"
    assert run(project, other, *settings, patch=partial(killed_at, "preference", 6)).code == -signal.SIGKILL
    both = in_ranks(project, other, 2, f"resume={only_run(other)}", "trainer.devices=2")
    assert [ended.code for ended in both] == [0, 0], both[0].err
    assert_equal(only_run(other), expected)


def fault(where: str, how: str, mark: Path) -> None:
    """Have a rank refuse, stumble, lack memory or be killed at its share of a stage's work."""
    from alignment.errors import UserError
    from alignment.evaluation.sampling import local
    from alignment.reference import cached
    from alignment.stages import sft
    from alignment.training.passes import StepPasses

    def failing(*arguments, **settings) -> None:
        mark.write_text(str(time.time()))
        if how == "refused":
            raise UserError("This rank has lost its courage: give it some.")
        if how == "stumbled":
            raise KeyError("courage")
        if how == "memory":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        os.kill(os.getpid(), signal.SIGKILL)

    if where == "sft":
        sft._scored_loss = failing
        sft._fits_head = lambda model: False
    elif where == "reference":
        cached.Missing.scored = failing
    elif where == "preference":
        StepPasses.add_gradients = failing
    else:
        local._drawn = failing


SAID = {
    "refused": "Error: This rank has lost its courage: give it some.",
    "stumbled": "RuntimeError: Rank 1 failed: Traceback",
    "memory": "Error: The GPU has too little memory for a group of",
    "killed": "Error: Rank 1 has ended in the midst of its work",
}
FAULTS = [
    ("sft", 1, "killed"), ("sft", 0, "refused"), ("reference", 1, "killed"), ("reference", 0, "killed"),
    ("preference", 1, "refused"), ("preference", 1, "killed"), ("preference", 1, "stumbled"),
    ("preference", 1, "memory"), ("evaluation", 0, "refused"), ("evaluation", 1, "killed"),
]  # fmt: skip
CORE = [("preference", 1, "refused"), ("preference", 1, "killed")]


@pytest.mark.parametrize(("where", "rank", "how"), each(FAULTS, CORE))
@pytest.mark.slow
def test_a_rank_that_fails_ends_all_with_one_sentence(where, rank, how, project, tmp_path):
    """In each stage, on either rank: within 15 seconds of a quiet machine, and rank 0 says why, unless it is killed.

    What no sentence was written for comes with Python's lines on where it happened, as in one process.
    """
    mark = tmp_path / "mark"
    skipped = () if where == "sft" else ("sft=none",)
    few = () if where == "evaluation" else ("evaluation.prompts=0", "evaluation.every=null")
    short = ("trainer.max_steps=1", "trainer.eval_every=0")
    ended = in_ranks(
        project, tmp_path / "run", 2, *PLAIN, *skipped, *few, *short, patches={rank: partial(fault, where, how, mark)}
    )
    assert time.time() - float(mark.read_text()) < patience(15)
    killed = -signal.SIGKILL
    expected = [1, 0] if how != "killed" else [1, killed] if rank else [killed, 1]
    assert [one.code for one in ended] == expected, ended[0].err
    last = [line for line in ended[0].err.splitlines() if line.startswith(("Error: ", "RuntimeError: "))]
    said = [SAID[how]] if how != "killed" or rank else []  # a rank 0 that is killed says nothing: its launcher does
    assert [line[: len(sentence)] for line, sentence in zip(last, said, strict=True)] == said
    assert "Traceback" not in ended[1].err + ended[0].out + (ended[0].err if how != "stumbled" else "")
