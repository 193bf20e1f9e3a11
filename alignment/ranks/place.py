"""Which of the run's ranks this process is, from the environment that a launcher has set."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from alignment.errors import UserError, require

LOGS = "ALIGNMENT_RANK_LOGS"
"""Set by our own launcher, which says how a rank has died: the folder with the output of all ranks but the first."""
LOCK = "launcher"
"""The file in that folder whose lock the launcher holds for as long as it lives."""
LOST = 75
"""The exit code by which rank 0 tells our launcher that another rank has ended, of which the launcher knows more."""

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_SRUN = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
_SUBMITIT = ("SUBMITIT_LOCAL_GLOBALID", "SUBMITIT_LOCAL_NTASKS", "SUBMITIT_LOCAL_LOCALID", "SUBMITIT_LOCAL_NTASKS")
_OTHERS = ("GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE", "CROSS_RANK", "CROSS_SIZE")
_GPUS = "CUDA_VISIBLE_DEVICES"
_PORTS = range(15000, 30000)
"""Below those that systems give to whoever asks for any."""


@dataclass(frozen=True, slots=True)
class Place:
    """A rank among all of the run, and among those on its machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int


def take_place(environment: MutableMapping[str, str] | None = None) -> Place | None:
    """This process's place, which only this package may know: its variables are taken out of the environment.

    Libraries that find them begin a process group of their own and split what they are given. Each rank sees one GPU,
    that of its local rank, under the number 0. Call it before torch looks for GPUs.

    Returns:
        None for a process alone.

    Raises:
        UserError: a launcher has set only a part of what is needed.
    """
    known = os.environ if environment is None else environment
    names = next((names for names in (_TORCHRUN, _SRUN, _SUBMITIT) if _whole(known, names[1]) > 1), None)
    if names is None:
        for name in (*_TORCHRUN, *_OTHERS):  # one process under torchrun
            known.pop(name, None)
        return None
    if names is _SRUN:
        _meet_at(known, _first_host(known.get("SLURM_STEP_NODELIST", "")), "SLURM_JOB_ID", "SLURM_STEP_ID")
    elif names is _SUBMITIT:
        _meet_at(known, "127.0.0.1", "SUBMITIT_LOCAL_JOB_ID")
    missing = [name for name in (names[0], names[2], "MASTER_ADDR", "MASTER_PORT") if name not in known]
    if missing:
        raise UserError(
            f"{names[1]}={known[names[1]]} says that this run has several ranks, and {' and '.join(missing)} is not "
            f"set: start it with torchrun, or with srun and both MASTER_ADDR and MASTER_PORT in the environment."
        )
    rank, size, local_rank = (_whole(known, name) for name in names[:3])
    local_size = int(known.get(names[3], str(size)).partition("(")[0].partition(",")[0])  # Slurm writes 4(x2)
    require(0 <= rank < size, f"{names[0]}={rank} must be below {names[1]}={size}.")
    for name in (*_TORCHRUN, *_OTHERS):
        known.pop(name, None)
    visible = [gpu for gpu in known.get(_GPUS, "").split(",") if gpu]
    if _GPUS not in known:
        known[_GPUS] = str(local_rank)
    elif len(visible) > 1:
        require(
            local_rank < len(visible),
            f"{_GPUS} shows {len(visible)} GPUs, and this machine has {local_size} ranks: start at most one for each.",
        )
        known[_GPUS] = visible[local_rank]
    return Place(rank, size, local_rank, local_size)


def _whole(known: Mapping[str, str], name: str) -> int:
    """The number that a launcher has set, 1 where it has set none."""
    value = known.get(name, "1")
    require(
        value.isdecimal(),
        f"{name} in the environment must be a whole number, not '{value}': set it right, or unset it.",
    )
    return int(value)


def _meet_at(known: MutableMapping[str, str], host: str, *numbers: str) -> None:
    """Say where ranks meet, unless you have: at a port that other jobs on the machine hardly choose."""
    if host and all(known.get(name, "").isdigit() for name in numbers):
        known.setdefault("MASTER_ADDR", host)
        job, *step = (int(known[name]) for name in numbers)
        known.setdefault("MASTER_PORT", str(_PORTS[(job + 101 * sum(step)) % len(_PORTS)]))


def _first_host(hosts: str) -> str:
    """The first machine of Slurm's list, as in `gpu[03-05,9],cpu1`."""
    return re.sub(r"\[(\w+)[^]]*]", r"\1", hosts).partition(",")[0]
