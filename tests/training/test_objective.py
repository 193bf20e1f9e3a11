"""What a loss is given for groups: the reference's own numbers, drawn seeds, counts."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from alignment.data.tokens.units import as_rows
from alignment.losses import Quantity
from alignment.scoring.logps import enable_scoring
from alignment.training.objective import step_seeds, step_totals
from alignment.types import Group
from tests.conftest import random_groups, recommended_loss, tiny_config, tiny_policy
from tests.helpers.steps import make_trainer, moved

GROUPS = random_groups(4, seed=31)


def policy_with_adapted_head():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(tie_word_embeddings=False)).double().requires_grad_(False)
    enable_scoring(model)
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "lm_head"])).double()


@pytest.mark.parametrize("kind", ["adapter", "adapted head", "whole model"])
def test_a_divergence_is_from_the_reference(kind, tmp_path):
    """The log-probs that come with it are those of the reference alone, whose head may train in the policy."""
    policy = {
        "adapter": tiny_policy,
        "adapted head": policy_with_adapted_head,
        "whole model": lambda: tiny_policy(r=None).requires_grad_(True),
    }[kind]()
    trainer = make_trainer(policy, GROUPS, recommended_loss("tdpo2"), tmp_path, tokens_per_batch=70)
    moved(policy)
    inputs = trainer.objective.inputs(GROUPS, trainer.objective.collect(GROUPS, 70))
    expected = trainer.reference.logps(GROUPS)
    torch.testing.assert_close(inputs.reference.values, expected.values, rtol=1e-6, atol=1e-8)
    assert (inputs.policy.values - expected.values).abs().max() > 1e-3
    with torch.no_grad():
        group = GROUPS[0]
        ids = torch.tensor([*group.prompt, *group.completions[0]])[None].long()
        start = len(group.prompt) - 1
        after = policy(input_ids=ids[:, :-1]).logits[0, start:].log_softmax(-1)
        with trainer.reference.frozen.active() as model:
            before = model(input_ids=ids[:, :-1]).logits[0, start:].log_softmax(-1)
    found = inputs.quantities[Quantity.divergence].sequence(0)
    torch.testing.assert_close(found, (before.exp() * (before - after)).sum(-1), rtol=1e-5, atol=1e-9)


def test_entropies_of_a_live_and_of_a_stored_reference(tmp_path):
    from alignment.reference.cached import CachedReference
    from alignment.reference.live import LiveReference
    from alignment.reference.store import ReferenceStore
    from alignment.scoring.layout import FlatLayout

    model, cpu = tiny_policy(torch.float32, trained=True), torch.device("cpu")
    with torch.no_grad():
        expected = []
        for group in GROUPS:
            for completion in group.completions:
                ids = torch.tensor([*group.prompt, *completion])[None].long()
                log_probs = model(input_ids=ids[:, :-1]).logits[0, len(group.prompt) - 1 :].double().log_softmax(-1)
                expected.append(-(log_probs.exp() * log_probs).sum(-1) / torch.tensor(97.0).double().log())
    passes = []
    for again in (False, True):
        store = ReferenceStore(tmp_path / "reference.sqlite")
        cached = CachedReference(store, model, FlatLayout(), 80, cpu, spot_checks=0, with_entropies=True)
        cached.prepare(GROUPS)
        assert cached.summary()["misses"] == (0 if again else 8)
        passes.append(cached.entropies(GROUPS))
        cached.close()
    for found in (*passes, LiveReference(model, FlatLayout(), 80, cpu).entropies(GROUPS)):
        torch.testing.assert_close(found.values.double(), torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_a_store_without_entropies_is_completed(tmp_path):
    """Log-probs that an earlier run stored do not stand for entropies."""
    from alignment.reference.cached import CachedReference
    from alignment.reference.store import ReferenceStore
    from alignment.scoring.layout import FlatLayout

    model, cpu = tiny_policy(torch.float32), torch.device("cpu")
    misses = []
    for with_entropies in (False, True, True):
        store = ReferenceStore(tmp_path / "reference.sqlite")
        cached = CachedReference(store, model, FlatLayout(), 80, cpu, spot_checks=2, with_entropies=with_entropies)
        cached.prepare(GROUPS)
        misses.append(cached.summary()["misses"])
        cached.close()
    assert misses == [8, 8, 0]


def test_seeds_are_of_the_content_the_run_and_the_step():
    seeds = step_seeds(GROUPS, 0, 3)
    assert step_seeds(GROUPS[::-1], 0, 3).tolist() == seeds.tolist()[::-1]
    assert len({*seeds.tolist(), *step_seeds(GROUPS, 1, 3).tolist(), *step_seeds(GROUPS, 0, 4).tolist()}) == 12
    assert (seeds >= 0).all()
    group = GROUPS[0]
    swapped = Group(group.prompt, group.completions[::-1])
    assert step_seeds([swapped], 0, 3) != seeds[:1]


@pytest.mark.parametrize("unit", ["pair", "row", "list"])
def test_totals_of_groups_are_those_of_their_inputs(unit, tmp_path):
    """Counted from tokens before any pass, and from the log-probs of a whole step."""
    loss = recommended_loss(
        {"pair": "orpo", "row": "bco", "list": "plackett_luce"}[unit],
        *(["nll_scope=prompt_and_response"] if unit == "pair" else []),
    )
    groups = {"pair": GROUPS, "row": as_rows(GROUPS)[1:7], "list": random_groups(3, k=4, seed=5)}[unit]
    trainer = make_trainer(tiny_policy(), groups, loss, tmp_path)
    inputs = trainer.objective.inputs(groups, trainer.objective.collect(groups, 1000))
    counted, found = step_totals(groups), inputs.step_totals()
    assert (counted.items, counted.tokens) == (found.items, found.tokens)
    assert found.prompt_tokens == (counted.prompt_tokens if unit == "pair" else 0)
    assert counted.tokens == sum(len(g.completions[0]) for g in groups if g.labels != (False,))
