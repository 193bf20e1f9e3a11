"""The command line of vLLM that serves a policy behind an OpenAI-compatible address."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` takes."""


@dataclass(frozen=True, slots=True)
class Served:
    """What a server needs to know.

    Attributes:
        name: of the policy in requests.
        model: folder or hub id of the base, or of the merged model.
        revision: of the base on the hub.
        adapter: the adapter's folder, as the server finds it; None for a merged model.
        rank: the largest of the adapter.
        tokenizer: folder of the tokenizer, its chat template and the settings of generation.
        dtype: of the weights.
        length: tokens of a prompt with its answer.
        packed: the policy trained on a base in NF4.
        code: whether the model's own code runs.
    """

    name: str
    model: str
    revision: str | None
    adapter: str | None
    rank: int
    tokenizer: str
    dtype: str
    length: int
    packed: bool
    code: bool


def not_served(settings: Mapping[str, Any]) -> str | None:
    """Why vLLM does not take an adapter with these settings of peft, in words; None where it does."""
    if settings["peft_type"] != "LORA":
        return f"a {settings['peft_type']}"
    if settings.get("use_dora"):
        return "a DoRA"
    for key in ("modules_to_save", "trainable_token_indices", "target_parameters"):
        if settings.get(key):
            return f"an adapter with {key}"
    targets = settings.get("target_modules") or []
    ends = {"embed_tokens", "lm_head", "wte"} & {str(name).rpartition(".")[2] for name in targets}
    return f"an adapter of {', '.join(sorted(ends))}" if ends else None


def largest_rank(settings: Mapping[str, Any]) -> int:
    """The largest rank of an adapter."""
    return max(settings["r"], *(settings.get("rank_pattern") or {}).values(), 0)


def serve_words(served: Served) -> list[str]:
    """The words of the command.

    Args:
        served: what is served.
    """
    words = ["vllm", "serve", served.model]
    if served.revision is not None:
        words += ["--revision", served.revision]
    if served.adapter is not None:
        rank = next((rank for rank in _RANKS if rank >= served.rank), served.rank)
        words += ["--enable-lora", "--lora-modules", f"{served.name}={served.adapter}", "--max-lora-rank", str(rank)]
    else:
        words += ["--served-model-name", served.name]
    words += ["--tokenizer", served.tokenizer, "--generation-config", served.tokenizer]
    words += ["--dtype", served.dtype, "--max-model-len", str(served.length)]
    return [*words, "--trust-remote-code"] if served.code else words


def serve_script(served: Served) -> str:
    """A script that serves the policy; it works wherever its folder is moved, with more options of vLLM behind it."""
    options = _lines(serve_words(served)[2:])
    notes = [
        f"# Ask for the model {served.name} at http://localhost:8000/v1. Options that you add go to vLLM.",
        f"# {served.length} tokens are what the policy was trained on; raise --max-model-len for longer conversations.",
    ]
    if served.packed and served.adapter is not None:
        notes += [
            "# The policy trained on its base in NF4. To serve it so, and in less memory, add:",
            "#   --quantization bitsandbytes",
        ]
    command = " \\\n  ".join(["exec vllm serve", *options, '"$@"'])
    return "\n".join(["#!/bin/sh", *notes, 'cd "$(dirname "$0")" || exit 1', command, ""])


def _lines(words: Sequence[str]) -> list[str]:
    """The words for a shell, each option with its values on a line."""
    lines: list[str] = []
    for word in words:
        quoted = shlex.quote(word)
        if word.startswith("--") or not lines or not lines[-1].startswith("--"):
            lines.append(quoted)
        else:
            lines[-1] += f" {quoted}"
    return lines
