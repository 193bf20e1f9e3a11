"""Every family that people post-train goes the whole way, tiny: in 4 bits, SFT, DPO, saved, reloaded, resumed."""

import copy
import math

import pytest
import torch

from alignment.policy.adapter import check_adapter_gradients, load_adapter
from alignment.reference.cached import CachedReference
from alignment.reference.store import ReferenceStore
from alignment.scoring.layout import FlatLayout
from alignment.scoring.logps import join_scores, score, score_groups
from alignment.scoring.prompt_sharing import choose_layout
from tests.conftest import random_groups
from tests.helpers.families import FAMILIES, line, policy, row, table, write_model
from tests.helpers.policies import CPU, NF4, load
from tests.helpers.references import ROUNDING
from tests.helpers.steps import make_loss, make_trainer

GROUPS = random_groups(4, seed=3)


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def sft_step(model, layout, optimizer):
    """One step on the chosen completions; returns the loss before it."""
    optimizer.zero_grad()
    [batch] = layout.batches([type(g)(g.prompt, g.completions[:1]) for g in GROUPS], 10_000)
    loss = -score(model, batch).values.mean()
    loss.backward()
    optimizer.step()
    return loss.item()


def dpo_step(trainer, model, optimizer):
    optimizer.zero_grad()
    loss = trainer.training_step(model, {"groups": GROUPS}).item()
    optimizer.step()
    return loss


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", [pytest.param(f, id=f.model_type, marks=() if f.core else pytest.mark.matrix) for f in FAMILIES]
)
def test_a_family_goes_the_whole_way(family, tmp_path):
    """Each step changes the policy, the reference is its start, and what is saved goes on bit by bit."""
    folder = write_model(family, tmp_path / "model")
    model = policy(folder).train()
    layout = choose_layout(model, CPU)
    assert table()[family.model_type] == line(row(family, model, layout))

    # SFT: the loss falls, and every trained tensor takes part
    optimizer = optimizer_of(model)
    before = sft_step(model, layout, optimizer)
    check_adapter_gradients(model)
    assert sft_step(model, layout, optimizer) < before

    # A row's neighbours and its padding change nothing
    alone = torch.cat([scores(model, [group], FlatLayout()) for group in GROUPS])
    torch.testing.assert_close(scores(model, GROUPS, FlatLayout()), alone, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(scores(model, GROUPS, layout), alone, rtol=0, atol=ROUNDING)

    # DPO against the stored log-probs of the policy that SFT ended with
    reference = CachedReference(ReferenceStore(tmp_path / "store.sqlite"), model, layout, 10_000, CPU, 1)
    reference.prepare(GROUPS)
    trainer = make_trainer(model, GROUPS, make_loss("dpo"), tmp_path, reference=reference, layout=layout)
    optimizer = optimizer_of(model)
    assert math.isclose(dpo_step(trainer, model, optimizer), math.log(2), abs_tol=1e-4)

    # Saved and loaded, it is the same policy, and its next step is the same
    model.save_pretrained(tmp_path / "adapter")
    resumed = load_adapter(load(folder, NF4, attention="auto"), tmp_path / "adapter").train()
    choose_layout(resumed, CPU)
    assert torch.equal(scores(model, GROUPS, layout), scores(resumed, GROUPS, layout))
    other = optimizer_of(resumed)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    again = make_trainer(resumed, GROUPS, make_loss("dpo"), tmp_path, reference=reference, layout=layout)
    losses = dpo_step(trainer, model, optimizer), dpo_step(again, resumed, other)
    assert losses[0] == losses[1] < math.log(2)
    trained, found = ({n: p for n, p in m.named_parameters() if p.requires_grad} for m in (model, resumed))
    assert trained.keys() == found.keys() and all(torch.equal(trained[name], found[name]) for name in trained)


@torch.no_grad()
def scores(model, groups, layout):
    return join_scores(groups, list(score_groups(model, groups, layout, 10_000, CPU))).values


def test_the_table_of_the_families_is_whole():
    """A family without a row, or a row without a family: `python -m tests.helpers.families` writes the table."""
    assert list(table()) == [family.model_type for family in FAMILIES]
