"""Log-probs: the scoring route against plain full logits, whatever the batches."""

import functools
import logging
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from alignment.kernels.attention import enable_shared_prompts
from alignment.scoring.head import LOGITS_PER_CHUNK, LogitTransform, score_hidden
from alignment.scoring.layout import FlatLayout, SharedLayout
from alignment.scoring.logps import (
    check_scoring,
    enable_scoring,
    in_passes,
    join_scores,
    score,
    score_groups,
    score_tokens,
)
from alignment.scoring.token_plan import TokenPlan
from alignment.types import Group
from tests.conftest import random_groups, tiny_config, tiny_policy

CPU = torch.device("cpu")


def plain_logps(model: nn.Module, prompt: np.ndarray, completion: np.ndarray) -> torch.Tensor:
    """Per-token log-probs of one completion from the full logits of one row."""
    ids = torch.tensor(np.concatenate([prompt, completion]).astype(np.int64))
    logits = model(input_ids=ids[None]).logits[0]
    return torch.stack([logits[t - 1].log_softmax(-1)[ids[t]] for t in range(len(prompt), len(ids))])


@pytest.mark.parametrize("tokens_per_batch", [1, 40, 100, 10_000])
def test_equals_full_logits_however_batched(tokens_per_batch):
    model, groups = tiny_policy(trained=True), random_groups(9, k=3)
    scored = list(score_groups(model, groups, FlatLayout(), tokens_per_batch, CPU))
    logps = join_scores(groups, scored)
    expected = [plain_logps(model, g.prompt, c).detach() for g in groups for c in g.completions]
    assert len(logps) == len(expected) == 27
    for i, values in enumerate(expected):
        torch.testing.assert_close(logps.sequence(i), values, rtol=1e-12, atol=1e-12)
    assert sorted(i for batch, _ in scored for i in batch.indices) == list(range(9))


@pytest.mark.parametrize("layout", [FlatLayout(), SharedLayout()], ids=["flat", "shared"])
@pytest.mark.parametrize("tokens_per_batch", [1, 60, 10_000])
def test_prompts_can_be_scored_too(layout, tokens_per_batch):
    """Their tokens but the first, behind those of all completions; groups with one prompt have it each."""
    model, groups = tiny_policy(trained=True), random_groups(6, k=2, seed=3)
    groups[4] = Group(groups[1].prompt, groups[4].completions)
    groups[5] = Group(groups[5].prompt[:1], groups[5].completions)
    expected = [plain_logps(model, g.prompt[:1], g.prompt[1:]).detach() if len(g.prompt) > 1 else [] for g in groups]
    completions = [plain_logps(model, g.prompt, c).detach() for g in groups for c in g.completions]
    if isinstance(layout, SharedLayout):
        enable_shared_prompts(model)
    plan = TokenPlan.of(groups, prompts=True)
    values = torch.full((plan.num_tokens,), torch.nan, dtype=torch.float64)
    run = functools.partial(score_tokens, model)
    for batch, part in in_passes(run, groups, layout, tokens_per_batch, CPU, prompts=True):
        values[plan.columns(batch.indices)] = part.logps
    for found, wanted in ((plan.prompts(values), expected), (plan.policy(values), completions)):
        assert len(found) == len(wanted)
        for i, sequence in enumerate(wanted):
            torch.testing.assert_close(
                found.sequence(i), torch.as_tensor(sequence, dtype=torch.float64), rtol=1e-5, atol=1e-6
            )


def test_batches_keep_the_token_budget():
    groups = random_groups(30)
    for batch in FlatLayout().batches(groups, 60):
        rows, width = batch.input_ids.shape
        assert rows * width <= 60 or len(batch.indices) == 1
        lengths = [len(groups[i].prompt) + len(c) for i in batch.indices for c in groups[i].completions]
        assert batch.num_tokens == sum(lengths)
        assert width == max(lengths) - 1  # the last token predicts nothing that is scored


