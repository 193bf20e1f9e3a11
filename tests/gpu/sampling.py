"""Four answers to a prompt by our loop against transformers' `generate`: `python -m tests.gpu.sampling SIZE`.

The same NF4 model with an adapter, the same prompts and batches. Random weights hardly ever end an answer, so all have
the same length.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
import torch

from alignment.evaluation.sampling.answer import Sampling
from alignment.evaluation.sampling.draw import draw
from alignment.evaluation.sampling.local import LocalEngine
from alignment.evaluation.sampling.presets import without_presets
from alignment.evaluation.sampling.ways import way_of
from alignment.scoring.logps import autocast
from tests.bench.sampling import theirs
from tests.gpu.correct import DEVICE, ON_GPU, OUT, policy
from tests.gpu.lines import is_dry, note
from tests.gpu.speed import pairs_of

PROMPTS, COUNT, TOKENS = (2, 2, 4) if is_dry() else (16, 4, 64)


def main() -> None:
    """One line for each side and each of two turns."""
    size = sys.argv[1]
    model: Any = policy(size).eval()
    prompts = [np.array(prompt, np.int32) for prompt, *_ in pairs_of(size)[:PROMPTS]]
    way = way_of(model, DEVICE)
    how = Sampling(stops=(0,), max_new_tokens=TOKENS, temperature=1.0, seed=0)

    def ours() -> int:
        answers = draw(LocalEngine(model, DEVICE, PROMPTS * COUNT), prompts, COUNT, how)
        return sum(len(answer.tokens) for each in answers for answer in each)

    def generated() -> int:
        with torch.no_grad(), without_presets(model), autocast(model, DEVICE):
            return theirs(model, prompts, COUNT, how, PROMPTS * COUNT)

    for turn in range(2):
        for name, side in (("ours", ours), ("generate", generated)):
            started = time.perf_counter()
            tokens = side()
            if ON_GPU:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - started
            note(OUT, "sampling", size=size, side=name, turn=turn, tokens=tokens, seconds=seconds, way=str(way))


if __name__ == "__main__":
    main()
