"""What must not be published: tokens, keys, passwords, and paths that name a person."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import get_token

from alignment.files import is_secret

# Most begin with letters, not with a look at what stands before them: so a vocabulary of megabytes takes no seconds.
_KINDS = {
    "a token of the Hugging Face hub": r"hf_[A-Za-z0-9]{30,}",
    "a key of an API (sk-...)": r"\bsk-[A-Za-z0-9_-]{20,}",
    "a key of W&B": r"wandb_v1_\w{20,}|(?:wandb|WANDB|api_?key|API_?KEY)\w{0,8}\W{1,12}[0-9a-f]{40}\b",
    "a token of GitHub": r"gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{22,}",
    "a key of AWS": r"A(?:KIA|SIA)[0-9A-Z]{16}\b",
    "a key of Google": r"AIza[0-9A-Za-z_-]{35}",
    "a token of Slack": r"xox[abeprs]-[0-9A-Za-z-]{10,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a password in an address": r"://[^/@\s:\"']*:[^/@\s\"']+@[\w\[]",
    "a path into a home folder": r"/(?<![\w.]/)(?:(?:home|Users)/[\w.-]+/|root/[\w.])",
}
_PATTERNS = {kind: re.compile(pattern) for kind, pattern in _KINDS.items()}

_LEAST_LENGTH = 8
"""Of a value of the environment that is looked for: shorter ones stand in many a text."""


def findings(text: str) -> Iterator[str]:
    """The secrets in a text: their kinds and lines, never the secrets themselves."""
    places = [(kind, found.start()) for kind, pattern in _PATTERNS.items() for found in pattern.finditer(text)]
    places += [(name, place) for name, value in _known() if (place := text.find(value)) >= 0]
    for kind, place in places:
        line = text.count("\n", 0, place) + 1
        yield f"{kind} in line {line}"


def _known() -> Iterator[tuple[str, str]]:
    """What this process itself knows, whatever it looks like."""
    if token := get_token():
        yield "your token of the hub", token
    for name, value in os.environ.items():
        if is_secret(name) and len(value) >= _LEAST_LENGTH:
            yield f"the value of ${name}", value
    home = str(Path.home())
    if len(Path(home).parts) > 1:
        yield "the path of your home folder", f"{home}/"
