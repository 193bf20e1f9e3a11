"""One pass of a pair with gradient, forked against flat: the time that running the prompt once saves.

    python -m tests.bench.forking [--repetitions 7] [--families mamba2 lfm2]

Families with a recurrence in small, random weights in fp32, all of them trained. Both layouts run in turns in one
process; the table has the median of what flat rows take, by what the fork takes, in time of the processor.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch
from torch import nn

from alignment.policy.architecture import auto_class
from alignment.scoring.layout import FlatLayout, ForkedLayout, MicroBatch
from alignment.scoring.logps import enable_scoring, score
from alignment.types import Group
from tests.helpers.families import FAMILIES

WIDE = {"hidden_size": 256, "intermediate_size": 512}
SETTINGS = {
    "mamba2": {"num_heads": 32, "head_dim": 16, "chunk_size": 64},
    "falcon_h1": {"mamba_d_ssm": 256, "mamba_n_heads": 16, "mamba_d_head": 16, "mamba_chunk_size": 64},
    "nemotron_h": {"mamba_num_heads": 16, "mamba_head_dim": 16, "chunk_size": 64},
    "qwen3_5_text": {"linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 32}
    | {"linear_value_head_dim": 32},
    "lfm2": {},
}
LENGTHS = ((64, 64), (128, 64), (128, 128), (256, 128), (256, 64), (512, 128), (512, 64))
"""Tokens of the prompt, and of each of two answers."""


def model_of(name: str) -> nn.Module:
    """A random model of the family, wider than in the tests."""
    family = next(f for f in FAMILIES if f.model_type == name)
    config = family.config(**WIDE | SETTINGS[name])
    torch.manual_seed(0)
    model = auto_class(config).from_config(config).float().train()
    enable_scoring(model)
    return model


def step(model: nn.Module, batch: MicroBatch) -> float:
    """Seconds of the processor for a forward and a backward pass."""
    begin = time.process_time()
    score(model, batch).values.sum().backward()
    return time.process_time() - begin


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--families", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    models = {name: model_of(name) for name in arguments.families}
    print("| prompt + answers | positions |", " | ".join(f"`{name}`" for name in models), "|")
    print("|", " | ".join(["---"] * (2 + len(models))), "|")
    for prompt, answer in LENGTHS:
        text, *answers = (rng.integers(3, 97, n).astype(np.int32) for n in (prompt, answer, answer))
        layouts = (FlatLayout(), ForkedLayout(least_gain=0))
        batches = [next(iter(layout.batches([Group(text, tuple(answers))], 10**6))) for layout in layouts]
        cells = [f"{prompt} + 2 × {answer}", f"{batches[0].positions / batches[1].positions:.2f}"]
        for model in models.values():
            pairs = [[step(model, batch) for batch in batches] for _ in range(arguments.repetitions + 1)][1:]
            cells.append(f"{statistics.median(flat / forked for flat, forked in pairs):.2f}")
        print("|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
