"""Memory on the CPU: the C library's allocator, and how torch asks it for tensors."""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # names in glibc's malloc.h


def begin_tensors_on_pages() -> None:
    """Let torch begin every tensor of 2 MiB or more on a page of its own, and ask for huge pages there.

    glibc cannot put an aligned block into a hole of just its size, and leaves a sliver beside every such block, where a
    small object settles that keeps the holes from growing together: a training step so takes half as much memory again
    as it has tensors at its peak. Beside a block that begins on a page, what is left over is large enough to be used.

    Torch reads the setting with its first tensor, so this has to come before that. A value that the environment has
    already is kept.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def keep_freed_memory() -> None:
    """Let the process keep what it frees: every pass over a model needs the same tens of megabytes again.

    By default glibc gives large blocks back to the kernel at once, which has to clear each page when it hands it out
    the next time. Another C library than glibc is left as it is.
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    set_option(_TRIM_THRESHOLD, 2**31 - 1)
    set_option(_MMAP_THRESHOLD, 32 * 2**20)  # the most that glibc takes
    set_option(_TOP_PAD, 64 * 2**20)
