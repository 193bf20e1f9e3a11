"""The reference: cached and live agree, it is the policy at the start, and every sequence is computed once."""

import math
from concurrent.futures import ThreadPoolExecutor, TimeoutError

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from alignment.data.tokens.units import as_rows
from alignment.errors import UserError
from alignment.losses import LOSSES
from alignment.policy.adapter import load_adapter
from alignment.policy.identity import policy_identity
from alignment.reference.base import agreement_limit, comparison_tolerance
from alignment.reference.cached import CachedReference
from alignment.reference.live import LiveReference
from alignment.scoring.layout import FlatLayout
from alignment.training.objective import groups_to_reference, mismatched_groups
from alignment.training.sampler import StepSampler
from alignment.types import Group, RaggedLogps
from tests.conftest import random_groups, tiny_policy
from tests.helpers.patience import patience
from tests.helpers.policies import CPU, NF4, adapter, load, start_of, train_adapter
from tests.helpers.references import GROUPS, ROUNDING, Forwards, books, cached, live, prepared
from tests.helpers.steps import make_loss, make_trainer


def test_constructors_refuse_numbers_that_make_no_sense(tmp_path):
    model = tiny_policy()
    for make in (
        lambda: live(model, tokens_per_batch=0),
        lambda: cached(model, tmp_path, tokens_per_batch=0),
        lambda: cached(model, tmp_path, spot_checks=-1),
        lambda: LiveReference(model, FlatLayout(), 100, CPU, mix=0.0),
        lambda: LiveReference(model, FlatLayout(), 100, CPU, mix=1.5),
    ):
        with pytest.raises(UserError, match=r"must be (at least|in)"):
            make()


@pytest.mark.slow
def test_who_wants_what_another_computes_waits_and_finds_it(tmp_path, monkeypatch):
    """The second asks while the first, who has found nothing stored either, is about to compute."""
    model = tiny_policy()
    compute, asked = CachedReference._compute, []
    with ThreadPoolExecutor(1) as other:

        def patched(self, missing):
            if not asked:
                asked.append(other.submit(prepared, model, tmp_path))
                with pytest.raises(TimeoutError):
                    asked[0].result(timeout=1)
            compute(self, missing)

        monkeypatch.setattr(CachedReference, "_compute", patched)
        _, first = prepared(model, tmp_path)
        _, second = asked[0].result(patience(30))
    count = first["misses"]
    assert count > 0 and (first["hits"], second["hits"], second["misses"]) == (0, count, 0)


# Cached and live are the policy at the start


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "tokens_per_batch"),
    [
        *(("trained", 1), ("trained", 10_000)),
        *((kind, 50) for kind in ("fresh", "trained", "embedding", "pissa", "olora", "full")),
    ],
)
def test_cached_equals_live_and_both_the_start(kind, tokens_per_batch, tmp_path):
    """Per token, also after the policy has moved on, and whatever the batches were."""
    model, start = start_of(kind), start_of(kind)
    stored, summary = prepared(model, tmp_path, tokens_per_batch=tokens_per_batch)
    assert (summary["hits"], summary["misses"]) == (0, 12)
    running = live(model, tokens_per_batch)
    expected = books(start, GROUPS)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    assert (books(model, GROUPS) - expected).abs().max() > 100 * ROUNDING
    for found in (stored, running.logps(GROUPS)):
        assert found.lengths.tolist() == [len(c) for g in GROUPS for c in g.completions]
        torch.testing.assert_close(found.values, expected, rtol=0, atol=ROUNDING)
    for order in ([3, 0, 5], [4]):
        picked = [GROUPS[i] for i in order]
        torch.testing.assert_close(running.logps(picked).values, books(start, picked), rtol=0, atol=ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["cache", "live"])
