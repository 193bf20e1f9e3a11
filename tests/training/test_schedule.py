"""A reference that follows the policy: TR-DPO and sDPO against plain loops, with LoRA and without, and resumed."""

import copy
import math
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

from alignment.config.schema import ReferenceMode
from alignment.data.tokens.units import as_rows
from alignment.errors import UserError
from alignment.kernels.base import is_patched, original_class
from alignment.policy import identity as identities
from alignment.policy.identity import policy_identity
from alignment.reference.frozen import FrozenPolicy
from alignment.reference.live import LiveReference
from alignment.scoring.layout import FlatLayout
from alignment.training.objective import groups_to_reference, mismatched_groups
from alignment.training.sampler import StepSampler
from alignment.training.schedule import FollowPolicy, Schedule, consecutive_parts
from alignment.types import Group
from tests.conftest import random_groups, tiny_config, tiny_policy
from tests.helpers.patched import lora_layers
from tests.helpers.patched import pair as patched_pair
from tests.helpers.policies import CPU, start_of
from tests.helpers.references import ROUNDING, Forwards, books, cached
from tests.helpers.steps import make_loss, make_trainer, moved, sequence_logp

pytestmark = pytest.mark.slow

GROUPS = [
    Group(group.prompt, group.completions, source=f"pairs:{i}") for i, group in enumerate(random_groups(8, seed=21))
]
HELD_OUT = random_groups(3, seed=22)


def dense(model):
    """All weights of what a policy computes, adapters worked in, by the names of a plain model."""
    model = copy.deepcopy(model)
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def plain(weights):
    """A model of its own with these weights."""
    model = AutoModelForCausalLM.from_config(tiny_config()).to(next(iter(weights.values())).dtype)
    model.load_state_dict(weights)
    return model


def schedule_of(num_steps, refreshes, per_step=2, groups=GROUPS, parts=None):
    sampler = StepSampler(len(groups), per_step, 3, parts=parts, max_steps=num_steps)
    return Schedule(sampler, sampler.first_steps(num_steps), refreshes)


