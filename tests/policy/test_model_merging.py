"""Merged updates are what each method says, whatever form the parents' adapters have; what is no update is refused."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

from alignment.errors import UserError
from alignment.policy.model_merging import METHODS, MergeSettings, merge_adapters, merge_models, put_adapter
from alignment.scoring.logps import enable_scoring
from tests.conftest import random_groups, tiny_config, tiny_policy
from tests.helpers.policies import CPU, scores, train_adapter

GROUPS = random_groups(3, seed=2)


def base():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config())
    enable_scoring(model)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    """Three saved adapters of one base: other ranks, scalings and, in the last, one pattern."""
    folder = tmp_path_factory.mktemp("parents")
    targets = ["q_proj", "down_proj", "embed_tokens"]
    forms = {
        "a": LoraConfig(r=4, lora_alpha=8, target_modules=targets),
        "b": LoraConfig(r=2, lora_alpha=3, target_modules=targets, use_rslora=True),
        "c": LoraConfig(r=3, lora_alpha=3, target_modules=targets, alpha_pattern={"down_proj": 9}),
    }
    for seed, (name, form) in enumerate(forms.items()):
        train_adapter(get_peft_model(base(), form), seed=seed).save_pretrained(folder / name)
    return {name: folder / name for name in forms}


def updates_of(folder):
    """By layer, what the adapter adds to the weight as peft computes it, (out, in); of embeddings (width, tokens)."""
    model = live(folder)
    layers = {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    found = {name: layer.get_delta_weight("default").detach() for name, layer in layers.items()}
    return {name: u.T.contiguous() if name.endswith("embed_tokens") else u for name, u in found.items()}


def expected(settings, folders):
    """The base with the merged updates in its weights."""
    each = [updates_of(folder) for folder in folders]
    model = base()
    with torch.no_grad():
        for name in each[0]:
            update = settings.merged([updates[name] for updates in each])
            model.get_parameter(f"{name}.weight").add_(update.T if name.endswith("embed_tokens") else update)
    return model


def live(folder):
    """A policy as a run has it, its adapter trained, beside which a merge is put into it."""
    return PeftModel.from_pretrained(base(), str(folder), is_trainable=True)


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_a_merged_adapter_is_the_sum_of_the_products(method, parents, tmp_path):
    """Exactly, for parents of other ranks and scalings; and so it is saved, as a plain LoRA that peft loads."""
    settings = MergeSettings(method, (1.0, 2.0, 0.5)).of(3)
    updates, facts = merge_adapters(parents, settings, CPU)
    assert (facts.rank, facts.error) == (9, pytest.approx(0, abs=1e-6))
    wanted = scores(expected(settings, parents.values()), GROUPS)
    for name in parents:  # into a policy with any of the scalings
        policy = live(parents[name])
        before = scores(policy, GROUPS)
        put_adapter(policy, updates)
        torch.testing.assert_close(scores(policy, GROUPS), wanted, rtol=1e-4, atol=1e-4)
        assert (before - wanted).abs().max() > 0.01
        policy.save_pretrained(tmp_path / name)
        saved = live(tmp_path / name)
        torch.testing.assert_close(scores(saved, GROUPS), wanted, rtol=1e-4, atol=1e-4)
        assert json.loads((tmp_path / name / "adapter_config.json").read_text())["r"] == 9


@pytest.mark.parametrize("method", ["magnitude_prune", "ties", "dare_ties"])
def test_a_pruned_merge_is_computed_on_the_products(method, parents):
    """With the full rank of a matrix nothing is left out; with less, the report has the share that is."""
    settings = MergeSettings(method, rank=32, seed=3).of(3)
    updates, facts = merge_adapters(parents, settings, CPU)
    assert facts.error < 1e-5
    each = [updates_of(folder) for folder in parents.values()]
    torch.manual_seed(3)
    for name in sorted(updates):
        a, b = updates[name]
        torch.testing.assert_close(b @ a, settings.merged([one[name] for one in each]), rtol=1e-3, atol=1e-4)
    small, facts = merge_adapters(parents, MergeSettings(method, rank=1).of(3), CPU)
    assert {len(a) for a, _ in small.values()} == {1}
    assert 0.1 < facts.error < 1


def test_the_methods_by_hand():
    """Six numbers each, worked out on paper from the papers' definitions."""
    one, two = torch.tensor([[3.0, -1.0, 0.5, 2.0]]), torch.tensor([[1.0, 2.0, -0.4, -4.0]])
    hand = {
        "linear": [2.0, 0.5, 0.05, -1.0],
        "task_arithmetic": [1.6, 0.4, 0.04, -0.8],
        "magnitude_prune": [1.5, 1.0, 0.0, -1.0],  # keeps 3 and 2 of the first, 2 and -4 of the second
        "ties": [3.0, 2.0, 0.0, -4.0],  # the last: 2 - 4 < 0 elects minus
    }
    for name, values in hand.items():
        settings = MergeSettings(name, density=0.5 if name in ("magnitude_prune", "ties") else None).of(2)
        torch.testing.assert_close(settings.merged([one, two]), torch.tensor([values]))
    torch.manual_seed(0)
    drawn = torch.stack([MergeSettings("dare_ties", density=0.5).of(2).merged([one, one]) for _ in range(2000)])
    assert set(drawn[:, 0, 0].tolist()) == {0.0, 6.0}  # kept at twice its size in one or both, or in none
    assert (drawn[:, 0, 0] > 0).float().mean().item() == pytest.approx(0.75, abs=0.04)


