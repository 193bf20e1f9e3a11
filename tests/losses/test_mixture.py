"""Weighted sums of losses: by hand, against their parts, and as they are composed from settings."""

import json
from dataclasses import replace
from math import exp, log

import pytest
import torch

from alignment.config.compose import load
from alignment.data.tokens.units import as_rows
from alignment.errors import UserError
from alignment.losses import (
    BCO,
    DPO,
    IPO,
    KTO,
    ORPO,
    SPPO,
    BCOPair,
    LossInputs,
    Mixture,
    PlackettLuce,
    Quantity,
    SimPO,
    StepTotals,
)
from alignment.losses.ipo import Reduction
from alignment.losses.nll import NLL, NLLReduction, NLLScope
from alignment.training.objective import mismatched_groups
from alignment.types import Group, RaggedLogps
from tests.conftest import random_groups
from tests.helpers.loss_steps import make_step
from tests.helpers.tiny_runs import project, tiny

__all__ = ["project", "tiny"]

DPO_1 = DPO(beta=1.0, label_smoothing=0.0)
KTO_1 = KTO(beta=1.0, desirable_weight=1.0, undesirable_weight=1.0)
IPO_1 = IPO(tau=0.5, reduction=Reduction.sum)
NLL_SUM = NLL(nll_reduction=NLLReduction.sequence_sum, nll_scope=NLLScope.response)


def mixture(*parts):
    """A mixture of (weight, loss)."""
    return Mixture(
        weights={loss.name: weight for weight, loss in parts}, settings={loss.name: loss for _, loss in parts}
    )


def sigmoid(x):
    return 1 / (1 + exp(-x))


def test_a_weighted_sum_by_hand(inputs, gradients):
    """d = log 3 and -log 3: DPO log(4/3) and log 4; IPO with the target 1: (log 3 - 1)^2 and (log 3 + 1)^2.

    The second pair prefers the wrong answer. Per chosen token -0.5 S(-d) + 2 * 2 (d - 1), the rejected the negative.
    """
    step = inputs(
        [[log(3) - 1], [-1.0, -1.0], [-2.0], [log(3) - 2, -1.0]], [[-1.0], [-1.0, -1.0], [-2.0], [-2.0, -1.0]]
    )
    output = mixture((0.5, DPO_1), (2.0, IPO_1))(step)
    dpo, ipo = [log(4 / 3), log(4)], [(log(3) - 1) ** 2, (log(3) + 1) ** 2]
    assert output.losses.tolist() == pytest.approx([0.5 * a + 2 * b for a, b in zip(dpo, ipo, strict=True)])
    assert output.parts["dpo/loss"].tolist() == pytest.approx(dpo)
    assert output.parts["ipo/loss"].tolist() == pytest.approx(ipo)
    slopes = [-0.5 * 0.25 + 4 * (log(3) - 1), -0.5 * 0.75 + 4 * (-log(3) - 1)]
    found = gradients(output.losses, step)
    for slope, chosen, rejected in zip(slopes, found[0::2], found[1::2], strict=True):
        assert chosen == pytest.approx([slope])
        assert rejected == pytest.approx([-slope] * 2)


def test_mpo_by_hand(inputs, gradients):
    """Wang et al.: 0.8 DPO + 0.2 (quality of the chosen + quality of the rejected) + the NLL per token.

    u = log 3 and v = -log 3 with beta 1: DPO log(10/9); BCO with both rewards in its mean, delta 0: 2 log(4/3); the
    chosen answer has two tokens of -1.5.
    """
    bco = BCO(beta=1.0, density_weights=False)
    nll = NLL(nll_reduction=NLLReduction.sequence_mean, nll_scope=NLLScope.response)
    loss = mixture((0.8, DPO_1), (0.2, bco), (1.0, nll))
    step = inputs([[-1.5, -1.5], [-1.0 - log(3)]], [[-1.5, -1.5 - log(3)], [-1.0]], seeds=torch.tensor([7]))
    output = loss(replace(step, state=loss.initial_state()))
    assert output.losses.tolist() == pytest.approx([0.8 * log(10 / 9) + 0.2 * 2 * log(4 / 3) + 1.5])
    assert output.state == {"bco/delta": pytest.approx(0.0), "bco/count": 2}
    chosen, rejected = gradients(output.losses, step)
    assert chosen == pytest.approx([-0.8 * 0.1 - 0.2 * 0.25 - 0.5] * 2)
    assert rejected == pytest.approx([0.8 * 0.1 + 0.2 * 0.25])


