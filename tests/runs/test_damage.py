"""Files that a run reads of its own: a changed byte is never taken for what was written."""

import errno
import os
import random
import shutil
from contextlib import suppress

import pytest

from alignment.errors import UserError, disk_problem
from alignment.files import digests, read_sealed, write_sealed
from alignment.runs.folder import read_run
from alignment.runs.record import RunRecord
from alignment.training.callbacks import last_checkpoint, remove_damaged

CONTENT = {"steps": 8, "metrics": {"loss": 0.25, "margin": float("inf")}, "text": ["a\ud83d", None, True]}


@pytest.mark.slow
@pytest.mark.parametrize("indent", [None, 2])
def test_every_changed_byte_of_a_sealed_file_is_found_or_harmless(tmp_path, indent):
    """Changed white space is the only change that passes; the value is the same then."""
    path = tmp_path / "done.json"
    write_sealed(path, CONTENT, indent)
    whole, expected = path.read_bytes(), read_sealed(path)
    rng = random.Random(0)
    for at in range(len(whole)):
        changed = bytearray(whole)
        changed[at] ^= 1 << rng.randrange(8)
        for data in (bytes(changed), whole[:at], whole[:at] + b"\0" + whole[at + 1 :]):
            path.write_bytes(data)
            with suppress(UserError):
                assert read_sealed(path) == expected


def test_a_checkpoint_of_which_a_byte_has_changed_is_removed(tmp_path):
    """The stage goes on from the one before, which is whole."""
    for step in (2, 4):
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        (checkpoint / "optimizer.pt").write_bytes(b"moments")
        write_sealed(checkpoint / "complete", digests(checkpoint))
    remove_damaged(tmp_path)
    assert last_checkpoint(tmp_path) == (tmp_path / "checkpoint-4", 4)
    (tmp_path / "checkpoint-4" / "optimizer.pt").write_bytes(b"momentt")
    remove_damaged(tmp_path)
    assert last_checkpoint(tmp_path) == (tmp_path / "checkpoint-2", 2)


def test_a_finished_run_says_which_file_has_changed(tmp_path):
    """A changed digit would only be another number in a report."""
    record = RunRecord(tmp_path)
    record.log("preference", 1, "train", {"loss": 0.5})
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    record.write_summary({"status": "finished"})
    record.seal()
    assert read_run(tmp_path).problems == []
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    assert read_run(tmp_path).problems == ["config.yaml has changed since the run ended."]


def test_what_an_earlier_kill_left_is_removed(tmp_path):
    """A file that was being written has a name that nobody would ever write again."""
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / ".done.json.123.tmp").write_text("{")
    RunRecord(tmp_path)
    assert list((tmp_path / "stages").iterdir()) == []


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a/b"), "a/b: No space left on device; free the disk"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), "A file could not be"),
        (RuntimeError("basic_ios::clear: iostream error"), "A file could not be"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), "Read-only file system; free the disk"),
        (shutil.Error([("a", "b", str(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "b")))]), "A file could not be"),
        (FileNotFoundError(errno.ENOENT, "none", "a"), None),
        (shutil.Error([("a", "b", "a bug")]), None),
        (RuntimeError("a bug"), None),
    ],
)
def test_errors_of_the_disk_are_sentences_and_bugs_are_not(error, said):
    """Torch writes files itself and gives no reason."""
    found = disk_problem(error)
    assert found is None if said is None else found.startswith(said)
