"""Plan the memory of a run without running it: from its configuration and the sizes of its model alone."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import AutoConfig

from alignment.config.preflight import model_problem
from alignment.config.schema import RunConfig, SFTConfig, Shard
from alignment.errors import UserError, require
from alignment.evaluation.judges.making import beside_training
from alignment.files import cache_dir
from alignment.policy.architecture import build_model, unknown_architecture
from alignment.policy.load import resolve_dtype
from alignment.policy.source import model_source
from alignment.policy.stored import Checkpoint
from alignment.policy.teacher import packing, teacher_shape
from alignment.ranks.memory import available_memory
from alignment.ranks.shares import largest_share
from alignment.training.budget import Plan, Room, make_plan, relative_time
from alignment.training.memory import (
    CONTEXT,
    USABLE_SHARE,
    Weights,
    attention_estimate,
    base_bytes,
    plan_policy,
    reference_bytes,
    sizes_of,
)
from alignment.training.shared_memory import shared_weights, why_whole

_SPECTRUM = "spectrum chooses among the layers of a loaded model, and here the backward pass goes down to the first"
_SHOWN_EVERY = (0, 8, 4, 3, 2, 1)
"""The values of `checkpoint_every` that a plan is compared with."""


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine that a plan is for.

    Attributes:
        name: for people.
        device: "cpu" or "cuda".
        memory: bytes; on a CPU, the free ones.
    """

    name: str
    device: str
    memory: int


@dataclass(frozen=True, slots=True)
class StagePlan:
    """The plan of a stage beside its alternatives.

    Attributes:
        longest: positions of the largest group that the data may hold.
        chosen: the plan.
        options: by `checkpoint_every`, the plan with this value, and its time per position (1: an endless pass without
            checkpointing).
        ranks: that share the base; 1 where each has its own.
        teacher: bytes of the teacher, which `chosen` counts among what is there beside the policy.
        judges: the same of each reward model that judges while the stage trains, by its key; None: not known.
    """

    longest: int
    chosen: Plan
    options: dict[int, tuple[Plan, float]]
    ranks: int
    teacher: int = 0
    judges: dict[str, int | None] = field(default_factory=dict)

    @property
    def judging(self) -> int:
        """Bytes of the reward models whose size is known."""
        return sum(size or 0 for size in self.judges.values())


def this_machine() -> Machine:
    """This machine's GPU, or else its CPU."""
    if torch.cuda.is_available():
        index = torch.cuda.current_device()
        return Machine(torch.cuda.get_device_name(index), "cuda", torch.cuda.get_device_properties(index).total_memory)
    return Machine("this machine's CPU", "cpu", available_memory())


def read_config(config: RunConfig, file: Path | None) -> Any:
    """The configuration of the recipe's model, from a file or from where the model is.

    Raises:
        UserError: it cannot be read.
    """
    what, source, revision = f"--config: {file}", str(file), None
    if file is None:
        what, revision = f"model.name={config.model.name}", config.model.revision
        if problem := model_problem(config.model.name):
            raise UserError(f"{what}: {problem}; give its config.json with --config FILE.")
        source = model_source(config.model, cache_dir(config.reference.path)).base
    elif not file.exists():
        raise UserError(f"--config: {file} does not exist.")
    try:
        return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=config.model.trust_remote_code)
    except Exception as error:
        if unknown := unknown_architecture(source, revision):
            raise UserError(f"{what}: {unknown}") from error
        advice = "" if file is not None else " (or it is not in the local cache and the hub cannot be reached)"
        raise UserError(
            f"{what} holds no configuration that transformers can read{advice}: give the model's config.json with "
            f"--config FILE."
        ) from error


def teacher_bytes(config: RunConfig, device: str) -> int:
    """Bytes of the teacher that a run keeps beside its policy, with its adapter; 0 for a loss that has none.

    Args:
        device: "cpu" or "cuda".

    Raises:
        UserError: the teacher's configuration cannot be read.
    """
    if config.loss is None or not config.loss.requirements().draws:
        return 0
    model, source, shape = teacher_shape(config)
    value = resolve_dtype(model.dtype, torch.device(device)).itemsize
    base, _ = base_bytes(build_model(shape, model.trust_remote_code), value, packing(config))
    adapter = () if source.adapter is None else source.adapter.glob("adapter_*.safetensors")
    return base + sum(path.stat().st_size for path in adapter)


def plan_stages(
    config: RunConfig,
    model: nn.Module,
    machine: Machine,
    length: int | None,
    longest: Mapping[str, int] = MappingProxyType({}),
) -> dict[str, StagePlan]:
    """The plan of every stage of a run; where `trainer.shard` says so, or leaves it to the plan, for a shared base.

    Args:
        config: of the run.
        model: on the meta device, from `build_model`.
        machine: the plan is for this one.
        length: tokens of the longest prompt with its answer; None takes `data.max_length`.
        longest: positions of the largest group of each stage, where the data are known.

    Raises:
        UserError: `trainer.shard=node` with one rank, or with what whole models in parts cannot do.
    """
    ranks = config.trainer.devices
    if ranks == "auto":
        ranks = max(1, torch.cuda.device_count())
    if config.trainer.shard is Shard.node:
        require_ranks(config, ranks)
        return _stages(config, model, machine, length, longest, ranks, ranks)
    plans = _stages(config, model, machine, length, longest, ranks, 1)
    can = config.trainer.shard is Shard.auto and machine.device == "cuda" and ranks > 1 and why_whole(config) is None
    if can and not all(plan.chosen.fits for plan in plans.values()):
        return _stages(config, model, machine, length, longest, ranks, ranks)
    return plans


