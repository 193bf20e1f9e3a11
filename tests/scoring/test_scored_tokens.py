"""Completions of which only some tokens are scored: the others are read, and count in no log-prob, sum or mean."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from alignment.config.data import ListPairs
from alignment.data.tokens.units import as_pairs, as_rows
from alignment.kernels.attention import enable_shared_prompts
from alignment.losses import LOSSES
from alignment.scoring.layout import FlatLayout, SharedLayout
from alignment.scoring.logps import join_scores, score_groups
from alignment.training.objective import mismatched_groups, step_totals
from alignment.types import Group
from tests.conftest import each, random_groups, recommended_loss, tiny_policy
from tests.helpers.policies import CPU
from tests.helpers.references import cached, prepared
from tests.helpers.steps import (
    groups_for,
    make_loss,
    make_trainer,
    masks_of,
    moved,
    plain_loss,
    sequence_logp,
    step_gradient,
)


def with_turns(groups, seed=0):
    """Each completion with spans of scored tokens and context between them; it may begin and end with either."""
    rng = np.random.default_rng(seed)

    def mask(length):
        scored = np.repeat(rng.random(length) < 0.5, 2)[:length]
        scored[rng.integers(length)] = True
        return scored

    return [replace(group, scored=tuple(mask(len(c)) for c in group.completions)) for group in groups]


GROUPS = with_turns(random_groups(6, seed=8))
LAYOUTS = {"flat": FlatLayout(), "shared": SharedLayout()}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens_per_batch", [60, 10_000])
def test_log_probs_are_those_of_the_scored_tokens(layout, tokens_per_batch):
    """From full logits, in any layout and passes of any size; the sequences are as long as their masks say."""
    model = tiny_policy(trained=True)
    if layout == "shared":
        enable_shared_prompts(model)
    groups = [*GROUPS, replace(GROUPS[0].only(1)), random_groups(1, seed=5)[0]]
    scored = list(score_groups(model, groups, LAYOUTS[layout], tokens_per_batch, CPU))
    found = join_scores(groups, scored)
    texts = [(g.prompt, c, m) for g in groups for c, m in zip(g.completions, masks_of(g), strict=True)]
    assert found.lengths.tolist() == [len(c) if m is None else m.sum() for _, c, m in texts]
    for i, text in enumerate(texts):
        torch.testing.assert_close(found.sequence(i), sequence_logp(model, *text).detach(), rtol=1e-9, atol=1e-9)
    sums = torch.stack([sequence_logp(model, *text).sum() for text in texts]).detach()
    torch.testing.assert_close(found.sums(), sums, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", each(("dpo", "ipo", "simpo", "orpo", "kto"), ("dpo", "kto")))
def test_loss_and_gradient_equal_those_by_hand(name, layout, tmp_path):
    """Each paper's formula over the scored tokens alone, from full logits, beside a step of the trainer."""
    groups = as_rows(GROUPS[:3]) if name == "kto" else GROUPS[:3]
    policy, start = tiny_policy(trained=True), tiny_policy(trained=True)
    if layout == "shared":
        enable_shared_prompts(policy)
    trainer = make_trainer(policy, groups, make_loss(name), tmp_path, layout=LAYOUTS[layout])
    moved(policy)
    loss, gradient = step_gradient(trainer, groups)
    policy.zero_grad()
    expected = plain_loss(name, policy, start, groups)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    for key, parameter in policy.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradient[key], parameter.grad, rtol=1e-5, atol=1e-8)


def test_the_key_of_a_completion():
    """It is what it was where all tokens are scored, so that caches of earlier versions are found, else it tells."""
    ids = np.arange(1, 8, dtype=np.int32)
    plain = Group(ids[:3], (ids[3:],))
    assert plain.key(0).hex() == "f362f990ac41c861873d0c6e250541a9b5bd890e80c251312c8ca5715fd51904"
    whole, some, others = (
        replace(plain, scored=(np.array(mask, bool),)) for mask in ([1, 1, 1, 1], [1, 0, 0, 1], [1, 0, 1, 1])
    )
    assert whole.key(0) == plain.key(0)
    assert len({group.key(0) for group in (plain, some, others)}) == 3


