"""What every loss promises, whatever its mathematics."""

from dataclasses import fields, replace
from math import log
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, ValidationError

from alignment.errors import UserError
from alignment.losses import LOSSES
from alignment.types import RaggedLogps
from tests.helpers.loss_examples import ENUMS, EXAMPLES
from tests.helpers.loss_steps import MOVING, TRIPLES, make_step, sequences_of, statistics_of, take, with_policy

CONF = Path(__file__).parents[2] / "conf" / "loss"

every_loss = pytest.mark.parametrize("loss", EXAMPLES.values(), ids=EXAMPLES)
every_class = pytest.mark.parametrize("name", [name for name in LOSSES if name != "mixture"])
"""A mixture is composed of other losses; test_mixture.py looks at how."""


def upwards(step):
    """(tokens,) +1 where the objective wants a token more likely (chosen, desirable, best), -1 where less.

    Of a list the worst is wanted less likely; for those between best and worst, 0, it depends on the loss.
    """
    direction = 2.0 * step.preferred().double() - 1
    if step.sizes is not None:
        last = torch.zeros_like(direction, dtype=torch.bool)
        last[step.sizes.cumsum(0) - 1] = True
        direction[~step.preferred() & ~last] = 0
    return direction.repeat_interleave(step.policy.lengths)


def test_every_registered_loss_is_examined():
    assert {type(loss) for loss in EXAMPLES.values()} == set(LOSSES.values())
    assert {name: cls.name for name, cls in LOSSES.items()} == {name: name for name in LOSSES}


@every_loss
def test_value_at_the_reference(loss):
    step = make_step(loss, drift=0.0)
    step_statistics = loss.step_statistics(make_step(loss, drift=0.0, seed=99))
    closed_form = loss.at_reference(replace(step, policy=step.reference, seeds=None))
    assert closed_form.dtype == torch.float64
    torch.testing.assert_close(
        loss(replace(step, seeds=None), step_statistics).losses, closed_form, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [("dpo", log(2)), ("cdpo", log(2)), ("ipo_mean", 25.0), ("ipo_sum", 25.0)],
)
def test_constants_at_the_reference(name, value):
    """Log 2 with and without smoothing; 1 / (4 * 0.1^2) = 25."""
    loss = EXAMPLES[name]
    assert loss.at_reference(make_step(loss)).tolist() == pytest.approx([value] * 5)


def test_kto_at_the_reference_is_half_of_each_weight():
    loss = EXAMPLES["kto"]
    step = make_step(loss)
    halves = [0.665 if label else 0.35 for label in step.labels.tolist()]
    assert loss.at_reference(step).tolist() == pytest.approx(halves, rel=1e-15)


@every_loss
def test_only_the_losses_carry_a_gradient(loss):
    step = make_step(loss)
    output = loss(step, statistics_of(loss))
    assert output.losses.requires_grad
    assert not output.rewards.requires_grad
    assert not any(part.requires_grad for part in output.parts.values())
    assert output.losses.shape == (5,)
    assert output.rewards.shape == (len(step.policy),)
    assert all(part.shape == (5,) for part in output.parts.values())


def every_loss_but(*names):
    """All examples except these, for which the test's docstring says why."""
    return pytest.mark.parametrize(
        "loss", [pytest.param(loss, id=name) for name, loss in EXAMPLES.items() if name not in names]
    )


DRAWING = [name for name, loss in EXAMPLES.items() if loss.requirements().draws]
"""Their answers are neither good nor bad: a teacher says of each token whether it shall be likelier."""
NLL_ALONE = [name for name in EXAMPLES if name.startswith("nll_")]


@every_loss_but("apo_down", "discopop", "sampo", *NLL_ALONE, *DRAWING, *MOVING)
def test_a_better_policy_has_a_lower_loss(loss):
    """The gradient has the right sign at every token, and so has a finite move.

    Where an item's loss depends on the others, only the loss of the step has to fall. APO-down lowers both answers,
    DiscoPOP pulls small margins back, SamPO leaves tokens out, and the NLL does not read the rejected answer, as their
    own tests show.
    """
    step = make_step(loss)
    step_statistics = statistics_of(loss)
    before = loss(step, step_statistics).losses
    direction = upwards(step)
    (gradient,) = torch.autograd.grad(before.sum(), step.policy.values)
    assert (gradient * direction)[direction != 0].max() < 0
    after = loss(with_policy(step, (step.policy.values + 0.01 * direction).detach()), step_statistics).losses
    if loss.requirements().whole_step:
        before, after = before.sum(), after.sum()
    assert (after < before).all()


