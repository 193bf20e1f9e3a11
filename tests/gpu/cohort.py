"""Joint passes against turns, four members on one NF4 base: `python -m tests.gpu.cohort SIZE true|false`."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

from alignment.runs.folder import read_run
from tests.gpu.lines import is_dry, note, out_folder
from tests.gpu.speed import folder_of, pairs_of

CONF = Path(__file__).parents[1] / "bench" / "conf"
BETAS = ("0.05", "0.1", "0.2", "0.5")
PAIRS_PER_STEP, STEPS = 4, 8


def main() -> None:
    """One sweep; the seconds of its steps are those between its first and its last metrics."""
    size, joint = sys.argv[1:]
    out, folder = out_folder(), folder_of(size)
    rows = folder / "rows.jsonl"
    letters = random.Random(0)
    with rows.open("w") as file:
        for pair in pairs_of(size)[: PAIRS_PER_STEP * STEPS]:  # the tokenizer of this model has a token for each byte
            texts = ["".join(letters.choices("abcdefghij ", k=len(ids))) + "." for ids in pair]
            file.write(json.dumps(dict(zip(("prompt", "chosen", "rejected"), texts, strict=True))) + "\n")
    runs = folder / f"cohort-{joint}"
    settings = {
        "recipe": "bench_sweep", "model.name": (folder / "source").read_text(), "quantization": "nf4",
        "data.source": rows, "data.max_length": 2048, "data.max_prompt_length": 1024, "optim.lr": 1e-5,
        "trainer.groups_per_step": PAIRS_PER_STEP, "trainer.max_steps": 2 if is_dry() else STEPS,
        "trainer.cohort": len(BETAS), "trainer.joint_passes": joint, "reference.path": folder / f"cohort-{joint}-cache",
        "hydra.sweep.dir": runs, "loss.beta": ",".join(BETAS),
    }  # fmt: skip
    command = [sys.executable, "-m", "alignment.run", "-m", "--config-dir", str(CONF)]
    started = time.monotonic()
    ended = subprocess.run([*command, *(f"{key}={value}" for key, value in settings.items())], check=False)
    seconds = time.monotonic() - started
    members = [read_run(path.parent) for path in sorted(runs.glob("*/config.yaml"))]
    stages = [member.summary["stages"]["preference"] for member in members if member.summary]
    note(
        out, "cohort", size=size, joint=joint, code=ended.returncode, command_seconds=seconds, members=len(stages),
        seconds=[stage["seconds"] for stage in stages],
        tokens_per_second=[stage["tokens_per_second"] for stage in stages],
        measured_gib=[stage["memory"]["measured"] / 2**30 for stage in stages],
        steps=[[row.get("time") for row in member.metrics if row.get("split") == "train"] for member in members],
        losses=[stage["metrics"].get("train/loss") for stage in stages],
    )  # fmt: skip
    sys.exit(ended.returncode)


if __name__ == "__main__":
    main()
