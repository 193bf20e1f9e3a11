"""Freed memory stays with the process: a second round of the same work makes the kernel clear next to no pages."""

import platform
import subprocess
import sys

import pytest

WORK = """
import resource
import numpy as np
from alignment.allocator import keep_freed_memory

if {keep}:
    keep_freed_memory()

def work():
    blocks = [np.ones(3 * 2**20, np.float32) for _ in range(8)]
    return sum(block[0] for block in blocks)

work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="NOT GLIBC: another C library is left as it is")
def test_memory_is_cleared_once():
    faults = {}
    for keep in (True, False):
        done = subprocess.run(
            [sys.executable, "-c", WORK.format(keep=keep)], capture_output=True, text=True, check=True
        )
        faults[keep] = int(done.stdout)
    assert faults[False] > 10_000  # 5 rounds of 96 MiB in pages of 4 KiB are 122 880
    assert faults[True] < 0.02 * faults[False]
