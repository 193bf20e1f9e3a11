"""How much of the speed each part brings: the same training with one part switched off, all in turns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from alignment.kernels import matmul
from alignment.kernels.attention import disable_shared_prompts
from alignment.scoring import head as scoring_head
from alignment.scoring.head import LogitTransform
from alignment.scoring.layout import BatchLayout, FlatLayout
from alignment.scoring.token_scores import TokenScores
from tests.bench.summary import check_losses

_NO_LIMIT = 2**62


@dataclass(frozen=True, slots=True)
class Part:
    """What the table says of a part, and the run that shows what it brings: that run without it."""

    said: str
    against: str = ""


PARTS = {
    "": Part("nothing"),
    "sharing": Part("the shared prompt: a row for each completion"),
    "padding": Part("no padding: rows as wide as the longest of the step", against="sharing"),
    "packing": Part("full passes: a pair in each"),
    "head": Part("the head in one pass: all logits at once, by autograd"),
    "cache": Part("the cache: reference passes in every step"),
    "oneDNN": Part("oneDNN: torch's own matrix products"),
}
"""By `Job.without`. Padding has to be held against rows that are not shared, because shared ones have none."""


def switch_off(part: str, model: Any, layout: BatchLayout, tokens_per_batch: int) -> tuple[BatchLayout, int]:
    """Take a part out of this process; the layout and the positions of a pass to train with."""
    match part:
        case "sharing" | "padding":
            disable_shared_prompts(model.get_base_model())
            return (FlatLayout(), tokens_per_batch) if part == "sharing" else (FlatLayout(_NO_LIMIT), _NO_LIMIT)
        case "packing":
            return layout, 1
        case "head":
            scoring_head._ScoreOnce = SimpleNamespace(apply=_by_autograd)  # type: ignore[assignment, misc]
        case "oneDNN":
            matmul._has_onednn = lambda: False  # type: ignore[assignment]
    return layout, tokens_per_batch


def _by_autograd(
    hidden: Tensor, head: nn.Module, targets: Tensor, transform: LogitTransform, *unused: object
) -> Tensor:
    return TokenScores.stack(-F.cross_entropy(transform(head(hidden)), targets, reduction="none")).values


def table(results: Mapping[str, Mapping[str, Any]], pairs_per_step: int) -> list[list[str]]:
    """Header and rows: seconds of a pair without each part, and how many times faster the part makes it.

    Args:
        results: by part, as `one_run.run_ours` returns them; the first step of each is not counted.
        pairs_per_step: pairs of one optimizer step.
    """
    difference = check_losses({part or "whole": result["losses"] for part, result in results.items()}, "exact")
    seconds = {part: median(result["seconds"]["wall"][1:]) / pairs_per_step for part, result in results.items()}
    rows = [["without", "s / pair", "the part makes it", "peak GiB"]]
    for part, result in results.items():
        faster = f"{seconds[part] / seconds[PARTS[part].against]:.2f}x faster" if part else ""
        rows.append([PARTS[part].said, f"{seconds[part]:.3f}", faster, f"{result['peak_bytes'] / 2**30:.2f}"])
    return [*rows, ["largest difference between losses", f"{difference:.1e}", "", ""]]
