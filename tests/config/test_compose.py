"""A loss by itself is the one that a run gets."""

import pytest

from alignment.config.compose import load, load_loss
from alignment.errors import UserError


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"), [("dpo", ()), ("simpo", ("gamma_beta_ratio=0.3",)), ("mpo", ("settings.dpo.beta=0.4",))]
)
def test_a_loss_by_itself_is_that_of_a_run(name, settings):
    alone = load_loss(name, *settings)
    assert alone == load("recipe=quickstart", f"loss={name}", *(f"loss.{setting}" for setting in settings)).loss


@pytest.mark.parametrize(
    ("name", "setting", "sentence"),
    [
        ("dop", "beta=1", "There is no loss dop (did you mean dpop?)"),
        ("dpo", "bta=1", "did you mean loss.beta?"),
        ("dpo", "beta=-1", "loss.beta must be a finite number above 0, not -1"),
        ("mpo", "weights.xx=1", "loss.weights.xx: no single loss has this name"),
        ("mpo", "settings.dpo.beta=-1", "loss.settings.dpo.beta must be"),
    ],
)
def test_one_sentence_says_what_is_wrong(name, setting, sentence):
    with pytest.raises(UserError) as refused:
        load_loss(name, setting)
    assert sentence in str(refused.value)
