"""System metrics of every rank in the one W&B run (`tracking.system=each`), by W&B's mode for several writers.

Rank 0 alone sends metrics, settings and the end of the run. Each other rank has a writer that sends nothing but what
W&B measures of the machine and of the process, under the label of the rank.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignment.ranks.team import Post

IDENTITY = ("WANDB_RUN_ID", "WANDB_RESUME", "WANDB_RESUME_FROM", "WANDB_FORK_FROM")
"""Variables of the environment with which W&B would make one run of two."""


@dataclass(frozen=True, slots=True)
class SharedRun:
    """The W&B run that the other ranks join, and how long they wait for W&B, in seconds."""

    id: str
    project: str
    entity: str | None
    init_seconds: float
    finish_seconds: float


def label(rank: int) -> str:
    """What W&B calls a rank's system metrics."""
    return f"rank-{rank}"


def settings_of(rank: int) -> dict[str, Any]:
    """W&B's settings of a rank that shares a run: its label, its GPU, and what rank 0 alone sends."""
    found: dict[str, Any] = {"x_label": label(rank), "x_primary": rank == 0, "x_update_finish_state": rank == 0}
    if rank:
        found |= {"disable_git": True, "save_code": False, "x_disable_meta": True, "x_save_requirements": False}
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return found | ({"x_stats_gpu_device_ids": [int(gpu)]} if gpu.isdecimal() else {})


def join_run(post: Post, shared: SharedRun) -> str:
    """On a rank that follows: begin to send its system metrics; returns why it cannot, or nothing."""
    from alignment.runs.trackers.wandb import login_problem

    for name in IDENTITY:
        os.environ.pop(name, None)
    try:
        import wandb

        if why := login_problem():
            return why
        folder = tempfile.TemporaryDirectory(prefix="alignment-wandb-", ignore_cleanup_errors=True)
        run = wandb.init(
            project=shared.project,
            entity=shared.entity,
            id=shared.id,
            dir=folder.name,
            reinit="create_new",
            mode="shared",
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=shared.init_seconds,
                finish_timeout=shared.finish_seconds,
                **settings_of(post.team.place.rank),
            ),
        )
    except Exception as error:
        return " ".join(str(error).split())
    post.tracked = run, folder
    return ""


def leave_run(post: Post, _: None) -> None:
    """On a rank that follows: send what is left."""
    if post.tracked is not None:
        run, folder = post.tracked
        post.tracked = None
        with suppress(Exception):
            run.finish()
        folder.cleanup()


def first_problem(answers: Mapping[int, str]) -> str:
    """Which ranks could not join, and why the first of them could not."""
    rank, why = next((rank, why) for rank, why in answers.items() if why)
    count = sum(map(bool, answers.values()))
    return f"{count} of {len(answers)} ranks send no system metrics to W&B (rank {rank}: {why})"
