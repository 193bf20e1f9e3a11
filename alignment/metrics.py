"""What is reported of a preference step: per-example values and their exact means."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from alignment.losses import LossInputs, LossOutput
from alignment.losses.lists import better_pairs, table


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
            for kind in ("rewards", "nats"):
                if f"{kind}/chosen" in means:
                    means[f"{kind}/margins"] = means[f"{kind}/chosen"] - means[f"{kind}/rejected"]
        return means


@torch.no_grad()
def preference_metrics(inputs: LossInputs, output: LossOutput) -> dict[str, Tensor]:
    """Per-example metrics under TRL's names, and the same quantities in nats, comparable across losses.

    `rewards/*` is what the objective itself optimises, in its own units; `nats/*` is the log-ratio to the reference,
    summed over the completion; `ranking/*` looks at the policy alone. Of a ranked list the best completion is the
    chosen, the worst the rejected one; `rewards/concordance` says of each two of its completions with different scores
    whether the rewards order them rightly.

    Returns:
        name -> one value per pair (or per row, or per two completions of a list, that it applies to), detached.
    """
    policy = inputs.policy.detach()
    per_sequence = {"rewards": output.rewards, "logps": policy.sums(), "lengths": policy.lengths}
    if inputs.reference is not None:
        per_sequence["nats"] = per_sequence["logps"] - inputs.reference.sums()
    metrics: dict[str, Tensor] = {}
    if inputs.labels is not None:
        for kind, values in per_sequence.items():
            metrics[f"{kind}/chosen"] = values[inputs.labels]
            metrics[f"{kind}/rejected"] = values[~inputs.labels]
    else:
        best = inputs.favoured()
        worst = best.roll(-1)  # the one before the next best one
        for kind, values in per_sequence.items():
            chosen, rejected = values[best], values[worst]
            metrics[f"{kind}/chosen"], metrics[f"{kind}/rejected"] = chosen, rejected
            if kind in ("rewards", "nats"):
                metrics[f"{kind}/margins"] = chosen - rejected
                metrics[f"{kind}/accuracies"] = (chosen > rejected).float()
        metrics["rewards/ties"] = (metrics["rewards/chosen"] == metrics["rewards/rejected"]).float()
        means = policy.means()
        metrics["ranking/accuracies"] = (metrics["logps/chosen"] > metrics["logps/rejected"]).float()
        metrics["ranking/accuracies_per_token"] = (means[best] > means[worst]).float()
        if inputs.sizes is not None:
            rewards = table(output.rewards, inputs.sizes)
            right = rewards[:, :, None] > rewards[:, None]
            metrics["rewards/concordance"] = right[better_pairs(inputs.sizes, inputs.scores)].float()
    metrics.update(output.parts)
    return metrics