@every_loss_but(*DRAWING)
def test_a_better_policy_has_a_larger_margin(loss):
    """The rewards are those of the objective: every move that lowers the loss raises the preferred reward."""
    step = make_step(loss)
    direction = upwards(step)
    moved = with_policy(step, (step.policy.values + 0.01 * direction).detach())
    step_statistics = statistics_of(loss)
    gain = loss(moved, step_statistics).rewards - loss(step, step_statistics).rewards
    direction = direction[step.policy.offsets[:-1]]
    assert (gain * direction)[direction != 0].min() > 0


@every_loss_but("wpo", *DRAWING, *MOVING)
def test_gradient_against_finite_differences(loss):
    """Weights of WPO and OPD follow the policy without a gradient: their own tests hold these fixed."""
    step = make_step(loss)
    step_statistics = statistics_of(loss)

    def losses(values):
        return loss(with_policy(step, values), step_statistics).losses

    assert torch.autograd.gradcheck(losses, step.policy.values, rtol=1e-6, atol=1e-8)


@every_loss
def test_order_of_the_items_does_not_matter(loss):
    step = make_step(loss)
    step_statistics = statistics_of(loss)
    order = [3, 0, 4, 1, 2]
    sequences = sequences_of(step, loss, order)
    whole, permuted = loss(step, step_statistics), loss(take(step, loss, order), step_statistics)
    torch.testing.assert_close(permuted.losses, whole.losses[order], rtol=1e-14, atol=0)
    torch.testing.assert_close(permuted.rewards, whole.rewards[sequences], rtol=1e-14, atol=1e-15)
    for key, part in whole.parts.items():
        torch.testing.assert_close(permuted.parts[key], part[order], rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    "loss",
    [pytest.param(loss, id=name) for name, loss in EXAMPLES.items() if not loss.requirements().whole_step],
)
@pytest.mark.parametrize("cut", [1, 2, 4])
def test_a_step_may_be_split(loss, cut):
    """Two parts give the losses of the whole, with the statistics summed over the parts."""
    step = make_step(loss)
    mismatched = make_step(loss, seed=99)
    parts = [list(range(cut)), list(range(cut, 5))]
    step_statistics = loss.step_statistics(mismatched)
    if step_statistics is not None:
        summed = sum(loss.step_statistics(take(mismatched, loss, part)) for part in parts)
        torch.testing.assert_close(summed, step_statistics, rtol=1e-14, atol=0)
    outputs = [loss(take(step, loss, part), step_statistics) for part in parts]
    whole = loss(step, step_statistics)
    torch.testing.assert_close(torch.cat([o.losses for o in outputs]), whole.losses, rtol=1e-14, atol=0)
    torch.testing.assert_close(torch.cat([o.rewards for o in outputs]), whole.rewards, rtol=1e-14, atol=1e-15)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept(loss, dtype):
    cast = make_step(loss, dtype=dtype)
    step_statistics = loss.step_statistics(cast)
    output = loss(cast, step_statistics)
    assert {output.losses.dtype, output.rewards.dtype, *(p.dtype for p in output.parts.values())} == {dtype}
    assert step_statistics is None or step_statistics.dtype == dtype


@every_loss_but(*DRAWING, *MOVING)
def test_float64_has_no_float32_in_it(loss):
    """A move of 1e-10 nats, far below what float32 resolves, changes the losses as the gradient says."""
    step = make_step(loss)
    step_statistics = statistics_of(loss)
    before = loss(step, step_statistics).losses
    (gradient,) = torch.autograd.grad(before.sum(), step.policy.values)
    direction = upwards(step)
    after = loss(with_policy(step, (step.policy.values + 1e-10 * direction).detach()), step_statistics).losses
    expected = 1e-10 * (gradient * direction).sum()
    torch.testing.assert_close((after - before).sum().detach(), expected, rtol=1e-3, atol=0)


