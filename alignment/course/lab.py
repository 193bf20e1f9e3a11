"""Training for the notebooks: chooses the model, runs the command, and makes a table of its runs.

With ALIGNMENT_FAST=1 in the environment, every run takes seconds: a tiny random model, a few rows, no SFT stage. The
numbers then show that the notebook works, and say nothing about the losses.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignment.config.compose import load
from alignment.config.members import sweep_members
from alignment.errors import UserError
from alignment.evaluation.intervals import wilson_interval
from alignment.policy.tiny_model import write_tiny_model
from alignment.runs.folder import RunFiles, dig, eval_pairs, first_and_last, read_run, submapping

OUTPUTS = Path("outputs") / "lab"
"""Folder of the notebooks' runs, below the folder that the notebook runs in."""

RECIPES = {"cpu": "quickstart", "gpu": "lab_qwen3"}
"""The recipe of the notebooks' runs by where they are: SmolLM2-135M on a processor, Qwen3-1.7B with QLoRA on a GPU."""

_FAST = (
    "sft=none",
    "device=auto",
    "data.limit=64",
    "data.eval_limit=32",
    "optim.lr=1e-2",
    "evaluation.prompts=4",
    "evaluation.max_new_tokens=8",
)


def is_fast() -> bool:
    """Whether ALIGNMENT_FAST asks for runs that take seconds."""
    return os.environ.get("ALIGNMENT_FAST", "0") not in ("", "0")


def choose(hardware: str) -> str:
    """The recipe for "cpu", "gpu" or "auto", which is the GPU if torch sees one; prints what it trains.

    Raises:
        UserError: another word.
    """
    import torch

    if hardware not in ("auto", *RECIPES):
        raise UserError(f"choose({hardware!r}): accepted are 'auto', 'cpu' and 'gpu'.")
    if hardware == "auto":
        hardware = "gpu" if torch.cuda.is_available() else "cpu"
    recipe = RECIPES[hardware]
    model = "a tiny random model, because of ALIGNMENT_FAST" if is_fast() else load(f"recipe={recipe}").model.name
    sys.stdout.write(f"recipe={recipe} trains {model}\n")
    return recipe


def train(recipe: str, *overrides: str) -> dict[str, RunFiles]:
    """Train a recipe with these settings by `python -m alignment.run -m`. Finished runs are not repeated.

    Args:
        recipe: from `choose`.
        overrides: settings as on the command line; values separated by commas give a run each.

    Returns:
        The runs in their order, by the settings that differ between them.

    Raises:
        UserError: the command failed; the message has its last line.
    """
    settings = [f"recipe={recipe}", "tracking=none", *(_tiny() if is_fast() else ()), *overrides]
    members = list(sweep_members(settings))
    names = [
        ", ".join(choice for choice in member if choice not in settings and not choice.startswith("hydra.")) or "run"
        for member in members
    ]
    folder = OUTPUTS / hashlib.sha256("\n".join(settings).encode()).hexdigest()[:12]
    folders = [folder / f"{number}-{recipe}" for number in range(len(members))]
    if not all((path / "summary.json").is_file() for path in folders):
        _command("alignment.run", "-m", *settings, f"hydra.sweep.dir={folder}")
    return dict(zip(names, map(read_run, folders), strict=True))


def _tiny() -> tuple[str, ...]:
    folder = OUTPUTS / "tiny_model"
    if not folder.is_dir():
        write_tiny_model(folder)
    return f"model.name={folder.resolve()}", *_FAST


def _command(module: str, *arguments: str) -> None:
    """Run a command of this package and print its output as it comes, without progress bars."""
    sys.stdout.write(f"python -m {module} {' '.join(arguments)}\n")
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        assert process.stdout is not None
        for line in process.stdout:
            sys.stdout.write(line)
        if process.wait():
            errors.seek(0)
            last = errors.read().strip().splitlines()[-1:] or ["it said nothing."]
            raise UserError(f"The command ended with status {process.returncode}: {last[0]}")


def table(runs: Mapping[str, RunFiles]) -> list[dict[str, Any]]:
    """A row per run: results on held-out pairs and answers. `from` and `to` are the 95% interval of reward accuracy."""
    return [{"run": name, **_measures(run)} for name, run in runs.items()]


def _measures(run: RunFiles) -> dict[str, Any]:
    metrics: dict[str, Any] = submapping(run.summary, "stages", "preference", "metrics")
    accuracy, pairs = metrics.get("eval/nats/accuracies"), eval_pairs(run.summary)
    low, high = wilson_interval(accuracy, pairs) if accuracy is not None and pairs else (None, None)
    drift = first_and_last(run, "logps/chosen")
    return {
        "pairs": pairs,
        "reward accuracy": accuracy,
        "from": low,
        "to": high,
        "ranking accuracy": metrics.get("eval/ranking/accuracies"),
        "margin (nats)": metrics.get("eval/nats/margins"),
        "margin (own units)": metrics.get("eval/rewards/margins"),
        "change of chosen (nats)": drift[1] - drift[0] if drift else None,
        "words per answer": dig(run.summary, "evaluation", "answers", "final", "words"),
        "judge score": dig(run.summary, "evaluation", "answers", "final", "judge_score"),
    }
