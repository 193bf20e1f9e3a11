"""Runs in two ranks that are disturbed at random moments: equal to an undisturbed one in two ranks, or one sentence."""

from __future__ import annotations

import random
import signal
from pathlib import Path

from tests.faults.campaign import RUN, Campaign, Verdict, require, words
from tests.faults.moments import Disturbed, KilledOther, Noted
from tests.helpers.commands import Ended
from tests.helpers.ranks import command_in_ranks

RANKED = ("kill the first rank", "kill the other rank", "terminate ranks", "full disk of ranks")
"""The kinds of faults."""


class RankedCampaign(Campaign):
    """What `Campaign` does in one process, in two ranks: the fault comes at a use of a file on rank 0."""

    def __init__(self, work: Path, can_mount: bool) -> None:
        super().__init__(work, can_mount)
        self.kinds = dict(zip(RANKED, (self.killed, self.other_killed, self.terminated), strict=False))
        if can_mount:
            self.kinds[RANKED[-1]] = self.full_disk

    def begin(self) -> None:
        """A sweep in one process takes no ranks."""
        self.whole(RUN)

    def _command(self, place: Path, *arguments: str, patch: Disturbed | None = None, run: str = "run") -> Ended:
        """How rank 0 ended, whom the other follows without a word."""
        (place / run).mkdir(exist_ok=True)
        first, other = command_in_ranks(
            2,
            *("--config-dir", str(self._project), *arguments),
            cwd=place / run,
            patches={0: patch or Disturbed(place), 1: Noted(place / "rank1")},
            said=self.work / "said" / place.name / run,
        )
        require(other.code in (0, 1, -signal.SIGKILL), words(other))
        require("Traceback" not in other.out + other.err, words(other))
        require(sum(line.startswith("Error: ") for line in first.err.splitlines()) <= 1, words(first))
        return first

    def other_killed(self, place: Path, rng: random.Random, moment: str) -> Verdict:
        """SIGKILL for the rank that follows: rank 0 says so, and that the run goes on works."""
        fault = KilledOther(place / "rank1", rng.choice([0, rng.uniform(0, 0.2)]))
        return self._judged(self._disturb(rng, moment, place, fault), place, moment)