@pytest.mark.parametrize("route", ["in process", "from disk"])
def test_after_sft_the_reference_is_the_sft_policy_and_not_the_base(mode, route, tmp_path):
    base = tiny_policy(torch.float32, r=None)
    model = tiny_policy(torch.float32, trained=True)
    if route == "from disk":
        model.save_pretrained(str(tmp_path / "sft"))
        model = load_adapter(tiny_policy(torch.float32, r=None), tmp_path / "sft")
    sft = books(tiny_policy(torch.float32, trained=True), GROUPS)
    distance = (sft - books(base, GROUPS)).abs().mean()
    reference = cached(model, tmp_path) if mode == "cache" else live(model)
    reference.prepare(GROUPS)
    found = reference.logps(GROUPS).values
    assert distance > 0.1
    assert (found - sft).abs().max() <= ROUNDING
    assert (found - books(base, GROUPS)).abs().mean() > 0.9 * distance
    assert reference.identity == policy_identity(tiny_policy(torch.float32, trained=True))[0]
    assert reference.identity != policy_identity(base)[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fresh", "trained"])
def test_the_live_reference_stays_while_the_trainer_trains(kind, tmp_path):
    """Ten optimizer steps of the real loop, with checkpoints; the saved policy is the trained adapter alone."""
    model = start_of(kind)
    expected = books(model, GROUPS)
    trainer = make_trainer(model, GROUPS, make_loss("dpo"), tmp_path)
    trainer.args.max_steps, trainer.args.save_steps, trainer.args.learning_rate = 10, 5, 1e-2
    trainer.train()
    moved = books(model, GROUPS)
    assert (moved - expected).abs().mean() > 0.01
    torch.testing.assert_close(trainer.reference.logps(GROUPS).values, expected, rtol=0, atol=ROUNDING)
    trainer.reference.close()
    torch.testing.assert_close(books(model, GROUPS), moved, rtol=0, atol=ROUNDING)
    model.save_pretrained(str(tmp_path / "policy"))
    assert not [path for path in (tmp_path / "policy").iterdir() if path.is_dir()]
    tensors = load_file(tmp_path / "policy" / "adapter_model.safetensors")
    assert len(tensors) == sum(p.requires_grad for p in model.parameters())
    base = tiny_policy(torch.float32, r=None)
    torch.testing.assert_close(books(load_adapter(base, tmp_path / "policy"), GROUPS), moved, rtol=0, atol=ROUNDING)


# Nothing is computed twice


def test_other_settings_of_a_run_ask_for_nothing_new(tmp_path):
    """Another loss, beta, rank, seed, order, batch size or subset finds everything; only spot checks run the model."""
    first = start_of("fresh")
    reference = cached(first, tmp_path)
    trainer = make_trainer(first, GROUPS, LOSSES["dpo"](beta=0.1, label_smoothing=0.0), tmp_path, reference=reference)
    counter = Forwards(first)
    reference.prepare(GROUPS)
    assert counter.rows == 12
    values = reference.logps(GROUPS)
    loss = trainer.evaluate_step(GROUPS).mean()
    reference.close()
    variants = {
        "same": (tiny_policy(torch.float32), GROUPS),
        "rank": (tiny_policy(torch.float32, r=8), GROUPS),
        "order": (tiny_policy(torch.float32), GROUPS[::-1]),
        "subset": (tiny_policy(torch.float32), GROUPS[2:4]),
        "rows": (tiny_policy(torch.float32), as_rows(GROUPS)),
        "no adapter": (tiny_policy(torch.float32, r=None), GROUPS),
    }
    for name, (model, groups) in variants.items():
        counter = Forwards(model)
        reference = cached(model, tmp_path, tokens_per_batch=30)
        reference.prepare(groups)
        assert counter.rows == 0, name
        assert reference.summary()["misses"] == 0, name
        assert reference.summary()["hits"] == sum(len(g.completions) for g in groups), name
        index = {key: i for i, key in enumerate(key for g in GROUPS for key in g.keys())}  # noqa: SIM118
        expected = values.select([index[key] for g in groups for key in g.keys()])  # noqa: SIM118
        assert torch.equal(reference.logps(groups).values, expected.values), name
        reference.close()
    other = tiny_policy(torch.float32)
    counter = Forwards(other)
    found, summary = prepared(other, tmp_path, spot_checks=4)
    assert (counter.rows, summary["spot_checks"], summary["misses"]) == (4, 4, 0)
    assert summary["spot_check_max_diff"] <= ROUNDING
    assert torch.equal(found.values, values.values)
    reference = cached(other, tmp_path)
    reference.prepare(GROUPS)
    louder = make_trainer(other, GROUPS, LOSSES["dpo"](beta=9.0, label_smoothing=0.0), tmp_path, reference=reference)
    assert abs(louder.evaluate_step(GROUPS).mean() - loss) < 1e-3, "both log 2 at the start, from the same store"


def edited(group, where):
    def change(tokens):
        tokens = tokens.copy()
        tokens[-1] = (tokens[-1] + 1) % 97
        return tokens

    if where == "prompt":
        return Group(change(group.prompt), group.completions)
    return Group(group.prompt, (group.completions[0], change(group.completions[1])))


@pytest.mark.parametrize(("where", "misses"), [("prompt", 2), ("completion", 1)])
def test_another_token_is_computed(where, misses, tmp_path):
    prepared(tiny_policy(torch.float32), tmp_path)
    groups = [*GROUPS[:3], edited(GROUPS[3], where), *GROUPS[4:]]
    model = tiny_policy(torch.float32)
    counter = Forwards(model)
    values, summary = prepared(model, tmp_path, groups)
    assert (summary["hits"], summary["misses"], counter.rows) == (12 - misses, misses, misses)
    torch.testing.assert_close(values.values, books(model, groups), rtol=0, atol=ROUNDING)


def test_a_token_moved_from_completion_to_prompt_is_computed(tmp_path):
    """The same tokens in the same order, but another completion."""
    group = Group(np.array([5, 6], np.int32), (np.array([7, 8], np.int32),))
    moved = Group(np.array([5, 6, 7], np.int32), (np.array([8], np.int32),))
    prepared(tiny_policy(torch.float32), tmp_path, [group])
    assert prepared(tiny_policy(torch.float32), tmp_path, [moved])[1]["misses"] == 1


def test_another_policy_is_computed(tiny_model_folder, tmp_path):
    """The SFT adapter, its training, the quantisation, the dtype, one base weight: none finds the base's values."""
    from alignment.config.schema import Dtype
    from alignment.policy.adapter import attach_adapter

    def fresh(quantization=None, **settings):
        return attach_adapter(load(tiny_model_folder, quantization, **settings), adapter(), 0)

    groups = GROUPS[:2]
    prepared(fresh(), tmp_path, groups)
    weight = fresh()
    with torch.no_grad():
        weight.get_base_model().model.norm.weight[0] *= 1.01
    policies = {
        "sft adapter": train_adapter(fresh(), 1),
        "another sft adapter": train_adapter(fresh(), 2),
        "nf4": fresh(NF4),
        "bfloat16": fresh(dtype=Dtype.bfloat16),
        "one weight": weight,
    }
    values = {}
    for name, model in policies.items():
        found, summary = prepared(model, tmp_path, groups, spot_checks=4)
        assert (summary["hits"], summary["misses"]) == (0, 4), name
        values[name] = found.values
        assert prepared(model, tmp_path, groups)[1]["misses"] == 0, name
    assert (values["sft adapter"] - values["nf4"]).abs().max() > 1e-2
    assert prepared(fresh(), tmp_path, groups)[1]["misses"] == 0, "the first one's values are still there"


def test_a_sequence_that_occurs_twice_is_computed_once(tmp_path):
    """Equal answers to one prompt, a repeated pair, and the same row in several steps."""
    same = Group(GROUPS[0].prompt, (GROUPS[0].completions[0], GROUPS[0].completions[0]))
    groups = [same, GROUPS[0], GROUPS[1], GROUPS[1], GROUPS[0]]
    model = tiny_policy(torch.float32)
    counter = Forwards(model)
    values, summary = prepared(model, tmp_path, groups)
    assert (counter.rows, summary["misses"], summary["hits"]) == (4, 4, 0)
    assert len(values) == 10
    torch.testing.assert_close(values.values, books(model, groups), rtol=0, atol=ROUNDING)


# KTO


def test_kto_is_covered_in_every_epoch_and_shares_what_dpo_computed(tmp_path):
    """Its mismatched rows are the only sequences that DPO on the same pairs has not stored."""
    pairs, held_out = random_groups(7, seed=12), random_groups(3, seed=13)
    kto = make_loss("kto")
    rows = as_rows(pairs)
    sampler = StepSampler(len(rows), 4, 5, kto.min_items)
    steps = sampler.first_steps(3 * len(sampler) - 1)
    prepared(tiny_policy(torch.float32), tmp_path, [*pairs, *held_out])
    model = tiny_policy(torch.float32)
    counter = Forwards(model)
    reference = cached(model, tmp_path)
    reference.prepare(groups_to_reference(kto, rows, steps, held_out))
    stored = {key for group in [*pairs, *held_out] for key in group.keys()}  # noqa: SIM118
    mismatched = {
        key
        for members in [*([rows[i] for i in step] for step in steps), as_rows(held_out)]
        for group in mismatched_groups(kto, members)
        for key in group.keys()  # noqa: SIM118
    }
    assert reference.summary()["misses"] == counter.rows == len(mismatched - stored) > 20
    assert reference.summary()["hits"] == len(stored)
    trainer = make_trainer(model, rows, kto, tmp_path, reference=reference, eval_groups=held_out)
    trainer.sampler = sampler
    trainer.args.max_steps, trainer.args.save_strategy = len(steps), "no"
    trainer.train()
    assert trainer.state.epoch > 2
    trainer.evaluate()
    for step in sampler.steps(3):
        rows_of_step = [rows[i] for i in step]
        if any(key not in mismatched | stored for g in mismatched_groups(kto, rows_of_step) for key in g.keys()):  # noqa: SIM118
            with pytest.raises(KeyError):
                reference.logps(mismatched_groups(kto, rows_of_step))
            break
    else:
        raise AssertionError("a fourth epoch would have asked for something new, or this test could not fail")


# The tolerance


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "compute", "expected"),
    [
        ("float32", None, 1e-4),
        ("bfloat16", None, 3e-2),
        ("float32", "float32", 1e-4),
        ("float32", "bfloat16", 3e-2),
        ("bfloat16", "bfloat16", 3e-2),
    ],
)
def test_rounding_stays_within_the_tolerance_and_a_small_step_does_not(
    dtype, compute, expected, tiny_model_folder, tmp_path
):
    """Batch shapes alone may change the last bits; an adapter that has moved a little changes more."""
    from alignment.config.schema import Calibration, Dtype, QuantizationConfig
    from alignment.policy.adapter import attach_adapter

    quantization = (
        QuantizationConfig(double=True, compute_dtype=Dtype[compute], calibration=Calibration.none) if compute else None
    )
    model = attach_adapter(load(tiny_model_folder, quantization, Dtype[dtype]), adapter(), 0)
    assert comparison_tolerance(model, 16) == 2 * expected
    assert comparison_tolerance(model, 16_000) == pytest.approx(expected, rel=1e-2)
    one, _ = prepared(model, tmp_path / "one", tokens_per_batch=1)
    all_at_once, _ = prepared(model, tmp_path / "all")
    difference = (one.values - all_at_once.values).abs()
    assert difference.mean() <= expected / 3
    moved, _ = prepared(train_adapter(model, std=0.3 if expected > 1e-3 else 0.02), tmp_path / "moved")
    assert (moved.values - one.values).abs().mean() > expected


