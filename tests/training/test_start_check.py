"""The check before the first update: it lets every right start through and stops every wrong one."""

import math
import re

import pytest
import torch

from alignment.data.tokens.units import as_rows
from alignment.errors import UserError
from alignment.losses import LossOutput
from alignment.losses.base import Loss
from alignment.policy.adapter import attach_adapter
from alignment.training.start_check import check_start
from tests.conftest import random_groups, tiny_policy
from tests.helpers.policies import NF4, adapter, load, start_of, train_adapter
from tests.helpers.references import cached, live, prepared
from tests.helpers.steps import SETTINGS, make_loss, make_trainer, sequence_logp

PAIRS = random_groups(4, seed=21)

REFERENCE_FREE = {"simpo", "orpo"}


def groups_for(name):
    return as_rows(PAIRS) if name == "kto" else PAIRS


def by_hand(name, model):
    """The loss where policy and reference are the same, from plain log-probs and the settings of `SETTINGS`."""
    with torch.no_grad():
        means = [[sequence_logp(model, g.prompt, c).double().mean().item() for c in g.completions] for g in PAIRS]
    values = {
        "dpo": [math.log(2)] * 4,  # also with label smoothing
        "ipo": [1 / (2 * 0.2) ** 2] * 4,
        "kto": [1.0 / 2] * 4 + [1.5 / 2] * 4,  # weights of desirable and undesirable rows
        "simpo": [math.log1p(math.exp(-(2.0 * (a - b) - 0.5 * 2.0))) for a, b in means],
        "orpo": [
            -a + 0.2 * math.log1p(math.exp(b - a) * (1 - math.exp(a)) / (1 - math.exp(b))) for a, b in means
        ],
    }[name]  # fmt: skip
    return sum(values) / len(values)


def policy(kind, folder):
    if kind == "nf4":
        return attach_adapter(load(folder, NF4), adapter(), 0)
    if kind == "nf4 trained":
        return train_adapter(attach_adapter(load(folder, NF4), adapter(), 0))
    return start_of(kind)


@pytest.mark.parametrize("kind", ["fresh", "trained", "pissa", "full", "nf4", "nf4 trained"])
def test_every_loss_starts_at_its_closed_form(kind, tiny_model_folder, tmp_path):
    model = policy(kind, tiny_model_folder)
    found = {}
    for mode in ("cache", "live"):
        reference = cached(model, tmp_path) if mode == "cache" else live(model)
        reference.prepare([*PAIRS, *mismatched("kto", groups_for("kto"))])
        for name in SETTINGS:
            groups = groups_for(name)
            trainer = make_trainer(model, groups, make_loss(name), tmp_path, tokens_per_batch=70, reference=reference)
            found[name, mode] = check_start(trainer, groups)
        reference.close()
    for name in REFERENCE_FREE:
        trainer = make_trainer(model, PAIRS, make_loss(name), tmp_path, reference=None)
        found[name, "none"] = check_start(trainer, PAIRS)
        assert found[name, "none"]["max_token_difference"] == 0
    expected = {name: by_hand(name, model) for name in SETTINGS}
    for (name, mode), result in found.items():
        # fp32 log-probs: some 1e-6 per token, times the slope of the steepest of these losses, which is below 10
        assert result["loss"] == pytest.approx(expected[name], rel=1e-4), (name, mode)
        assert result["closed_form"] == pytest.approx(expected[name], rel=1e-5), (name, mode)
        assert result["max_token_difference"] < 2e-5, (name, mode)


def mismatched(name, groups):
    from alignment.training.objective import mismatched_groups

    return mismatched_groups(make_loss(name), groups)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_a_reference_that_is_another_policy_stops_the_run(name, tmp_path):
    """The base in place of the SFT policy: the mistake that an adapter switched off makes."""
    groups = groups_for(name)
    base, sft = tiny_policy(torch.float32), tiny_policy(torch.float32, trained=True)
    reference = cached(base, tmp_path)
    reference.prepare([*PAIRS, *mismatched(name, groups)])
    trainer = make_trainer(sft, groups, make_loss(name), tmp_path, reference=reference)
    with pytest.raises(UserError, match=rf"^The reference of loss {name} is not the policy .* nats per token"):
        check_start(trainer, groups)


def test_a_policy_that_is_no_function_stops_the_run(tmp_path):
    """Dropout that is left in training mode, though the reference was computed without."""
    model = tiny_policy(torch.float32, trained=True)
    for layer in model.get_base_model().model.layers:
        layer.self_attn.attention_dropout = 0.5
    reference = cached(model.eval(), tmp_path)
    reference.prepare(PAIRS)
    trainer = make_trainer(model, PAIRS, make_loss("dpo"), tmp_path, reference=reference)
    with pytest.raises(UserError, match="is not the policy that this stage starts from"):
        check_start(trainer, PAIRS)


