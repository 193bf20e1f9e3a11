"""Runs commands with the package of one checkout; started by path, so that only `PYTHONPATH` says which one.

Everything heavy is imported once, and every command runs in a fork: a kind takes seconds, not the half minute of
imports.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path


def _preload() -> None:
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers
    import transformers.trainer  # noqa: F401
    import trl  # noqa: F401

    torch.set_num_threads(1)


def _kill_after_checkpoint(step: int) -> None:
    """End this process as a power cut would, once the checkpoint of a step of a stage of eight is whole."""
    from transformers import trainer_callback

    saved = trainer_callback.CallbackHandler.on_save

    def on_save(self, args, state, control):
        control = saved(self, args, state, control)
        if "preference" in str(args.output_dir) and state.global_step >= step:
            os.kill(os.getpid(), signal.SIGKILL)
        return control

    trainer_callback.CallbackHandler.on_save = on_save


def _run(arguments: list[str], folder: Path, killed_at: int | None) -> int:
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    code = 1
    try:
        os.chdir(folder)
        os.environ["ALIGNMENT_CACHE"] = str(folder / "cache")
        with (folder / "output.txt").open("a") as output:
            for stream in (1, 2):
                os.dup2(output.fileno(), stream)
            if killed_at is not None:
                _kill_after_checkpoint(killed_at)
            from alignment.run import main

            main(arguments)
        code = 0
    except SystemExit as end:
        code = 0 if end.code in (None, 0) else 1
        if code:
            print(end.code, file=sys.stderr, flush=True)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """Read jobs from standard input, one JSON object a line, and answer each with the exit codes of its commands."""
    _preload()
    import alignment

    print(json.dumps({"package": str(Path(alignment.__file__).parent)}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        folder = Path(job["folder"])
        folder.mkdir(parents=True, exist_ok=True)
        codes = [
            _run(arguments, folder, job["killed_at"] if number == 0 else None)
            for number, arguments in enumerate(job["commands"])
        ]
        print(json.dumps(codes), flush=True)


if __name__ == "__main__":
    main()
