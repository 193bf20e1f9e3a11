"""What every loss promises, whatever its mathematics."""

from dataclasses import fields
from math import log
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, ValidationError

from alignment.errors import UserError
from alignment.losses import (
    DPO,
    DPOP,
    EXO,
    FDPO,
    GPO,
    IPO,
    KTO,
    LNDPO,
    LOSSES,
    NCA,
    ORPO,
    RDPO,
    SPPO,
    AlphaPO,
    APODown,
    APOZero,
    BCOPair,
    CalDPO,
    DiscoPOP,
    Hinge,
    LossInputs,
    RePO,
    RobustDPO,
    SimPO,
    SLiCHF,
)
from alignment.losses.f_dpo import Divergence
from alignment.losses.gpo import Shape
from alignment.losses.ipo import Reduction
from alignment.ragged import RaggedLogps

CONF = Path(__file__).parents[2] / "conf" / "loss"

EXAMPLES = {
    "dpo": DPO(beta=0.1, label_smoothing=0.0),
    "cdpo": DPO(beta=0.1, label_smoothing=0.1),
    "ipo_mean": IPO(tau=0.1, reduction=Reduction.mean),
    "ipo_sum": IPO(tau=0.1, reduction=Reduction.sum),
    "simpo": SimPO(beta=2.0, gamma_beta_ratio=0.55),
    "orpo": ORPO(lam=0.1),
    "kto": KTO(beta=0.1, desirable_weight=1.33, undesirable_weight=0.7),
    "robust_dpo": RobustDPO(beta=0.1, flip_rate=0.2),
    "hinge": Hinge(beta=0.05),
    **{f"gpo_{shape.name}": GPO(beta=0.3, shape=shape) for shape in Shape},
    "ln_dpo": LNDPO(beta=5.0),
    "r_dpo": RDPO(beta=0.1, alpha=0.03),
    "dpop": DPOP(beta=0.3, lam=50.0),
    "cal_dpo": CalDPO(beta=0.05),
    **{f"f_dpo_{divergence.name}": FDPO(beta=0.1, divergence=divergence, alpha=0.3) for divergence in Divergence},
    "discopop": DiscoPOP(beta=0.05, tau=0.05),
    "exo": EXO(beta=0.5, epsilon=1e-3),
    "nca": NCA(beta=0.1),
    "sppo": SPPO(beta=0.05),
    "apo_zero": APOZero(beta=0.1),
    "apo_down": APODown(beta=0.1),
    "bco_pair": BCOPair(beta=0.1),
    "alphapo": AlphaPO(beta=2.5, gamma_beta_ratio=0.1, alpha=0.25),
    "alphapo_0": AlphaPO(beta=2.5, gamma_beta_ratio=0.1, alpha=0.0),
    "repo": RePO(gamma=2.0),
    "slic_hf": SLiCHF(delta=50.0, lam=0.1),
}
ENUMS = {"reduction": Reduction, "shape": Shape, "divergence": Divergence}
every_loss = pytest.mark.parametrize("loss", EXAMPLES.values(), ids=EXAMPLES)
every_class = pytest.mark.parametrize("name", LOSSES)


