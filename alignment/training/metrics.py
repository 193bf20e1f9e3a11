"""The metrics of a preference step: per-example values and their exact means."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignment.losses import LossInputs, LossOutput
from alignment.losses.lists import better_pairs, table
from alignment.types import Group, RaggedLogps


@dataclass(frozen=True, slots=True)
class Observed:
    """What `preference_metrics` reads of a pass: tensors without gradient, still on the device, of any shape."""

    tensors: dict[str, Tensor]
    parts: dict[str, Tensor]

    @classmethod
    def of(cls, inputs: LossInputs, output: LossOutput) -> Observed:
        """Of a pass that was just made; looks at no value, so the host need not wait for a GPU."""
        found = {
            "policy": inputs.policy.values.detach(),
            "offsets": inputs.policy.offsets,
            "reference": None if inputs.reference is None else inputs.reference.values,
            "labels": inputs.labels,
            "sizes": inputs.sizes,
            "scores": inputs.scores,
            "lengths": inputs.lengths,
            "drawn": None if inputs.drawn is None else inputs.drawn.values,
            "losses": output.losses.detach(),
            "rewards": output.rewards.detach(),
        }
        return cls({name: tensor for name, tensor in found.items() if tensor is not None}, output.parts)


def read(passes: Sequence[Observed]) -> Iterator[tuple[LossInputs, LossOutput]]:
    """The inputs and outputs of these passes on the CPU, with one copy for all of them."""
    copied = iter(_on_cpu([x for seen in passes for x in (*seen.tensors.values(), *seen.parts.values())]))
    for seen in passes:
        found = {name: next(copied) for name in seen.tensors}
        offsets = found["offsets"]
        reference = RaggedLogps(found["reference"], offsets) if "reference" in found else None
        yield (
            LossInputs(
                RaggedLogps(found["policy"], offsets),
                reference,
                found.get("labels"),
                sizes=found.get("sizes"),
                scores=found.get("scores"),
                lengths=found.get("lengths"),
                drawn=RaggedLogps(found["drawn"], offsets) if "drawn" in found else None,
            ),
            LossOutput(found["losses"], found["rewards"], {name: next(copied) for name in seen.parts}),
        )


def _on_cpu(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors on the CPU. They travel as float64, which holds float32, booleans and counts exactly."""
    if not tensors:
        return []
    joined = torch.cat([tensor.double().flatten() for tensor in tensors]).cpu()
    pieces = joined.split([tensor.numel() for tensor in tensors])
    return [piece.to(x.dtype).reshape(x.shape) for piece, x in zip(pieces, tensors, strict=True)]


class Means:
    """Means over examples, kept as sums and counts, so that batching does not change them."""

    def __init__(self) -> None:
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._counts: defaultdict[str, int] = defaultdict(int)

    def join(self, others: Means, without: Collection[str] = ()) -> None:
        """Add the examples of other means to these, but for those of some names."""
        for name, value in others._sums.items():
            if name in without:
                continue
            self._sums[name] += value
            self._counts[name] += others._counts[name]

    def add(self, values: dict[str, Tensor]) -> None:
        """Add per-example values by name."""
        for name, tensor in values.items():
            self._sums[name] += tensor.double().sum().item()
            self._counts[name] += tensor.numel()

    def take(self) -> dict[str, float]:
        """Return the means so far, in order of first appearance, and start again."""
        means = {name: self._sums[name] / count for name, count in self._counts.items() if count}
        self._sums.clear()
        self._counts.clear()
        if "rewards/margins" not in means and {"rewards/chosen", "rewards/rejected"} <= means.keys():
            # Rows have no pair, so their margin is the difference of the two means.
            for kind, gap in _GAPS.items():
                if f"{kind}/chosen" in means:
                    means[f"{kind}/{gap}"] = means[f"{kind}/chosen"] - means[f"{kind}/rejected"]
        return means


# What the difference of chosen and rejected is called, for each kind of metric that has one.
_GAPS = {"rewards": "margins", "nats": "margins", "nats_per_token": "margins", "lengths": "gap"}
# Kinds of metrics that should be higher for the chosen completion, so that a pair can be right.
_RANKED = ("rewards", "nats", "nats_per_token")


@torch.no_grad()
def preference_metrics(inputs: LossInputs, output: LossOutput) -> dict[str, Tensor]:
    """Per-example metrics under TRL's names, and the same quantities in nats, which are comparable across losses.

    - `rewards/*`: what the objective itself optimises, in its own units.
    - `nats/*`: the log-ratio to the reference, summed over the completion; `nats_per_token/*`: its mean per token.
    - `ranking/*`: the policy alone.
    - `lengths/gap`: by how many tokens the chosen completion is longer.
    - `rewards/concordance`: for two completions of a list with different scores, whether the rewards order them right.
    - `kl/offline`: the log-ratio of every completion, chosen or not. Its mean stands in for KL(policy || reference),
      which is defined over the policy's own samples; over other texts it is biased and can be negative.

    In a ranked list the best completion counts as chosen and the worst as rejected.

    Answers that the policy has drawn are neither chosen nor rejected. Of them there are `kl/teacher`, the log-ratio to
    the teacher when they were drawn, summed over the answer, whose mean is the sampled KL(policy || teacher);
    `kl/teacher_per_token`, its mean per token; and `lengths/answers`.

    A reward model has no log-probs: of it there are `rewards/*`, with `rewards/mean` over all completions, and lengths.

    Returns:
        name -> detached values, one per pair, row, completion, or two completions of a list.
    """
    if inputs.drawn is not None:
        return _of_drawn(inputs) | output.parts
    per_sequence = _per_sequence(inputs, output)
    metrics = _by_row(inputs, per_sequence) if inputs.labels is not None else _by_pair(inputs, per_sequence)
    if inputs.lengths is not None:
        metrics["rewards/mean"] = output.rewards
    if "nats" in per_sequence:
        metrics["kl/offline"] = per_sequence["nats"]
    if inputs.sizes is not None:
        rewards = table(output.rewards, inputs.sizes)
        right = rewards[:, :, None] > rewards[:, None]
        metrics["rewards/concordance"] = right[better_pairs(inputs.sizes, inputs.scores)].float()
    metrics.update(output.parts)
    return metrics


