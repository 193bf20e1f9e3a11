"""Prompts whose states go on with their completions: the same numbers as flat rows, or flat rows."""

import gc
import logging
import weakref

import numpy as np
import pytest
import torch

from alignment.data.tokens.units import as_rows
from alignment.policy.adapter import attach_adapter
from alignment.policy.architecture import auto_class
from alignment.policy.layers import checkpoint_layers
from alignment.reference.cached import CachedReference
from alignment.reference.store import ReferenceStore
from alignment.scoring import prompt_sharing, states
from alignment.scoring.layout import FlatLayout, ForkedLayout, keys_per_position
from alignment.scoring.logps import enable_scoring, join_scores, score, score_tokens
from alignment.scoring.prompt_sharing import choose_layout
from alignment.training.objective import groups_to_reference
from alignment.types import Group
from tests.conftest import each, random_groups
from tests.helpers.families import FAMILIES
from tests.helpers.policies import CPU, adapter
from tests.helpers.steps import make_loss, make_trainer, moved, step_gradient

BY_TYPE = {family.model_type: family for family in FAMILIES}
FORKED = (
    "qwen3_next", "qwen3_5_text", "granitemoehybrid", "falcon_h1", "nemotron_h", "mamba2", "bamba", "lfm2", "gemma2",
    "gpt_oss", "deepseek_v3",
)  # fmt: skip
ALWAYS = ForkedLayout(10_000, least_gain=0)
"""All prompts in one pass, padded, whatever that gains."""
ALONE = ForkedLayout(0, least_gain=0)
"""Passes without padding between prompts."""


def policy(name, dtype=torch.float32):
    """A tiny random model of the family with an adapter that has an effect."""
    config = BY_TYPE[name].config()
    torch.manual_seed(0)
    model = auto_class(config).from_config(config).to(dtype).requires_grad_(False)
    enable_scoring(model)
    model = attach_adapter(model, adapter(target_modules=["auto"]), 0)
    moved(model)
    return model.train()


def scores_and_gradient(model, groups, layout):
    model.zero_grad()
    scored = []
    for batch in layout.batches(groups, 10_000):
        found = score(model, batch)
        (found.values * torch.cos(batch.targets.to(found.values))).sum().backward()
        scored.append((batch, found.detach()))
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return join_scores(groups, scored).values, gradient


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-5)
    assert expected[1].norm() > 1e-2
    assert (found[1] - expected[1]).norm() <= 1e-5 * expected[1].norm()


@torch.no_grad()
def values(model, groups):
    found = join_scores(groups, [(batch, score(model, batch)) for batch in ALWAYS.batches(groups, 10_000)])
    return [found.sequence(i) for i in range(len(found))]


@pytest.mark.parametrize("name", each(FORKED, ["mamba2"]))
def test_a_family_forks_as_its_flat_rows(name):
    """Log-probs and gradients, with prompts padded and not, with layers checkpointed and not."""
    model = policy(name)
    assert isinstance(choose_layout(model, CPU), ForkedLayout)
    groups = random_groups(4, k=3, seed=2)
    expected = scores_and_gradient(model, groups, FlatLayout(10_000))
    assert_same(scores_and_gradient(model, groups, ALONE), expected)
    for every in (0, 1):
        checkpoint_layers(model, every)
        assert_same(scores_and_gradient(model, groups, ALWAYS), expected)


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("name", "layout"),
    [(name, ForkedLayout) for name in ("mamba2", "falcon_h1", "qwen3_5_text", "lfm2")]
    + [("mamba", FlatLayout), ("jamba", FlatLayout)],
)
def test_a_policy_in_16_bits_shares_no_row(name, layout):
    """Rounding hides there what a tiny recurrence changes: the states that its layers keep and read do not."""
    assert isinstance(choose_layout(policy(name, torch.bfloat16), CPU), layout)


