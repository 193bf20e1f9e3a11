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


THREADS = """
import threading
from pathlib import Path
import numpy as np
from alignment.allocator import keep_freed_memory, share_freed_memory

keep_freed_memory()
if {share}:
    share_freed_memory()

def work():
    return sum(block[0] for block in [np.ones(3 * 2**20, np.float32) for _ in range(8)])

def pages():
    return int(Path("/proc/self/statm").read_text().split()[1])

before = pages()
for _ in range(4):
    done, end = threading.Event(), threading.Event()
    threading.Thread(target=lambda: (work(), done.set(), end.wait()), daemon=True).start()
    done.wait()
print((pages() - before) * 4)
"""

GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="NOT GLIBC: another C library is left as it is")


def printed(script):
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return int(done.stdout)


@GLIBC
def test_memory_is_cleared_once():
    faults = {keep: printed(WORK.format(keep=keep)) for keep in (True, False)}
    assert faults[False] > 10_000  # 5 rounds of 96 MiB in pages of 4 KiB are 122 880
    assert faults[True] < 0.02 * faults[False]


@GLIBC
def test_threads_that_take_turns_need_the_memory_of_one():
    """Four threads, all alive, take and free 96 MiB one after the other."""
    kilobytes = {share: printed(THREADS.format(share=share)) for share in (True, False)}
    assert kilobytes[False] > 3 * 96 * 1024
    assert kilobytes[True] < 1.2 * 96 * 1024
