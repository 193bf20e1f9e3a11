"""The version of this package, from git's tags. Hatchling asks for it when it builds from a checkout.

A tag `v1.2.0` is version 1.2.0; three commits later it is 1.2.0.post3+g<commit>. Without a tag it is
0.1.0.dev<number of commits>+g<commit>, without git 0.1.0.dev0. An archive of sources has the version in its PKG-INFO,
where hatchling finds it.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

BEFORE = "0.1.0"
"""What the first tag is expected to be."""
_TAG = re.compile(r"v(\d+(?:\.\d+)*(?:(?:a|b|rc)\d+)?)-(\d+)-g([0-9a-f]+)")


def version(root: Path) -> str:
    """The version of the checkout in a folder."""
    described = _git(root, "describe", "--tags", "--long", "--match", "v[0-9]*")
    if found := _TAG.fullmatch(described):
        tag, distance, commit = found.groups()
        return tag if distance == "0" else f"{tag}.post{distance}+g{commit}"
    count, commit = _git(root, "rev-list", "--count", "HEAD"), _git(root, "rev-parse", "--short", "HEAD")
    return f"{BEFORE}.dev{count}+g{commit}" if count else f"{BEFORE}.dev0"


def _git(root: Path, *words: str) -> str:
    """What git says of the folder itself; empty where it is no checkout, or git is not installed."""
    try:
        if not (root / ".git").exists():  # another project's, around an unpacked archive
            return ""
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


__version__ = version(Path(__file__).parents[1])