@pytest.mark.parametrize("loss", [DPO_1, KTO_1, PlackettLuce(beta=0.1)], ids=["pairs", "rows", "lists"])
def test_of_one_loss_it_is_that_loss(loss):
    step = make_step(loss, seed=3)
    both = mixture((1.0, loss), (0.0, NLL_SUM))
    assert both.requirements() == loss.requirements()
    step_statistics = loss.step_statistics(make_step(loss, seed=99))
    alone, mixed = loss(step, step_statistics), both(step, step_statistics)
    torch.testing.assert_close(mixed.losses, alone.losses, rtol=0, atol=0)
    torch.testing.assert_close(mixed.rewards, alone.rewards, rtol=0, atol=0)
    assert both.mismatched(5) == loss.mismatched(5)
    gradients = [torch.autograd.grad(o.losses.sum(), step.policy.values)[0] for o in (alone, mixed)]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


def ratios_of(groups):
    """Log-probs of every completion under a prompt, made of its tokens alone; the reference's are others."""
    values = [[-0.1 - (g.prompt.sum() * 7 + int(t)) % 13 / 10 for t in c] for g in groups for c in g.completions]
    policy = RaggedLogps.from_sequences([torch.tensor(v, dtype=torch.float64) for v in values])
    return policy, RaggedLogps(-1 - policy.values**2, policy.offsets)


def of_groups(groups):
    policy, reference = ratios_of(groups)
    labels = [label for group in groups for label in group.labels or ()]
    return LossInputs(policy, reference, torch.tensor(labels) if labels else None)


def test_kto_inside_pairs_is_twice_kto_on_their_rows():
    """Two rows are added per pair: the sum over the pairs is that over the rows, the mean twice theirs."""
    pairs = random_groups(4, seed=5)
    rows = as_rows(pairs)
    kto = KTO(beta=0.3, desirable_weight=1.33, undesirable_weight=0.7)
    both = mixture((1.0, kto), (0.5, DPO_1))
    assert [g.keys() for g in mismatched_groups(both, pairs)] == [g.keys() for g in mismatched_groups(kto, rows)]
    step_statistics = both.step_statistics(of_groups(mismatched_groups(both, pairs)))
    alone = kto(of_groups(rows), kto.step_statistics(of_groups(mismatched_groups(kto, rows))))
    mixed = both(of_groups(pairs), step_statistics)
    dpo = DPO_1(of_groups(pairs)).losses
    torch.testing.assert_close(mixed.losses, alone.losses[:4] + alone.losses[4:] + 0.5 * dpo)
    torch.testing.assert_close(mixed.parts["kto/loss"].mean(), 2 * alone.losses.mean())
    torch.testing.assert_close(mixed.parts["kto/kl"], alone.parts["kl"][:4])
    assert alone.parts["kl"][0] > 0
    torch.testing.assert_close(mixed.rewards[0::2], alone.rewards[:4])
    torch.testing.assert_close(mixed.rewards[1::2], alone.rewards[4:])


