"""What training steps take at their peak, measured."""

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from alignment.scoring.layout import MicroBatch
from alignment.scoring.logps import score
from alignment.scoring.prompt_sharing import choose_layout
from alignment.types import Group

CPU = torch.device("cpu")


def _peak(run) -> int:
    """Most bytes that torch's allocator held at once, beyond those at the start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    changes = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(np.cumsum([event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns())]))


def step_peak(model, make_optimizer, passes: int = 2, prompt: int = 8) -> tuple[int, MicroBatch]:
    """(bytes at the peak of two steps beside the weights, a pass): of a pair in each, with 128 tokens an answer.

    Args:
        make_optimizer: of the parameters that train.
    """
    rng = np.random.default_rng(0)
    pair = tuple(rng.integers(0, 97, 128).astype(np.int32) for _ in range(2))
    groups = [Group(rng.integers(0, 97, prompt).astype(np.int32), pair)]
    [batch] = choose_layout(model, CPU).batches(groups, 10**6)

    def train():
        optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad])
        for _ in range(2):
            for _ in range(passes):
                score(model, batch).values.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    model.train()
    return _peak(train), batch