def test_padding_is_never_seen():
    """Whatever stands in the padding, even the token that the model likes best, nothing changes."""
    model = tiny_policy(trained=True)
    batch = next(FlatLayout().batches(random_groups(4), 10_000))
    before = score(model, batch).values
    lengths = torch.zeros(batch.input_ids.shape[0], dtype=torch.long)
    for row in range(len(lengths)):
        scored = batch.score_positions[
            (batch.score_positions >= row * batch.input_ids.shape[1])
            & (batch.score_positions < (row + 1) * batch.input_ids.shape[1])
        ]
        lengths[row] = scored.max() - row * batch.input_ids.shape[1] + 1
    padding = torch.arange(batch.input_ids.shape[1])[None] >= lengths[:, None]
    assert padding.any()
    batch.input_ids[padding] = 55
    torch.testing.assert_close(score(model, batch).values, before, rtol=0, atol=1e-12)


def test_a_special_token_inside_a_completion_is_scored():
    """pad == eos: a completion that contains the padding id (0) keeps all its tokens."""
    model = tiny_policy()
    group = Group(np.array([5], np.int32), (np.array([0, 0, 7, 0], np.int32),))
    [(_, logps)] = score_groups(model, [group], FlatLayout(), 100, CPU)
    torch.testing.assert_close(logps.values, plain_logps(model, *[group.prompt, group.completions[0]]).detach())