def test_a_row_of_a_pair_has_a_neighbour_with_another_prompt():
    groups = [Group(g.prompt, g.completions) for g in random_groups(3, seed=1)]
    loss = mixture((1.0, DPO_1), (1.0, KTO_1))
    assert loss.requirements().min_items == 2
    assert all(i // 2 != j // 2 for i, j in loss.mismatched(len(groups)))
    assert sorted(i for i, _ in loss.mismatched(3)) == list(range(6))


def test_a_list_loss_reads_a_pair_as_a_list_of_two():
    """Plackett-Luce of two answers is DPO."""
    both = mixture((2.0, PlackettLuce(beta=0.1)), (1.0, DPO(beta=0.1, label_smoothing=0.0)))
    assert both.requirements().unit == "pair"
    output = both(make_step(both))
    torch.testing.assert_close(output.parts["plackett_luce/loss"], output.parts["dpo/loss"])
    torch.testing.assert_close(output.losses, 3 * output.parts["dpo/loss"], check_stride=False)


def test_what_the_rows_of_pairs_are_given(inputs):
    """Everything that comes with the sequences, in the order of the rows; every row draws for itself."""
    seen = []

    class Spy(KTO):
        def __call__(self, inputs, step_statistics=None):
            seen.append(inputs)
            return super().__call__(inputs, step_statistics)

    spy = Spy(beta=1.0, desirable_weight=1.0, undesirable_weight=1.0)
    step = inputs(
        [[-1.0], [-2.0], [-3.0], [-4.0]],
        [[-1.5]] * 4,
        scores=torch.tensor([1.0, 2.0, 3.0, 4.0]),
        prompts=RaggedLogps(torch.tensor([-5.0, -6.0]), torch.tensor([0, 1, 2])),
        quantities={Quantity.entropy: RaggedLogps(torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.arange(5))},
        totals=StepTotals(items=9, tokens=20, prompt_tokens=30),
        seeds=torch.tensor([10, 21]),
    )
    step_statistics = torch.tensor([1.0, 1.0], dtype=torch.float64)
    mixture((1.0, spy), (1.0, DPO_1))(step, step_statistics)
    [rows] = seen
    assert rows.policy.values.tolist() == [-1, -3, -2, -4]
    assert rows.labels.tolist() == [True, True, False, False]
    assert rows.scores.tolist() == [1, 3, 2, 4]
    assert rows.prompts.values.tolist() == [-5, -6, -5, -6]
    assert rows.quantities[Quantity.entropy].values.tolist() == pytest.approx([0.1, 0.3, 0.2, 0.4])
    assert rows.totals == StepTotals(items=18, tokens=20, prompt_tokens=30)
    assert rows.seeds[:2].tolist() == [10, 21] and len(set(rows.seeds.tolist())) == 4


def test_requirements_are_those_of_all_parts():
    nll = NLL(nll_reduction=NLLReduction.token_mean, nll_scope=NLLScope.prompt_and_response)
    bco = BCO(beta=0.1, density_weights=False)
    assert not mixture((1.0, SimPO(beta=2.0, gamma_beta_ratio=0.5)), (1.0, NLL_SUM)).requirements().reference
    needs = mixture((1.0, SimPO(beta=2.0, gamma_beta_ratio=0.5)), (1.0, nll), (1.0, bco)).requirements()
    assert (needs.unit, needs.reference, needs.prompts, needs.whole_step) == ("pair", True, True, True)
    assert mixture((1.0, bco), (1.0, KTO_1)).requirements().unit == "row"


def test_the_rewards_are_those_of_the_first_part_with_a_weight(inputs):
    step = inputs([[-1.0, -2.0], [-3.0]], [[-1.5, -1.5], [-2.0]])
    simpo = SimPO(beta=2.0, gamma_beta_ratio=0.5)
    for loss in (mixture((0.0, DPO_1), (1.0, simpo), (5.0, IPO_1)), mixture((1.0, simpo), (9.0, DPO_1))):
        assert loss(step).rewards.tolist() == simpo(step).rewards.tolist()


def test_the_state_goes_to_the_part_that_it_came_from():
    bco = BCO(beta=1.0, density_weights=False)
    loss = mixture((1.0, bco), (1.0, KTO_1))
    state = loss.initial_state()
    alone = bco.initial_state()
    for seed in range(3):
        step = make_step(loss, seed=seed)
        step_statistics = loss.step_statistics(make_step(loss, seed=99))
        state = loss(replace(step, state=state), step_statistics).state
        alone = bco(replace(step, state=alone)).state
    assert state == {f"bco/{key}": value for key, value in alone.items()} and alone["count"] == 15


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([(1.0, DPO_1)], "loss.weights must name at least two losses, as in loss.weights.dpo=1, not 1."),
        ([(1.0, DPO_1), (-0.1, SPPO(beta=1.0))], "loss.weights.sppo must be a finite number, at least 0, not -0.1."),
        ([(1.0, DPO_1), (float("inf"), NLL_SUM)], "loss.weights.nll must be a finite number, at least 0, not inf."),
        ([(float("nan"), DPO_1), (1.0, NLL_SUM)], "loss.weights.dpo must be a finite number, at least 0, not nan."),
        ([(0.0, DPO_1), (0.0, NLL_SUM)], "loss.weights must have a weight above 0; all are 0."),
        (
            [(1.0, DPO_1), (1.0, BCO(beta=0.1, density_weights=True))],
            "loss.settings.bco.density_weights must be false in a mixture: it would weight all the losses.",
        ),
    ],
)
def test_refusals(parts, said):
    with pytest.raises(UserError) as caught:
        mixture(*parts)
    assert str(caught.value) == said


def test_two_losses_with_answers_to_other_prompts_are_refused():
    with pytest.raises(UserError, match="only one loss that scores answers to other prompts, not kto and other"):
        Mixture(weights={"kto": 1.0, "other": 1.0}, settings={"kto": KTO_1, "other": KTO_1})


# As settings