@every_loss
@pytest.mark.parametrize("chosen", [-1e4, -1e-8, 0.0])
@pytest.mark.parametrize("rejected", [-1e4, -1e-8, 0.0])
def test_extremes_in_float32(loss, chosen, rejected, inputs):
    """Mean log-probs from -1e4 to 0, log-ratios up to 1e4 either way: losses, rewards and gradients stay finite."""
    needs = loss.requirements()
    policy, reference = [[chosen] * 2, [rejected] * 2], [[-5e3 - chosen / 2] * 2, [-1.0] * 2]
    pairs = needs.min_items if needs.unit == "pair" else 1
    if pairs == 2:
        policy, reference = policy + policy[::-1], reference + reference[::-1]
    if loss.name in TRIPLES:
        policy, reference = policy[:1] + policy, reference[:1] + reference
    step = inputs(policy, reference, [True, False] if needs.unit == "row" else None, torch.float32)
    more = make_step(loss, items=2 if needs.unit == "row" else pairs, dtype=torch.float32)
    step = replace(
        step,
        sizes=torch.tensor([len(policy)]) if needs.unit == "list" else None,
        scores=torch.tensor([1e3, -1e3], dtype=torch.float64) if needs.scores else None,
        prompts=more.prompts,
        quantities={q: RaggedLogps(torch.tensor([1.0, 0.0, 0.5, 1e-6]), step.policy.offsets) for q in needs.quantities},
        state=more.state,
        seeds=more.seeds,
    )
    step_statistics = loss.step_statistics(step)
    output = loss(step, step_statistics)
    (gradient,) = torch.autograd.grad(output.losses.sum(), step.policy.values)
    for tensor in (output.losses, output.rewards, gradient, *output.parts.values()):
        assert torch.isfinite(tensor).all()


def recommended(name):
    """The values of conf/loss/<name>.yaml, without its defaults list."""
    values = OmegaConf.load(CONF / f"{name}.yaml")
    assert values.pop("defaults") == [f"/schema/loss/{name}", "_self_"]
    return values


@every_class
def test_is_its_own_schema(name):
    """Structured config, merge, object: the way that a recipe's values take."""
    values = recommended(name)
    schema = OmegaConf.structured(LOSSES[name])
    loss = OmegaConf.to_object(OmegaConf.merge(schema, values))
    assert type(loss) is LOSSES[name]
    assert set(values) == {f.name for f in fields(LOSSES[name])}
    plain = {key: ENUMS[key][value] if key in ENUMS else value for key, value in values.items()}
    assert loss == LOSSES[name](**plain)


@every_class
def test_schema_has_no_defaults_and_knows_its_keys(name):
    schema = OmegaConf.structured(LOSSES[name])
    with pytest.raises(MissingMandatoryValue):
        OmegaConf.to_object(schema)
    with pytest.raises(ConfigKeyError):
        OmegaConf.merge(schema, {"bata": 0.1})
    with pytest.raises(ValidationError):
        OmegaConf.merge(schema, {fields(LOSSES[name])[0].name: "high"})


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("mixture", "nll")])
def test_range_check_reaches_the_user(name):
    """The NLL has no number among its settings."""
    first = fields(LOSSES[name])[0].name
    broken = OmegaConf.merge(OmegaConf.structured(LOSSES[name]), recommended(name), {first: -1.0})
    with pytest.raises(UserError, match=rf"^loss\.{first} must be .*, not -1\.0\.$"):
        OmegaConf.to_object(broken)


def test_no_loss_is_an_option_of_its_own():
    text = (CONF / "none.yaml").read_text()
    assert text.splitlines()[0] == "# @package _global_"
    assert OmegaConf.create(text) == {"loss": None}


def test_every_loss_has_its_values_and_the_other_way_round():
    assert {path.stem for path in CONF.glob("*.yaml")} == {*LOSSES, "none", "mpo"}
