"""Settings of the allocators: the C library's, how torch asks it for tensors, and torch's own for a GPU."""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # names in glibc's malloc.h


def begin_tensors_on_pages() -> None:
    """Let torch begin every tensor of 2 MiB or more on its own page, and ask for huge pages there.

    glibc cannot fit an aligned block into a hole of exactly its size. It leaves a sliver beside it, a small object
    settles there, and the holes cannot merge again: a training step then takes 1.5 times the memory of its tensors at
    the peak. Beside a block that begins on a page, the rest is large enough to be used.

    Torch reads the setting with its first tensor, so call this before. A value that the environment already has stays.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def grow_gpu_segments() -> None:
    """Let torch's blocks of a GPU's memory grow in place.

    Every pass has another width. By default, a tensor that fits into no free block gets a new one of its own size; in
    the end much of the memory is free in pieces that are all too small, and a plan for 90 % of it does not hold.

    Torch reads the setting when it first uses a GPU, so call this before. Every version that we support reads this
    name; with a value in the environment, under it or under the newer name, that value stays.
    """
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def keep_freed_memory() -> None:
    """Let the process keep the memory that it frees: every pass over a model needs the same tens of megabytes again.

    By default glibc returns large blocks to the kernel at once, and the kernel clears each page before it hands it out
    again. Other C libraries than glibc are left alone.
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    set_option(_TRIM_THRESHOLD, 2**31 - 1)
    set_option(_MMAP_THRESHOLD, 32 * 2**20)  # the most that glibc takes
    set_option(_TOP_PAD, 64 * 2**20)
