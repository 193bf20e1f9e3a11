"""Several ranks of one run on this machine: forked processes with the environment that torchrun gives them."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from tests.helpers.commands import FORKS, Ended, child
from tests.helpers.patience import patience


def environment(rank: int, size: int, port: str, machines: int = 1) -> dict[str, str]:
    """What torchrun sets for a rank, as if it ran on so many machines."""
    local = size // machines
    place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank % local, "LOCAL_WORLD_SIZE": local}
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} | {name: str(value) for name, value in place.items()}


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def _rank(variables: dict[str, str], folder: Path, work: Callable, arguments: tuple) -> None:
    import torch

    from alignment.ranks.place import take_place
    from alignment.ranks.team import join

    os.environ.update(variables)
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"std{name}{variables['RANK']}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1) for stream in (1, 2))
    torch.set_num_threads(1)
    team = join(take_place())
    if team.place.rank:
        team.follow()
        return
    try:
        work(team, *arguments)
    finally:
        team.end()


def in_ranks(
    size: int, folder: Path, work: Callable, *arguments: object, timeout: float = 120, machines: int = 1
) -> list[int]:
    """Run `work(team, *arguments)` on rank 0 while the others follow; returns the exit codes of all."""
    port = free_port()
    folder.mkdir(exist_ok=True)
    return ended(
        [
            FORKS.Process(target=_rank, args=(environment(rank, size, port, machines), folder, work, arguments))
            for rank in range(size)
        ],
        timeout,
    )


def ended(processes: list, timeout: float) -> list[int]:
    """Start the processes and wait for them; returns their exit codes."""
    for process in processes:
        process.start()
    for process in processes:
        process.join(patience(timeout))
    for process in processes:
        if process.exitcode is None:
            process.kill()
    return [process.exitcode for process in processes]


def _command_rank(variables: dict[str, str], folder: Path, arguments: list[str], cwd: Path, patch: Callable) -> None:
    os.environ.update(variables)
    output = folder / variables["RANK"]
    output.mkdir(parents=True)
    child(arguments, cwd, cwd / "cache", patch, output)


def command_in_ranks(
    size: int,
    *arguments: str,
    cwd: Path,
    patches: dict[int, Callable] | None = None,
    timeout: float = 120,
    said: Path | None = None,
) -> list[Ended]:
    """Run the command in `cwd` as torchrun would, with a cache in there; `patches` run first on ranks.

    What it prints goes to the folder `said`, or to one in `cwd`.
    """
    folder, port = (said or cwd / "output") / free_port(), free_port()
    (cwd / "cache").mkdir(parents=True, exist_ok=True)
    codes = ended(
        [
            FORKS.Process(
                target=_command_rank,
                args=(environment(rank, size, port), folder, list(arguments), cwd, (patches or {}).get(rank)),
            )
            for rank in range(size)
        ],
        timeout,
    )
    return [
        Ended(code, (folder / str(rank) / "stdout").read_text(), (folder / str(rank) / "stderr").read_text())
        for rank, code in enumerate(codes)
    ]
