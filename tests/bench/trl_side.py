"""TRL's side: what a user of TRL writes, for texts that have been tokenised.

It imports nothing of ours, so that a run of it alone is TRL's and no more:
`python -m tests.bench.trl_side JOB.json RESULT.json`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import DPOConfig, DPOTrainer

from tests.bench.job import SEED, Job


class TokenisedDPOTrainer(DPOTrainer):
    """Takes the data set as it is: its texts have been tokenised."""

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        del args
        return dataset


def dpo_trainer(
    job: Job, base: Any, kind: type[TokenisedDPOTrainer] = TokenisedDPOTrainer, callbacks: Sequence[Any] = ()
) -> TokenisedDPOTrainer:
    """A trainer of `kind` on the job's tokens, its reference the policy with the adapter switched off."""
    on_gpu = torch.cuda.is_available()
    pairs = job.read_pairs(np.int64)
    columns = dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), zip(*pairs, strict=True), strict=True))
    adapter = LoraConfig.from_pretrained(job.adapter)
    adapter.inference_mode = False  # what `save_pretrained` wrote
    trainer = kind(
        model=base,
        args=DPOConfig(
            output_dir=str(Path(job.cache) / job.run),
            per_device_train_batch_size=job.pairs_per_step,
            max_steps=len(pairs) // job.pairs_per_step,
            max_length=None,  # nothing is left to cut
            beta=job.beta,
            precompute_ref_log_probs=job.run == "trl_precomputed",
            gradient_checkpointing=job.run == "trl_checkpointed",
            train_sampling_strategy="sequential",
            optim="adamw_torch_fused",
            learning_rate=job.lr,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            bf16=on_gpu,
            use_cpu=not on_gpu,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=SEED,
        ),
        train_dataset=Dataset.from_dict({name: [ids.tolist() for ids in column] for name, column in columns.items()}),
        processing_class=AutoTokenizer.from_pretrained(job.model),
        peft_config=adapter,
        callbacks=list(callbacks),
    )
    # TRL takes a fresh adapter only as a configuration; a finished PeftModel would get a second one as its reference.
    set_peft_model_state_dict(trainer.model, load_file(str(Path(job.adapter) / "adapter_model.safetensors")))
    return trainer


def main() -> None:
    """Train and save; write the losses, and what torch had of a GPU."""
    task, result = map(Path, sys.argv[1:])
    job = Job(**json.loads(task.read_text()))
    on_gpu = torch.cuda.is_available()
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if on_gpu else torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(
        job.model,
        dtype=torch.bfloat16 if on_gpu else torch.float32,
        attn_implementation="sdpa",
        quantization_config=nf4 if job.nf4 else None,
        device_map={"": 0} if on_gpu else None,
    )
    trainer = dpo_trainer(job, base)
    trainer.train()
    trainer.save_model()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    gpu_bytes = torch.cuda.max_memory_allocated() if on_gpu else None
    result.write_text(json.dumps({"losses": losses, "gpu_bytes": gpu_bytes}))


if __name__ == "__main__":
    main()
