"""The C library's memory allocator, told how training uses it."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # names in glibc's malloc.h


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