def test_the_unused_adapter_rank_does_not_reach_the_store(tmp_path):
    """Two sweep members, the second of which would train another rank: one identity, one computation."""
    small = get_peft_model(tiny_policy(torch.float32, r=None), LoraConfig(r=2, target_modules=["q_proj"]))
    prepared(small, tmp_path)
    assert prepared(tiny_policy(torch.float32, r=16), tmp_path)[1]["misses"] == 0


@pytest.mark.parametrize(
    ("dtype", "difference", "noise", "chance", "limit"),
    [
        (torch.float32, 0.05, 0.04, 0.0, None),  # 32 bits have no such noise
        (torch.bfloat16, 0.02, 0.04, 0.0, None),  # within the usual tolerance: nothing is measured
        (torch.bfloat16, 0.05, 0.02, 0.0, 0.06),
        (torch.bfloat16, 0.05, 0.001, 0.0, None),
        (torch.bfloat16, 0.09, 0.06, 0.0, 0.1),  # the ceiling
        (torch.bfloat16, 0.5, 0.2, 0.0, None),  # no rounding explains it
        (torch.bfloat16, 0.05, 0.02, 0.02, None),  # the policy is no function
        (torch.bfloat16, math.nan, 0.02, 0.0, None),
        (torch.bfloat16, 0.05, math.nan, 0.0, None),
    ],
)
def test_the_limit_of_agreement_follows_the_noise(dtype, difference, noise, chance, limit, monkeypatch):
    """`noise` is what another batch shape changes, `chance` what scoring the same batch again changes."""
    groups, alone = random_groups(3, seed=1), []

    def scored(model, groups, layout, tokens_per_batch, device):
        (batch,) = FlatLayout().batches(groups, 10_000)
        values = torch.zeros(int(batch.offsets[-1]))
        if tokens_per_batch > 1:
            values += noise
        elif alone:
            values += chance
        if tokens_per_batch == 1:
            alone.append(values)
        yield batch, RaggedLogps(values, batch.offsets)

    monkeypatch.setattr("alignment.reference.base.score_groups", scored)
    model = tiny_policy(torch.float32).to(dtype)
    found = agreement_limit(model, groups, difference, 10_000, FlatLayout())
    usual = comparison_tolerance(model, 10_000)
    assert found == pytest.approx(usual if limit is None else limit)
    assert bool(alone) == (dtype is torch.bfloat16 and usual < difference <= 0.1)
