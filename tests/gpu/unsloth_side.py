"""Unsloth's DPO on the same tokens: `python -m tests.gpu.unsloth_side SIZE [unsloth|none]`, how it checkpoints.

What a user of Unsloth writes, in its defaults but for the adapter, the optimizer and the batches, which are those of
the other runs. Its TRL 1.15 keeps a second copy of the adapter as the reference. The first steps compile each layer. It
has a TRL of its own, so it runs in an environment of its own: packages that `make gpu-bundle` does not pack. Without
them it notes so.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.gpu.check import work_folder
from tests.gpu.lines import note, out_folder

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PAIRS_PER_STEP = {"1.7B": 16, "8B": 8}
SEED = 0


def measure(size: str, checkpointing: str) -> None:
    """One run; the first step is a warm-up."""
    # It patches what is imported after it.
    from unsloth import FastLanguageModel  # isort: skip

    from datasets import Dataset
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    moments: list[float] = []

    class Steps(TrainerCallback):
        """Notes when each step begins, after all work of the GPU."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            torch.cuda.synchronize()
            moments.append(time.perf_counter())

        on_train_end = on_step_begin

    folder = work_folder(out_folder()) / size
    pairs = json.loads((folder / "pairs-1.json").read_text())
    per_step = PAIRS_PER_STEP[size]
    model, tokenizer = FastLanguageModel.from_pretrained(
        (folder / "source").read_text(), max_seq_length=2048, load_in_4bit=True, local_files_only=True,
    )  # fmt: skip
    model = FastLanguageModel.get_peft_model(
        model, r=32, lora_alpha=64, lora_dropout=0, target_modules=TARGETS, random_state=SEED,
        use_gradient_checkpointing="unsloth" if checkpointing == "unsloth" else False,
    )  # fmt: skip

    set_peft_model_state_dict(model, load_file(str(folder / "adapter" / "adapter_model.safetensors")))

    class Tokenised(DPOTrainer):
        """Takes the data set as it is: its texts have been tokenised."""

        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            del args, kwargs
            return dataset

    columns = dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), zip(*pairs, strict=True), strict=True))
    trainer = Tokenised(
        model=model,
        ref_model=None,
        args=DPOConfig(
            output_dir=str(folder / "unsloth"), per_device_train_batch_size=per_step,
            max_steps=len(pairs) // per_step, max_length=None, beta=0.1, optim="adamw_torch_fused", learning_rate=1e-4,
            lr_scheduler_type="constant", max_grad_norm=1.0, bf16=True, logging_steps=1,
            train_sampling_strategy="sequential", gradient_accumulation_steps=1,
            gradient_checkpointing=checkpointing == "unsloth", save_strategy="no",
            report_to="none", disable_tqdm=True, seed=SEED,
        ),
        train_dataset=Dataset.from_dict({name: list(column) for name, column in columns.items()}),
        processing_class=tokenizer,
        callbacks=[Steps()],
    )  # fmt: skip
    trainer.train()
    seconds = np.diff(moments)[1:].tolist()
    counted = sum(2 * len(p) + len(c) + len(r) for p, c, r in pairs[per_step:])
    note(
        out_folder(), "measure", size=size, run=f"unsloth_{checkpointing}", step=statistics.median(seconds),
        seconds=seconds, tokens_per_second=counted / sum(seconds), reference=0,
        peak_gib=torch.cuda.max_memory_allocated() / 2**30,
        losses=[row["loss"] for row in trainer.state.log_history if "loss" in row],
    )  # fmt: skip


def main() -> None:
    """One line, also where it cannot run."""
    size, checkpointing = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "unsloth"
    work = work_folder(out_folder()) / "unsloth-compiled"
    os.environ.update(
        HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", UNSLOTH_DISABLE_STATISTICS="1",
        UNSLOTH_COMPILE_LOCATION=str(Path(work)),
    )  # fmt: skip
    try:
        measure(size, checkpointing)
    except Exception as error:
        what = f"{type(error).__name__}: {error}"[:600]
        note(out_folder(), "measure", size=size, run=f"unsloth_{checkpointing}", error=what)
        raise


if __name__ == "__main__":
    main()
