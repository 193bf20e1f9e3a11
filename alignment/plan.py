"""The command: `python -m alignment.plan recipe=<name> [key=value ...] [--gpu-memory 24GiB] [--length N] [--json]`.

It says what the steps of a recipe will need of memory and how they would be run, without loading any weights.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from alignment.config.compose import load
from alignment.config.preflight import model_problem
from alignment.config.schema import Device, ReferenceMode, RunConfig, SFTConfig
from alignment.errors import UserError
from alignment.files import asset_dir, atomic_write_text, cache_dir
from alignment.policy.load import model_source, resolve_dtype
from alignment.training.budget import Plan, Room, describe_checkpointing, make_plan, relative_time
from alignment.training.memory import CONTEXT, GIB, USABLE_SHARE, plan_weights, sizes_of
from alignment.training.planning import available_memory

QWEN3: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "Qwen3-1.7B": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
    "Qwen3-4B": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
    "Qwen3-8B": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
}
"""What the published configurations of the table's models differ in."""
_QWEN3_ALIKE = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}
_UNTIED = "Qwen3-8B"
TABLE_LENGTHS = (512, 1024, 2048, 4096)
TABLE_MEMORY = (24, 80)
"""GiB of the GPUs in the table."""
_BEGIN, _END = "<!-- made by: python -m alignment.plan --table -->", "<!-- end of the table -->"
_UNITS = {"": GIB, "g": GIB, "gib": GIB, "gb": 10**9, "m": 2**20, "mib": 2**20, "mb": 10**6}
_SHOWN_EVERY = (0, 8, 4, 3, 2, 1)


@dataclass(frozen=True, slots=True)
class Machine:
    """What is planned for.

    Attributes:
        name: for people.
        device: "cpu" or "cuda".
        memory: bytes; of a CPU, those that are free.
    """

    name: str
    device: str
    memory: int


@dataclass(frozen=True, slots=True)
class StagePlan:
    """A stage's plan beside what else it could be.

    Attributes:
        longest: positions of the largest group that the data may hold.
        chosen: the plan.
        options: by `checkpoint_every`, the plan with that, and its time per position (1: an endless pass without
            checkpointing).
    """

    longest: int
    chosen: Plan
    options: dict[int, tuple[Plan, float]]


def parse_memory(text: str) -> int:
    """Bytes of a size such as 24GiB, 80GB, 24576MiB or 24 (GiB).

    Raises:
        UserError: anything else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if found is None or found[2] not in _UNITS or float(found[1]) == 0:
        raise UserError(f"--gpu-memory must be a size such as 24GiB, 80GB or 24576MiB, not '{text}'.")
    return round(float(found[1]) * _UNITS[found[2]])


def this_machine() -> Machine:
    """This machine's GPU, or else its CPU."""
    if torch.cuda.is_available():
        index = torch.cuda.current_device()
        return Machine(torch.cuda.get_device_name(index), "cuda", torch.cuda.get_device_properties(index).total_memory)
    return Machine("this machine's CPU", "cpu", available_memory())


def read_config(config: RunConfig, file: Path | None) -> Any:
    """The configuration of the recipe's model, from the file or from where the model is.

    Raises:
        UserError: it cannot be read.
    """
    try:
        if file is not None:
            if not file.exists():
                raise UserError(f"--config: {file} does not exist.")
            return AutoConfig.from_pretrained(str(file), trust_remote_code=config.model.trust_remote_code)
        if problem := model_problem(config.model.name):
            raise UserError(f"model.name={config.model.name}: {problem}; give its config.json with --config FILE.")
        source = model_source(config.model, cache_dir(config.reference.path))
        return AutoConfig.from_pretrained(
            source, revision=config.model.revision, trust_remote_code=config.model.trust_remote_code
        )
    except UserError:
        raise
    except (OSError, ValueError, ImportError) as error:
        what = f"--config: {file}" if file is not None else f"model.name={config.model.name}"
        advice = "" if file is not None else " (or it is not in the local cache and the hub cannot be reached)"
        raise UserError(
            f"{what} holds no configuration that transformers can read{advice}: give the model's config.json with "
            f"--config FILE."
        ) from error


