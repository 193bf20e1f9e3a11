"""The supervised stage: TRL's SFTTrainer on token sequences that we made, with the loss on the answers only."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from alignment.config.schema import SFTConfig
from alignment.policy.adapter import has_adapter
from alignment.policy.layers import checkpoint_layers
from alignment.training.budget import Plan
from alignment.training.callbacks import (
    LogFunction,
    last_checkpoint,
    prepare_trainer,
    stage_callbacks,
    training_arguments,
)

log = logging.getLogger(__name__)


def split_step(groups_per_step: int, longest: int, tokens_per_batch: int) -> tuple[int, int]:
    """(rows per forward pass, passes per optimizer step): the largest even split whose passes fit the token budget."""
    fitting = max(1, tokens_per_batch // longest)
    rows = max(d for d in range(1, groups_per_step + 1) if groups_per_step % d == 0 and d <= max(1, fitting))
    return rows, groups_per_step // rows


def _dataset(examples: Sequence[dict[str, list[int]]]) -> Dataset:
    """Token ids with labels, -100 where a token is not scored."""
    return Dataset.from_list(
        [
            {
                "input_ids": example["input_ids"],
                "labels": [
                    token if scored else -100
                    for token, scored in zip(example["input_ids"], example["completion_mask"], strict=True)
                ],
            }
            for example in examples
        ]
    )


def run_sft(
    model: nn.Module,
    tokenizer: Any,
    config: SFTConfig,
    examples: Sequence[dict[str, list[int]]],
    eval_examples: Sequence[dict[str, list[int]]],
    *,
    plan: Plan,
    folder: Path,
    seed: int,
    device: torch.device,
    log_metrics: LogFunction,
) -> dict[str, Any]:
    """Train on the examples, continuing from the newest checkpoint in the folder if there is one.

    Args:
        model: a policy with something trainable.
        examples: {"input_ids", "completion_mask"}, the mask 1 on tokens that are scored.
        eval_examples: the same, held out; may be empty.
        plan: the budget of a pass and the layers to checkpoint.
        folder: for checkpoints.
        log_metrics: receives every logged value.

    Returns:
        {"steps", "num_tokens" (non-padding tokens trained on in this process), "metrics": final evaluation}.
    """
    from trl import SFTConfig as TRLConfig
    from trl import SFTTrainer

    longest = max(len(example["input_ids"]) for example in examples)
    rows, passes = split_step(config.trainer.groups_per_step, longest, plan.tokens_per_batch)
    steps_per_epoch = math.ceil(len(examples) / config.trainer.groups_per_step)
    num_steps = config.trainer.max_steps or math.ceil(config.trainer.epochs * steps_per_epoch)
    arguments = training_arguments(
        TRLConfig,
        folder=folder,
        optim=config.optim,
        trainer=config.trainer,
        num_steps=num_steps,
        seed=seed,
        device=device,
        per_device_train_batch_size=rows,
        per_device_eval_batch_size=rows,
        gradient_accumulation_steps=passes,
        bf16=device.type == "cuda" and model.dtype is torch.bfloat16,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    checkpoint, done = last_checkpoint(folder)
    checkpoint_layers(model, plan.checkpoint_every)
    base = model.get_base_model() if has_adapter(model) else model
    forward = base.forward
    weights = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    trainer = SFTTrainer(
        model=model,  # type: ignore[arg-type]
        args=arguments,
        train_dataset=_dataset(examples),
        eval_dataset=_dataset(eval_examples) if eval_examples else None,
        processing_class=tokenizer,
        callbacks=stage_callbacks("SFT", log_metrics, config.trainer, bool(eval_examples)),
    )
    prepare_trainer(trainer)
    # On a quantised base TRL rounds the adapter to bfloat16; small updates would be lost, so it keeps its own dtype.
    for name, parameter in model.named_parameters():
        if name in weights:
            parameter.data = weights[name]
    try:
        if checkpoint is not None:
            log.info("SFT continues from step %d.", done)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        base.forward = forward  # without the head that TRL put in front of ours
    last = {name: row[name] for row in trainer.state.log_history for name in ("loss", "eval_loss") if name in row}
    final = {"train/loss": last["loss"]}
    if eval_examples:
        final["eval/loss"] = last["eval_loss"]
    trained = num_steps - done
    mean_length = sum(len(example["input_ids"]) for example in examples) / len(examples)
    return {
        "steps": num_steps,
        "num_tokens": round(trained * config.trainer.groups_per_step * mean_length),
        "metrics": final,
    }
