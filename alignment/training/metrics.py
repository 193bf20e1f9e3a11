"""What is reported of a preference step: per-example values and their exact means."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from alignment.losses import LossInputs, LossOutput
from alignment.losses.lists import better_pairs, table
from alignment.types import Group


class Means:
    """Means over examples, kept as sums and counts: how the examples were batched leaves no trace."""

    def __init__(self) -> None:
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._counts: defaultdict[str, int] = defaultdict(int)

    @classmethod
    def joined(cls, parts: Sequence[Means]) -> Means:
        """The means over the examples of all parts."""
        whole = cls()
        for part in parts:
            for name, value in part._sums.items():
                whole._sums[name] += value
                whole._counts[name] += part._counts[name]
        return whole

    def add(self, values: dict[str, Tensor]) -> None:
        """Add per-example values by name."""
        for name, tensor in values.items():
            self._sums[name] += tensor.double().sum().item()
            self._counts[name] += tensor.numel()

    def take(self) -> dict[str, float]:
        """The means so far, in order of first appearance; starts anew."""
        means = {name: self._sums[name] / count for name, count in self._counts.items() if count}
        self._sums.clear()
        self._counts.clear()
        if "rewards/margins" not in means and {"rewards/chosen", "rewards/rejected"} <= means.keys():
            # Rows have no partner: their margin is the difference of the two means.
            for kind, gap in _GAPS.items():
                if f"{kind}/chosen" in means:
                    means[f"{kind}/{gap}"] = means[f"{kind}/chosen"] - means[f"{kind}/rejected"]
        return means


# Differences of chosen and rejected, by the name that each kind's has.
_GAPS = {"rewards": "margins", "nats": "margins", "nats_per_token": "margins", "lengths": "gap"}
# Kinds of which a pair can be right: what is higher for chosen completions.
_RANKED = ("rewards", "nats", "nats_per_token")


@torch.no_grad()
def preference_metrics(inputs: LossInputs, output: LossOutput) -> dict[str, Tensor]:
    """Per-example metrics under TRL's names, and the same quantities in nats, comparable across losses.

    `rewards/*` is what the objective itself optimises, in its own units; `nats/*` is the log-ratio to the reference,
    summed over the completion, `nats_per_token/*` its mean over the completion's tokens; `ranking/*` looks at the
    policy alone; `lengths/gap` is by how many tokens chosen completions are longer. Of a ranked list the best
    completion is the chosen, the worst the rejected one; `rewards/concordance` says of each two of its completions with
    different scores whether the rewards order them rightly.

    `kl/offline` is the log-ratio of every completion, chosen or not. Its mean stands in for KL(policy || reference),
    which is one over the policy's own samples: over other texts it is biased, and may well be negative.

    Returns:
        name -> one value per pair (or per row, per completion, or per two completions of a list, that it applies to),
        detached.
    """
    per_sequence = _per_sequence(inputs, output)
    metrics = _by_row(inputs, per_sequence) if inputs.labels is not None else _by_pair(inputs, per_sequence)
    if "nats" in per_sequence:
        metrics["kl/offline"] = per_sequence["nats"]
    if inputs.sizes is not None:
        rewards = table(output.rewards, inputs.sizes)
        right = rewards[:, :, None] > rewards[:, None]
        metrics["rewards/concordance"] = right[better_pairs(inputs.sizes, inputs.scores)].float()
    metrics.update(output.parts)
    return metrics


@torch.no_grad()
def held_out_rows(groups: Sequence[Group], inputs: LossInputs, output: LossOutput) -> list[dict[str, Any]]:
    """The metrics of each pair, row or list on its own, by their names, for comparisons of the same pairs.

    Args:
        groups: the items of the inputs.

    Returns:
        A row for each: `source`, `key` (a hash of its tokens: equal in runs that share the data and the tokenizer), its
        metrics (of a labelled row those of its side), and with a reference its log-probs as `reference_logps/*`.
    """
    per_sequence = _per_sequence(inputs, output)
    if inputs.reference is not None:
        per_sequence["reference_logps"] = inputs.reference.sums()
    rows: list[dict[str, Any]] = [{"source": group.source, "key": _key(group)} for group in groups]
    if inputs.labels is None:
        for name, values in _by_pair(inputs, per_sequence).items():
            for row, value in zip(rows, values.tolist(), strict=True):
                row[name] = value
    else:
        for kind, values in per_sequence.items():
            for row, value, label in zip(rows, values.tolist(), inputs.labels.tolist(), strict=True):
                row[f"{kind}/{'chosen' if label else 'rejected'}"] = value
    return rows


def _key(group: Group) -> str:
    return hashlib.blake2b(b"".join(group.keys()), digest_size=16).hexdigest()


def _per_sequence(inputs: LossInputs, output: LossOutput) -> dict[str, Tensor]:
    """kind -> (S,) values."""
    policy = inputs.policy.detach()
    values = {"rewards": output.rewards, "logps": policy.sums(), "lengths": policy.lengths}
    if inputs.reference is not None:
        values["nats"] = values["logps"] - inputs.reference.sums()
        values["nats_per_token"] = values["nats"] / values["lengths"]
    return values


def _by_row(inputs: LossInputs, per_sequence: dict[str, Tensor]) -> dict[str, Tensor]:
    assert inputs.labels is not None
    sides = {"chosen": inputs.labels, "rejected": ~inputs.labels}
    return {f"{kind}/{side}": values[own] for kind, values in per_sequence.items() for side, own in sides.items()}


def _by_pair(inputs: LossInputs, per_sequence: dict[str, Tensor]) -> dict[str, Tensor]:
    """name -> (items,) values, of the best and the worst completion of each item."""
    metrics: dict[str, Tensor] = {}
    best = inputs.preferred()
    worst = best.roll(-1)  # the one before the next best one
    for kind, values in per_sequence.items():
        chosen, rejected = values[best], values[worst]
        metrics[f"{kind}/chosen"], metrics[f"{kind}/rejected"] = chosen, rejected
        if kind in _GAPS:
            metrics[f"{kind}/{_GAPS[kind]}"] = chosen - rejected
        if kind in _RANKED:
            metrics[f"{kind}/accuracies"] = (chosen > rejected).float()
    metrics["rewards/ties"] = (metrics["rewards/chosen"] == metrics["rewards/rejected"]).float()
    means = inputs.policy.detach().means()
    metrics["ranking/accuracies"] = (metrics["logps/chosen"] > metrics["logps/rejected"]).float()
    metrics["ranking/accuracies_per_token"] = (means[best] > means[worst]).float()
    return metrics
