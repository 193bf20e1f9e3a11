"""Tasks on held-out text that nobody draws: the implicit reward's accuracy, and the perplexity of SFT data."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from alignment.assessment.entrants import Entrants
from alignment.assessment.task import Result
from alignment.comparison.members import rows_by_key
from alignment.comparison.tables import Table
from alignment.errors import UserError
from alignment.evaluation.intervals import wilson_interval
from alignment.evaluation.statistics.clusters import effective_count
from alignment.evaluation.statistics.resampling import bounds, drawn_weights
from alignment.runs.folder import read_rows
from alignment.runs.text import is_number, percent
from alignment.scoring.layout import FlatLayout
from alignment.scoring.logps import join_scores, score_groups
from alignment.stages.finished import OpenedPolicy
from alignment.types import Group

log = logging.getLogger(__name__)

_REDUCTIONS = {"sum": "nats/accuracies", "mean": "nats_per_token/accuracies"}
_TOKENS = 4096
"""Positions of a pass, or those of the longest text."""


class ImplicitRewards:
    """How often a policy's implicit reward ranks held-out pairs rightly, as RewardBench scores policies.

    The reward is the log-ratio to the reference, summed over tokens (Lambert et al. 2024, arXiv:2403.13787) or as their
    mean; a tie is not right. The values are those that the runs have written of their held-out pairs.

    Raises:
        UserError: a run has none, or other pairs than the first.
    """

    def __init__(self, field: Entrants) -> None:
        self._rows = {policy.name: _final_pairs(policy) for policy in field.policies[: field.runs]}
        (first, pairs), *others = self._rows.items()
        for name, rows in others:
            if rows.keys() != pairs.keys():
                raise UserError(f"{name} has other held-out pairs than {first}: compare runs with the same data.")

    def run(self) -> Result:
        """Both accuracies of every run."""
        found = []
        for name, rows in self._rows.items():
            prompts = [str(row.get("source")) for row in rows.values()]
            row: dict[str, Any] = {"name": name}
            for reduction, metric in _REDUCTIONS.items():
                right = [float(pair[metric]) for pair in rows.values()]
                share = sum(right) / len(right)
                low, high = wilson_interval(share, effective_count(right, prompts))
                row[reduction] = {"n": len(right), "share": share, "low": low, "high": high}
            found.append(row)
        cells = [
            [row["name"], str(row["sum"]["n"]), *(_share_cell(row[reduction]) for reduction in _REDUCTIONS)]
            for row in found
        ]
        note = (
            "Share of held-out pairs with the higher log-ratio to the reference on the chosen answer. The sum over "
            "tokens grows with length, the mean does not. High accuracy does not say that answers are good."
        )
        header = ["policy", "pairs", "sum of log-ratios", "mean per token"]
        return Result({"policies": found}, [Table("Implicit reward", header, cells, note, is_numbers=True)])


def _final_pairs(policy: OpenedPolicy) -> dict[str, dict[str, Any]]:
    assert policy.run is not None
    rows = [row for row in read_rows(policy.run, "held_out.jsonl") if row.get("moment") == "final"]
    if not rows or not all(is_number(row.get(metric)) for row in rows for metric in _REDUCTIONS.values()):
        raise UserError(
            f"{policy.run.folder} has no log-ratios of held-out pairs to a reference: tasks=implicit needs pairs, and "
            f"a loss with a reference or reference.for_metrics=true."
        )
    return rows_by_key(rows, "key")


def _share_cell(found: dict[str, Any]) -> str:
    return f"{percent(found['share'])} ({percent(found['low'])} to {percent(found['high'])})"


class Perplexity:
    """Nats per token of held-out SFT text: what a policy has forgotten of it.

    Raises:
        UserError: a run has no held-out SFT text, or policies read other tokens.
    """

    def __init__(self, field: Entrants) -> None:
        self._field = field
        self._groups = [_held_out_texts(policy) for policy in field.policies]
        first = [group.key(0) for group in self._groups[0]]
        for policy, groups in zip(field.policies, self._groups, strict=True):
            if [group.key(0) for group in groups] != first:
                raise UserError(
                    f"{policy.name} reads other held-out SFT text than {field.names[0]}, or in other tokens, so their "
                    f"perplexities do not compare."
                )

    def run(self) -> Result:
        """Nats per token of every policy, and the difference of each match."""
        nats = []
        for policy, groups in zip(self._field.policies, self._groups, strict=True):
            log.info("%s reads %d held-out conversations ...", policy.name, len(groups))
            nats.append(_nats(policy, groups))
        tokens = np.array([sum(group.scored_lengths) for group in self._groups[0]], dtype=float)
        names = self._field.names
        found = [
            {"name": name, "nats_per_token": (rate := float(own.sum() / tokens.sum())), "perplexity": math.exp(rate)}
            for name, own in zip(names, nats, strict=True)
        ]
        weights = drawn_weights(len(tokens))
        matches = []
        for i, j in self._field.matches:
            more = nats[i] - nats[j]
            low, high = bounds((weights @ more) / (weights @ tokens))
            value = float(more.sum() / tokens.sum())
            matches.append({"first": names[i], "second": names[j], "more": value, "low": low, "high": high})
        rows = [[str(r["name"]), f"{r['nats_per_token']:.4f}", f"{r['perplexity']:.4g}"] for r in found]
        pairs = [
            [str(m["first"]), str(m["second"]), f"{m['more']:+.4f} ({m['low']:+.4f} to {m['high']:+.4f})"]
            for m in matches
        ]
        about = f"{len(tokens)} held-out conversations of {int(tokens.sum())} scored tokens."
        note = "Above 0 the first policy has forgotten. 95% intervals by bootstrap over conversations."
        return Result(
            {"policies": found, "matches": matches, "conversations": len(tokens), "tokens": int(tokens.sum())},
            [
                Table("Held-out SFT text", ["policy", "nats per token", "perplexity"], rows, about, is_numbers=True),
                Table("Forgetting", ["first", "against", "more nats per token"], pairs, note, is_numbers=True),
            ],
        )


def _held_out_texts(policy: OpenedPolicy) -> list[Group]:
    """The held-out conversations, each with what comes before its first scored token as prompt."""
    questions = policy.questions
    held_out = () if questions.config.sft is None else questions.conversations.eval
    if not held_out:
        raise UserError(
            f"{policy.name} has no held-out SFT text: tasks=perplexity needs an SFT stage with sft.data.eval_size or "
            f"sft.data.eval_source."
        )
    groups = []
    for conversation in held_out:
        ids = np.array(conversation["input_ids"], dtype=np.int32)
        scored = np.array(conversation["completion_mask"], dtype=bool)
        begin = max(1, int(scored.argmax()))
        groups.append(Group(ids[:begin], (ids[begin:],), scored=(scored[begin:],)))
    return groups


def _nats(policy: OpenedPolicy, groups: Sequence[Group]) -> np.ndarray:
    """(groups,) -log p of the scored tokens of each."""
    device = policy.questions.device
    model = policy.load().eval()
    most = max(_TOKENS, *(len(group.prompt) + len(group.completions[0]) for group in groups))
    found = join_scores(groups, list(score_groups(model, groups, FlatLayout(), most, device)))
    return -found.sums().double().cpu().numpy()
