"""A short form of `make faults`: a few disturbed runs end equal to the undisturbed one, or say what is wrong."""

import subprocess

import pytest

from tests.faults.campaign import Campaign, mounted
from tests.faults.ranked import RankedCampaign

CASES = [
    ("full disk", "sft"),
    ("terminate", "preference"),
    ("checkpoint model", "flip"),
]


@pytest.mark.matrix
def test_disturbed_runs_end_right(tmp_path):
    """Each kind of fault once or so; `make faults` has all of them, at many moments."""
    (tmp_path / "disk").mkdir()
    try:
        with mounted("-t", "tmpfs", "tmpfs", tmp_path / "disk"):
            can_mount = True
    except (subprocess.CalledProcessError, FileNotFoundError):
        can_mount = False
    campaign = Campaign(tmp_path / "work", can_mount)
    for kind, moment in CASES[0 if can_mount else 1 :]:
        verdict = campaign.case(kind, moment, "0")
        assert verdict.outcome != "wrong", f"{kind}, {moment}: {verdict.said}"


@pytest.mark.matrix
def test_disturbed_ranks_end_right(tmp_path):
    """A rank that dies, and a stop after which the command that is printed works."""
    campaign = RankedCampaign(tmp_path / "work", can_mount=False)
    for kind, moment in (("kill the other rank", "reference"), ("terminate ranks", "preference")):
        verdict = campaign.case(kind, moment, "0")
        assert verdict.outcome != "wrong", f"{kind}, {moment}: {verdict.said}"