def followed(model, reference, schedule, folder, groups=GROUPS, loss=None, eval_groups=(), **arguments):
    """A trainer whose reference follows as scheduled; learning rate constant, nothing clipped, no decay."""
    loss = loss or make_loss("dpo")
    trainer = make_trainer(model, groups, loss, folder, reference=reference, eval_groups=list(eval_groups))
    trainer.sampler = schedule.sampler
    settings = {"max_steps": len(schedule.steps), "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    for name, value in (settings | {"weight_decay": 0.0, "save_strategy": "no"} | arguments).items():
        setattr(trainer.args, name, value)
    asked = partial(groups_to_reference, loss, groups, eval_groups=list(eval_groups))
    reference.prepare(asked(schedule.until_refresh(0)))
    trainer.add_callback(FollowPolicy(reference, schedule, asked))
    return trainer


def watched(reference, groups=GROUPS):
    """What the reference says of the groups after every refresh."""
    seen, refresh = [], reference.refresh

    def watching(step, asked):
        refresh(step, asked)
        seen.append((step, reference.logps(groups).values.clone()))

    reference.refresh = watching
    return seen


# Mixing, in weight space


@pytest.mark.parametrize("kind", ["fresh", "trained", "embedding", "pissa", "full"])
def test_a_mixed_reference_is_the_mean_of_all_weights(kind):
    """After each of several mixes, of a policy that moves in between; it leaves no trace in the policy."""
    model = start_of(kind).double()
    names = list(model.state_dict())
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    frozen, weights = FrozenPolicy(model), dense(model)
    for seed, share in enumerate((0.6, 0.25, 1.0, 0.6)):
        moved(model, seed)
        before, expected = policy_identity(model)[0], dense(model)
        frozen.mix(share)
        weights = {name: share * expected[name] + (1 - share) * weights[name] for name in weights}
        with frozen.active() as reference:
            found = books(reference, GROUPS[:3])
        torch.testing.assert_close(found, books(plain(weights), GROUPS[:3]), rtol=0, atol=1e-10)
        assert (found - books(model, GROUPS[:3])).abs().max() > 1e-3 or share == 1
        assert policy_identity(model)[0] == before
    assert list(model.state_dict()) == names
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trainable
    frozen.close()


def test_shares_that_rounding_has_lost_are_dropped():
    """So that the rank of a mixed adapter stops growing: 0.6 * 0.4**16 is above the precision of fp32, 2**-23, but

    0.6 * 0.4**17 is below it, which leaves 17 policies.
    """
    model = tiny_policy(torch.float32, r=4, trained=True)
    frozen, weights = FrozenPolicy(model), dense(model)
    for seed in range(30):
        moved(model, seed)
        frozen.mix(0.6)
        weights = {name: 0.6 * tensor + 0.4 * weights[name] for name, tensor in dense(model).items()}
    ranks = {tensor.shape[0] for name, tensor in frozen.state().items() if "lora_A" in name}
    assert ranks == {4 * 17}
    with frozen.active() as reference:
        torch.testing.assert_close(books(reference, GROUPS), books(plain(weights), GROUPS), rtol=0, atol=ROUNDING)


def test_a_mix_close_to_nothing_keeps_what_was():
    model = tiny_policy(torch.float32, trained=True)
    frozen, expected = FrozenPolicy(model), books(model, GROUPS)
    moved(model, 1)
    for _ in range(3):
        frozen.mix(1e-9)
    with frozen.active() as reference:
        torch.testing.assert_close(books(reference, GROUPS), expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("nf4", [False, True], ids=["fp32", "nf4"])
def test_patched_layers_take_a_mixed_adapter(nf4, monkeypatch):
    """Of three times the policy's rank, by their patched forwards alone, with the values of the layers' own."""
    ids, found = torch.arange(40)[None], []
    for model, is_changed in zip(patched_pair("qwen3", nf4=nf4), (False, True), strict=True):
        frozen, layers = FrozenPolicy(model), list(lora_layers(model))
        for factor in (2.0, -1.0):
            for layer in layers:
                layer.lora_B["default"].weight.data.mul_(factor)
            frozen.mix(0.6)
        rank = layers[0].lora_A["default"].weight.shape[0]
        assert {is_patched(layer) for layer in layers} == {is_changed}
        for kind in {original_class(layer) for layer in layers} if is_changed else ():
            monkeypatch.setattr(kind, "forward", None)
        with torch.no_grad(), frozen.active() as reference:
            found.append(reference(input_ids=ids).logits)
            assert {layer.lora_A["default"].weight.shape[0] for layer in layers} == {3 * rank}
        assert not torch.allclose(model(input_ids=ids).logits, found[-1], rtol=1e-2)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share", [0.6, 1.0])
def test_a_whole_model_is_mixed_as_trl_mixes_it(share):
    from trl.trainer.callbacks import SyncRefModelCallback

    model = start_of("full")
    frozen, theirs = FrozenPolicy(model), copy.deepcopy(model)
    for seed in range(3):
        moved(model, seed)
        frozen.mix(share)
        SyncRefModelCallback._sync_target_model(model, theirs, share)
    with frozen.active() as reference:
        for found, expected in zip(reference.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


# TR-DPO


def plain_training(model, steps, refreshes, mix, beta=0.3, smoothing=0.1):
    """DPO with conservative labels by the book, its reference a model of its own: what it says at each refresh."""
    weights, seen = dense(model), []
    reference = plain(weights)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for number, step in enumerate(steps):
        if number in refreshes:
            weights = {name: mix * tensor + (1 - mix) * weights[name] for name, tensor in dense(model).items()}
            reference = plain(weights)
            seen.append((number, books(reference, GROUPS)))
        losses = []
        for group in (GROUPS[i] for i in step):
            a, b = (sequence_logp(model, group.prompt, c).sum() for c in group.completions)
            with torch.no_grad():
                ref_a, ref_b = (sequence_logp(reference, group.prompt, c).sum() for c in group.completions)
            d = beta * (a - ref_a - b + ref_b)
            losses.append(-(1 - smoothing) * torch.log(torch.sigmoid(d)) - smoothing * torch.log(torch.sigmoid(-d)))
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()
    return seen


def policy_of(kind):
    """In double precision; made anew it is the same."""
    if kind == "full":
        return tiny_policy(r=None).requires_grad_(True)
    return tiny_policy(trained=kind == "trained")


@pytest.mark.parametrize(("kind", "mix"), [("fresh", 1.0), ("trained", 0.6), ("full", 0.6), ("full", 1.0)])
def test_tr_dpo_equals_a_plain_loop(kind, mix, tmp_path):
    """Seven steps, a refresh after every second: the reference at each refresh, and the policy at the end."""
    model, oracle = policy_of(kind), policy_of(kind)
    schedule = schedule_of(7, (2, 4, 6))
    reference = LiveReference(model, FlatLayout(), 60, CPU, mix)
    seen = watched(reference)
    followed(model, reference, schedule, tmp_path).train()
    expected = plain_training(oracle, schedule.steps, schedule.refreshes, mix)
    assert [step for step, _ in seen] == [2, 4, 6]
    for (step, found), (_, wanted) in zip(seen, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-8, msg=f"after step {step}")
    assert (seen[0][1] - seen[2][1]).abs().max() > 1e-2
    torch.testing.assert_close(books(model, GROUPS), books(oracle, GROUPS), rtol=0, atol=1e-8)
    if mix == 1:
        assert (books(model, GROUPS) - seen[2][1]).abs().max() > 1e-3, "one step was done since"


def test_a_cached_hard_refresh_equals_a_live_one(tmp_path):
    """The store has fp32, so that the policies differ by rounding."""
    seen = {}
    for mode in ReferenceMode:
        model = tiny_policy(torch.float32, trained=True)
        reference = cached(model, tmp_path) if mode is ReferenceMode.cache else LiveReference(
            model, FlatLayout(), 10_000, CPU
        )  # fmt: skip
        # Cached, it knows the groups of the steps until the next refresh: all of them, of eight pairs in one step.
        seen[mode] = watched(reference)
        trainer = followed(model, reference, schedule_of(5, (2, 4), per_step=8), tmp_path / mode.name)
        trainer.train()
        seen[mode].append((5, books(model, GROUPS)))
        assert [refresh["step"] for refresh in reference.refreshes] == [2, 4]
        identities = {refresh["identity"] for refresh in reference.refreshes} | {reference.summary()["identity"]}
        assert len(identities) == 3 and reference.identity in identities
        reference.close()
    for (_, live), (_, stored) in zip(seen[ReferenceMode.live], seen[ReferenceMode.cache], strict=True):
        torch.testing.assert_close(live, stored, rtol=0, atol=1e-3)
        assert live.dtype == stored.dtype


def test_both_references_know_a_refreshed_policy_by_its_identity(tmp_path, monkeypatch):
    """No refresh reads the base, which would take seconds, and cannot have changed."""
    model = tiny_policy(torch.float32)
    references = [cached(model, tmp_path), LiveReference(model, FlatLayout(), 10_000, CPU)]
    soft = LiveReference(model, FlatLayout(), 10_000, CPU, 0.6)
    moved(model)
    read: list[torch.Tensor] = []

    def updated(digest, tensor, update=identities.hash_tensor):
        read.append(tensor)
        update(digest, tensor)

    with monkeypatch.context() as patch:
        patch.setattr("alignment.policy.identity.hash_tensor", updated)
        for reference in (*references, soft):
            reference.refresh(3, GROUPS)
    base = {id(parameter) for name, parameter in model.named_parameters() if "lora_" not in name}
    assert read and not base & {id(tensor) for tensor in read}
    identity = policy_identity(model)[0]
    assert [r.identity for r in references] == [identity] * 2 != [soft.identity] * 2
    for reference in references:
        assert reference.summary()["refreshes"] == [{"step": 3, "identity": identity}]
        assert reference.summary()["identity"] == policy_identity(tiny_policy(torch.float32))[0]
        torch.testing.assert_close(reference.logps(GROUPS).values, books(model, GROUPS), rtol=0, atol=ROUNDING)


def test_a_refreshed_whole_model_is_known_by_its_identity(tmp_path):
    model = start_of("full")
    references = [cached(model, tmp_path), LiveReference(model, FlatLayout(), 10_000, CPU)]
    moved(model, 1)
    for reference in references:
        reference.refresh(3, GROUPS)
        assert reference.identity == policy_identity(model)[0] != reference.summary()["identity"]


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_nothing_is_computed_twice(name, tmp_path):
    """Each refresh scores what the next steps and an evaluation ask for, once; a second run scores nothing."""
    loss = make_loss(name)
    groups = as_rows(GROUPS) if name == "kto" else GROUPS
    schedule = schedule_of(6, (3, 5), groups=groups)
    weights = []
    for attempt in range(2):
        model = tiny_policy(torch.float32)
        reference = cached(model, tmp_path)
        counts, counter = [], Forwards(model)
        refresh = reference.refresh

        def counting(step, asked, refresh=refresh, counter=counter, counts=counts):
            before = counter.rows
            refresh(step, asked)
            counts.append(counter.rows - before)

        reference.refresh = counting
        trainer = followed(model, reference, schedule, tmp_path / name, groups=groups, loss=loss, eval_groups=HELD_OUT)
        trainer.train()
        trainer.evaluate()
        reference.close()
        expected = []
        for first, last in ((3, 5), (5, 6)):
            steps = [[groups[i] for i in step] for step in schedule.steps[first:last]]
            asked = [*HELD_OUT, *(group for step in steps for group in step)]
            asked += [group for step in steps for group in mismatched_groups(loss, step)]
            if name == "kto":
                asked += mismatched_groups(loss, as_rows(HELD_OUT))
            expected.append(len({key for group in asked for key in group.keys()}))  # noqa: SIM118
        assert counts == (expected if attempt == 0 else [0, 0])
        assert (reference.summary()["misses"] == 0) == (attempt == 1)
        weights.append(dense(model))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_what_is_logged_and_evaluated_after_a_step_is_of_the_reference_of_that_step(tmp_path):
    """At a hard refresh the policy would be its own reference, and every margin 0."""
    model = tiny_policy(torch.float32)
    reference = cached(model, tmp_path)
    trainer = followed(
        model, reference, schedule_of(4, (2,)), tmp_path, eval_groups=HELD_OUT,
        eval_strategy="steps", eval_steps=1, logging_steps=1,
    )  # fmt: skip
    trainer.train()
    rows = {row["step"]: row for row in trainer.state.log_history if "eval_loss" in row}
    assert all(abs(rows[step]["eval_nats/margins"]) > 1e-2 for step in (1, 2, 3, 4))
    losses = {row["step"]: row["loss"] for row in trainer.state.log_history if "loss" in row}
    assert losses[3] == pytest.approx(math.log(2), abs=1e-5), "the first step with the policy as its reference"
    assert abs(losses[4] - math.log(2)) > 1e-3


def test_a_policy_that_has_diverged_does_not_become_the_reference(tmp_path):
    model = tiny_policy(torch.float32)
    reference = cached(model, tmp_path)
    reference.prepare(GROUPS)
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(math.nan)
        next(p for name, p in model.named_parameters() if "lora_B" in name).fill_(1.0)
    with pytest.raises(UserError, match=r"^After step 4 the policy, .*not finite.*optim\.lr\.$"):
        reference.refresh(4, GROUPS)


# sDPO


@pytest.mark.parametrize("mode", ["cache", "live"])
def test_sdpo_equals_two_trainings_of_which_the_second_starts_from_the_first(mode, tmp_path):
    """Up to the optimizer, which goes on: the reference of the second part is what the first part alone makes of it."""
    parts = consecutive_parts(GROUPS, 2)
    schedule = schedule_of(8, (4,), parts=parts)
    model = tiny_policy(torch.float32)
    reference = cached(model, tmp_path) if mode == "cache" else LiveReference(model, FlatLayout(), 10_000, CPU)
    first, second = GROUPS[:4], GROUPS[4:]
    seen = watched(reference, second)
    trainer = followed(model, reference, schedule, tmp_path / "staged", logging_steps=1)
    trainer.train()
    alone = tiny_policy(torch.float32)
    single = schedule_of(4, (), groups=first)
    assert [[first[i] for i in step] for step in single.steps] == [[GROUPS[i] for i in s] for s in schedule.steps[:4]]
    own = cached(alone, tmp_path) if mode == "cache" else LiveReference(alone, FlatLayout(), 10_000, CPU)
    followed(alone, own, single, tmp_path / "alone", groups=first).train()
    [(step, found)] = seen
    assert step == 4
    torch.testing.assert_close(found, books(alone, second), rtol=0, atol=ROUNDING)
    assert (found - books(tiny_policy(torch.float32), second)).abs().max() > 1e-2
    losses = {row["step"]: row["loss"] for row in trainer.state.log_history if "loss" in row}
    assert losses[1] == pytest.approx(math.log(2), abs=1e-6) and losses[5] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(losses[4] - math.log(2)) > 1e-3


def test_both_rows_of_a_pair_are_in_one_part():
    """Pairs taken apart are all chosen rows, then all rejected ones; halves of that would be halves of the pairs."""
    rows = as_rows(GROUPS[:7])
    parts = [part.tolist() for part in consecutive_parts(rows, 3)]
    assert parts == [[0, 1, 2, 7, 8, 9], [3, 4, 10, 11], [5, 6, 12, 13]]
    assert [part.tolist() for part in consecutive_parts(GROUPS[:7], 3)] == [[0, 1, 2], [3, 4], [5, 6]]
    for part in parts:
        assert [rows[i].labels for i in part].count((True,)) == len(part) / 2
