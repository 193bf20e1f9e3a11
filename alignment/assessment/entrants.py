"""Who takes part: the policies of runs, and those that they are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path

from alignment.comparison.members import is_run, run_folders, short_names
from alignment.data.rows.row import Row
from alignment.errors import UserError
from alignment.runs.folder import MODEL_TITLES, read_run, submapping
from alignment.stages.finished import OpenedPolicy, open_model, open_run, starting_moment

ALL = "all"
"""`against` of policies that meet each other."""
_HOW = ("prompts", "max_new_tokens", "temperature")


@dataclass(frozen=True)
class Entrants:
    """The policies with their answers.

    Attributes:
        policies: first those of the runs, in their order, then those that they are compared with, each once.
        matches: the numbers of two policies: those of a run, and what it is compared with.
        runs: how many policies are those of the runs.
        count: answers to each prompt.
    """

    policies: list[OpenedPolicy]
    matches: list[tuple[int, int]]
    runs: int
    count: int

    @cached_property
    def answers(self) -> list[list[list[str]]]:
        """Of each policy, `count` for each prompt."""
        return [policy.answers(self.count) for policy in self.policies]

    @property
    def names(self) -> list[str]:
        """Of the policies, for people."""
        return [policy.name for policy in self.policies]


def opened(folders: Sequence[Path], settings: Sequence[str], rows: Sequence[Row] | None) -> list[OpenedPolicy]:
    """The final policies of runs, checked to be asked the same.

    Args:
        folders: of runs, or of sweeps.
        settings: overrides of the settings that the runs had.
        rows: what is asked in place of the held-out rows.

    Raises:
        UserError: a folder of no run, a run that cannot be asked, or runs with other prompts.
    """
    runs = run_folders(folders)
    found = [open_run(run, name, settings, rows) for run, name in zip(runs, short_names(runs), strict=True)]
    for policy in found[1:]:
        _require_same(found[0], policy)
    return found


def entrants(policies: Sequence[OpenedPolicy], against: str | None, count: int, settings: Sequence[str]) -> Entrants:
    """The policies, and what they are compared with.

    Args:
        against: "start" or "sft", of each run; "all": each other; a run's folder, or a model; None: the policy that the
            run's preference stage has begun with.
        count: answers to each prompt.
        settings: overrides of the settings that a run had.

    Raises:
        UserError: `against` is none of these, or is asked other prompts.
    """
    temperature = policies[0].questions.config.evaluation.temperature
    if count > 1 and temperature == 0:
        raise UserError(
            f"answers={count} needs evaluation.temperature above 0: greedy answers to a prompt are all the same."
        )
    players = list(policies)
    if against == ALL:
        if len(policies) < 2:
            raise UserError("against=all compares runs with each other, and there is only one: give several.")
        return Entrants(players, list(combinations(range(len(players)), 2)), len(players), count)
    matches = []
    for number, opponent in enumerate(_opponents(policies, against, settings)):
        others = players[len(policies) :]
        place = next((place for place, other in enumerate(others) if opponent.is_same(other)), len(others))
        if place == len(others):
            players.append(opponent)
        matches.append((number, len(policies) + place))
    if len(players) == len(policies) + 1 and players[-1].run is not None and players[-1].moment != "final":
        players[-1] = replace(players[-1], name=MODEL_TITLES[players[-1].moment])  # of all runs
    return Entrants(players, matches, len(policies), count)


def _opponents(policies: Sequence[OpenedPolicy], against: str | None, settings: Sequence[str]) -> list[OpenedPolicy]:
    """What each policy is compared with."""
    if against in (None, "start", "sft"):
        return [policy.at(against or starting_moment(policy.run)) for policy in policies if policy.run is not None]
    assert against is not None
    folder = Path(against).expanduser()
    if folder.is_dir() and is_run(folder) and not submapping(read_run(folder).summary, "merge"):
        opponent = open_run(folder.resolve(), against, settings, policies[0].questions.given_rows)
    else:
        opponent = open_model(against, policies[0])
    _require_same(policies[0], opponent)
    return [opponent] * len(policies)


def _require_same(first: OpenedPolicy, other: OpenedPolicy) -> None:
    """Refuse policies that are asked other prompts, or in another way."""
    ours, theirs = first.questions, other.questions
    for key in _HOW:
        one, two = getattr(ours.config.evaluation, key), getattr(theirs.config.evaluation, key)
        if one != two:
            raise UserError(
                f"{first.name} answers with evaluation.{key}={one} and {other.name} with {two}: give evaluation.{key} "
                f"for both."
            )
    if ours.texts != theirs.texts:
        only = len(set(theirs.texts) - set(ours.texts))
        raise UserError(
            f"{other.name} has other held-out prompts than {first.name} ({only} of its {len(theirs.texts)} are none of "
            f"the {len(ours.texts)}): compare runs with the same held-out data."
        )