def build_model(config: Any) -> nn.Module:
    """The model without its weights, on torch's meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def plan_stages(config: RunConfig, model: nn.Module, machine: Machine, length: int | None) -> dict[str, StagePlan]:
    """The plan of every stage of a run.

    Args:
        config: of the run.
        model: on the meta device, as `build_model` gives it.
        machine: that it is planned for.
        length: tokens of the longest prompt with its answer; None: as `data.max_length` has it.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it would report what it lacks on a CPU
    from alignment.training.callbacks import check_names

    stages: dict[str, StagePlan] = {}
    if config.sft is not None:
        check_names("sft.optim", config.sft.optim)
        stages["sft"] = _plan_stage(config, config.sft, model, machine, length or config.sft.data.max_length, True)
    if config.loss is not None:
        assert config.data is not None
        check_names("optim", config.optim)
        # All answers may be as long as a row may be, beside a short prompt; lists are mostly of four.
        answers = {"row": 1, "pair": 2, "list": 4}[config.loss.requirements().unit]
        longest = (length or config.data.max_length) * answers
        stages["preference"] = _plan_stage(config, config, model, machine, longest, False)
    return stages


def _plan_stage(
    config: RunConfig, part: RunConfig | SFTConfig, model: nn.Module, machine: Machine, longest: int, supervised: bool
) -> StagePlan:
    value = resolve_dtype(config.model.dtype, torch.device(machine.device)).itemsize
    weights = plan_weights(model, value, config.adapter, config.quantization)
    sizes = sizes_of(
        model,
        weights,
        value=value,
        optimizer=part.optim.name,
        device=machine.device,
        dropout=supervised and config.adapter is not None and config.adapter.dropout > 0,
        supervised=supervised,
    )
    copies = not supervised and config.reference.mode is ReferenceMode.live and config.adapter is None
    context = CONTEXT[machine.device] + (weights.base if copies else 0)
    room = Room(machine.device, round(USABLE_SHARE[machine.device] * machine.memory), context)
    trainer = part.trainer

    def plan(every: int | None) -> Plan:
        return make_plan(
            sizes,
            room,
            longest=longest,
            step_tokens=trainer.groups_per_step * longest,
            tokens_per_batch=trainer.tokens_per_batch,
            checkpoint_every=every,
        )

    chosen = plan(trainer.checkpoint_every)
    shown = {chosen.checkpoint_every, *(_SHOWN_EVERY if trainer.checkpoint_every is None else ())}
    count = len(sizes.layers)
    options = {}
    for every in sorted((k for k in shown if k <= count), key=lambda k: (k > 0, -k)):
        option = plan(every)
        tokens = max(longest, min(option.tokens_per_batch, trainer.groups_per_step * longest))
        options[every] = (option, relative_time(max(1, count), every, tokens, machine.device))
    return StagePlan(longest, chosen, options)


# Output

_PARTS = {
    "weights": "weights of the base model",
    "adapter": "adapter",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "activations": "activations",
    "head": "logits of a chunk",
    "buffers": "de-quantised weights",
    "context": "libraries and driver",
}


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"


def _needs_table(stages: dict[str, StagePlan]) -> Table:
    table = Table(title="What a step needs, GiB", title_justify="left")
    table.add_column("part")
    for name in stages:
        table.add_column(name, justify="right")
    for key, title in _PARTS.items():
        table.add_row(title, *(_gib(getattr(stage.chosen.needs, key)) for stage in stages.values()))
    table.add_section()
    table.add_row("together", *(_gib(stage.chosen.needs.total) for stage in stages.values()))
    return table


def _options_table(name: str, stage: StagePlan) -> Table:
    table = Table(title=f"Options of the {name} stage", title_justify="left")
    for title in ("checkpointing", "positions a pass", "activations, GiB", "together, GiB", "time"):
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


