"""The check for a GPU says so where one of its parts fails."""

import json
import re

import pytest

from tests.gpu import check
from tests.gpu.check import Part


def python(statement: str, seconds: float = 60) -> Part:
    """A part that runs this statement once."""
    return Part("planted", "timeit", ("-n", "1", "-r", "1", statement), seconds)


NOTES = "from tests.gpu.lines import note, out_folder; note(out_folder(), {!r}, what='planted', error='it broke')"
FAULTS = {
    "no fault": (python("pass"), 0, ""),
    "another line": (python(NOTES.format("agree")), 0, ""),
    "a crash": (python("1 / 0"), 1, "FAILED: planted"),
    "a comparison that fails": (python(NOTES.format("failed")), 1, "FAILED: planted it broke"),
    "a time limit": (python("import time; time.sleep(60)", seconds=0.2), 1, "time limit"),
}


@pytest.mark.parametrize(("part", "status", "said"), FAULTS.values(), ids=FAULTS)
def test_a_part_that_fails_is_the_check_s_failure(part, status, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check, "parts", lambda sizes: [[python("pass")], [part]])
    monkeypatch.setattr("sys.argv", ["check", str(tmp_path / "out"), "--dry"])
    assert check.main() == status
    assert said in capsys.readouterr().err


def test_an_earlier_failure_in_the_same_folder_does_not_count(tmp_path, monkeypatch):
    (tmp_path / "results.jsonl").write_text(json.dumps({"part": "failed", "what": "earlier"}) + "\n")
    monkeypatch.setattr(check, "parts", lambda sizes: [[python("pass")]])
    monkeypatch.setattr("sys.argv", ["check", str(tmp_path), "--dry"])
    assert check.main() == 0


def test_no_time_left_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "parts", lambda sizes: [[python("pass")]])
    monkeypatch.setattr("sys.argv", ["check", str(tmp_path), "--dry", "--seconds", "1"])
    assert check.main() == 1


def test_every_log_can_come_back_from_the_machine():
    """What has other characters in its name is left there."""
    titles = [part.title for group in check.parts(["1.7B", "8B"]) for part in group]
    assert len(titles) == len(set(titles)) > 10
    assert all(re.fullmatch(r"[A-Za-z0-9._-]{1,100}", title) for title in titles), titles
