"""`python -m alignment.plan [-m] recipe=<name> [key=value ...]`: says how much memory a run needs, before it starts."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from alignment.config.compose import load
from alignment.config.members import is_sweep, single_values, sweep_members
from alignment.config.registry import register
from alignment.config.schema import Device, Judge, RunConfig
from alignment.config.typed_text import as_text
from alignment.errors import CommandParser, UserError, ending_plainly
from alignment.evaluation.statistics.power import (
    LEVEL,
    POWER,
    items_for_sign_test,
    least_difference,
    least_mean,
    seeds_needed,
)
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

_DIFFER = (0.1, 0.2, 0.4)
"""Shares of the held-out items on which two variants are assumed to differ."""

_SIZES = (0.05, 0.02)
"""Differences that a plan says the items and seeds of."""

_TOO_LARGE = 0.5
"""No two variants worth a comparison differ by more."""

_SPREAD = 0.02
"""Standard deviation over seeds that is assumed of the difference of two variants."""


def parse_memory(text: str) -> int:
    """Bytes of a size such as 24GiB, 80GB, 24576MiB or 24 (GiB).

    Raises:
        UserError: anything else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if found is None or found[2] not in _UNITS or float(found[1]) == 0:
        raise UserError(f"--gpu-memory must be a size such as 24GiB, 80GB or 24576MiB, not '{text}'.")
    return round(float(found[1]) * _UNITS[found[2]])


# A sweep


@dataclass(frozen=True, slots=True)
class SweepPlan:
    """What a sweep can tell.

    Attributes:
        members: the settings in which they differ, for each.
        variants: members that differ in more than the seed.
        seeds: of each variant; the fewest, where they differ.
        comparisons: that share the level: the best variant of each loss, on-policy and offline apart, with the first,
            or all of a single loss.
        unit: what is held out.
        items: how many at most; None where the data decide it.
    """

    members: list[list[str]]
    variants: int
    seeds: int
    comparisons: int
    unit: str
    items: int | None

    @property
    def level(self) -> float:
        """Of each comparison."""
        return LEVEL / self.comparisons

    def items_for(self, size: float, differ: float) -> int:
        """Items that tell a difference of this size if two variants differ on that share of them."""
        return ceil(items_for_sign_test((differ + size) / 2, (differ - size) / 2, self.level))

    def to_dict(self) -> dict[str, Any]:
        """For programs: differences and shares from 0 to 1."""
        return {
            **{name: getattr(self, name) for name in ("variants", "seeds", "comparisons", "unit", "items")},
            "members": len(self.members),
            "level": self.level,
            "power": POWER,
            "told": [
                {
                    "differ": differ,
                    "least": None if self.items is None else least_difference(self.items, differ, self.level),
                    "items_for": {str(size): self.items_for(size, differ) for size in _SIZES},
                }
                for differ in _DIFFER
            ],
            "spread_over_seeds": _SPREAD,
            "least_by_seeds": least_mean(self.seeds, _SPREAD, self.level),
            "seeds_for": {str(size): int(seeds_needed(size, _SPREAD, self.level)) for size in _SIZES},
        }


def plan_sweep(members: Sequence[Sequence[str]], config: RunConfig) -> SweepPlan | None:
    """What the members of a sweep can tell; None if they have no two variants of a preference stage.

    Args:
        members: the overrides of each, from `sweep_members`.
        config: of the first.
    """
    told = [[setting for setting in member if not setting.startswith("hydra.")] for member in members]
    shared = set.intersection(*map(set, told)) if told else set()
    seeds: dict[tuple[str, ...], set[str]] = {}
    for member in told:
        others = tuple(setting for setting in member if not setting.startswith("seed="))
        seeds.setdefault(others, set()).update(set(member) - set(others) or {""})
    ways = {
        tuple(
            next((s for s in reversed(key) if s.startswith(names)), "") for names in (("loss=", "recipe="), "onpolicy=")
        )
        for key in seeds
    }
    comparisons = (len(ways) if len(ways) > 1 else len(seeds)) - 1
    if config.loss is None or comparisons < 1:
        return None
    evaluation, data = config.evaluation, config.data
    is_judged = evaluation.judge is not Judge.none and evaluation.prompts > 0
    known = None if data is None or data.sources else data.eval_limit or data.eval_size or None
    return SweepPlan(
        members=[[setting for setting in member if setting not in shared] for member in told],
        variants=len(seeds),
        seeds=min(map(len, seeds.values())),
        comparisons=comparisons,
        unit="prompts" if is_judged else "pairs",
        items=evaluation.prompts if is_judged else known,
    )


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
        others = [stage.teacher + stage.judging if key == "context" else 0 for stage in stages.values()]
        needs = zip(stages.values(), others, strict=True)
        table.add_row(title, *(_gib(getattr(stage.chosen.needs, key) - other) for stage, other in needs))
    if any(stage.teacher for stage in stages.values()):
        table.add_row("teacher", *(_gib(stage.teacher) for stage in stages.values()))
    if any(stage.judging for stage in stages.values()):
        table.add_row("reward models that judge", *(_gib(stage.judging) for stage in stages.values()))
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
    for key in (key for key, size in stage.judges.items() if size is None):
        lines.append(f"  The model of {key} is not on this machine, so its size is not known and not counted.")
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


