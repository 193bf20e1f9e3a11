"""The C library's memory allocator, told how training uses it."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -2, -3, -8  # names in glibc's malloc.h


def keep_freed_memory() -> None:
    """Let the process keep what it frees: every pass over a model needs the same tens of megabytes again.

    By default glibc gives large blocks back to the kernel at once, which has to clear each page when it hands it out
    the next time. Another C library than glibc is left as it is.
    """
    _set_options({_TRIM_THRESHOLD: 2**31 - 1, _MMAP_THRESHOLD: 32 * 2**20, _TOP_PAD: 64 * 2**20})  # 32 MiB is the most


def share_freed_memory() -> None:
    """Let threads that are begun from now on have the memory that others of them have freed.

    By default each has a store of its own, so that a pass that one thread runs after another takes its memory anew.
    """
    _set_options({_ARENA_MAX: 1})


def _set_options(options: dict[int, int]) -> None:
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    for name, value in options.items():
        set_option(name, value)
