"""A loss built in Python: strings stand for members of enums, and a value of a wrong type is refused."""

import re
from dataclasses import fields
from enum import Enum
from typing import get_type_hints

import pytest
from omegaconf import OmegaConf

from alignment.config.compose import load
from alignment.errors import UserError, within
from alignment.losses import IPO, LOSSES
from alignment.losses.__main__ import read_option
from alignment.losses.gpo import Shape
from tests.helpers.loss_steps import make_step, statistics_of

TYPES = {
    (name, field.name): get_type_hints(kind)[field.name]
    for name, kind in LOSSES.items()
    if name != "mixture"
    for field in fields(kind)
}
ENUMS = [(*place, kind) for place, kind in TYPES.items() if isinstance(kind, type) and issubclass(kind, Enum)]
NUMBERS = [place for place, kind in TYPES.items() if kind in (float, float | None)]


def settings(name, **changed):
    """The recommended ones with these."""
    if changed.get("divergence") == "alpha":  # the only one that reads it
        changed["alpha"] = 0.5
    return {**read_option(name).values, **changed}


def computed(loss):
    return loss(make_step(loss), statistics_of(loss)).losses.tolist()


def test_the_fields_are_found():
    names = {"Credit", "Divergence", "NLLReduction", "NLLScope", "Outliers", "Reduction", "Shape"}
    assert {kind.__name__ for *_, kind in ENUMS} == names
    assert len(ENUMS) >= 17 and len(NUMBERS) >= 84


@pytest.mark.parametrize(("name", "key", "member"), [(*place, member) for *place, kind in ENUMS for member in kind])
def test_a_string_computes_what_its_member_computes(name, key, member):
    by_string = LOSSES[name](**settings(name, **{key: member.name}))
    by_member = LOSSES[name](**{**settings(name, **{key: member.name}), key: member})
    assert by_string == by_member and getattr(by_string, key) is member
    assert computed(by_string) == computed(by_member)


def test_the_mean_is_not_the_sum():
    """A string compared with `is` would be neither, and computed as the sum."""
    mean, total = (IPO(tau=0.1, reduction=reduction) for reduction in ("mean", "sum"))
    assert computed(mean) != computed(total)


@pytest.mark.parametrize(("name", "key", "kind"), ENUMS)
@pytest.mark.parametrize("value", ["median", "", None, 1, Shape.squared], ids=repr)
def test_anything_else_is_refused(name, key, kind, value):
    if isinstance(value, kind):
        return
    with pytest.raises(UserError) as refused:
        LOSSES[name](**settings(name, **{key: value}))
    assert str(refused.value) == f"loss.{key} must be one of {', '.join(kind.__members__)}, not {value!r}."


@pytest.mark.parametrize(("name", "key", "kind"), ENUMS)
def test_a_configuration_names_its_members_by_strings(name, key, kind):
    schema = OmegaConf.structured(LOSSES[name])
    for member in kind:
        node = OmegaConf.merge(schema, settings(name, **{key: member.name}))
        assert getattr(OmegaConf.to_object(node), key) is member


def test_a_configuration_names_the_wrong_one():
    with pytest.raises(UserError, match=r"^loss\.reduction must be one of mean, sum, not 'median'\."):
        load("loss=ipo", "loss.reduction=median")


@pytest.mark.parametrize(("name", "key"), NUMBERS)
@pytest.mark.parametrize("value", ["0.1", None, float("nan"), True, [0.1]], ids=repr)
def test_a_number_is_a_number(name, key, value):
    if value is None and TYPES[name, key] is not float:
        return
    with pytest.raises(UserError, match=rf"^loss\.{key} must be .*not {re.escape(repr(value))}"):
        LOSSES[name](**settings(name, **{key: value}))


def test_a_switch_is_true_or_false():
    with pytest.raises(UserError, match=r"^loss\.density_weights must be true or false, not 1\.$"):
        LOSSES["bco"](beta=0.1, density_weights=1)


@pytest.mark.parametrize("value", ["1", None, True])
def test_a_weight_of_a_mixture_is_a_number(value):
    part = LOSSES["nll"](nll_reduction="token_mean", nll_scope="response")
    with pytest.raises(UserError, match=r"^loss\.weights\.nll must be a number, not "):
        LOSSES["mixture"](weights={"nll": value, "dpo": 1.0}, settings={"nll": part})


def test_a_part_of_a_mixture_is_a_loss():
    with pytest.raises(UserError, match=r"^loss\.settings\.dpo must be a loss, as loss\.weights names it, not None\.$"):
        LOSSES["mixture"](weights={"nll": 1.0, "dpo": 1.0}, settings={"nll": LOSSES["nll"](**settings("nll"))})


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [
        ("[0, 0.5)", [0, 0.25], [-1e-9, 0.5, 1, float("nan")]),
        ("(0, 1)", [1e-9, 0.5], [0, 1, float("inf")]),
        ("[0, 1]", [0, 1], [-1e-9, 1.0001]),
    ],
)
def test_a_bracket_says_whether_the_end_is_in(interval, inside, outside):
    for value in inside:
        within("loss.alpha", value, interval)
    for value in outside:
        with pytest.raises(UserError) as refused:
            within("loss.alpha", value, interval)
        assert str(refused.value) == f"loss.alpha must be in {interval}, not {value}."