def make_step(loss, items=5, seed=0, drift=0.1):
    """A step of completions of 1 to 9 tokens whose policy lies within `drift` nats per token of the reference."""
    generator = torch.Generator().manual_seed(seed)
    sequences = items * (2 if loss.unit == "pair" else 1)
    lengths = torch.randint(1, 10, (sequences,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    reference = -torch.rand(int(offsets[-1]), generator=generator, dtype=torch.float64) - 2 * drift
    noise = drift * (2 * torch.rand(reference.shape, generator=generator, dtype=torch.float64) - 1)
    labels = torch.arange(items) % 3 != 1 if loss.unit == "row" else None
    policy = (reference + noise).requires_grad_()
    return LossInputs(RaggedLogps(policy, offsets), RaggedLogps(reference, offsets), labels)


def statistics_of(loss, items=5, **keywords):
    """What the trainer passes as the step's statistics; None for most losses."""
    return loss.statistics(make_step(loss, items, seed=99, **keywords))


def take(step, loss, items):
    """The given items of a step, sequences and labels alike."""
    sequences = [s for i in items for s in ((2 * i, 2 * i + 1) if loss.unit == "pair" else (i,))]
    labels = None if step.labels is None else step.labels[items]
    return LossInputs(step.policy.select(sequences), step.reference.select(sequences), labels)


def upwards(step, loss):
    """(tokens,) +1 where the objective wants a token more likely (chosen, desirable), -1 where less."""
    favoured = torch.arange(len(step.policy)) % 2 == 0 if loss.unit == "pair" else step.labels
    return (2.0 * favoured.double() - 1).repeat_interleave(step.policy.lengths)


def test_every_registered_loss_is_examined():
    assert {type(loss) for loss in EXAMPLES.values()} == set(LOSSES.values())
    assert {name: cls.name for name, cls in LOSSES.items()} == {name: name for name in LOSSES}


@every_loss
def test_value_at_the_reference(loss):
    step = make_step(loss, drift=0.0)
    statistics = loss.statistics(make_step(loss, drift=0.0, seed=99))
    closed_form = loss.at_reference(step.reference, step.labels)
    assert closed_form.dtype == torch.float64
    torch.testing.assert_close(loss(step, statistics).losses, closed_form, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "value"),
    [("dpo", log(2)), ("cdpo", log(2)), ("ipo_mean", 25.0), ("ipo_sum", 25.0)],
)
def test_constants_at_the_reference(name, value):
    """Log 2 with and without smoothing; 1 / (4 * 0.1^2) = 25."""
    loss = EXAMPLES[name]
    assert loss.at_reference(make_step(loss).reference, None).tolist() == pytest.approx([value] * 5)


def test_kto_at_the_reference_is_half_of_each_weight():
    loss = EXAMPLES["kto"]
    step = make_step(loss)
    halves = [0.665 if label else 0.35 for label in step.labels.tolist()]
    assert loss.at_reference(step.reference, step.labels).tolist() == pytest.approx(halves, rel=1e-15)


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


every_raising_loss = pytest.mark.parametrize(
    "loss",
    [pytest.param(loss, id=name) for name, loss in EXAMPLES.items() if name not in ("apo_down", "discopop")],
)
"""APO-down lowers both answers, and DiscoPOP pulls small margins back, as their own tests show."""


@every_raising_loss
def test_a_better_policy_has_a_lower_loss(loss):
    """The gradient has the right sign at every token, and so has a finite move."""
    step = make_step(loss)
    statistics = statistics_of(loss)
    before = loss(step, statistics).losses
    direction = upwards(step, loss)
    (gradient,) = torch.autograd.grad(before.sum(), step.policy.values)
    assert (gradient * direction < 0).all()
    moved = RaggedLogps((step.policy.values + 0.01 * direction).detach(), step.policy.offsets)
    after = loss(LossInputs(moved, step.reference, step.labels), statistics).losses
    assert (after < before).all()


@every_loss
def test_a_better_policy_has_a_larger_margin(loss):
    """The rewards are those of the objective: every move that lowers the loss raises the favoured reward."""
    step = make_step(loss)
    direction = upwards(step, loss)
    moved = RaggedLogps((step.policy.values + 0.01 * direction).detach(), step.policy.offsets)
    statistics = statistics_of(loss)
    gain = loss(LossInputs(moved, step.reference, step.labels), statistics).rewards - loss(step, statistics).rewards
    assert (gain * direction[step.policy.offsets[:-1]] > 0).all()


@every_loss
def test_gradient_against_finite_differences(loss):
    step = make_step(loss)
    statistics = statistics_of(loss)

    def losses(values):
        return loss(
            LossInputs(RaggedLogps(values, step.policy.offsets), step.reference, step.labels), statistics
        ).losses

    assert torch.autograd.gradcheck(losses, step.policy.values, rtol=1e-6, atol=1e-8)


@every_loss
def test_order_of_the_items_does_not_matter(loss):
    step = make_step(loss)
    statistics = statistics_of(loss)
    order = [3, 0, 4, 1, 2]
    sequences = [s for i in order for s in ((2 * i, 2 * i + 1) if loss.unit == "pair" else (i,))]
    whole, permuted = loss(step, statistics), loss(take(step, loss, order), statistics)
    torch.testing.assert_close(permuted.losses, whole.losses[order], rtol=1e-14, atol=0)
    torch.testing.assert_close(permuted.rewards, whole.rewards[sequences], rtol=1e-14, atol=1e-15)
    for key, part in whole.parts.items():
        torch.testing.assert_close(permuted.parts[key], part[order], rtol=1e-14, atol=0)


@every_loss
@pytest.mark.parametrize("cut", [1, 2, 4])
def test_a_step_may_be_split(loss, cut):
    """Two parts give the losses of the whole, with the statistics summed over the parts."""
    step = make_step(loss)
    companions = make_step(loss, seed=99)
    parts = [list(range(cut)), list(range(cut, 5))]
    statistics = loss.statistics(companions)
    if statistics is not None:
        summed = sum(loss.statistics(take(companions, loss, part)) for part in parts)
        torch.testing.assert_close(summed, statistics, rtol=1e-14, atol=0)
    outputs = [loss(take(step, loss, part), statistics) for part in parts]
    whole = loss(step, statistics)
    torch.testing.assert_close(torch.cat([o.losses for o in outputs]), whole.losses, rtol=1e-14, atol=0)
    torch.testing.assert_close(torch.cat([o.rewards for o in outputs]), whole.rewards, rtol=1e-14, atol=1e-15)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept(loss, dtype):
    step = make_step(loss)
    cast = LossInputs(
        RaggedLogps(step.policy.values.to(dtype), step.policy.offsets),
        RaggedLogps(step.reference.values.to(dtype), step.reference.offsets),
        step.labels,
    )
    statistics = loss.statistics(cast)
    output = loss(cast, statistics)
    assert {output.losses.dtype, output.rewards.dtype, *(p.dtype for p in output.parts.values())} == {dtype}
    assert statistics is None or statistics.dtype == dtype


@every_loss
def test_float64_has_no_float32_in_it(loss):
    """A move of 1e-10 nats, far below what float32 resolves, changes the losses as the gradient says."""
    step = make_step(loss)
    statistics = statistics_of(loss)
    before = loss(step, statistics).losses
    (gradient,) = torch.autograd.grad(before.sum(), step.policy.values)
    direction = upwards(step, loss)
    moved = RaggedLogps((step.policy.values + 1e-10 * direction).detach(), step.policy.offsets)
    after = loss(LossInputs(moved, step.reference, step.labels), statistics).losses
    expected = 1e-10 * (gradient * direction).sum()
    torch.testing.assert_close((after - before).sum().detach(), expected, rtol=1e-3, atol=0)


@every_loss
@pytest.mark.parametrize("chosen", [-1e4, -1e-8, 0.0])
@pytest.mark.parametrize("rejected", [-1e4, -1e-8, 0.0])
def test_extremes_in_float32(loss, chosen, rejected, inputs):
    """Mean log-probs from -1e4 to 0, log-ratios up to 1e4 either way: losses, rewards and gradients stay finite."""
    labels = [True, False] if loss.unit == "row" else None
    step = inputs([[chosen] * 2, [rejected] * 2], [[-5e3 - chosen / 2] * 2, [-1.0] * 2], labels, torch.float32)
    statistics = loss.statistics(step)
    output = loss(step, statistics)
    (gradient,) = torch.autograd.grad(output.losses.sum(), step.policy.values)
    for tensor in (output.losses, output.rewards, gradient, *output.parts.values()):
        assert torch.isfinite(tensor).all()


@pytest.mark.parametrize(
    ("loss", "value"),
    [
        (DPO(beta=0.1, label_smoothing=0.0), 0.6302581947),
        (DPO(beta=0.1, label_smoothing=0.1), 0.6432581947),
        (IPO(tau=0.1, reduction=Reduction.sum), 13.69),
        (IPO(tau=0.1, reduction=Reduction.mean), 22.48340278),
        (SimPO(beta=2.0, gamma_beta_ratio=0.5), 1.026758839),
        (ORPO(lam=0.1), 0.676125384),
        (RobustDPO(beta=0.1, flip_rate=0.1), 0.6140081947),
        (Hinge(beta=0.1), 0.87),
        (Hinge(beta=1.0), 0.0),
        (SLiCHF(delta=1.0, lam=0.1), 0.25),
        (AlphaPO(beta=2.5, gamma_beta_ratio=0.04, alpha=0.25), 0.4646924416),
        (EXO(beta=0.1, epsilon=1e-3), 2.539184819),
        (NCA(beta=0.1), 1.354662956),
        (SPPO(beta=1e-3), 249350.445),
        (APOZero(beta=0.1), 0.9675132634),
        (APODown(beta=0.1), 0.9800430901),
        (DiscoPOP(beta=0.05, tau=0.05), 0.8779809948),
        (BCOPair(beta=0.1), 1.322406615),
        (FDPO(beta=0.1, divergence=Divergence.forward_kl, alpha=0.5), 0.6154695877),
        (FDPO(beta=0.1, divergence=Divergence.jensen_shannon, alpha=0.5), 0.6589031761),
        (FDPO(beta=0.1, divergence=Divergence.alpha, alpha=0.5), 0.6243846536),
        (FDPO(beta=0.1, divergence=Divergence.alpha, alpha=0.3), 0.6270627169),
        (RDPO(beta=0.1, alpha=0.03), 0.6587595555),
        (LNDPO(beta=5.0), 0.2427990153),
        (DPOP(beta=0.3, lam=50.0), 0.5170403967),
        (CalDPO(beta=1e-3), 498701.131),
        (GPO(beta=2.0, shape=Shape.squared), 2.56),
        (GPO(beta=2.0, shape=Shape.exponential), 0.07427357821),
        (GPO(beta=2.0, shape=Shape.truncated_quadratic), 0.0),
        (GPO(beta=2.0, shape=Shape.savage), 0.004780121168),
    ],
)
def test_published_pair(inputs, loss, value):
    """One pair with a = -2.5, A = -3, b = -5, B = -4.2 over 4 and 6 tokens: u = 0.5, v = -0.8, d = 1.3.

    DPO: log(1 + e^-0.13) = 0.630258; smoothed: + 0.1 * 0.13. IPO: (1.3 - 5)^2, and
    (0.125 + 0.8 / 6 - 5)^2. SimPO: log(1 + e^(1 - 2 (-0.625 + 5 / 6))).
    ORPO: p = e^-0.625 and e^(-5/6), w = 0.404395, 0.625 + 0.1 log(1 + e^-w).
    """
    pair = inputs(
        [[-0.5, -1.0, -0.25, -0.75], [-1.0, -0.5, -1.5, -0.25, -0.75, -1.0]],
        [[-0.75, -1.25, -0.5, -0.5], [-0.5, -0.5, -1.0, -0.5, -0.75, -0.95]],
    )
    assert loss(pair).losses.item() == pytest.approx(value, rel=2e-9)  # the values have ten digits


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


@every_class
def test_range_check_reaches_the_user(name):
    first = fields(LOSSES[name])[0].name
    broken = OmegaConf.merge(OmegaConf.structured(LOSSES[name]), recommended(name), {first: -1.0})
    with pytest.raises(UserError, match=rf"^loss\.{first} must be .*, not -1\.0\.$"):
        OmegaConf.to_object(broken)


def test_no_loss_is_an_option_of_its_own():
    text = (CONF / "none.yaml").read_text()
    assert text.splitlines()[0] == "# @package _global_"
    assert OmegaConf.create(text) == {"loss": None}


def test_every_loss_has_its_values_and_the_other_way_round():
    assert {path.stem for path in CONF.glob("*.yaml")} == {*LOSSES, "none"}