def _print(config: RunConfig, machine: Machine, stages: dict[str, StagePlan]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(
        f"{config.model.name} on {machine.name}: {machine.memory / GIB:.1f} GiB, of which "
        f"{USABLE_SHARE[machine.device]:.0%} are planned with.",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    if config.device is Device.cuda and machine.device == "cpu":
        console.print("The recipe asks for a GPU, and none is here: --gpu-memory 24GiB plans for one of that size.")
    console.print(_needs_table(stages))
    for name, stage in stages.items():
        console.print(_options_table(name, stage))
    for name, stage in stages.items():
        plan = stage.chosen
        lines = [
            f"{name}: trainer.checkpoint_every={plan.checkpoint_every} "
            f"trainer.tokens_per_batch={plan.tokens_per_batch}; the largest group has {stage.longest} positions."
        ]
        if plan.reference_tokens > plan.tokens_per_batch and name == "preference":
            lines.append(f"  The reference pass takes up to {plan.reference_tokens} positions at once.")
        if plan.estimate:
            lines.append(f"  Its activations are a rough estimate: {plan.estimate}.")
        if not plan.fits:
            lines.append(
                f"  It may run out of memory: a pass of that group needs {_gib(plan.needs.total)} GiB, and "
                f"{_gib(plan.limit)} GiB are usable."
            )
        for line in lines:
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def as_json(config: RunConfig, machine: Machine, stages: dict[str, StagePlan]) -> str:
    """All of it for programs; sizes in bytes."""

    def plain(plan: Plan) -> dict[str, Any]:
        return {**plan.to_dict(), "total": plan.needs.total}

    return json.dumps(
        {
            "model": config.model.name,
            "machine": asdict(machine),
            "stages": {
                name: {
                    "longest": stage.longest,
                    **plain(stage.chosen),
                    "options": [{**plain(plan), "time": time} for plan, time in stage.options.values()],
                }
                for name, stage in stages.items()
            },
        },
        indent=2,
    )


def qwen3_table() -> str:
    """Plans of QLoRA DPO for the published Qwen3 sizes, as the recipe `dpo_qwen3` has it, in Markdown."""
    recipe = load("recipe=dpo_qwen3", "sft=none")
    lines = [
        "| model | prompt and answer up to | " + " | ".join(f"{size} GiB" for size in TABLE_MEMORY) + " |",
        "|---|---|" + "---|" * len(TABLE_MEMORY),
    ]
    for name, sizes in QWEN3.items():
        config = AutoConfig.for_model("qwen3", **sizes, **_QWEN3_ALIKE, tie_word_embeddings=name != _UNTIED)
        model = build_model(config)
        for length in TABLE_LENGTHS:
            cells = []
            for memory in TABLE_MEMORY:
                machine = Machine(f"a GPU of {memory} GiB", "cuda", memory * GIB)
                cells.append(_cell(plan_stages(recipe, model, machine, length)["preference"].chosen))
            lines.append(f"| {name} | {length} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(plan: Plan) -> str:
    if not plan.fits:
        return "does not fit"
    return f"{describe_checkpointing(plan.checkpoint_every)}, {plan.tokens_per_batch}, {plan.needs.total / GIB:.1f}"


def with_table(text: str, table: str) -> str:
    """The text with the table between its markers."""
    before, _, rest = text.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    return f"{before}{_BEGIN}\n\n{table}\n\n{_END}{after}"


def write_table() -> Path:
    """Make the table in the recipes' README anew."""
    path = asset_dir("recipes") / "README.md"
    atomic_write_text(path, with_table(path.read_text(encoding="utf-8"), qwen3_table()))
    return path


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see python -m alignment.plan --help.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m alignment.plan", description=(__doc__ or "").split("\n\n")[1], allow_abbrev=False)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="a recipe and its settings, as for a run")
    parser.add_argument("--gpu-memory", metavar="SIZE", help="plan for a GPU of this size, e.g. 24GiB")
    parser.add_argument("--length", type=int, metavar="N", help="tokens of the longest prompt with its answer")
    parser.add_argument("--config", type=Path, metavar="FILE", help="the model's config.json, where the hub is not")
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help="your own recipes, as for a run")
    parser.add_argument("--json", action="store_true", help="print JSON, sizes in bytes")
    parser.add_argument("--table", action="store_true", help="write the table of Qwen3 models in recipes/README.md")
    return parser


def run(arguments: Sequence[str] | None) -> None:
    """What the command does.

    Raises:
        UserError: arguments that cannot be followed.
    """
    options = _parser().parse_intermixed_args(arguments)
    if options.table:
        Console().print(f"Written into {write_table()}.", markup=False, highlight=False, soft_wrap=True)
        return
    if options.length is not None and options.length < 2:
        raise UserError(f"--length must be at least 2, not {options.length}.")
    machine = this_machine()
    if options.gpu_memory is not None:
        memory = parse_memory(options.gpu_memory)
        machine = Machine(f"a GPU of {options.gpu_memory}", "cuda", memory)
    config = load(*options.overrides, config_dir=options.config_dir)
    if options.config is not None:
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
