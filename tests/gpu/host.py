"""What bounds a pass, the GPU or the host that feeds it: `python -m tests.gpu.host SIZE`.

Passes of several widths with their wall time, then one of them under the profilers: the GPU's kernels, the host's
operators and Python's functions.
"""

from __future__ import annotations

import cProfile
import pstats
import sys
import time
from collections import Counter
from collections.abc import Callable

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from alignment.scoring.layout import SharedLayout
from alignment.scoring.logps import score
from alignment.scoring.prompt_sharing import choose_layout
from alignment.types import Group
from tests.gpu.correct import DEVICE, ON_GPU, OUT, policy
from tests.gpu.lines import is_dry, note
from tests.gpu.speed import pairs_of

WIDTHS = (1024, 4096, 8192, 16384, 32768)


def main() -> None:
    """All lines of one size."""
    size = sys.argv[1]
    model = policy(size)
    choose_layout(model, DEVICE)
    pairs = [[np.array(ids, np.int32) for ids in pair] for pair in pairs_of(size)]
    groups = [Group(prompt, (chosen, rejected)) for prompt, chosen, rejected in pairs]

    def pass_of(width: int) -> tuple[int, Callable[[], None]]:
        batch = next(iter(SharedLayout().batches(groups, width))).to(DEVICE)

        def run() -> None:
            score(model, batch).values.sum().backward()
            if ON_GPU:
                torch.cuda.synchronize()

        return batch.input_ids.numel(), run

    for width in WIDTHS[:1] if is_dry() else WIDTHS:
        positions, run = pass_of(width)
        run()
        seconds = []
        for _ in range(4):
            started = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - started)
        note(OUT, "pass", size=size, positions=positions, seconds=min(seconds), all=seconds)

    _, run = pass_of(WIDTHS[0] if is_dry() else 8192)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ON_GPU else [])]
    with profile(activities=activities) as found:
        run()
    own: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    launches: Counter[str] = Counter()
    for event in found.events():
        if event.device_type == DeviceType.CPU:
            own[event.name] += event.self_cpu_time_total / 1e3
            calls[event.name] += 1
        else:
            kernels[event.name[:120]] += event.device_time / 1e3
            launches[event.name[:120]] += 1
    note(OUT, "kernels", size=size, busy_ms=sum(kernels.values()), launches=sum(launches.values()),
         top=[[name, launches[name], ms] for name, ms in kernels.most_common(40)])  # fmt: skip
    note(OUT, "operators", size=size, host_ms=sum(own.values()),
         top=[[name, calls[name], ms] for name, ms in own.most_common(40)])  # fmt: skip

    python = cProfile.Profile()
    python.enable()
    run()
    python.disable()
    rows = pstats.Stats(python).stats.items()  # type: ignore[attr-defined]
    by_own = sorted(rows, key=lambda row: -row[1][2])[:60]
    note(OUT, "python", size=size, seconds=sum(row[1][2] for row in rows), calls=sum(row[1][1] for row in rows),
         top=[[f"{'/'.join(f.split('/')[-2:])}:{line}:{name}", s[1], s[2], s[3]]
              for (f, line, name), s in by_own])  # fmt: skip


if __name__ == "__main__":
    main()
