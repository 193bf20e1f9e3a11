"""The command in a process of its own, forked from one that has imported the libraries already."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.composition import compose_options_once
from tests.helpers.patience import patience

# A run that starts from scratch imports torch, transformers, trl and peft for many seconds; one forked from a server
# that has them takes one. To the code under test both are a process whose main() gets the arguments.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.helpers.preload"])

RECIPE = """\
    # @package _global_
    defaults:
      - override /sft: quickstart
      - override /loss: dpo
      - override /tracking: none
    model: {{name: '{model}'}}
    adapter: {{r: 4, alpha: 8, dropout: 0.2}}
    sft:
      data: {{source: '{data}/sft.jsonl', eval_size: 2, system: null, limit: null}}
      optim: {{lr: 2.0e-2}}
      trainer: {{epochs: 2, groups_per_step: 2, tokens_per_batch: 100, log_every: 2, save_every: 3}}
    data:
      source: '{data}/pairs.jsonl'
      eval_source: '{data}/held_out.jsonl'
      system: null
      limit: null
      eval_limit: null
    optim: {{lr: 1.0e-2}}
    trainer: {{epochs: 3, max_steps: 8, groups_per_step: 4, log_every: 3, eval_every: 4, save_every: 2}}
    evaluation: {{prompts: 2, max_new_tokens: 4, judge: none}}
"""


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def pair(number: int) -> dict:
    """A small pair; no two are alike or of the same length."""
    return {
        "prompt": [{"role": "user", "content": f"Add {number} and {number * 7}{'!' * (number % 5)}"}],
        "chosen": [{"role": "assistant", "content": f"{number * 8}."}],
        "rejected": [{"role": "assistant", "content": f"Perhaps {number}{', or not' * (number % 3)}."}],
        "answer": str(number * 8),
    }


def write_project(folder: Path, model: Path) -> Path:
    """Data files and a configuration folder with the recipe `tiny`; returns the configuration folder."""
    data, config = folder / "data", folder / "conf"
    data.mkdir(parents=True)
    (config / "recipe").mkdir(parents=True)
    pairs = [pair(number) for number in range(1, 15)]
    write_lines(data / "pairs.jsonl", pairs[:10])
    write_lines(data / "held_out.jsonl", pairs[10:])
    conversations = [{"messages": [*p["prompt"], *p["chosen"]]} for p in (pair(n) for n in range(20, 30))]
    write_lines(data / "sft.jsonl", conversations)
    (config / "recipe" / "tiny.yaml").write_text(textwrap.dedent(RECIPE).format(model=model, data=data))
    return config


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended: its exit code (negative: the signal that killed it) and what it printed."""

    code: int
    out: str
    err: str


def _leave_out_pictures() -> None:
    """Plots are made, but a picture is one pixel, for speed; tests/runs/test_plots.py looks at real ones.

    Nor is the card that peft writes beside each adapter, for each of which it compiles a template.
    """
    from matplotlib.figure import Figure
    from peft import PeftModel
    from PIL import Image

    Figure.savefig = lambda self, file, **settings: Image.new("1", (1, 1)).save(file, "png")
    PeftModel.create_or_update_model_card = lambda self, folder: None


def child(
    arguments: list[str], cwd: Path, cache: Path, patch: Callable[[], None] | None, output: Path | None = None
) -> None:
    """What a process of the command does; its output goes to files in the folder `output`, or in the cache."""
    import torch

    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open((output or cache) / f"std{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1) for stream in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(cwd)
    os.environ["ALIGNMENT_CACHE"] = str(cache)
    torch.set_num_threads(1)
    _leave_out_pictures()
    if "RANK" not in os.environ:  # ranks compose as they do for you, and end as this does
        compose_options_once()
    if patch is not None:
        patch()
    from alignment.run import main

    main(arguments)


def command(
    *arguments: str, cwd: Path, cache: Path, patch: Callable[[], None] | None = None, timeout: float = 120
) -> Ended:
    """Run `python -m alignment.run` with the arguments in `cwd`; `patch` runs in the new process before it.

    `timeout` is the seconds that it may take on a quiet machine.
    """
    cache.mkdir(parents=True, exist_ok=True)
    process = FORKS.Process(target=child, args=(list(arguments), cwd, cache, patch))
    process.start()
    process.join(patience(timeout))
    if process.exitcode is None:
        process.kill()
        process.join()
        raise TimeoutError(f"{arguments} took longer than {patience(timeout)} s")
    return Ended(process.exitcode, (cache / "stdout").read_text(), (cache / "stderr").read_text())
