"""One task of the benchmark, alone in its process: `python -m tests.bench.one_run TASK.json RESULT.json DONE GO`.

Alone, because the peak of a process's memory is its own, and nothing that ran before has warmed anything. DONE and GO
are the pipe ends by which it takes turns with others (turns.py).
"""

from __future__ import annotations

import functools
import json
import logging
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from alignment.config.schema import (
    Calibration,
    Device,
    Dtype,
    OptimConfig,
    Planning,
    QuantizationConfig,
    Shard,
    TrainerConfig,
)
from alignment.kernels.allocator import keep_freed_memory
from alignment.kernels.matmul import matmul
from alignment.losses import DPO
from alignment.policy.adapter import load_adapter
from alignment.policy.layers import checkpoint_layers, disable_dropout
from alignment.policy.load import load_base, resolve_device, resolve_dtype
from alignment.reference.base import Reference
from alignment.reference.cached import CachedReference
from alignment.reference.live import LiveReference
from alignment.reference.store import ReferenceStore
from alignment.scoring.prompt_sharing import choose_layout
from alignment.training.callbacks import training_arguments
from alignment.training.sampler import StepSampler
from alignment.training.start_check import check_start
from alignment.training.trainer import PreferenceTrainer
from alignment.types import Group
from tests.bench.job import (
    SEED,
    Case,
    Job,
    PeakRate,
    Preparation,
    Task,
)
from tests.bench.parts import switch_off
from tests.bench.preparation import before_shuffle, model_config, prepare
from tests.bench.profiling import profile_step
from tests.bench.turns import pass_on

TOKENS_PER_BATCH = {"cpu": 1024, "cuda": 16384}
"""Positions of one of our forward passes, as the recipes for these devices have it."""


def peak_rates(task: PeakRate, give_up: Callable[[], None]) -> dict[str, Any]:
    """Operations a second of large square products, by torch.mm and by ours: float32 on a CPU, bfloat16 on a GPU."""
    device = resolve_device(Device.auto)
    size, products = (8192, 200) if device.type == "cuda" else (4096, 1)
    left, right = torch.randn(2, size, size, device=device, dtype=resolve_dtype(Dtype.auto, device))
    routines = {"torch_rates": torch.mm, "our_rates": matmul}
    clocks = {name: Clock() for name in routines}
    for _ in range(task.turns):
        give_up()
        for name, product in routines.items():
            clocks[name].start()
            for _ in range(products):
                product(left, right)
            clocks[name].stop()
    return {
        name: [products * 2 * size**3 / seconds for seconds in clock.seconds()["wall"][1:]]
        for name, clock in clocks.items()
    }


# Measuring


class Clock:
    """Wall and CPU time of stretches of work."""

    KINDS = ("wall", "user", "system")

    def __init__(self) -> None:
        self._since: tuple[float, ...] | None = None
        self._stretches: list[list[float]] = []

    @staticmethod
    def _now() -> tuple[float, ...]:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return time.perf_counter(), usage.ru_utime, usage.ru_stime

    def start(self) -> None:
        """Begin a stretch."""
        self._since = self._now()

    def stop(self) -> None:
        """End the stretch, if one has begun."""
        if self._since is not None:
            self._stretches.append([b - a for a, b in zip(self._since, self._now(), strict=True)])
            self._since = None

    def seconds(self) -> dict[str, list[float]]:
        """Seconds of every stretch by kind."""
        return {kind: [stretch[i] for stretch in self._stretches] for i, kind in enumerate(self.KINDS)}


class StepTurns(TrainerCallback):
    """Gives up the turn before every step, and times what lies between two such moments, the wait left out.

    That is the whole cost of a step: the step itself, its log, and the loading of the next one's data.
    """

    def __init__(self, give_up: Callable[[], None]) -> None:
        self._give_up = give_up
        self.clock = Clock()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.stop()
        self._give_up()
        self.clock.start()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.stop()


