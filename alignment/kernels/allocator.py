"""Memory on the CPU: settings of the C library's allocator, and how torch asks it for tensors."""

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
