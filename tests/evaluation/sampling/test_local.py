"""Answers drawn in this process: the policy's own distribution, and the same ones whatever is drawn beside them."""

import copy
import logging

import numpy as np
import peft
import pytest
import torch
from transformers import GenerationConfig

from alignment.evaluation.sampling import local
from alignment.evaluation.sampling.answer import Finish, Sampling
from alignment.evaluation.sampling.choice import Drawn
from alignment.evaluation.sampling.draw import draw
from alignment.evaluation.sampling.local import LocalEngine
from alignment.evaluation.sampling.loop import Way
from alignment.evaluation.sampling.ways import way_of
from alignment.kernels.patch import patch_layers
from alignment.types import Group
from tests.conftest import random_groups, tiny_policy
from tests.helpers.families import FAMILIES, policy, write_model
from tests.helpers.odd_model import OddConfig
from tests.helpers.patched import tiny
from tests.helpers.played_ranks import PlayedTeam
from tests.helpers.policies import CPU, scores, train_adapter
from tests.helpers.seeing_models import KINDS, write_seeing_model

STOPS = (3, 5)
PROMPTS = [group.prompt for group in random_groups(5, seed=7)]


def peaked(dtype=torch.float32):
    """A tiny policy whose distributions are far from uniform."""
    model = tiny_policy(dtype, trained=True)
    model.get_output_embeddings().weight.data.mul_(20)
    return model


def tokens_of(answers):
    return [[answer.tokens.tolist() for answer in each] for each in answers]


def drawn(model, prompts=PROMPTS, count=2, at_once=16, team=None, **settings):
    how = Sampling(**{"stops": STOPS, "max_new_tokens": 8} | settings)
    return draw(LocalEngine(model, CPU, at_once, team), prompts, count, how)


# The same tokens as `generate`


def generated(model, prompt, length, **settings):
    """The greedy tokens of `generate`, alone and without an end."""
    ids = torch.from_numpy(prompt.astype(np.int64))[None]
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False, pad_token_id=0,
        eos_token_id=None, **settings,
    )  # fmt: skip
    return output[0, len(prompt) :].tolist()


def assert_greedy_as_generated(model, vocabulary=97):
    """On prompts of several lengths, in one batch with padding where that is exact; some answers end early.

    Drawn answers, two to a prompt, have the log-probs of whole passes.
    """
    model.eval()
    rng = np.random.default_rng(0)
    prompts = [rng.integers(6, vocabulary, length).astype(np.int32) for length in (3, 20, 8)]
    expected = [generated(model, prompt, 6) for prompt in prompts]
    stop = expected[0][2]
    found = drawn(model, prompts, temperature=0.0, stops=(stop,), max_new_tokens=6)
    for whole, answers in zip(expected, found, strict=True):
        cut = whole[: whole.index(stop) + 1] if stop in whole else whole
        assert tokens_of([answers]) == [[cut, cut]]
        assert {answer.finish for answer in answers} == {Finish.stop if stop in whole else Finish.length}
    assert len(found[0][0].tokens) <= 3
    found = drawn(model, prompts, max_new_tokens=6, stops=(stop,))
    assert found[0][0].tokens.tolist() != found[0][1].tokens.tolist()
    assert_scored(model, prompts, found, 1e-4)


def assert_scored(model, prompts, answers, tolerance):
    groups = [Group(prompt, tuple(a.tokens for a in each)) for prompt, each in zip(prompts, answers, strict=True)]
    logps = np.concatenate([answer.logps for each in answers for answer in each])
    assert logps.dtype == np.float32
    np.testing.assert_allclose(logps, scores(model, groups).numpy(), rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(f, id=f.model_type, marks=pytest.mark.slow if f.model_type == "falcon_h1" else pytest.mark.matrix)
        for f in FAMILIES
    ],
)
def test_greedy_answers_are_those_of_generate(family, tmp_path):
    """In every family, in 4 bits with an adapter: caches of attention, windows and recurrences are repeated and cut."""
    model = train_adapter(policy(write_model(family, tmp_path)))
    assert_greedy_as_generated(model)
    assert way_of(model, CPU).cached


@pytest.mark.matrix
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_model_that_also_sees_answers_in_text(kind, tmp_path):
    """Its positions have three axes, and its first pass other inputs."""
    model = train_adapter(policy(write_seeing_model(kind, tmp_path), quantization=None))
    assert_greedy_as_generated(model)
    assert way_of(model, CPU).cached


