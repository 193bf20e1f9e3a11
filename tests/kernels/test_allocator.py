"""How memory is asked for and kept."""

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

WORK = """
import resource
import numpy as np
from alignment.kernels.allocator import keep_freed_memory

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
    """Freed memory stays with the process: a second round of the same work takes next to no new pages."""
    faults = {}
    for keep in (True, False):
        done = subprocess.run(
            [sys.executable, "-c", WORK.format(keep=keep)], capture_output=True, text=True, check=True
        )
        faults[keep] = int(done.stdout)
    assert faults[False] > 10_000  # 5 rounds of 96 MiB in pages of 4 KiB are 122 880
    assert faults[True] < 0.02 * faults[False]


COMMAND = """
from alignment.run import main
try:
    main(["recipe=nowhere"])
except SystemExit:
    pass
import mmap
import torch
print([torch.empty(3 * 2**18 + i).data_ptr() % mmap.PAGESIZE for i in range(4)])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="NOT LINUX: torch has the setting there alone")
@pytest.mark.parametrize(("given", "on_pages"), [(None, True), ("0", False)])
def test_the_command_begins_large_tensors_on_pages(given, on_pages, monkeypatch):
    if given is None:
        monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    else:
        monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", given)
    done = subprocess.run([sys.executable, "-c", COMMAND], capture_output=True, text=True, check=True)
    assert (done.stdout.strip() == "[0, 0, 0, 0]") == on_pages
