"""The command in several ranks: the files of one run, the numbers of one process, and any number of ranks goes on."""

import os
import signal
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.helpers.ranks import command_in_ranks
from tests.helpers.runs import TINY, assert_whole, at_row, metric_rows, only_run, run, summary, weights
from tests.helpers.tiny_runs import project

__all__ = ["project"]

PLAIN = (*TINY, "adapter.dropout=0")
"""Dropout masks are those of a rank."""
_BY_PASS = ("entropy", "mean_token_accuracy")


def in_ranks(project: Path, cwd: Path, size: int, *arguments: str, patches=None):
    cwd.mkdir(exist_ok=True)
    return command_in_ranks(size, "--config-dir", str(project), *arguments, cwd=cwd, patches=patches)


def assert_equal(folder: Path, expected: Path) -> None:
    """The same but for the order of sums: metrics, answers, identities of references, and weights that moved by 0.1."""
    found, wanted = weights(folder), weights(expected)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-5, msg=name)
    rows = [[{k: v for k, v in row.items() if k not in _BY_PASS} for row in metric_rows(f)] for f in (folder, expected)]
    assert [row.keys() for row in rows[0]] == [row.keys() for row in rows[1]]
    for row, other in zip(*rows, strict=True):
        named = ("stage", "split", "step")
        assert [row[key] for key in named] == [other[key] for key in named]
        for key in row.keys() - set(named):
            assert row[key] == pytest.approx(other[key], rel=1e-3, abs=1e-4), (row["stage"], row["step"], key)
    for name in ("samples.jsonl",):
        assert (folder / name).read_text() == (expected / name).read_text()
    assert_whole(folder)


def killed_at(stage: str, step: int) -> None:
    at_row(stage, step, signal.SIGKILL)


@pytest.mark.slow
def test_two_ranks_do_the_run_of_one_and_either_goes_on_with_the_other(project, tmp_path):
    """SFT, reference, preference stage, evaluation: one folder; killed in the last stage, then resumed."""
    alone = tmp_path / "alone"
    assert run(project, alone, *PLAIN).code == 0
    expected = only_run(alone)

    # Both stages in two ranks
    both = in_ranks(project, tmp_path / "both", 2, *PLAIN)
    assert [ended.code for ended in both] == [0, 0], both[0].err + both[1].err
    assert (both[1].out, both[1].err) == ("", "")
    found = only_run(tmp_path / "both")
    assert_equal(found, expected)
    shared, single = summary(found), summary(expected)
    assert shared["machine"].pop("ranks") == 2
    assert shared["stages"]["preference"]["steps"] == single["stages"]["preference"]["steps"]

    # Two ranks, then one; and the other way round
    cut = tmp_path / "cut"
    killed = in_ranks(project, cut, 2, *PLAIN, patches={0: partial(killed_at, "preference", 6)})
    assert killed[0].code == -signal.SIGKILL
    assert run(project, cut, f"resume={only_run(cut)}").code == 0
    assert_equal(only_run(cut), expected)
    other = tmp_path / "other"
    assert run(project, other, *PLAIN, patch=partial(killed_at, "preference", 6)).code == -signal.SIGKILL
    both = in_ranks(project, other, 2, f"resume={only_run(other)}", "trainer.devices=2")
    assert [ended.code for ended in both] == [0, 0], both[0].err
    assert_equal(only_run(other), expected)


def refuse_in_pass() -> None:
    """Fail in the preference stage of a rank, with a sentence."""
    from alignment.errors import UserError
    from alignment.training.passes import StepPasses

    def failing(self, *arguments) -> None:
        raise UserError("This rank has lost its courage: give it some.")

    StepPasses.add_gradients = failing


def die_in_pass() -> None:
    """Be killed in the preference stage of a rank."""
    from alignment.training.passes import StepPasses

    StepPasses.add_gradients = lambda *_: os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("patch", "code", "said"),
    [
        (refuse_in_pass, 0, "Error: This rank has lost its courage: give it some."),
        (die_in_pass, -signal.SIGKILL, "Error: Another rank has ended in the midst of its work"),
    ],
)
def test_a_rank_that_fails_ends_all_with_one_sentence(patch, code, said, project, tmp_path):
    ended = in_ranks(project, tmp_path / "run", 2, *PLAIN, "sft=none", patches={1: patch})
    assert [one.code for one in ended] == [1, code]
    last = [line for line in ended[0].err.splitlines() if line.startswith("Error")]
    assert len(last) == 1 and last[0].startswith(said)
    assert "Traceback" not in ended[0].err + ended[1].err + ended[0].out