def require_ranks(config: RunConfig, ranks: int) -> None:
    """Refuse a shared base where there is nobody to share it with, or where it cannot train in parts.

    Args:
        ranks: of a machine.

    Raises:
        UserError: what to set.
    """
    require(
        ranks > 1,
        "trainer.shard=node shares the base among the ranks of a machine, and there is one: set trainer.devices to "
        "the number of its GPUs, or trainer.shard=auto.",
    )
    if (problem := why_whole(config)) is not None:
        raise UserError(f"trainer.shard=node with adapter=none trains parts of a model, and {problem}.")


def _stages(
    config: RunConfig,
    model: nn.Module,
    machine: Machine,
    length: int | None,
    known: Mapping[str, int],
    ranks: int,
    sharing: int,
) -> dict[str, StagePlan]:
    """The plans for so many ranks of which `sharing` share a base."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it would report what it lacks on a CPU
    from alignment.training.optimizers import check_optimizer

    stages: dict[str, StagePlan] = {}
    if config.sft is not None:
        check_optimizer("sft.optim", config.sft.optim, config.adapter, machine.device)
        longest = known.get("sft", length or config.sft.data.max_length)
        stages["sft"] = _plan_stage(config, config.sft, model, machine, longest, True, ranks, sharing)
    if config.loss is not None:
        assert config.data is not None
        check_optimizer("optim", config.optim, config.adapter, machine.device)
        # All answers may be as long as a row may be, beside a short prompt; lists are mostly of four.
        answers = {"row": 1, "pair": 2, "list": 4}[config.loss.requirements().unit]
        whole = length or config.data.max_length
        if config.loss.requirements().draws and config.onpolicy is not None:
            whole = length or config.data.max_prompt_length + config.onpolicy.max_new_tokens
        longest = known.get("preference", whole * answers)
        stages["preference"] = _plan_stage(config, config, model, machine, longest, False, ranks, sharing)
    return stages


_planned: WeakKeyDictionary[nn.Module, dict[str, tuple[nn.Module, Weights]]] = WeakKeyDictionary()


def _policy(model: nn.Module, value: int, config: RunConfig) -> tuple[nn.Module, Weights]:
    """What `plan_policy` gives, once for each model: peft takes a second to lay out an adapter on a large one."""
    planned = _planned.setdefault(model, {})
    key = repr((value, config.adapter, config.quantization, config.spectrum))
    if key not in planned:
        planned[key] = plan_policy(model, value, config.adapter, config.quantization, config.spectrum)
    return planned[key]


def _plan_stage(
    config: RunConfig,
    part: RunConfig | SFTConfig,
    model: nn.Module,
    machine: Machine,
    longest: int,
    supervised: bool,
    ranks: int,
    sharing: int,
) -> StagePlan:
    value = resolve_dtype(config.model.dtype, torch.device(machine.device), config.adapter is None).itemsize
    policy, weights = _policy(model, value, config)
    if sharing > 1:
        weights = shared_weights(weights, model, value, sharing)
    sizes = sizes_of(
        policy,
        weights,
        value=value,
        optimizer=part.optim.name,
        projected=part.optim.target_modules,
        master_weights=part.optim.master_weights,
        device=machine.device,
        dropout=supervised and config.adapter is not None and config.adapter.dropout > 0,
        supervised=supervised,
    )
    stored = Checkpoint.of(model.config)
    reason = attention_estimate(config.model.attention) or (_SPECTRUM if config.spectrum is not None else "")
    if stored.is_packed and not stored.settings.get("load_in_4bit"):
        reason = f"LoRA layers on {stored.title} run peft's own forward, which keeps more than is counted"
    sizes = replace(sizes, estimate=sizes.estimate or reason)
    context = CONTEXT[machine.device]
    teacher = 0 if supervised else teacher_bytes(config, machine.device)
    judges = {} if supervised else beside_training(config)
    if not supervised:
        reference, steps = config.reference, config.trainer.max_steps
        refreshes: int | None = reference.parts - 1
        if reference.sync_every is not None:
            refreshes = None if steps is None else (steps - 1) // reference.sync_every
        whole = config.adapter is None
        at_base = config.adapter is not None and not config.adapter.moves_the_start and config.sft is None
        context += teacher + sum(size or 0 for size in judges.values())
        context += reference_bytes(reference, weights, whole=whole, at_base=at_base, refreshes=refreshes)
    room = Room(machine.device, round(USABLE_SHARE[machine.device] * machine.memory), context)
    trainer = part.trainer
    step_tokens = largest_share(trainer.groups_per_step, ranks) * longest

    def plan(every: int | None) -> Plan:
        return make_plan(
            sizes,
            room,
            longest=longest,
            step_tokens=step_tokens,
            tokens_per_batch=trainer.tokens_per_batch,
            checkpoint_every=every,
        )

    chosen = plan(trainer.checkpoint_every)
    shown = {chosen.checkpoint_every, *(_SHOWN_EVERY if trainer.checkpoint_every is None else ())}
    count = len(sizes.layers)
    options = {}
    for every in sorted((k for k in shown if k <= count), key=lambda k: (k > 0, -k)):
        option = plan(every)
        tokens = max(longest, min(option.tokens_per_batch, step_tokens))
        options[every] = (option, relative_time(sizes, every, tokens, machine.device))
    return StagePlan(longest, chosen, options, sharing, teacher, judges)
