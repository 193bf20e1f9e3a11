"""Steps of random log-probs with everything that a loss asks for."""

from dataclasses import replace

import torch

from alignment.losses import LossInputs, Quantity
from alignment.types import RaggedLogps

TRIPLES = ("tpo", "tpo_l")
"""They read lists of three completions and no other."""

MOVING = ("bco", "beta_dpo", "beta_dpo_all_kept", "alpha_dpo", "mixture_of_a_step")
"""Statistics of the step enter them without a gradient: a move of the policy moves these too, so that differences of
the loss do not follow its gradient. test_running_state.py holds them fixed."""


def make_step(loss, items=5, seed=0, drift=0.1, dtype=torch.float64):
    """A step of completions of 1 to 9 tokens whose policy lies within `drift` nats per token of the reference.

    With everything that the loss asks for, in that dtype; at drift 0 the policy is the reference in all of it.
    """
    needs = loss.requirements()
    generator = torch.Generator().manual_seed(seed)

    def uniform(count):
        return torch.rand(count, generator=generator, dtype=torch.float64)

    def ragged(lengths):
        return torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])

    sizes = None
    if needs.unit == "list":
        sizes = torch.randint(*((3, 4) if loss.name in TRIPLES else (2, 5)), (items,), generator=generator)
    sequences = {"pair": 2 * items, "row": items}.get(needs.unit) or int(sizes.sum())
    offsets = ragged(torch.randint(1, 10, (sequences,), generator=generator))
    tokens = int(offsets[-1])
    reference = -uniform(tokens) - 2 * drift
    noise = drift * (2 * uniform(tokens) - 1)
    labels = torch.arange(items) % 3 != 1 if needs.unit == "row" else None
    scores = prompts = None
    if needs.scores:
        per_item = [2] * items if sizes is None else sizes.tolist()
        scores = torch.cat([(2 * uniform(k)).sort(descending=True).values for k in per_item])
    if needs.prompts:
        starts = ragged(torch.randint(1, 6, (items,), generator=generator))
        prompts = RaggedLogps((-uniform(int(starts[-1]))).to(dtype).requires_grad_(), starts)
    quantities = {
        Quantity.collision: lambda: -uniform(tokens),
        Quantity.entropy: lambda: uniform(tokens),
        Quantity.divergence: lambda: drift * uniform(tokens),
        Quantity.forward_kl: lambda: uniform(tokens),
    }
    return LossInputs(
        RaggedLogps((reference + noise).to(dtype).requires_grad_(), offsets),
        RaggedLogps(reference.to(dtype), offsets),
        labels,
        sizes=sizes,
        scores=scores,
        prompts=prompts,
        quantities={q: RaggedLogps(quantities[q]().to(dtype), offsets) for q in Quantity if q in needs.quantities},
        state=loss.initial_state(),
        seeds=torch.randint(2**62, (items,), generator=generator),
        drawn=RaggedLogps((reference + drift * (2 * uniform(tokens) - 1)).to(dtype), offsets) if needs.draws else None,
    )


def statistics_of(loss, items=5, **keywords):
    """What the trainer passes as `step_statistics`; None for most losses."""
    return loss.step_statistics(make_step(loss, items, seed=99, **keywords))


def sequences_of(step, loss, items):
    """The numbers of the sequences of the given items."""
    sizes = {"pair": [2] * 5, "row": [1] * 5}.get(loss.requirements().unit) or step.sizes.tolist()
    return [s for i in items for s in range(sum(sizes[:i]), sum(sizes[: i + 1]))]


def take(step, loss, items):
    """The given items of a step, with everything of theirs, as a part of it."""
    sequences = sequences_of(step, loss, items)

    def picked(tensor, which):
        return None if tensor is None else tensor[which]

    return replace(
        step,
        policy=step.policy.select(sequences),
        reference=step.reference.select(sequences),
        labels=picked(step.labels, items),
        sizes=picked(step.sizes, items),
        scores=picked(step.scores, sequences),
        prompts=None if step.prompts is None else step.prompts.select(items),
        quantities={quantity: ragged.select(sequences) for quantity, ragged in step.quantities.items()},
        seeds=step.seeds[items],
        totals=step.step_totals(),
        drawn=None if step.drawn is None else step.drawn.select(sequences),
    )


def with_policy(step, values):
    """The step with other log-probs of the policy."""
    return replace(step, policy=RaggedLogps(values, step.policy.offsets))
