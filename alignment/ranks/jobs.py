"""The tasks of a job that submitit has started: they are the ranks of the run that the job does."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from alignment.ranks.place import take_place
from alignment.ranks.team import join

_LAUNCHERS = "hydra_plugins.hydra_submitit_launcher.submitit_launcher"


def share_job() -> None:
    """Let rank 0 alone run what submitit's launcher has sent to a process, while the others follow.

    Hydra would have every task write the run's folder. We change the launcher, since Hydra refuses one of our own
    outside of the namespace hydra_plugins.
    """
    launchers = sys.modules.get(_LAUNCHERS)
    if launchers is not None and not hasattr(launchers.BaseSubmititLauncher, "run_alone"):
        kind = launchers.BaseSubmititLauncher
        kind.run_alone, kind.__call__ = kind.__call__, _in_ranks


def _in_ranks(launcher: Any, *arguments: Any) -> Any:
    """What a task does; a job that is started again is sent it as it stands here, so it closes over nothing."""
    place = take_place()
    if place is None:
        return launcher.run_alone(*arguments)
    team = join(place)
    if place.rank:
        team.follow()
        return None
    launcher.task_function = replace(launcher.task_function, team=team)
    try:
        return launcher.run_alone(*arguments)
    finally:
        team.end()
