"""Any weighted sum of losses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from alignment.errors import not_negative, require
from alignment.losses.base import Loss, LossInputs, LossOutput, Requirements, as_typed
from alignment.losses.nll import NLL
from alignment.types import pairs_from_rows, rows_from_pairs


@dataclass(kw_only=True)
class Mixture(Loss):
    """L = sum over k of weight_k L_k, for the losses k that `weights` names.

    Every part computes what it computes alone, with its recommended settings but for those that `settings` gives, on
    one scoring of the step. A part of weight 0 is watched and not trained on.

    Where all parts read the same kind of items, so does the sum; `nll` reads any. Where they do not, the items are
    pairs: a loss of lists reads a pair as a list of two; a loss of rows reads it as a desirable and an undesirable row,
    whose two losses are *added* (all chosen completions first, then all rejected ones, so that a row's neighbour
    answers another prompt). KTO inside pairs is therefore twice KTO on the same completions as rows, where the mean is
    over rows.

    Paper: of sums in general none. `mpo`, mixed preference optimisation, is one of them: Wang et al. 2024,
    arXiv:2411.10442, 0.8 DPO + 0.2 BCO + 1.0 NLL.

    Gradient of -L per token: the weighted sum of the parts' G_w and G_l.

    Rewards: those of the first loss in `weights` whose weight is above 0. Parts: `<name>/loss`, unweighted, and
    `<name>/<part>` for every part that the loss reports; rows inside pairs report the mean of their two.

    Recommended: nothing in general; a weight multiplies a loss whose size is its own (SPPO's is some 1e5).

    Deviations: none. TRL's `loss_weights` does the same for losses that it knows as `loss_type`; its losses share one
    beta, and here every part has its own settings.
    """

    name: ClassVar[str] = "mixture"
    title: ClassVar[str] = "mixture"
    purpose: ClassVar[str] = "several losses at once, each with a weight"
    unit: ClassVar[str] = "pair"
    needs_reference: ClassVar[bool] = True

    weights: dict[str, float]
    settings: dict[str, Any]  # the losses themselves once composed

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            len(self.weights) >= 2,
            f"loss.weights must name at least two losses, as in loss.weights.dpo=1, not {len(self.weights)}.",
        )
        for name, weight in self.weights.items():
            as_typed(f"loss.weights.{name}", float, weight)
            not_negative(f"loss.weights.{name}", weight)
        require(any(self.weights.values()), "loss.weights must have a weight above 0; all are 0.")
        for name in self.settings:
            require(
                name in self.weights,
                f"loss.settings.{name} has no effect: loss.weights names {', '.join(self.weights)} only.",
            )
        for name in self.weights:
            require(
                isinstance(self.settings.get(name), Loss),
                f"loss.settings.{name} must be a loss, as loss.weights names it, not {self.settings.get(name)!r}.",
            )
        for name, part in self._parts().items():
            require(
                not part.requirements().density_weights,
                f"loss.settings.{name}.density_weights must be false in a mixture: it would weight all the losses.",
            )
        rewarding = [name for name, part in self._parts().items() if part.requirements().rewards]
        require(
            not rewarding,
            f"loss.weights cannot name {', '.join(rewarding)}: it trains a reward model, which has no log-probs that "
            f"others could read; choose it alone, with loss={', '.join(rewarding)}.",
        )
        drawing = [name for name, part in self._parts().items() if part.requirements().draws]
        require(
            not drawing,
            f"loss.weights cannot name {', '.join(drawing)}: it draws answers of its own, and others read those of the "
            f"data; choose it alone, with loss={', '.join(drawing)}.",
        )
        asking = [name for name, part in self._parts().items() if part.mismatched(2 * part.requirements().min_items)]
        require(
            len(asking) <= 1,
            f"loss.weights may name only one loss that scores answers to other prompts, not {' and '.join(asking)}.",
        )

    def requirements(self) -> Requirements:
        """The needs of all parts together."""
        needs = [part.requirements() for part in self._parts().values()]
        units = {part.requirements().unit for part in self._parts().values() if not isinstance(part, NLL)}
        return Requirements(
            unit=units.pop() if len(units) == 1 else "pair",
            reference=any(need.reference for need in needs),
            min_items=max(need.min_items for need in needs),
            whole_step=any(need.whole_step for need in needs),
            scores=any(need.scores for need in needs),
            prompts=any(need.prompts for need in needs),
            quantities=frozenset().union(*(need.quantities for need in needs)),
            orders_ties=any(need.orders_ties for need in needs),
        )

    def __call__(self, inputs: LossInputs, step_statistics: Tensor | None = None) -> LossOutput:
        """Losses (items,) and rewards (S,); parts `<name>/loss` and `<name>/<part>` (items,)."""
        outputs = {}
        for name, part in self._parts().items():
            output = part(self._inputs_of(name, inputs), step_statistics)
            outputs[name] = _of_pairs(output) if self._reads_pairs_as_rows(part) else output
        parts: dict[str, Tensor] = {}
        for name, output in outputs.items():
            parts[f"{name}/loss"] = output.losses.detach()
            parts |= {f"{name}/{key}": value for key, value in output.parts.items()}
        return LossOutput(
            self._sum({name: output.losses for name, output in outputs.items()}),
            outputs[next(name for name, weight in self.weights.items() if weight > 0)].rewards,
            parts,
            {f"{name}/{key}": value for name, output in outputs.items() for key, value in output.state.items()},
        )

    def at_reference(self, inputs: LossInputs) -> Tensor:
        """The weighted sum of the parts' closed forms."""
        values = {}
        for name, part in self._parts().items():
            value = part.at_reference(self._inputs_of(name, inputs))
            values[name] = value.view(2, -1).sum(0) if self._reads_pairs_as_rows(part) else value
        return self._sum(values)

    def problem(self, completions: int, scores: tuple[float, ...] | None) -> str | None:
        """The first problem that any part has."""
        found = (part.problem(completions, scores) for part in self._parts().values())
        return next((problem for problem in found if problem is not None), None)

    def initial_state(self) -> dict[str, float]:
        """The parts' states, as `<name>/<key>`."""
        return {
            f"{name}/{key}": value
            for name, part in self._parts().items()
            for key, value in part.initial_state().items()
        }

    def mismatched(self, num_items: int) -> list[tuple[int, int]]:
        """Those of the one part that asks for mismatched sequences."""
        for part in self._parts().values():
            if self._reads_pairs_as_rows(part):
                order = rows_from_pairs(num_items)
                if found := part.mismatched(2 * num_items):
                    return [(order[i], order[j]) for i, j in found]
            elif found := part.mismatched(num_items):
                return found
        return []

    def step_statistics(self, mismatched: LossInputs) -> Tensor | None:
        """The statistics of the one part that asks for mismatched sequences."""
        found = (part.step_statistics(mismatched) for part in self._parts().values())
        return next((step_statistics for step_statistics in found if step_statistics is not None), None)

    def _parts(self) -> dict[str, Loss]:
        return {name: self.settings[name] for name in self.weights}

    def _reads_pairs_as_rows(self, part: Loss) -> bool:
        return (part.requirements().unit, self.requirements().unit) == ("row", "pair")

    def _inputs_of(self, name: str, inputs: LossInputs) -> LossInputs:
        """The step as this part reads it."""
        part = self._parts()[name]
        keys = part.initial_state()
        inputs = replace(inputs, state={key: inputs.state[f"{name}/{key}"] for key in keys})
        if self._reads_pairs_as_rows(part):
            return _as_rows(inputs)
        if (part.requirements().unit, self.requirements().unit) == ("list", "pair"):
            return replace(inputs, sizes=torch.full_like(inputs.policy.offsets[2::2], 2))
        return inputs

    def _sum(self, values: dict[str, Tensor]) -> Tensor:
        return torch.stack([self.weights[name] * value for name, value in values.items()]).sum(0)


def _as_rows(inputs: LossInputs) -> LossInputs:
    """The completions of pairs as labelled rows, in the order of `rows_from_pairs`."""
    pairs = len(inputs.policy) // 2
    order = rows_from_pairs(pairs)
    return replace(
        inputs,
        policy=inputs.policy.select(order),
        reference=None if inputs.reference is None else inputs.reference.select(order),
        labels=torch.arange(2 * pairs, device=inputs.policy.values.device) < pairs,
        scores=None if inputs.scores is None else inputs.scores[order],
        prompts=None if inputs.prompts is None else inputs.prompts.select([*range(pairs), *range(pairs)]),
        quantities={quantity: ragged.select(order) for quantity, ragged in inputs.quantities.items()},
        totals=None if inputs.totals is None else replace(inputs.totals, items=2 * inputs.totals.items),
        seeds=None if inputs.seeds is None else torch.cat([inputs.seeds, inputs.seeds ^ 1]),  # no two draws are one
    )


def _of_pairs(rows: LossOutput) -> LossOutput:
    """The result for rows in the order of `rows_from_pairs`, per pair."""
    return LossOutput(
        rows.losses.view(2, -1).sum(0),
        rows.rewards[pairs_from_rows(len(rows.rewards) // 2)],
        {key: part.view(2, -1).mean(0) for key, part in rows.parts.items()},
        rows.state,
    )