def _sweep_lines(sweep: SweepPlan) -> list[str]:
    many = "" if sweep.items is None else f"{sweep.items:,} "
    shared = f" over {sweep.comparisons} comparisons" if sweep.comparisons > 1 else ""
    return [
        "",
        f"A sweep of {len(sweep.members)} members, {sweep.variants} variants; the memory is that of the first: "
        f"{' '.join(sweep.members[0])}.",
        f"What {many}held-out {sweep.unit} tell (power {POWER:.0%}, two-sided {LEVEL:.0%}{shared}), if two variants "
        f"differ on 10, 20 or 40% of them (assumed):",
    ]


def _sweep_table(sweep: SweepPlan) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    sizes = [f"{sweep.unit} for {100 * size:.0f} points" for size in _SIZES]
    for title in ("differ on", *(["points told"] if sweep.items is not None else []), *sizes):
        table.add_column(title, justify="right")
    for differ in _DIFFER:
        told = None if sweep.items is None else least_difference(sweep.items, differ, sweep.level)
        least = [] if sweep.items is None else ["none" if told is None else f"{100 * told:.1f}"]
        table.add_row(f"{differ:.0%}", *least, *(f"{sweep.items_for(size, differ):,}" for size in _SIZES))
    return table


def _seed_line(sweep: SweepPlan) -> str:
    by_size = " and ".join(
        f"{seeds_needed(size, _SPREAD, sweep.level):.0f} for {100 * size:.0f} points" for size in _SIZES
    )
    least = least_mean(sweep.seeds, _SPREAD, sweep.level)
    if least is None:
        here = "With one seed, what other seeds would change stays unknown"
    elif least > _TOO_LARGE:
        here = f"By themselves {sweep.seeds} are too few to tell anything"
    else:
        here = f"By themselves {sweep.seeds} tell {100 * least:.1f} points"
    return (
        f"All seeds see the same {sweep.unit}. {here}; it takes {by_size}, if a difference varies by "
        f"{100 * _SPREAD:.0f} points between seeds (assumed)."
    )


def _print(config: RunConfig, machine: Machine, stages: dict[str, StagePlan], sweep: SweepPlan | None) -> None:
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
    if sweep is not None:
        for line in _sweep_lines(sweep):
            say(line)
        console.print(_sweep_table(sweep))
        say(_seed_line(sweep))


def as_json(config: RunConfig, machine: Machine, stages: dict[str, StagePlan], sweep: SweepPlan | None = None) -> str:
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
                    "teacher": stage.teacher,
                    "judges": stage.judges,
                    **plain(stage.chosen),
                    "options": [{**plain(plan), "time": time} for plan, time in stage.options.values()],
                }
                for name, stage in stages.items()
            },
            **({} if sweep is None else {"sweep": sweep.to_dict()}),
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
    parser.add_argument("-m", "--multirun", action="store_true", help="a sweep: what its held-out set can tell, too")
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
    members = _members(options.overrides, options.multirun, options.config_dir)
    config = load(*(members[0] if members else options.overrides), config_dir=options.config_dir)
    if options.config is not None:
        options.config = options.config.expanduser()
        config = replace(config, model=replace(config.model, name=str(options.config)))
    stages = plan_stages(config, build_model(read_config(config, options.config)), machine, options.length)
    sweep = plan_sweep(members, config)
    if options.json:
        sys.stdout.write(as_json(config, machine, stages, sweep) + "\n")
    else:
        _print(config, machine, stages, sweep)


def _members(settings: Sequence[str], multirun: bool, config_dir: Path | None) -> list[list[str]]:
    """The overrides of each member of a sweep: one that -m asks for, or one of a recipe; empty for a single run.

    A search has one, without the settings that its sweeper chooses.
    """
    register(config_dir)
    if not multirun and not any(is_sweep(setting.removeprefix("recipe=")) for setting in settings):
        return []
    overrides = as_text(settings, sweeps=multirun)
    return sweep_members(overrides) or [single_values(overrides)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; `ending_plainly` says how it ends."""
    with ending_plainly():
        run(arguments)


if __name__ == "__main__":
    main()
