"""What a judge has said of the answers of runs against each other: the pairs that `alignment.evaluate` has left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from alignment.comparison.members import ComparedRun
from alignment.runs.folder import RunFiles, dig, read_mapping, read_rows, submapping

PAIRS, FOUND = "evaluation_pairs.jsonl", "evaluation.json"
"""Files of an evaluation."""


@dataclass(slots=True)
class Between:
    """The verdicts of one judge on pairs of answers of two runs.

    Attributes:
        card: the judge's, over these pairs.
        shares: by the names of two runs, the first one's share of wins by prompt; the mean, where each has several.
        problems: what could not be read.
    """

    card: dict[str, Any] = field(default_factory=dict)
    shares: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def meet(self, first: ComparedRun, second: ComparedRun) -> Mapping[str, float]:
        """The first run's share of wins over the second by prompt; empty where they have not met."""
        if (won := self.shares.get((first.name, second.name))) is not None:
            return won
        lost = self.shares.get((second.name, first.name), {})
        return {prompt: 1 - share for prompt, share in lost.items()}


def read_between(folder: Path, members: Sequence[ComparedRun]) -> Between | None:
    """The pairs in a folder in which both answers are of these runs; None where no evaluation is.

    A run is known by its final policy, so that verdicts on a run that was trained anew count no more.
    """
    if not (folder / PAIRS).exists():
        return None
    files = RunFiles(folder)
    whole = read_mapping(files, FOUND)
    found, member_of = submapping(whole, "win_rate"), members_of(whole, members)
    shares: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in read_rows(files, PAIRS):
        first, second = (member_of.get(name) for name in row["policies"])
        if first is not None and second is not None:
            of_prompt = shares.setdefault((first, second), {}).setdefault(row["prompt"], [])
            of_prompt.append(0.5 + row["outcome"] / 2)
    means = {names: {prompt: fmean(several) for prompt, several in by.items()} for names, by in shares.items()}
    return Between(submapping(found, "judge"), means, files.problems)


def members_of(found: Mapping[str, Any], members: Sequence[ComparedRun]) -> dict[str, str]:
    """The name of the run that each policy of an evaluation is, by the policy's name; others are left out."""
    identities = submapping(found, "identities") or {
        policy.get("name"): policy.get("identity") for policy in submapping(found, "win_rate").get("policies", ())
    }
    known: dict[str, str] = {}
    for name, identity in identities.items():
        for member in members:
            own = dig(member.run.summary, "model", "final_identity")
            if identity == own if identity and own else name == member.name:
                known.setdefault(name, member.name)
    return known
