"""How memory is asked for and kept."""

import os
import platform
import subprocess
import sys

import pytest

from alignment.kernels.allocator import grow_gpu_segments

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


@pytest.mark.slow
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
import os
import torch
assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
print([torch.empty(3 * 2**18 + i).data_ptr() % mmap.PAGESIZE for i in range(4)])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="NOT LINUX: torch has the setting there alone")
@pytest.mark.parametrize(("given", "on_pages"), [(None, True), ("0", False)])
def test_the_command_begins_large_tensors_on_pages(given, on_pages, monkeypatch):
    if given is None:
        monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    else:
        monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", given)
    done = subprocess.run([sys.executable, "-c", COMMAND], capture_output=True, text=True, check=True)
    assert (done.stdout.strip() == "[0, 0, 0, 0]") == on_pages


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}),
    ],
)
def test_blocks_of_a_gpu_grow_unless_the_environment_says_how(given, expected, monkeypatch):
    """The older name comes first in some versions of torch, so it is not set beside the newer one."""
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    grow_gpu_segments()
    assert {name: value for name, value in os.environ.items() if name.endswith("ALLOC_CONF")} == expected
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)  # what it set is not the next test's
