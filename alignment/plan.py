"""The command: `python -m alignment.plan recipe=<name> [key=value ...] [--gpu-memory 24GiB] [--length N] [--json]`."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from alignment.config.compose import load
from alignment.config.schema import Device, RunConfig
from alignment.errors import CommandParser, UserError
from alignment.policy.architecture import build_model
from alignment.training.budget import Plan, describe_checkpointing
from alignment.training.forecast import Machine, StagePlan, plan_stages, read_config, this_machine
from alignment.training.memory import GIB, USABLE_SHARE
from alignment.training.optimizers import optimizer_estimate
from alignment.training.published import write_tables

_UNITS = {"": GIB, "g": GIB, "gib": GIB, "gb": 10**9, "m": 2**20, "mib": 2**20, "mb": 10**6}
_PARTS = {
    "weights": "weights of the base model",
    "adapter": "adapter",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "activations": "activations",
    "head": "logits of a chunk",
    "buffers": "de-quantised and gathered weights",
    "context": "libraries and driver",
}


def parse_memory(text: str) -> int:
    """Bytes of a size such as 24GiB, 80GB, 24576MiB or 24 (GiB).

    Raises:
        UserError: anything else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if found is None or found[2] not in _UNITS or float(found[1]) == 0:
        raise UserError(f"--gpu-memory must be a size such as 24GiB, 80GB or 24576MiB, not '{text}'.")
    return round(float(found[1]) * _UNITS[found[2]])


# Output


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"


def _table(title: str) -> Table:
    """A table that reads well at 80 columns, in a pipe and in a file."""
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)


def _needs_table(stages: dict[str, StagePlan]) -> Table:
    table = _table("What a step needs, in GiB")
    table.add_column("part")
    for name in stages:
        table.add_column(name, justify="right")
    for key, title in _PARTS.items():
        table.add_row(title, *(_gib(getattr(stage.chosen.needs, key)) for stage in stages.values()))
    table.add_section()
    table.add_row("total", *(_gib(stage.chosen.needs.total) for stage in stages.values()))
    return table


def _options_table(name: str, stage: StagePlan) -> Table:
    table = _table(f"The {name} stage: positions a pass, memory in GiB, relative time")
    for title in ("checkpointing", "positions", "activations", "total", "time"):
        table.add_column(title, justify="left" if title == "checkpointing" else "right")
    best = stage.options[stage.chosen.checkpoint_every][1]
    for every, (plan, time) in stage.options.items():
        chosen = every == stage.chosen.checkpoint_every
        row = (
            describe_checkpointing(every) + (" (chosen)" if chosen else ""),
            f"{plan.tokens_per_batch}" if plan.fits else "does not fit",
            _gib(plan.needs.activations),
            _gib(plan.needs.total),
            f"{time / best:.2f}" if plan.fits else "",
        )
        table.add_row(*row, style="bold" if chosen else None)
    return table


def _stage_lines(name: str, stage: StagePlan, optimizer: str) -> list[str]:
    plan = stage.chosen
    lines = [
        f"{name}: trainer.checkpoint_every={plan.checkpoint_every} "
        f"trainer.tokens_per_batch={plan.tokens_per_batch}; the largest group has {stage.longest} positions."
    ]
    if plan.reference_tokens > plan.tokens_per_batch and name == "preference":
        lines.append(f"  The reference pass takes up to {plan.reference_tokens} positions at once.")
    if plan.estimate:
        lines.append(f"  The activations are a rough estimate: {plan.estimate}.")
    if states := optimizer_estimate(optimizer):
        lines.append(f"  The optimizer states are an estimate: {states}.")
    if not plan.fits:
        lines.append(
            f"  It may run out of memory: a pass of that group needs {_gib(plan.needs.total)} GiB, and "
            f"{_gib(plan.limit)} GiB are usable."
        )
    return lines


def _print(config: RunConfig, machine: Machine, stages: dict[str, StagePlan]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 80)

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    say(
        f"{config.model.name} on {machine.name}: {machine.memory / GIB:.1f} GiB, of which the plan uses up to "
        f"{USABLE_SHARE[machine.device]:.0%}."
    )
    if config.device is Device.cuda and machine.device == "cpu":
        say("The recipe asks for a GPU, and this machine has none: --gpu-memory 24GiB plans for a GPU of that size.")
    ranks = max(stage.ranks for stage in stages.values())
    if ranks > 1:
        what = "base: each holds a part of its layers"
        if config.adapter is None:
            what = "model: each trains a part of every weight"
        say(f"{ranks} of them share one {what} (trainer.shard=node).")
    say("")
    console.print(_needs_table(stages))
    for name, stage in stages.items():
        console.print(_options_table(name, stage))
    for name, stage in stages.items():
        part = config.sft if name == "sft" and config.sft is not None else config
        for line in _stage_lines(name, stage, part.optim.name):
            say(line)


def as_json(config: RunConfig, machine: Machine, stages: dict[str, StagePlan]) -> str:
    """The plans for programs; sizes in bytes."""

    def plain(plan: Plan) -> dict[str, Any]:
        return {**plan.to_dict(), "total": plan.needs.total}

    return json.dumps(
        {
            "model": config.model.name,
            "machine": asdict(machine),
            "stages": {
                name: {
                    "longest": stage.longest,
                    "ranks": stage.ranks,
                    **plain(stage.chosen),
                    "options": [{**plain(plan), "time": time} for plan, time in stage.options.values()],
                }
                for name, stage in stages.items()
            },
        },
        indent=2,
    )


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="python -m alignment.plan",
        description="Say how much memory a recipe needs and how its steps would run, without loading any weights.",
        epilog="Example: python -m alignment.plan recipe=dpo_qwen3 --gpu-memory 24GiB",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="a recipe and its settings, as for a run")
    parser.add_argument("--gpu-memory", metavar="SIZE", help="plan for a GPU of this size, e.g. 24GiB")
    parser.add_argument("--devices", type=int, metavar="N", help="that many of them on a machine: trainer.devices=N")
    parser.add_argument("--length", type=int, metavar="N", help="tokens of the longest prompt with its answer")
    parser.add_argument("--config", type=Path, metavar="FILE", help="the model's config.json, without the hub")
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help="your own recipes, as for a run")
    parser.add_argument("--json", action="store_true", help="print JSON, sizes in bytes")
    parser.add_argument("--table", action="store_true", help="write the tables of models in recipes/README.md")
    return parser


def run(arguments: Sequence[str] | None) -> None:
    """What the command does.

    Raises:
        UserError: arguments that cannot be followed.
    """
    options = _parser().parse_intermixed_args(arguments)
    if options.table:
        Console().print(f"Written into {write_tables()}.", markup=False, highlight=False, soft_wrap=True)
        return
    if options.length is not None and options.length < 2:
        raise UserError(f"--length must be at least 2, not {options.length}.")
    machine = this_machine()
    if options.gpu_memory is not None:
        memory = parse_memory(options.gpu_memory)
        machine = Machine(f"a GPU of {options.gpu_memory}", "cuda", memory)
    if options.devices is not None:
        options.overrides.append(f"trainer.devices={options.devices}")
    config = load(*options.overrides, config_dir=options.config_dir)
    if options.config is not None:
        options.config = options.config.expanduser()
        config = replace(config, model=replace(config.model, name=str(options.config)))
    stages = plan_stages(config, build_model(read_config(config, options.config)), machine, options.length)
    if options.json:
        sys.stdout.write(as_json(config, machine, stages) + "\n")
    else:
        _print(config, machine, stages)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; leaves the process with status 1 and one sentence where the user can mend something."""
    try:
        run(arguments)
    except UserError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
