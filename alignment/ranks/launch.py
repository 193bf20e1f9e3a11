"""One command that starts its own ranks on this machine, by torch's elastic launcher."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from filelock import FileLock

from alignment.errors import UserError
from alignment.ranks.place import LOCK, LOGS, LOST

_SHUTDOWN_SECONDS = 10
_FOLDERS = "alignment-ranks-"
_KEPT_SECONDS = 7 * 24 * 3600
"""How long the output of a rank that has died is kept at least."""


def rank_count(devices: int | str, gpus: int, wants_gpu: bool) -> int:
    """How many ranks `trainer.devices` asks for on this machine.

    Args:
        devices: the setting: a number, or "auto" for one on each GPU, and one on a machine without.
        gpus: that this machine shows.
        wants_gpu: whether the run uses them.

    Raises:
        UserError: more ranks than GPUs.
    """
    if devices == "auto":
        return max(1, gpus) if wants_gpu else 1
    count = int(devices)
    if wants_gpu and count > gpus:
        raise UserError(
            f"trainer.devices={count}, and this machine shows {gpus} GPU{'s' * (gpus != 1)}: set it to auto, or to at "
            f"most {gpus}."
        )
    return count


def idle_gpus(gpus: int) -> str | None:
    """What to say to a run that has one rank on a machine with so many GPUs."""
    return f"This run uses one of {gpus} GPUs: trainer.devices=auto uses all of them." if gpus > 1 else None


def launch(count: int, module: str, arguments: Sequence[str]) -> NoReturn:
    """Run `python -m <module> <arguments>` in so many ranks, and leave this process as they end.

    Rank 0 speaks, and says why it fails; the output of the others goes to files. Raises SystemExit.
    """
    import torch
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.CRITICAL)  # what the launcher says of each process
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // count)))
    with _output_folder() as folder:
        os.environ[LOGS] = str(folder)
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id=str(os.getpid()),
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            **_known(LaunchConfig, shutdown_timeout=_SHUTDOWN_SECONDS),
            logs_specs=DefaultLogsSpecs(
                log_dir=str(folder), redirects={rank: Std.NONE if rank == 0 else Std.ALL for rank in range(count)}
            ),
        )
        try:
            elastic_launch(config, sys.executable)("-m", module, *arguments)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if rank == 0 and failure.exitcode == LOST:  # it noticed another's end within the same tenth of a second
                rank, failure = max(error.failures.items())
            if rank == 0 and failure.exitcode > 0:
                sys.exit(1)  # it has said why
            (folder / LOCK).unlink()
            how = f"was killed by {failure.signal_name()}" if failure.exitcode < 0 else f"ended with {failure.exitcode}"
            sys.exit(
                f"Error: Rank {rank} {how}; what it said is in {folder}: mend that (SIGKILL is mostly a lack of main "
                f"memory), and continue with resume=true."
            )
        except SignalException:
            sys.exit(1)  # rank 0 has said how to continue
        sys.exit(0)


@contextmanager
def _output_folder() -> Iterator[Path]:
    """A folder for what ranks say, which goes at the end unless its file `LOCK` has gone before.

    The lock says that the launcher lives: folders of those that were killed are removed here, and those that a sentence
    has named after some days.
    """
    for path in Path(tempfile.gettempdir()).glob(f"{_FOLDERS}*"):
        with suppress(OSError):  # another user's, or of a launcher that lives
            if not (path / LOCK).exists():
                is_old = path.stat().st_mtime < time.time() - _KEPT_SECONDS
            else:
                with FileLock(path / LOCK, timeout=0):
                    is_old = True
            if is_old:
                shutil.rmtree(path)
    folder = Path(tempfile.mkdtemp(prefix=_FOLDERS))
    try:
        with FileLock(folder / LOCK):
            yield folder
    finally:
        if (folder / LOCK).exists():
            shutil.rmtree(folder, ignore_errors=True)


def _known(kind: Any, **settings: Any) -> dict[str, Any]:
    """Those of the settings that this version of torch has."""
    return {name: value for name, value in settings.items() if name in kind.__dataclass_fields__}