def test_norms_and_cosines_of_the_parents(parents):
    """Over all weights, as numbers of one long vector."""
    facts = merge_adapters(parents, MergeSettings("linear").of(3), CPU)[1]
    vectors = [torch.cat([u.flatten() for u in updates_of(folder).values()]) for folder in parents.values()]
    assert facts.norms == pytest.approx([v.norm().item() for v in vectors], rel=1e-3)
    cosines = [torch.cosine_similarity(vectors[i], vectors[j], 0).item() for i, j in ((0, 1), (0, 2), (1, 2))]
    assert facts.cosines == pytest.approx(cosines, abs=1e-3)
    assert facts.merged_norm == pytest.approx((sum(vectors) / 3).norm().item(), rel=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_whole_models_are_merged_by_the_differences_of_their_weights(method):
    """Two models that moved from one base; the base becomes the merged model."""
    models = []
    for seed in range(2):
        model = tiny_policy(torch.float32, r=None)
        torch.manual_seed(10 + seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        models.append(model)
    settings = MergeSettings(method, seed=1).of(2)
    start, merged = tiny_policy(torch.float32, r=None), tiny_policy(torch.float32, r=None)
    facts = merge_models(merged, models, settings)
    torch.manual_seed(1)
    for (name, weight), before, *after in zip(
        merged.named_parameters(), start.parameters(), *(m.parameters() for m in models), strict=True
    ):
        wanted = before + settings.merged([a - before for a in after])
        torch.testing.assert_close(weight, wanted, msg=name)
    assert facts.rank is None and facts.norms[0] == pytest.approx(facts.norms[1], rel=0.1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (MergeSettings("tise"), r"^method must be one of linear, .*, not 'tise' \(did you mean ties\?\)\.$"),
        (MergeSettings("linear", (1.0,)), "weights needs a finite number for each of the 2 runs, not 1"),
        (MergeSettings("linear", (1.0, -1.0)), "must be above 0"),
        (MergeSettings("task_arithmetic", (1.0, float("nan"))), "finite"),
        (MergeSettings("linear", density=0.5), "density has no effect with method=linear"),
        (MergeSettings("ties", density=0.0), r"density must be in \(0, 1\]"),
        (MergeSettings("ties", rank=0), "rank must be at least 1"),
    ],
)  # fmt: skip
def test_settings_that_a_merge_refuses(settings, said):
    """One sentence each."""
    with pytest.raises(UserError, match=said):
        settings.of(2)


def test_adapters_that_cannot_be_merged(parents, tmp_path):
    """A DoRA is more than a product; adapters on other layers have nothing to be merged with."""
    forms = {
        "dora": (LoraConfig(r=2, target_modules=["q_proj"], use_dora=True), "its adapter has use_dora"),
        "saved": (LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]), "has "),
        "other": (LoraConfig(r=2, target_modules=["q_proj"]), "have adapted other layers"),
    }
    for name, (form, said) in forms.items():
        get_peft_model(base(), form).save_pretrained(tmp_path / name)
        with pytest.raises(UserError, match=said):
            merge_adapters({"a": parents["a"], name: tmp_path / name}, MergeSettings("linear").of(2), CPU)