def test_the_models_own_settings_act_where_they_are_asked_for():
    """As `generate` has them for each prompt alone; and not at all on the plain distribution."""
    model, preset = peaked(), peaked()
    inner = preset.get_base_model()
    inner.generation_config = GenerationConfig(repetition_penalty=5.0, min_p=0.9, top_k=2, temperature=0.1)
    expected = [generated(preset, prompt, 8) for prompt in PROMPTS[:3]]
    found = drawn(preset, PROMPTS[:3], count=1, temperature=0.0, stops=(0,), presets=True)
    for whole, (answer,) in zip(expected, found, strict=True):
        assert answer.tokens.tolist() == whole[: len(answer.tokens)]
    plain = tokens_of(drawn(model))
    assert tokens_of(drawn(preset)) == plain
    assert tokens_of(drawn(preset, presets=True)) != plain
    assert inner.generation_config.repetition_penalty == 5.0


# The distribution


def filtered(logits, temperature, top_k, top_p, min_p):
    """Probabilities by the book, one filter after the other."""
    p = np.exp((logits - logits.max()) / temperature)
    if top_k:
        p[np.argsort(p)[:-top_k]] = 0
    p /= p.sum()
    order = np.argsort(-p)
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= top_p]] = 0
    p[p < min_p * p.max()] = 0
    return p / p.sum()


def chi_square(tokens, p):
    """(statistic, degrees of freedom) of the tokens' counts; rare tokens are counted together."""
    counts, expected = np.bincount(tokens, minlength=len(p)), p * len(tokens)
    assert not counts[p == 0].any()
    common = expected >= 8
    counts, expected = (np.append(x[common], x[~common].sum()) for x in (counts, expected))
    counts, expected = counts[expected > 0], expected[expected > 0]
    return ((counts - expected) ** 2 / expected).sum(), len(counts) - 1


def fits(tokens, p):
    """Whether the counts are less than four standard deviations above what chance gives."""
    statistic, freedom = chi_square(tokens, p)
    return statistic < freedom + 4 * np.sqrt(2 * freedom)


