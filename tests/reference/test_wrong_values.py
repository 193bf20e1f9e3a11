"""Stored log-probs that are wrong, missing or not finite, and a build that was interrupted."""

import logging

import numpy as np
import pytest
import torch

from alignment.errors import UserError
from alignment.policy.identity import policy_identity
from alignment.reference.store import ReferenceStore
from tests.conftest import tiny_policy
from tests.helpers.references import GROUPS, ROUNDING, Forwards, books, cached, prepared


def tampered(path, model, change):
    """Replace every stored value by another with a valid checksum."""
    store = ReferenceStore(path / "reference.sqlite")
    identity, _ = policy_identity(model)
    keys = [key for group in GROUPS for key in group.keys()]  # noqa: SIM118
    store.put(identity, {key: change(value) for key, value in store.get(identity, keys).items()})
    store.close()


@pytest.mark.parametrize(
    "change",
    [lambda v: v - np.float32(0.01), lambda v: v * np.float32(0.5), lambda v: v[::-1].copy() - np.float32(1)],
    ids=["shifted", "halved", "reversed"],
)
def test_stored_values_that_are_wrong_are_noticed_dropped_and_computed_again(change, tmp_path, caplog):
    model = tiny_policy(torch.float32)
    good, _ = prepared(model, tmp_path)
    tampered(tmp_path, model, change)
    unchecked, _ = prepared(model, tmp_path, spot_checks=0)
    assert not torch.allclose(unchecked.values, good.values, atol=1e-3), "the checksum does not see it"
    with caplog.at_level(logging.WARNING):
        mended, summary = prepared(model, tmp_path, spot_checks=3)
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert "differ from fresh ones" in warning and "nats per token" in warning
    assert (summary["hits"], summary["misses"], summary["spot_checks"]) == (0, 12, 3)
    assert summary["spot_check_max_diff"] >= 0.009
    assert torch.equal(mended.values, good.values)
    caplog.clear()
    again, summary = prepared(model, tmp_path, spot_checks=3)
    assert (summary["hits"], summary["misses"]) == (12, 0)
    assert not caplog.records or all(r.levelno < logging.WARNING for r in caplog.records)
    assert torch.equal(again.values, good.values)


def test_wrong_values_that_this_run_did_not_ask_for_are_dropped_too(tmp_path):
    model = tiny_policy(torch.float32)
    good, _ = prepared(model, tmp_path)
    tampered(tmp_path, model, lambda v: v - np.float32(1))
    assert prepared(model, tmp_path, GROUPS[:2], spot_checks=2)[1]["misses"] == 4
    values, summary = prepared(model, tmp_path)
    assert (summary["hits"], summary["misses"]) == (4, 8)
    torch.testing.assert_close(values.values, good.values, rtol=0, atol=ROUNDING)


def test_a_stored_value_of_the_wrong_length_is_a_miss(tmp_path):
    """Used as it is it would shift every sequence after it."""
    model = tiny_policy(torch.float32)
    good, _ = prepared(model, tmp_path)
    tampered(tmp_path, model, lambda v: np.append(v, np.float32(-1)))
    for spot_checks in (0, 4):
        values, summary = prepared(model, tmp_path, spot_checks=spot_checks)
        assert torch.equal(values.values, good.values)
        assert summary["misses"] == (12 if spot_checks == 0 else 0)


def test_other_policies_keep_their_values_when_one_is_dropped(tmp_path):
    model, other = tiny_policy(torch.float32), tiny_policy(torch.float32, trained=True)
    prepared(model, tmp_path)
    kept, _ = prepared(other, tmp_path)
    tampered(tmp_path, model, lambda v: v - np.float32(1))
    assert prepared(model, tmp_path, spot_checks=2)[1]["misses"] == 12
    values, summary = prepared(other, tmp_path, spot_checks=2)
    assert summary["misses"] == 0
    assert torch.equal(values.values, kept.values)


def test_an_interrupted_build_keeps_what_it_wrote(tmp_path, monkeypatch):
    """The next build computes the rest and nothing else."""
    monkeypatch.setattr("alignment.reference.cached._SEQUENCES_PER_WRITE", 4)
    model = tiny_policy(torch.float32)
    original, calls = model.forward, 0

    def failing(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 8:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    model.forward = failing
    reference = cached(model, tmp_path, tokens_per_batch=1)
    with pytest.raises(KeyboardInterrupt):
        reference.prepare(GROUPS)
    reference.close()
    model = tiny_policy(torch.float32)
    counter = Forwards(model)
    values, summary = prepared(model, tmp_path, tokens_per_batch=1)
    assert (summary["hits"], summary["misses"], counter.rows) == (4, 8, 8), "seven were computed, four written"
    torch.testing.assert_close(values.values, books(model, GROUPS), rtol=0, atol=ROUNDING)


def test_log_probs_that_are_not_finite_stop_the_run(tmp_path):
    """A base model that overflows on the data is something to be told, and nothing to be stored."""
    model = tiny_policy(torch.float32)
    with torch.no_grad():
        model.get_base_model().model.norm.weight.fill_(float("nan"))
    reference = cached(model, tmp_path)
    with pytest.raises(UserError, match="not finite"):
        reference.prepare(GROUPS)
    reference.close()
