"""Which sizes a plan chooses, and what it counts them with."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from alignment.training.budget import Plan, Room, make_plan, relative_time, step_needs, useful_tokens
from alignment.training.layer_memory import Layer
from alignment.training.memory import Sizes, plan_policy, sizes_of
from tests.helpers.adapters import adapter

SIZES = Sizes(
    weights=1000, adapter=100, gradients=100, optimizer=200, layers=(Layer(1, 10, 4),) * 4, ends=2, head=3,
    head_limit=300, buffers=50, launched=0,
)  # fmt: skip


def plan(limit, **settings):
    given = {"longest": 128, "step_tokens": 10**9, "tokens_per_batch": None, "checkpoint_every": None} | settings
    return make_plan(SIZES, Room("cpu", limit, 400), **given)


def test_a_pass_is_as_large_as_the_device_gains_by():
    assert plan(10**9).tokens_per_batch == 1024
    assert plan(10**9, tokens_per_batch=500).tokens_per_batch == 500
    settings = {"longest": 128, "step_tokens": 10**9, "tokens_per_batch": None, "checkpoint_every": None}
    assert make_plan(SIZES, Room("cuda", 10**9, 400), **settings).tokens_per_batch == 8192


FIXED = 1000 + 100 + 100 + 200 + 50 + 400


def test_needs_by_hand():
    """Up to 150 positions the head's moment is the peak, beyond that the last layer's."""
    needs = step_needs(SIZES, 0, 128, 400)
    assert (needs.activations, needs.head) == (128 * (4 * 10 + 2), 300)
    assert needs.total == FIXED + 128 * 42 + 300
    assert step_needs(SIZES, 0, 64, 400).head == 192
    needs = step_needs(SIZES, 0, 151, 400)
    assert (needs.activations, needs.head) == (151 * (4 * 10 + 4), 0)
    assert needs.total == FIXED + 151 * 44


def test_a_plan_is_the_largest_that_fits():
    everything = plan(10**9)
    assert (everything.checkpoint_every, everything.tokens_per_batch, everything.fits) == (0, 1024, True)
    assert everything.needs.total == FIXED + 1024 * 44
    tight = plan(FIXED + 700 * 44)
    assert (tight.checkpoint_every, tight.tokens_per_batch) == (0, 640)
    assert tight.needs.total <= tight.limit < step_needs(SIZES, 0, 704, 400).total


def test_less_memory_is_met_with_more_checkpointing():
    """128 positions without: 42 each and the head. Of 4: 33 and the head. Of 3: 35. Of 2: 24 and the head. All: 17."""
    least = {0: 128 * 42 + 300, 4: 128 * 33 + 300, 3: 128 * 35, 2: 128 * 24 + 300, 1: 128 * 17}
    for every, memory in least.items():
        assert plan(FIXED + memory).checkpoint_every == every
    found = [plan(FIXED + memory - 1).checkpoint_every for memory in least.values()]
    assert found == [4, 3, 2, 1, 1]
    nothing = plan(FIXED + 128 * 17 - 1)
    assert (nothing.fits, nothing.checkpoint_every, nothing.tokens_per_batch) == (False, 1, 128)


def test_the_reference_pass_takes_what_gradients_leave():
    """It has no gradients and no optimizer (300), and of the layers one at a time: 10 + 4 a position."""
    room = 128 * 42 + 300
    tight = plan(FIXED + room)
    assert (tight.tokens_per_batch, tight.reference_tokens) == (128, (300 + room) // 14 // 64 * 64)
    assert plan(10**9).reference_tokens == 1024
    assert plan(FIXED, tokens_per_batch=77).reference_tokens == 77
    assert plan(1).reference_tokens == plan(1).tokens_per_batch == 128


def test_numbers_that_are_given_count():
    assert plan(10**9, tokens_per_batch=5000).tokens_per_batch == 5000
    assert plan(10**9, checkpoint_every=2).checkpoint_every == 2
    given = plan(FIXED + 1000 * 20, tokens_per_batch=1000)
    assert (given.tokens_per_batch, given.checkpoint_every, given.fits) == (1000, 1, True)
    both = plan(1, tokens_per_batch=1000, checkpoint_every=0)
    assert (both.tokens_per_batch, both.checkpoint_every, both.fits) == (1000, 0, False)


def test_a_small_step_is_planned_as_it_is():
    """Positions that a step never has need no room, and no checkpointing."""
    small = plan(FIXED + 256 * 44, step_tokens=256)
    assert (small.checkpoint_every, small.tokens_per_batch) == (0, 256)
    assert small.needs.total == FIXED + 256 * 44
    given = plan(FIXED + 256 * 44, step_tokens=256, tokens_per_batch=5000)
    assert (given.checkpoint_every, given.tokens_per_batch, given.needs) == (0, 5000, small.needs)


def test_time_of_a_pass():
    """Below the launched positions the host's time counts, which no narrower pass shortens."""
    sizes = replace(SIZES, launched=8192)
    for device in ("cpu", "cuda"):
        assert relative_time(sizes, 0, 10**12, device) == pytest.approx(1)
        assert relative_time(sizes, 1, 10**12, device) == pytest.approx(1.5)
        assert relative_time(sizes, 3, 10**12, device) == pytest.approx(1.25)
    assert relative_time(SIZES, 0, 64, "cpu") == 1.5
    assert [relative_time(sizes, 0, n, "cuda") for n in (2048, 4096, 16384)] == [4, 2, 1 + 256 / 16384]
    assert relative_time(sizes, 0, 4096, "cuda") > relative_time(sizes, 1, 16384, "cuda")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hidden", "mlp", "heads", "layers", "launched", "useful"),
    [
        (1024, 3072, 16, 28, 14305, 16384),  # 0.6B: the most
        (2048, 6144, 16, 28, 4470, 16384),  # 1.7B: 2.25e11 / 50.3e6 weights of a layer
        (2560, 9728, 32, 36, 2229, 8896),  # 4B: four times as many, in multiples of 64
        (4096, 12288, 32, 36, 1166, 8192),  # 8B: the least
        (5120, 25600, 64, 64, 461, 8192),  # 32B
    ],
)
def test_useful_positions_of_the_qwen3_sizes(hidden, mlp, heads, layers, launched, useful):
    config = AutoConfig.for_model(
        "qwen3", hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=8, head_dim=128, vocab_size=151936, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    weights = plan_policy(model, 2, adapter(r=4, alpha=8), None)[1]
    for device, expected in (("cuda", (launched, useful)), ("cpu", (0, 1024))):
        sizes = sizes_of(model, weights, value=2, optimizer="adamw_torch", device=device)
        assert (sizes.launched, useful_tokens(sizes, device)) == expected


def test_a_plan_survives_the_file(tmp_path):
    made = plan(10**9)
    assert Plan.from_dict(json.loads(json.dumps(made.to_dict()))) == made