@pytest.mark.parametrize(
    "filters",
    [
        {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
        {"temperature": 0.6, "top_k": 12, "top_p": 0.8, "min_p": 0.02},
    ],
    ids=["plain", "filtered"],
)
def test_frequencies_are_the_exact_probabilities(filters):
    """Of the first tokens of 4,000 answers, and of the second ones after the most frequent first one."""
    model, prompt = peaked(), PROMPTS[0]
    (answers,) = drawn(model, [prompt], 4000, 4000, stops=(96,), max_new_tokens=2, **filters)
    first = np.array([answer.tokens[0] for answer in answers])
    often = int(np.bincount(first).argmax())
    second = np.array([a.tokens[1] for a in answers if a.tokens[0] == often and len(a.tokens) == 2])
    ids = torch.from_numpy(np.append(prompt, often).astype(np.int64))[None]
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, -2:].double().numpy()
    assert len(second) > 300
    assert fits(first, filtered(logits[0], **filters)) and fits(second, filtered(logits[1], **filters))
    other = filters | {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": 0.8 * filters["temperature"]}
    assert not fits(first, filtered(logits[0], **other)), "the test sees a temperature that is a fifth lower"


@pytest.mark.parametrize("size", [512, 1000])
def test_a_large_vocabulary_has_its_exact_probabilities(size):
    """Drawn by groups of tokens: within the last group, which may be a part of one, and with groups filtered out."""
    logits = 1.5 * torch.randn(size, generator=torch.Generator().manual_seed(size))
    logits[-3:] += 2
    logits[:256] -= 1
    choose, rows = Drawn(range(8000), CPU), range(8000)
    for filters in ({}, {"top_k": 40}):
        scores = logits.clone()
        if filters:
            scores[scores.argsort()[:-40]] = -torch.inf
        p = filtered(logits.double().numpy(), 1.0, top_p=1.0, min_p=0.0, **{"top_k": 0} | filters)
        assert fits(choose(scores.expand(8000, -1), rows).numpy(), p)
        assert not fits(choose((scores * 0.7).expand(8000, -1), rows).numpy(), p)


def test_log_probs_are_those_of_a_scoring_pass():
    """At temperature 1 and without filters, whatever the answers were drawn with; stop tokens have one too."""
    model = peaked()
    found = drawn(model, temperature=0.7, top_k=20, top_p=0.9)
    assert_scored(model, PROMPTS, found, 5e-5)
    assert {answer.finish for each in found for answer in each} == {Finish.stop, Finish.length}


# What an answer does not depend on


def test_neither_batch_nor_order_nor_number_nor_ranks_change_an_answer():
    """An answer has random numbers of its own."""
    model = peaked()
    few = tokens_of(drawn(model))
    assert len({tuple(tokens) for each in few for tokens in each}) > 8
    assert tokens_of(drawn(model, PROMPTS[::-1])) == few[::-1]
    assert tokens_of(drawn(model, PROMPTS[2:4] + PROMPTS[2:3], at_once=1)) == few[2:4] + few[2:3]
    many = tokens_of(drawn(model, count=4))
    assert [each[:2] for each in many] == few
    assert tokens_of(drawn(model, seed=1)) != few
    team = PlayedTeam(3)
    team._post.model = copy.deepcopy(model)
    assert tokens_of(drawn(model, count=4, at_once=3, team=team)) == many
    assert len(team.shares["draw_share"]) == 2


def test_random_numbers_of_others_are_left_alone():
    """The global state is as it was, and has no part in the answers."""
    model = peaked()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    found = tokens_of(drawn(model))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert tokens_of(drawn(model)) == found


def test_no_batch_is_larger_than_it_may_be(monkeypatch):
    """Tokens count with their padding; where memory runs out, halves are drawn one after the other."""
    model, at_once, sizes = peaked(), local._at_once, []

    def noted(model, batch, share, device):
        sizes.append((len(batch), max(len(prompt) for prompt, _ in batch)))
        if len(batch) > 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return at_once(model, batch, share, device)

    expected = tokens_of(drawn(model))
    monkeypatch.setattr(local, "_at_once", noted)
    assert tokens_of(drawn(model, at_once=3)) == expected
    longest = max(map(len, PROMPTS))
    assert any(rows > 3 for rows, _ in sizes)
    assert all(rows * (width + 8) <= 3 * (longest + 8) for rows, width in sizes)


# Models that cannot do it the fast way


@pytest.mark.slow
def test_a_model_without_a_usable_cache_answers_the_slow_way(tmp_path, caplog):
    """It reads every answer anew, alone or with those of its length, and one log line says so."""
    from alignment.policy.architecture import auto_class

    torch.manual_seed(0)
    config = OddConfig(initializer_range=0.3)
    auto_class(config).from_config(config).save_pretrained(tmp_path)
    model = policy(tmp_path, quantization=None).eval()
    with caplog.at_level(logging.INFO):
        found = drawn(model, temperature=0.0, max_new_tokens=4)
        drawn(model)
    assert caplog.text.count("without its cache and without padding") == 1
    for prompt, answers in zip(PROMPTS, found, strict=True):
        ids = prompt.tolist()
        for token in answers[1].tokens.tolist():
            with torch.no_grad():
                assert token == model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()
            ids.append(token)


@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        pytest.param("padding", Way(cached=True, padded=False), marks=pytest.mark.slow),
        ("reorder", Way(cached=False, padded=True)),
    ],
)
def test_what_is_not_exact_is_not_used(broken, expected, monkeypatch):
    """A model that does not heed padding gets none, and a cache that mixes rows up is not used; answers stay."""
    model = peaked()
    found = tokens_of(drawn(model))
    faulty = peaked()
    if broken == "padding":
        inner = faulty.get_base_model()
        prepare = type(inner).prepare_inputs_for_generation

        def without_mask(self, *args, attention_mask=None, position_ids=None, **kwargs):
            return prepare(self, *args, **kwargs)

        monkeypatch.setattr(type(inner), "prepare_inputs_for_generation", without_mask)
    else:
        from transformers import DynamicCache

        monkeypatch.setattr(
            DynamicCache, "reorder_cache", lambda self, rows: self.batch_select_indices(rows.flip(0)), raising=False
        )
    assert way_of(faulty, CPU) == expected
    assert tokens_of(drawn(faulty)) == found


# The layers that score


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_answers_come_through_the_layers_that_score(dtype, monkeypatch):
    """An adapter in float32 on a base in 16 bits, as a QLoRA has it: peft's own forward would round in other places."""
    own = tiny("qwen3", dtype)
    for parameter in own.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    patch_layers(model := copy.deepcopy(own))
    forward, calls = peft.tuners.lora.Linear.forward, []
    monkeypatch.setattr(
        peft.tuners.lora.Linear, "forward", lambda *args, **kw: calls.append(args) or forward(*args, **kw)
    )
    prompts = [np.arange(2, 2 + n, dtype=np.int32) for n in (3, 5)]
    settings = {"temperature": 0.0, "max_new_tokens": 4, "stops": (0,)}
    answers = drawn(model, prompts, **settings)
    assert not calls
    lengths = [[len(answer.tokens) for answer in each] for each in answers]
    assert lengths == [[len(answer.tokens) for answer in each] for each in drawn(own, prompts, **settings)]
    assert calls, "without our layers it is peft's forward, so the list above could have been filled"