def test_parts_have_their_recommended_settings_but_for_those_given():
    loss = load("loss=mixture", "loss.weights={ipo: 1, orpo: 0.5}", "loss.settings.ipo.reduction=sum").loss
    recommended = load("loss=orpo").loss
    assert isinstance(recommended, ORPO)
    assert loss == Mixture(
        weights={"ipo": 1.0, "orpo": 0.5},
        settings={"ipo": IPO(tau=0.1, reduction=Reduction.sum), "orpo": recommended},
    )


def test_mpo_is_a_mixture():
    loss = load("loss=mpo").loss
    assert loss.weights == {"dpo": 0.8, "bco": 0.2, "nll": 1.0}
    assert loss.settings == {
        "dpo": DPO(beta=0.1, label_smoothing=0.0),
        "bco": BCO(beta=0.1, density_weights=False),
        "nll": NLL(nll_reduction=NLLReduction.sequence_mean, nll_scope=NLLScope.response),
    }
    changed = load("loss=mpo", "loss.weights.dpo=0.5", "loss.settings.dpo.beta=0.2").loss
    assert changed.weights["dpo"] == 0.5 and changed.settings["dpo"].beta == 0.2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["loss=mixture"], ["loss.weights", "two"]),
        (["loss=mpo", "loss.weights.kot=1"], ["loss.weights.kot", "kto"]),
        (["loss=mpo", "loss.weights.mpo=1"], ["loss.weights.mpo"]),
        (["loss=mpo", "loss.weights.none=1"], ["loss.weights.none"]),
        (["loss=mpo", "loss.weights.dpo=much"], ["loss.weights.dpo", "much"]),
        (["loss=mpo", "loss.settings.dpo.bata=1"], ["loss.settings.dpo.bata", "label_smoothing"]),
        (["loss=mpo", "loss.settings.dpo.beta=high"], ["loss.settings.dpo.beta", "high"]),
        (["loss=mpo", "loss.settings.dpo.beta=-1"], ["loss.settings.dpo.beta must be", "-1"]),
        (["loss=mpo", "loss.settings.dpo=0.1"], ["loss.settings.dpo must map", "0.1"]),
        (["loss=mpo", "loss.settings.kto.beta=1"], ["loss.settings.kto", "no effect"]),
        (["loss=mpo", "loss.beta=1"], ["loss.beta", "weights, settings"]),
    ],
    ids=lambda value: value[-1],
)
def test_wrong_settings_are_named_as_they_were_written(arguments, said):
    with pytest.raises(UserError) as caught:
        load(*arguments)
    assert all(part in str(caught.value) for part in said), caught.value
    assert "\n" not in str(caught.value)


def test_a_recipe_mixes(tmp_path):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mixed.yaml").write_text(
        "# @package _global_\ndefaults: [{override /loss: mixture}]\n"
        "loss: {weights: {bco_pair: 2, dpo: 1}, settings: {dpo: {beta: 0.05}}}\n"
    )
    mixed = load("recipe=mixed", config_dir=tmp_path).loss
    assert (list(mixed.weights), mixed.settings["dpo"].beta) == (["bco_pair", "dpo"], 0.05)
    assert isinstance(mixed.settings["bco_pair"], BCOPair)
    assert (
        load("recipe=mixed", "loss.settings.dpo.beta=0.5", "loss.weights.bco_pair=0").loss.settings["dpo"].beta == 0.5
    )
    assert load("recipe=mixed", "loss=dpo").loss == load("loss=dpo").loss


@pytest.mark.matrix
def test_a_run(tiny, tmp_path):
    """Every setting of every part is on record; the loss is the weighted sum of the parts that are logged beside it."""
    ended = tiny(
        "loss=mpo", "+loss.weights.kto=0.5", "sft=none", "trainer.max_steps=2", "trainer.log_every=1",
        "evaluation.prompts=0", "trainer.eval_every=1",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    [run_dir] = (tmp_path / "outputs" / "tiny").iterdir()
    stage = json.loads((run_dir / "summary.json").read_text())["stages"]["preference"]
    assert stage["loss"] == "mixture" and stage["settings"]["settings"]["kto"]["beta"] == 0.1
    assert stage["settings"]["settings"]["nll"]["nll_reduction"] == "sequence_mean"
    assert "density_weights: false" in (run_dir / "config.yaml").read_text()
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 5
    for row in rows:
        total = sum(w * row[f"{k}/loss"] for k, w in {"dpo": 0.8, "bco": 0.2, "nll": 1.0, "kto": 0.5}.items())
        assert row["loss"] == pytest.approx(total, rel=1e-4)
    report = (run_dir / "report.md").read_text()
    assert "mixture (weights (dpo 0.8, bco 0.2, nll 1, kto 0.5), settings (nll (nll_reduction sequence_mean" in report