@torch.no_grad()
def undecided_metrics(inputs: LossInputs, output: LossOutput) -> frozenset[str]:
    """The metrics that ask which of two answers is better where these inputs, free of rounding, say that none is."""
    found = preference_metrics(inputs, output)
    kinds = [kind for kind in _RANKED if f"{kind}/margins" in found and not found[f"{kind}/margins"].any()]
    return frozenset(f"{kind}/{question}" for kind in kinds for question in ("accuracies", "ties", "concordance"))


@torch.no_grad()
def held_out_rows(groups: Sequence[Group], inputs: LossInputs, output: LossOutput) -> list[dict[str, Any]]:
    """The metrics of each single pair, row or list, for comparisons of the same items across runs.

    Args:
        groups: the items of the inputs.

    Returns:
        One dict per item: `source`, `key` (a hash of its tokens, or of the prompt of an answer that was drawn: equal in
        runs with the same data and tokenizer), its
        metrics (a labelled row has those of its side), and with a reference its log-probs as `reference_logps/*`. In a
        mixture `dataset` names its source.
    """
    per_sequence = _per_sequence(inputs, output)
    if inputs.reference is not None:
        per_sequence["reference_logps"] = inputs.reference.sums()
    rows: list[dict[str, Any]] = [{"source": group.source, "key": _key(group)} for group in groups]
    for row, group in zip(rows, groups, strict=True):
        if group.dataset:
            row["dataset"] = group.dataset
    if inputs.labels is None or inputs.drawn is not None:
        named = _by_pair(inputs, per_sequence) if inputs.drawn is None else _of_drawn(inputs)
        for name, values in named.items():
            for row, value in zip(rows, values.tolist(), strict=True):
                row[name] = value
    else:
        for kind, values in per_sequence.items():
            for row, value, label in zip(rows, values.tolist(), inputs.labels.tolist(), strict=True):
                row[f"{kind}/{'chosen' if label else 'rejected'}"] = value
    return rows


def means_by_dataset(rows: Sequence[dict[str, Any]], losses: Tensor) -> dict[str, float]:
    """The means over the items of each source of a mixture, as "<source>/<metric>"; nothing without a mixture.

    Args:
        rows: from `held_out_rows`.
        losses: (items,), or (2 * items,) where the loss took pairs as rows, in the order of `rows_from_pairs`.
    """
    per_item = losses.detach().double().cpu().reshape(-1, len(rows)).mean(0)
    found: dict[str, float] = {}
    for name in dict.fromkeys(row["dataset"] for row in rows if "dataset" in row):
        members = [i for i, row in enumerate(rows) if row.get("dataset") == name]
        means = Means()
        means.add({"loss": per_item[members]})
        for i in members:
            for key, value in rows[i].items():
                if isinstance(value, int | float) and not key.startswith("reference_logps/"):
                    means.add({key: torch.tensor(value, dtype=torch.float64)})
        found |= {f"{name}/{key}": value for key, value in means.take().items()}
    return found


def _key(group: Group) -> str:
    asked = b"".join(group.keys()) if group.drawn is None else group.prompt.tobytes()
    return hashlib.blake2b(asked, digest_size=16).hexdigest()


def _of_drawn(inputs: LossInputs) -> dict[str, Tensor]:
    """name -> (answers,) values of answers that were drawn."""
    assert inputs.drawn is not None and inputs.reference is not None, "a loss that draws has a teacher"
    lengths = inputs.drawn.lengths
    nats = inputs.drawn.sums() - inputs.reference.sums()
    return {"kl/teacher": nats, "kl/teacher_per_token": nats / lengths, "lengths/answers": lengths}


def _per_sequence(inputs: LossInputs, output: LossOutput) -> dict[str, Tensor]:
    """kind -> (S,) values."""
    if inputs.lengths is not None:
        return {"rewards": output.rewards, "lengths": inputs.lengths}
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
    """name -> (items,) values from the best and the worst completion of each item."""
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
    if inputs.lengths is not None:
        return metrics
    means = inputs.policy.detach().means()
    metrics["ranking/accuracies"] = (metrics["logps/chosen"] > metrics["logps/rejected"]).float()
    metrics["ranking/accuracies_per_token"] = (means[best] > means[worst]).float()
    return metrics