@pytest.mark.parametrize("name", each(["mamba", "jamba"], ["mamba"]))
def test_a_family_that_drops_a_state_is_flat(name, caplog):
    """Its log-probs may differ by next to nothing; that no completion reads the state is seen."""
    with caplog.at_level(logging.INFO, logger="alignment.scoring.prompt_sharing"):
        assert isinstance(choose_layout(policy(name), CPU), FlatLayout)
    assert "completions do not read the recurrent state of layer 0" in caplog.text
    assert sum(record.name == prompt_sharing.__name__ for record in caplog.records) == 1


@pytest.mark.parametrize("way", ["detached", "raises", "written", "checkpointed without"])
def test_what_cannot_be_forked_right_is_flat(way, monkeypatch, caplog):
    """States without a gradient, a cache of another form, completions that write, layers that drop the cache."""

    def detached(self, recurrent_states, state_idx=0, **kwargs):
        self.kept["recurrent", state_idx] = recurrent_states.detach()
        return recurrent_states

    def raises(self, *args, **kwargs):
        raise KeyError("layers")

    def written(self, conv_states, state_idx=0, **kwargs):
        whole = torch.cat([self.conv_states[state_idx], conv_states], -1)
        self._kept["conv", state_idx].zero_()
        return whole

    if way == "detached":
        monkeypatch.setattr(states._Recording, "update_recurrent_state", detached)
    elif way == "raises":
        monkeypatch.setattr(states._Recording, "update_conv_state", raises)
    elif way == "written":
        monkeypatch.setattr(states._Reading, "update_conv_state", written)
    else:
        monkeypatch.delattr(states.GradientCheckpointingLayer, "_can_checkpoint_with_cache")
    with caplog.at_level(logging.INFO, logger="alignment.scoring.prompt_sharing"):
        assert isinstance(choose_layout(policy("mamba2"), CPU), FlatLayout)
    assert sum(record.name == prompt_sharing.__name__ for record in caplog.records) == 1


def test_states_never_leak():
    """Another completion, or another prompt in the pass, changes nothing elsewhere."""
    model = policy("lfm2")
    groups = random_groups(3, k=3, seed=2)
    before = values(model, groups)
    first, *others = groups[1].completions
    changed = [groups[0], Group(groups[1].prompt, ((first + 1) % 97, *others)), groups[2]]
    after = values(model, changed)
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True] * 3 + [False] + [True] * 5
    changed = [groups[0], Group((groups[1].prompt + 1) % 97, groups[1].completions), groups[2]]
    after = values(model, changed)
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True] * 3 + [False] * 3 + [True] * 3


def test_no_state_outlives_its_pass(monkeypatch):
    """A checkpointed layer holds the cache that it will read again, which must not hold the graph of that layer."""
    model = policy("mamba2")
    states.enable_forking(model.get_base_model())
    checkpoint_layers(model, 1)
    seen = []
    plain = states.run_prompts

    def watched(*args):
        hidden, kept = plain(*args)
        seen.extend(weakref.ref(state) for layer in kept for state in layer.values())
        return hidden, kept

    monkeypatch.setattr(states, "run_prompts", watched)
    gc.disable()
    try:
        for backward in (True, False):
            for batch in ALWAYS.batches(random_groups(2), 10_000):
                total = score(model, batch).values.sum()
                assert seen and all(reference() is not None for reference in seen)
                if backward:
                    total.backward()
                del total
            assert all(reference() is None for reference in seen)
            seen.clear()
    finally:
        gc.enable()


@pytest.mark.parametrize("name", each(["dpo", "kto"], ["dpo"]))
def test_a_training_step_is_the_same(name, tmp_path):
    """Loss and gradient of a step of DPO, and of KTO, against log-probs that the same layout stored; checkpointed."""
    groups = random_groups(4, seed=8)
    if name == "kto":
        groups = as_rows(groups)
    results = []
    for layout in (FlatLayout(10_000), ALWAYS):
        model = policy("lfm2")
        if layout is ALWAYS:
            states.enable_forking(model.get_base_model())
            checkpoint_layers(model, 1)
        store = ReferenceStore(tmp_path / f"{type(layout).__name__}.sqlite")
        reference = CachedReference(store, model, layout, 10_000, CPU, spot_checks=0)
        reference.prepare(groups_to_reference(loss := make_loss(name), groups, [range(len(groups))], ()))
        trainer = make_trainer(model, groups, loss, tmp_path, reference=reference, layout=layout)
        moved(model)
        loss, gradient = step_gradient(trainer, groups)
        results.append((reference.logps(groups).values, loss, torch.cat([g.flatten() for g in gradient.values()])))
    (flat_logps, flat_loss, flat), (forked_logps, forked_loss, forked) = results
    torch.testing.assert_close(forked_logps, flat_logps, rtol=0, atol=1e-5)
    assert forked_loss == pytest.approx(flat_loss, rel=1e-5)
    assert (forked - flat).norm() <= 1e-5 * flat.norm()


