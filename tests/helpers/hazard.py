"""A loss whose run meets with what happens on clusters, and a project with it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.helpers.commands import write_project

LOSS = '''\
"""A loss whose run is killed, as by a system without memory, told to stop, or preempted."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from alignment.losses.dpo import DPO


@dataclass(kw_only=True)
class Hazard(DPO):
    name: ClassVar[str] = "hazard"
    passes: ClassVar[int] = 0

    fault: str = "none"

    def __call__(self, *arguments):
        if self.fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "stopped":
            os.kill(os.getpid(), signal.SIGTERM)
        if self.fault == "preempted" and torch.is_grad_enabled():
            Hazard.passes += 1
            mark = Path(f"preempted{os.environ['SUBMITIT_LOCAL_GLOBALID']}")
            if Hazard.passes == 3 and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGUSR2)
        return DPO.__call__(self, *arguments)
'''


def finding_modules_in(folder: Path) -> None:
    """As `python -m` does for the folder that it is started in, here also for the jobs."""
    sys.path.insert(0, str(folder))
    os.environ.update({"PYTHONPATH": f"{folder}:{Path(__file__).parents[2]}", "OMP_NUM_THREADS": "1"})


def hazardous_project(folder: Path, model: Path) -> Path:
    """The tiny project with the loss `hazard`, whose module is in the folder itself."""
    project = write_project(folder / "project", model)
    (project / "loss").mkdir()
    (project / "loss" / "hazard.yaml").write_text("_target_: hazard.Hazard\nbeta: 0.1\nlabel_smoothing: 0\n")
    (folder / "hazard.py").write_text(LOSS)
    return project