def memory_peak() -> int:
    """The most bytes that were in use at once."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measured(trainer: Any, turns: StepTurns, reference: Clock, started: float) -> dict[str, Any]:
    """Train, and report: `reference` holds the time of the reference pass, if there was one."""
    reference_seconds = {kind: sum(values) for kind, values in reference.seconds().items()}
    setup_seconds = time.perf_counter() - started - reference_seconds["wall"]
    trainer.train()
    return {
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "seconds": turns.clock.seconds(),
        "reference_seconds": reference_seconds,
        "setup_seconds": setup_seconds,
        "peak_bytes": memory_peak(),
    }


# The runs


def load(job: Job, device: torch.device) -> nn.Module:
    """The base model, the same for both sides."""
    quantization = (
        QuantizationConfig(double=True, compute_dtype=Dtype.auto, calibration=Calibration.none) if job.nf4 else None
    )
    return load_base(model_config(job.model), quantization, job.model, device)


def run_ours(job: Job, give_up: Callable[[], None]) -> dict[str, Any]:
    """The preference stage as `alignment/preference_stage.py` drives it."""
    device = resolve_device(Device.auto)
    if device.type == "cpu":
        keep_freed_memory()
    tokens_per_batch = job.tokens_per_batch or TOKENS_PER_BATCH[device.type]
    base = load(job, device)
    started = time.perf_counter()
    model = load_adapter(base, Path(job.adapter))
    disable_dropout(model)
    pairs = [Group(p, (c, r)) for p, c, r in job.read_pairs(np.int32)]
    groups = before_shuffle(pairs, job.pairs_per_step)
    sampler = StepSampler(len(groups), job.pairs_per_step, SEED)
    layout, tokens_per_batch = switch_off(job.without, model, choose_layout(model, device), tokens_per_batch)
    if job.checkpointed:
        checkpoint_layers(model, 1)
    reference: Reference
    if job.without == "cache":
        reference = LiveReference(model, layout, tokens_per_batch, device)
    else:
        store = ReferenceStore(Path(job.cache) / "reference.sqlite")
        reference = CachedReference(store, model, layout, tokens_per_batch, device, spot_checks=4)
    watch = Clock()
    if job.run == "ours_cold":  # looking up and spot-checking belong to the setup: their cost is that of no pass
        watch.start()
    reference.prepare(groups)
    watch.stop()
    num_steps = len(sampler)
    turns = StepTurns(give_up)
    trainer = PreferenceTrainer(
        model=model,
        args=training_arguments(
            TrainingArguments,
            folder=Path(job.cache) / job.run,
            optim=OptimConfig(
                name="adamw_torch_fused", lr=job.lr, weight_decay=0.0, beta1=0.9, beta2=0.999, schedule="constant",
                warmup_ratio=0.0, max_grad_norm=1.0, target_modules=None, master_weights=True,
            ),
            trainer=TrainerConfig(
                epochs=1, max_steps=num_steps, groups_per_step=job.pairs_per_step, plan=Planning.off,
                tokens_per_batch=tokens_per_batch, checkpoint_every=0, log_every=1, eval_every=0, save_every=0,
                keep_checkpoints=1,
                cohort=1,
                router_aux_loss_coef=0.0,
                devices=1,
                shard=Shard.off,
            ),
            num_steps=num_steps,
            seed=SEED,
            device=device,
            per_device_train_batch_size=job.pairs_per_step,
        ),
        groups=groups,
        eval_groups=(),
        loss=DPO(beta=job.beta, label_smoothing=0.0),
        reference=reference,
        layout=layout,
        tokens_per_batch=tokens_per_batch,
        sampler=sampler,
        callbacks=[turns],
    )  # fmt: skip
    check_start(trainer, pairs[: job.pairs_per_step])
    result = measured(trainer, turns, watch, started) | {"stored": reference.summary().get("hits")}
    if job.profile:
        result["profile"] = profile_step(
            model, lambda: trainer.training_step(model, {"groups": pairs[-job.pairs_per_step :]})
        )
    reference.close()
    return result


def run_trl(job: Job, give_up: Callable[[], None]) -> dict[str, Any]:
    """TRL's DPOTrainer on the same tokens, with its reference of the adapter switched off, live or precomputed."""
    from tests.bench.trl_side import TokenisedDPOTrainer, dpo_trainer

    watch, turns = Clock(), StepTurns(give_up)

    class TimedDPOTrainer(TokenisedDPOTrainer):
        """Also times the precomputation."""

        def _precompute_ref_logps(self, *args: Any) -> Any:
            watch.start()
            dataset = super()._precompute_ref_logps(*args)
            watch.stop()
            return dataset

    base = load(job, resolve_device(Device.auto))
    del base.forward  # ours, which scores: TRL wraps the model's own
    started = time.perf_counter()
    trainer: Any = dpo_trainer(job, base, TimedDPOTrainer, [turns])
    check_tokens(next(iter(trainer.get_train_dataloader())), job.read_pairs(np.int64)[: job.pairs_per_step])
    return measured(trainer, turns, watch, started)


def check_tokens(batch: dict[str, torch.Tensor], pairs: list[list[np.ndarray]]) -> None:
    """TRL's first batch must hold exactly our tokens, the chosen rows above the rejected ones."""
    expected = [(p, completions[k]) for k in range(2) for p, *completions in pairs]
    for row, (prompt, completion) in enumerate(expected):
        real = batch["attention_mask"][row].bool()
        ids, scored = batch["input_ids"][row][real].cpu().numpy(), batch["completion_mask"][row][real].cpu().numpy()
        if not np.array_equal(ids, np.concatenate([prompt, completion])) or scored.sum() != len(completion):
            raise AssertionError(f"row {row} of TRL's first batch holds other tokens than ours")


def run(task: Task, give_up: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Carry out the task; `give_up` gives up the turn and waits for the next."""
    match task:
        case Preparation():
            return prepare(task)
        case PeakRate():
            return peak_rates(task, give_up)
        case Job():
            return (run_ours if task.run.startswith("ours") else run_trl)(task, give_up)


def read_task(text: str) -> Task:
    """The task that `asdict` wrote, of the kind whose fields it has."""
    fields = json.loads(text)
    if "cases" in fields:
        return Preparation(**fields | {"cases": tuple(Case(**case) for case in fields["cases"])})
    return Job(**fields) if "run" in fields else PeakRate(**fields)


def main() -> None:
    """Read the task, do it, write its result."""
    logging.basicConfig(level=logging.INFO)
    transformers.logging.set_verbosity_error()
    task, result, done, go = sys.argv[1:]
    found = run(read_task(Path(task).read_text()), functools.partial(pass_on, int(done), int(go)))
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