def test_chunks_do_not_matter(monkeypatch):
    model, groups = tiny_policy(trained=True), random_groups(5)
    whole = next(iter(FlatLayout().batches(groups, 10_000)))
    reference = score(model, whole)
    reference.values.sum().backward()
    gradient = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    monkeypatch.setitem(LOGITS_PER_CHUNK, "cpu", 97 * 3)
    chunked = score(model, whole)
    chunked.values.sum().backward()
    torch.testing.assert_close(chunked.values, reference.values, rtol=1e-13, atol=0)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, gradient[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("family", ["gemma2", "granite", "cohere", "llama", "gpt_neox", "mamba"])
def test_architectures_that_change_their_logits(family):
    """Softcapping (Gemma), division (Granite) and scaling (Cohere) of logits are part of the log-prob."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = tiny_config().to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    settings = {name: shape[name] for name in names}
    if family in ("gemma2", "granite", "cohere", "llama"):
        settings |= {"num_key_value_heads": 2, "head_dim": 8}
    if family == "gemma2":
        settings["final_logit_softcapping"] = 0.5
    if family == "granite":
        settings["logits_scaling"] = 3.0
    if family == "cohere":
        settings["logit_scale"] = 0.25
    if family == "mamba":
        settings = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings, **ids)).eval()
    enable_scoring(model)
    check_scoring(model, 97, CPU)
    group = random_groups(1)[0]
    logps = join_scores([group], list(score_groups(model, [group], FlatLayout(), 1000, CPU)))
    for k in range(2):
        expected = plain_logps(model, group.prompt, group.completions[k]).detach()
        torch.testing.assert_close(logps.sequence(k), expected, rtol=1e-4, atol=1e-5)


def test_an_unknown_head_is_scored_by_its_own_logits(caplog):
    """What a model makes of its head's output is part of the log-prob, whether anybody knows it or not."""
    model = tiny_policy(r=None)
    plain = type(model).forward

    def doubled(self, *args, **kwargs):
        output = plain(self, *args, **kwargs)
        output.logits = output.logits * 2
        return output

    model.__class__ = type("Doubled", (type(model),), {"forward": doubled})
    del model.forward
    enable_scoring(model)
    with caplog.at_level(logging.INFO, logger="alignment.scoring.logps"):
        check_scoring(model, 97, CPU)
    assert caplog.text.count("all logits of a pass are kept") == 1
    groups = random_groups(2)
    found = join_scores(groups, list(score_groups(model, groups, FlatLayout(), 1000, CPU)))
    expected = torch.cat([plain_logps(model, g.prompt, c).detach() for g in groups for c in g.completions])
    torch.testing.assert_close(found.values, expected, rtol=1e-4, atol=1e-5)


def test_generation_still_works():
    """The patched forward keeps its signature, so `generate` accepts and validates its arguments."""
    model = tiny_policy(dtype=torch.float32).eval()
    out = model.generate(input_ids=torch.tensor([[3, 4]]), max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert out.shape == (1, 5)
    with pytest.raises(ValueError, match="not used by the model"):
        model.generate(input_ids=torch.tensor([[3, 4]]), max_new_tokens=1, no_such_argument=1)


@pytest.mark.parametrize("trained", ["all weights, the head's too", "a layer below a frozen head"])
def test_gradients_of_a_trained_and_of_a_frozen_head(trained):
    """A frozen head is run once and a trained one twice; under softcapping both give the gradient of plain logits."""
    from transformers import AutoConfig, AutoModelForCausalLM

    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    shape = {name: tiny_config().to_dict()[name] for name in names}
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gemma2", **shape, num_key_value_heads=2, final_logit_softcapping=0.5, tie_word_embeddings=False
    )
    model = AutoModelForCausalLM.from_config(config).double()
    model.requires_grad_(trained.startswith("all"))
    model.model.layers[0].mlp.up_proj.requires_grad_(True)
    enable_scoring(model)
    groups = random_groups(3)
    weights = torch.randn(sum(len(c) for g in groups for c in g.completions), dtype=torch.float64)
    batch = next(FlatLayout(10_000).batches(groups, 10_000))
    (score(model, batch).values * weights).sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    plain = torch.cat([plain_logps(model, groups[i].prompt, c) for i in batch.indices for c in groups[i].completions])
    (plain * weights).sum().backward()
    assert ("lm_head.weight" in found) == trained.startswith("all")
    for name, gradient in found.items():
        expected = model.get_parameter(name).grad
        assert expected.norm() > 0
        assert (gradient - expected).norm() <= 1e-4 * expected.norm()  # Gemma's attention works in fp32


def test_a_very_unlikely_token_has_its_gradient():
    """Where exp of a log-prob is a denormal number or zero, the derivative is still that of the embeddings."""
    head = torch.nn.Linear(4, 5, bias=False).requires_grad_(False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(5, 4, generator=torch.Generator().manual_seed(0)) * 60)
    hidden = torch.ones(3, 4, requires_grad=True)
    targets = (head.weight @ torch.ones(4)).argsort()[:3]
    values = score_hidden(head, hidden, targets, LogitTransform())[0]
    assert values.max() < -90
    (found,) = torch.autograd.grad(values.sum(), hidden)
    logits = hidden.double() @ head.weight.double().T
    plain = logits.log_softmax(-1).gather(1, targets[:, None])
    torch.testing.assert_close(values.double(), plain[:, 0].detach(), rtol=1e-6, atol=0)
    (expected,) = torch.autograd.grad(plain.sum(), hidden)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pass_cost", [0, 32, 100_000])
def test_groups_of_unlike_length_are_not_padded_to_one_another(pass_cost):
    groups = random_groups(40)
    lengths = [len(g.prompt) + max(len(c) for c in g.completions) for g in groups]
    batches = list(FlatLayout(pass_cost).batches(groups, 400))
    assert sorted(i for batch in batches for i in batch.indices) == list(range(40))
    padding = [sum(2 * (lengths[batch.indices[0]] - lengths[i]) for i in batch.indices) for batch in batches]
    assert max(padding) <= pass_cost
    if pass_cost == 0:
        assert len(batches) >= len(set(lengths))
    for i, (batch, following) in enumerate(pairwise(batches)):  # none ends before it has to
        rows, width = len(batch.indices), lengths[batch.indices[0]]
        added = 2 * (width - lengths[following.indices[0]])
        assert 2 * (rows + 1) * width > 400 or padding[i] + added > pass_cost