def test_stored_log_probs_know_the_mask(tmp_path):
    """A second run finds all; where only the masks differ it finds none, and each gets its own values."""
    model = tiny_policy(torch.float32, trained=True)
    values, first = prepared(model, tmp_path, GROUPS)
    _, second = prepared(model, tmp_path, GROUPS, spot_checks=4)
    other, third = prepared(model, tmp_path, with_turns(GROUPS, seed=1))
    assert [(s["hits"], s["misses"]) for s in (first, second)] == [(0, 12), (12, 0)]
    changed = sum(
        a.key(k) != b.key(k) for a, b in zip(GROUPS, with_turns(GROUPS, seed=1), strict=True) for k in range(2)
    )
    assert changed > 6
    assert (third["hits"], third["misses"]) == (12 - changed, changed)
    assert second["spot_check_max_diff"] < 1e-5
    for groups, found in ((GROUPS, values), (with_turns(GROUPS, seed=1), other)):
        texts = [(g.prompt, c, m) for g in groups for c, m in zip(g.completions, g.scored, strict=True)]
        by_hand = torch.cat([sequence_logp(model, *text).detach() for text in texts])
        torch.testing.assert_close(found.values, by_hand, rtol=1e-4, atol=1e-5)


def test_units_keep_their_masks():
    """Pairs of lists, rows of pairs, mismatched rows and counts of a step."""
    (group,) = with_turns(random_groups(1, k=3, seed=2))
    for pair, ks in zip(as_pairs([group], ListPairs.all_pairs), [(0, 1), (0, 2), (1, 2)], strict=True):
        assert [mask.tolist() for mask in pair.scored] == [group.scored[k].tolist() for k in ks]
    rows = as_rows(GROUPS[:2])
    assert [row.scored[0].tolist() for row in rows] == [GROUPS[i].scored[k].tolist() for k in (0, 1) for i in (0, 1)]
    for i, row in enumerate(mismatched_groups(recommended_loss("kto"), rows)):
        other = rows[(i + 1) % 4]
        assert (row.prompt.tolist(), row.scored[0].tolist()) == (rows[i].prompt.tolist(), other.scored[0].tolist())
    assert step_totals(GROUPS).tokens == sum(g.scored[0].sum() for g in GROUPS)


def test_a_cached_reference_serves_a_step(tmp_path):
    """With the policy at its start DPO's loss is that of a margin of 0, so that both score the same tokens."""
    model = tiny_policy(torch.float32)
    reference = cached(model, tmp_path)
    reference.prepare(GROUPS)
    trainer = make_trainer(model, GROUPS, recommended_loss("dpo"), tmp_path, reference=reference)
    loss, _ = step_gradient(trainer, GROUPS)
    assert loss == pytest.approx(np.log(2), abs=1e-5)


OF_LOGPS = [name for name in sorted(set(LOSSES) - {"mixture"}) if not LOSSES[name].reads_rewards]


@pytest.mark.parametrize("name", each(OF_LOGPS, ("tdpo2", "wpo")))
def test_every_loss_reads_the_scored_tokens_alone(name, tmp_path):
    """What it is given per token, quantities of the distributions too; the reference is the policy at the start."""
    loss = recommended_loss(name)
    groups = with_turns(groups_for(loss, num=4))
    policy = tiny_policy(trained=True)
    trainer = make_trainer(policy, groups, loss, tmp_path)
    lengths = [n for group in groups for n in group.scored_lengths]
    at_start = trainer.evaluate_step(groups)
    moved(policy)
    after = trainer.evaluate_step(groups)
    for inputs in (at_start.inputs, after.inputs):
        for ragged in (inputs.policy, inputs.reference, *inputs.quantities.values()):
            assert ragged is None or ragged.lengths.tolist() == lengths
    if loss.requirements().reference:
        at_first, reference = at_start.inputs.policy.values, at_start.inputs.reference.values
        torch.testing.assert_close(at_first, reference, rtol=0, atol=1e-5, check_dtype=False)
    texts = [(g.prompt, c, m) for g in groups for c, m in zip(g.completions, masks_of(g), strict=True)]
    by_hand = torch.cat([sequence_logp(policy, *text).detach() for text in texts])
    torch.testing.assert_close(after.inputs.policy.values, by_hand, rtol=1e-6, atol=1e-6)
    assert after.losses.isfinite().all()
    assert (after.losses - at_start.losses).abs().max() > 0
