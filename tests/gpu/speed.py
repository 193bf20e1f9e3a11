"""Speed and memory of DPO on an NF4 Qwen3 with random weights, ours against TRL's: `python -m tests.gpu.speed`.

prepare SIZE            makes the model, one adapter for both sides and the pairs
measure SIZE RUN        one run, alone in its process: one of the benchmark's or of `VARIANTS`
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from alignment.config.schema import Calibration, Device, Dtype, QuantizationConfig
from alignment.policy.adapter import attach_adapter
from alignment.policy.load import load_base, load_tokenizer, resolve_device
from alignment.policy.tiny_model import write_tiny_model
from tests.bench import one_run, preparation
from tests.bench.floor import Shape
from tests.bench.job import QWEN3_SIZES, Job
from tests.gpu.check import work_folder
from tests.gpu.lines import is_dry, note, out_folder
from tests.helpers.adapters import adapter

QWEN3_SIZES["tiny"] = (64, 128, 2, 16, True)
STEPS = {"tiny": (2, 3), "1.7B": (16, 8), "8B": (8, 6)}
"""Pairs of a step, and steps; the first is a warm-up."""
ADAPTER = adapter(r=32, alpha=64)


@dataclass(frozen=True)
class Variant:
    """A run of ours in another setting.

    Attributes:
        run: which of the benchmark's runs it is.
        checkpointed: whether every layer is run again in the backward pass, as TRL does unless told otherwise.
        wider: how many times as many pairs a step has.
    """

    run: str
    checkpointed: bool = False
    wider: int = 1


VARIANTS = {
    "ours_checkpointed": Variant("ours_cold", checkpointed=True),
    "ours_wide": Variant("ours_cold", wider=4),
}


def pairs_of(size: str, wider: int = 1) -> list[list[list[int]]]:
    """Random tokens in lengths like UltraFeedback's: prompts around 150, answers around 270, cut at 512.

    Steps that are wider are fewer: half of their number.
    """
    rng = np.random.default_rng(0)
    per_step, steps = STEPS[size]
    if wider > 1:
        per_step, steps = per_step * wider, max(2, steps // 2)

    def tokens(middle: float) -> list[int]:
        length = int(np.clip(rng.lognormal(np.log(middle), 0.6), 16, 512))
        return rng.integers(0, 151_000, 12 if is_dry() else length).tolist()

    return [[tokens(150), tokens(270), tokens(270)] for _ in range(per_step * steps)]


def folder_of(size: str) -> Path:
    """Where the model of that size lies."""
    return work_folder(out_folder()) / size


def job_of(size: str, run: str) -> Job:
    """The run on what `prepare` made."""
    folder, variant = folder_of(size), VARIANTS.get(run, Variant(run))
    pairs = folder / f"pairs-{variant.wider}.json"
    if not pairs.exists():
        pairs.write_text(json.dumps(pairs_of(size, variant.wider)))
    return Job(
        run=variant.run, model=(folder / "source").read_text(), adapter=str(folder / "adapter"), pairs=str(pairs),
        pairs_per_step=STEPS[size][0] * variant.wider, nf4=True, cache=str(folder / "cache"), beta=0.1, lr=1e-4,
        tokens_per_batch=None, profile=run in ("ours_warm", "ours_wide"), checkpointed=variant.checkpointed,
    )  # fmt: skip


def prepare(size: str) -> None:
    """Write the model, the adapter and the pairs."""
    out, folder, device = out_folder(), folder_of(size), resolve_device(Device.auto)
    write_tiny_model(folder / "tokenizer")
    tokenizer = load_tokenizer(preparation.model_config(str(folder / "tokenizer")), str(folder / "tokenizer"))
    started = time.monotonic()
    source = preparation.random_qwen3(size, tokenizer, folder, device)
    made = time.monotonic() - started
    quantization = QuantizationConfig(double=True, compute_dtype=Dtype.auto, calibration=Calibration.none)
    base = load_base(preparation.model_config(source), quantization, source, device)

    def adapted() -> nn.Module:
        attached: Any = attach_adapter(base, ADAPTER, 0)
        attached.save_pretrained(str(folder / "adapter"))
        return attached

    shape = preparation.model_shape(base, adapted)
    (folder / "shape.json").write_text(json.dumps(asdict(shape)))
    (folder / "source").write_text(source)
    job_of(size, "ours_cold")  # writes the pairs, which TRL's and Unsloth's runs read as well
    gib = torch.cuda.memory_allocated() / 2**30 if device.type == "cuda" else None
    note(out, "prepare", size=size, made=made, loaded=time.monotonic() - started - made, weights_gib=gib)


def measure(size: str, run: str) -> None:
    """One run: tokens a second, as 2 P + C + R of every pair, and the peak of memory."""
    out, job = out_folder(), job_of(size, run)
    cache = Path(job.cache)
    if job.run == "ours_cold":
        shutil.rmtree(cache, ignore_errors=True)
    cache.mkdir(exist_ok=True)
    pairs = json.loads(Path(job.pairs).read_text())
    lengths = [2 * len(p) + len(c) + len(r) for p, c, r in pairs]
    oom = None
    try:
        result = one_run.run(job)
    except torch.cuda.OutOfMemoryError as error:
        oom = " ".join(str(error).split())[:200]
    if oom:
        note(out, "measure", size=size, run=run, out_of_memory=oom)
        return
    seconds = result["seconds"]["wall"][1:]
    counted = sum(lengths[job.pairs_per_step :])
    shape = Shape(**json.loads((folder_of(size) / "shape.json").read_text()))
    operations = sum(shape.floor(*map(len, pair)) for pair in pairs)
    reference = result["reference_seconds"]["wall"]
    if profile := result.pop("profile", None):
        note(out, "profile", size=size, run=run, **profile)
    note(
        out, "measure", size=size, run=run, step=statistics.median(seconds), seconds=seconds,
        tokens_per_second=counted / sum(seconds), reference=reference,
        # The reference pass also covers the warm-up step.
        with_reference=counted / (sum(seconds) + reference * counted / sum(lengths)),
        operations=operations / (len(seconds) + 1),
        peak_gib=result["peak_bytes"] / 2**30, setup=result["setup_seconds"], losses=result["losses"],
    )  # fmt: skip


def main() -> None:
    """`prepare SIZE` or `measure SIZE RUN`."""
    what, *rest = sys.argv[1:]
    {"prepare": prepare, "measure": measure}[what](*rest)


if __name__ == "__main__":
    main()