def wrong(kind, original):
    def call(self: Loss, inputs, step_statistics=None):
        output = original(self, inputs, step_statistics)
        losses = {"factor": 1.001 * output.losses, "offset": output.losses + 0.01, "nan": output.losses * math.nan}[
            kind
        ]
        return LossOutput(losses, output.rewards, output.parts)

    return call


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "reference"),
    [*((name, "cache") for name in sorted(SETTINGS)), *((name, "none") for name in sorted(REFERENCE_FREE))],
)
def test_a_loss_that_is_wrong_stops_the_run(name, reference, tmp_path, monkeypatch):
    """A thousandth is enough, in any dtype: on equal log-probs the loss itself is compared in float64."""
    groups, loss = groups_for(name), make_loss(name)
    model = tiny_policy(torch.bfloat16)
    source = None
    if reference == "cache":
        source = cached(model, tmp_path)
        source.prepare([*PAIRS, *mismatched(name, groups)])
    trainer = make_trainer(model, groups, loss, tmp_path, reference=source)
    check_start(trainer, groups)
    right = type(loss).__call__
    for kind in ("factor", "offset", "nan"):
        monkeypatch.setattr(type(loss), "__call__", wrong(kind, right))
        with pytest.raises(UserError, match=rf"^The loss {name} is .* before the first update, but its formula gives"):
            check_start(trainer, groups)


def test_mismatched_rows_are_part_of_the_start(tmp_path, monkeypatch):
    """If KTO's mismatched rows were scored by another policy, z0 would not start at 0."""
    rows = groups_for("kto")
    model = tiny_policy(torch.float32)
    reference = cached(model, tmp_path)
    reference.prepare([*PAIRS, *mismatched("kto", rows)])
    plain = {key for g in rows for key in g.keys()}  # noqa: SIM118
    for key in {key for g in mismatched("kto", rows) for key in g.keys()} - plain:  # noqa: SIM118
        reference._values.add(key, reference._values.get(key) - 1)
    trainer = make_trainer(model, rows, make_loss("kto"), tmp_path, reference=reference)
    with pytest.raises(UserError, match=re.escape("The loss kto is")):
        check_start(trainer, rows)


def test_a_start_from_stored_values_of_other_batches_passes_in_16_bit(tmp_path):
    """The reference from single rows, the policy in one batch, short completions: rounding stops no run."""
    model = tiny_policy(torch.bfloat16, trained=True)
    groups = random_groups(2, seed=5)
    prepared(model, tmp_path, groups, tokens_per_batch=1)
    for size in (1, 2):
        reference = cached(model, tmp_path, spot_checks=4)
        reference.prepare(groups)
        trainer = make_trainer(model, groups[:size], make_loss("dpo"), tmp_path, reference=reference)
        assert check_start(trainer, groups[:size])["loss"] == pytest.approx(math.log(2), abs=0.05)
        assert reference.summary()["misses"] == 0
        reference.close()


def means_of_step(trainer, done):
    """The names that a training step logs which begins after `done` steps."""
    trainer.state.global_step = done
    trainer.training_step(trainer.model, {"groups": list(trainer.groups)})
    return trainer._means.take()


QUESTIONS = {"nats/accuracies", "nats_per_token/accuracies", "rewards/accuracies", "rewards/ties"}


@pytest.mark.parametrize(("name", "undecided"), [("dpo", QUESTIONS), ("simpo", {q for q in QUESTIONS if "nats" in q})])
def test_a_step_whose_policy_is_its_reference_does_not_count_signs_of_rounding(name, undecided, tmp_path):
    """The first step of a stage and the first after a refresh, and only what compares with the reference."""
    trainer = make_trainer(tiny_policy(torch.float32), PAIRS, make_loss(name), tmp_path)
    usual = means_of_step(trainer, 0).keys()
    assert usual >= QUESTIONS | {"rewards/margins"}
    check_start(trainer, PAIRS)
    assert usual - means_of_step(trainer, 0).keys() == undecided
    assert means_of_step(trainer, 1).keys() == usual  # a run that goes on behind a checkpoint, too
    trainer.reference.refresh(5, [])
    assert usual - means_of_step(trainer, 5).keys() == undecided
    assert means_of_step(trainer, 0).keys() == means_of_step(trainer, 6).keys() == usual
    trainer.reference._mix = 0.5
    assert means_of_step(trainer, 5).keys() == usual, "a mixture of two policies is neither"
