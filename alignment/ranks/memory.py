"""How much main memory is left."""

from __future__ import annotations

import re
from pathlib import Path


def available_memory() -> int:
    """Bytes of main memory that a process may still take, within a container's limit."""
    lines = Path("/proc/meminfo").read_text()
    found = re.search(r"^MemAvailable:\s*(\d+) kB", lines, re.MULTILINE)
    assert found is not None
    available = int(found[1]) * 1024
    group = Path("/sys/fs/cgroup")
    limit, used = group / "memory.max", group / "memory.current"
    if limit.is_file() and used.is_file() and (most := limit.read_text().strip()) != "max":
        # The kernel's cached files count as used, but it drops them when memory is needed.
        cached = re.search(r"^inactive_file (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)
        available = min(available, int(most) - int(used.read_text()) + int(cached[1] if cached else 0))
    return max(0, available)