@torch.no_grad()
def test_prompts_are_scored_too():
    """Where a loss asks for the prompts' tokens, they follow those of the completions, group by group."""
    model = policy("mamba2")
    for group in random_groups(3, seed=5):
        [flat], [forked] = (layout.batches([group], 10_000, prompts=True) for layout in (FlatLayout(), ALWAYS))
        assert (
            torch.equal(forked.targets, flat.targets) and len(flat.targets) == flat.offsets[-1] + len(group.prompt) - 1
        )
        found, expected = (score_tokens(model, batch).values for batch in (forked, flat))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


# The layout


def test_every_group_once_within_the_budget():
    """With groups of one prompt in one fork, and rows of at least two tokens."""
    groups = random_groups(40, k=3, seed=1)
    groups += [Group(group.prompt, group.completions[:1]) for group in groups[:5]]
    for pass_cost, budget in ((0, 100), (60, 100), (10_000, 400)):
        batches = list(ForkedLayout(pass_cost, least_gain=0).batches(groups, budget))
        assert sorted(i for b in batches for i in b.indices) == list(range(45))
        for batch in batches:
            prompts, (rows, width) = len(batch.input_ids), batch.fork.input_ids.shape
            assert batch.positions <= budget or prompts == 1
            assert rows == sum(len(groups[i].completions) for i in batch.indices) and width >= 2
            assert prompts == len({groups[i].prompt.tobytes() for i in batch.indices})
            assert batch.num_tokens == sum(
                len(groups[i].prompt) + len(c) for i in batch.indices for c in groups[i].completions
            )
            ids = torch.cat([batch.input_ids.flatten(), batch.fork.input_ids.flatten()])
            assert (batch.fork.mask is None) == (len({len(groups[i].prompt) for i in batch.indices}) == 1)
            assert batch.score_positions.max() < len(ids)


def group_of(prompt, *completions):
    return Group(np.ones(prompt, np.int32), tuple(np.ones(n, np.int32) for n in completions))


@pytest.mark.parametrize(
    ("prompt", "completions", "forks"),
    [(256, (64, 64), True), (64, (64, 64), False), (128, (128,) * 4, True), (512, (64,), False), (8, (2, 2), False)],
)
def test_a_prompt_forks_where_that_saves_enough(prompt, completions, forks):
    """Long prompts and many completions do; one completion has nothing to share."""
    group = group_of(prompt, *completions)
    [batch] = ForkedLayout().batches([group], 10_000)
    own = max(completions) - 1
    flat = len(completions) * (prompt + own)
    assert (batch.fork is not None) == forks
    assert batch.positions == (prompt + len(completions) * own if forks else flat)
    assert keys_per_position(ForkedLayout(), [group]) == ((prompt + flat) / batch.positions if forks else 1.0)


def test_a_gpu_forks_where_the_whole_pass_saves_a_pass():
    """A second call of the decoder is worth many positions there, so a few short prompts are laid out flat."""
    group = group_of(256, 64, 64)
    for number, forks in ((2, False), (20, True)):
        groups = [Group(group.prompt + i, group.completions) for i in range(number)]
        batches = list(ForkedLayout(prompt_sharing.PASS_COST["cuda"]).batches(groups, 100_000))
        assert sorted(i for b in batches for i in b.indices) == list(range(number))
        assert all((batch.fork is not None) == forks for batch in batches)
