"""A base of which each rank holds a part: the numbers of one process, by the same kernels."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft.tuners import lora
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from alignment.config.schema import Dtype
from alignment.errors import UserError
from alignment.policy.adapter import attach_adapter
from alignment.policy.layers import decoder_layers
from alignment.policy.sharding import backward_turn, is_part, shared_units
from alignment.policy.tiny_model import write_tiny_model
from alignment.ranks import team as team_module
from alignment.ranks.team import trained_parameters
from alignment.scoring.layout import SharedLayout
from alignment.stages.following import load_turns
from tests.helpers.policies import NF4, adapter, load
from tests.helpers.rank_steps import hold, share, share_base, steps
from tests.helpers.ranks import command_in_ranks, in_ranks
from tests.helpers.runs import TINY, at_row, only_run, run, summary, weights
from tests.helpers.tiny_runs import project

__all__ = ["project"]

CASES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "checkpointed": {"checkpoint_every": 1},
    "live": {"live": True, "num_steps": 3, "refreshes": (1, 2)},
    "nf4": {"quantization": NF4},
    "bf16": {"quantization": replace(NF4, compute_dtype=Dtype.bfloat16), "dtype": Dtype.bfloat16},
    "tied": {"tied": True},
    "kto": {},
}
WHOLE = ("fp32", "bf16")
OWN = {kind: kind.forward for kind in (lora.Linear, lora.Linear4bit, Qwen3MLP)}


def policy(folder: Path, tied: bool = False, quantization: Any = None, dtype: Dtype = Dtype.float32) -> Any:
    """A policy as a run loads it, whose layers run by our kernels or not at all."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a layer has run its own forward")

    for kind, forward in OWN.items():
        kind.forward = forward
    model = attach_adapter(load(folder / ("tied" if tied else "plain"), quantization, dtype), adapter(), 3)
    for kind in OWN:
        kind.forward = refuse
    return model


def train_all(team: Any, folder: Path, models: Path) -> None:
    """Train every case, and keep what came of it; in a team some with whole bases, and all with parts of one."""
    results = {}
    for sharded, names in ((False, WHOLE), (True, CASES)) if team is not None else ((False, CASES),):
        for name in names:
            settings = {"live": False} | CASES[name]
            made = {key: settings.pop(key) for key in ("tied", "quantization", "dtype") if key in settings}
            part = folder / f"{name}-{sharded}"
            part.mkdir(parents=True)
            loss, make = name if name == "kto" else "dpo", partial(policy, models, **made)
            results[name, sharded] = steps(team, part, loss, make=make, sharded=sharded, **settings)
    torch.save(results, folder / "results.pt")


@pytest.fixture(autouse=True)
def _own_forwards():
    yield
    for kind, forward in OWN.items():
        kind.forward = forward


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Tiny models with a head of its own, and with one that is the embeddings."""
    folder = tmp_path_factory.mktemp("models")
    write_tiny_model(folder / "plain")
    write_tiny_model(folder / "tied")
    tied = AutoModelForCausalLM.from_pretrained(folder / "tied")
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    tied.save_pretrained(folder / "tied")
    return folder


@pytest.mark.slow
def test_ranks_that_share_a_base_are_one(models, tmp_path):
    """Steps, a stored or live reference, an evaluation: plain and packed weights, tied and untied heads.

    Where each rank has a whole base the passes are the very same; one process adds up in another order.
    """
    train_all(None, tmp_path / "alone", models)
    code = in_ranks(2, tmp_path / "output", train_all, tmp_path / "ranks", models)
    assert code == [0, 0], (tmp_path / "output" / "stderr0").read_text()
    found, expected = (torch.load(tmp_path / name / "results.pt", weights_only=False) for name in ("ranks", "alone"))
    for name in WHOLE:
        for key, value in found[name, False]["weights"].items():
            assert found[name, True]["weights"][key].equal(value), (name, key)
    for name in CASES:
        shared, alone = found[name, True], expected[name, False]
        assert (shared["identity"], shared["layout"]) == (alone["identity"], SharedLayout), name
        if name == "bf16":
            continue
        for key, value in alone["weights"].items():
            torch.testing.assert_close(shared["weights"][key], value, rtol=0, atol=2e-6, msg=f"{name} {key}")
        assert shared["held_out"] == pytest.approx(alone["held_out"], rel=1e-4, abs=1e-5), name
        assert shared["stored"].keys() == alone["stored"].keys()
        for key, value in alone["stored"].items():
            torch.testing.assert_close(shared["stored"][key], value, rtol=1e-5, atol=1e-5)


def adapter_settings(folder: Path) -> dict:
    found = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    return found | {"target_modules": sorted(found["target_modules"])}


def test_ranks_load_in_turn_as_main_memory_asks_for():
    """Every rank but the first once, and so many of a machine at a time."""
    for size, local_size, at_once in ((2, 2, 1), (8, 8, 3), (8, 8, 100), (16, 8, 2), (4, 1, 1)):
        turns = load_turns(size, local_size, at_once)
        assert sorted(rank for turn in turns for rank in turn) == list(range(1, size))
        assert all(len([r for r in turn if r // local_size == 0]) <= at_once for turn in turns)
    assert load_turns(8, 8, 3) == [[1, 2], [3, 4, 5], [6, 7]]


def killed() -> None:
    at_row("preference", 6, signal.SIGKILL)


@pytest.mark.matrix
def test_a_run_goes_on_with_a_shared_base_and_back(project, tmp_path):
    """SFT, reference, preference stage, answers, KL: killed in the last stage, then resumed the other way."""
    plain = (*TINY, "adapter.dropout=0", "evaluation.kl_prompts=2", "evaluation.every=3", "export.merge=true")
    in_parts = "trainer.shard=node"
    alone, first, second = tmp_path / "alone", tmp_path / "first", tmp_path / "second"
    assert run(project, alone, *plain).code == 0
    expected = only_run(alone)

    # In parts, then in one process; in two ranks with whole bases, then in parts
    first.mkdir()
    ended = command_in_ranks(2, "--config-dir", str(project), *plain, in_parts, cwd=first, patches={0: killed})
    assert ended[0].code == -signal.SIGKILL, ended[0].err
    assert "The 2 ranks of a machine share one base (trainer.shard=node)" in ended[0].out + ended[0].err
    assert "there is one" in run(project, first, f"resume={only_run(first)}").err
    assert run(project, first, f"resume={only_run(first)}", "trainer.shard=off").code == 0
    second.mkdir()
    ended = command_in_ranks(2, "--config-dir", str(project), *plain, cwd=second, patches={0: killed})
    assert ended[0].code == -signal.SIGKILL, ended[0].err
    again = f"resume={only_run(second)}"
    ended = command_in_ranks(2, "--config-dir", str(project), again, in_parts, cwd=second)
    assert [one.code for one in ended] == [0, 0], ended[0].err
    for found in map(only_run, (first, second)):
        for name, value in weights(expected).items():
            torch.testing.assert_close(weights(found)[name], value, rtol=0, atol=2e-5, msg=name)
        assert (found / "samples.jsonl").read_text() == (expected / "samples.jsonl").read_text()
        assert adapter_settings(found) == adapter_settings(expected)
        merged, other = (load_file(folder / "merged" / "model.safetensors") for folder in (found, expected))
        assert all((merged[name] - other[name]).abs().max() < 2e-5 for name in other)
        assert summary(found)["export"]["generation_agrees"]
        evaluation = summary(found)["evaluation"]["kl/sampled"], summary(expected)["evaluation"]["kl/sampled"]
        assert evaluation[0]["mean"] == pytest.approx(evaluation[1]["mean"], abs=1e-3)
        assert summary(found)["reference"]["mode"] == summary(expected)["reference"]["mode"]


def hold_a_part(team: Any, models: Path, quantization: Any = None) -> Any:
    """Rank 0's policy after all ranks have taken a part of its base, ready for shares of a step."""
    make = partial(policy, models, quantization=quantization)
    model = make()
    team.tell(hold, make)
    team.run(share, [None] * team.size, lambda _: share_base(model, team))
    return model


def held(post: Any) -> int:
    return sum(p.to_local().nbytes for p in post.parameters() if is_part(p))


def own_bytes(post: Any, _: None) -> int:
    return held(post.model)


def run_passes(post: Any, count: int) -> None:
    with torch.set_grad_enabled(count > 3):
        for _ in range(count):
            hidden = post.model(input_ids=torch.zeros(1, 3, dtype=torch.int64)).logits
            if count > 3:
                with backward_turn(post.model):
                    hidden.sum().backward()


@contextmanager
def gathered() -> Iterator[list[int]]:
    """Bytes of each gathering of weights within the block."""
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    gather, found = getattr(dist, name), []

    def counted(whole: torch.Tensor, *arguments: Any, **settings: Any) -> Any:
        found.append(whole.nbytes)
        return gather(whole, *arguments, **settings)

    setattr(dist, name, counted)
    yield found
    setattr(dist, name, gather)


def pass_unequally(team: Any, models: Path) -> None:
    """Passes of rank 0 alone, of the other alone, and of both in other numbers, with and without gradient.

    A pass gathers every layer and the embeddings, and for its gradient the layers once more.
    """
    model = hold_a_part(team, models)
    units = [sum(p.nbytes for p in unit.parameters() if is_part(p)) for unit in shared_units(model)]
    whole, layers = sum(units), units[: len(decoder_layers(model))]
    parts = [held(model), *team.tell(own_bytes)]
    assert max(parts) < 0.52 * whole and sum(parts) >= whole
    for count, expected in ((1, units), (4, 4 * (units + layers))):
        with gathered() as found:
            team.run(run_passes, [count] * 2, lambda count: run_passes(SimpleNamespace(model=model), count))
        assert sorted(found) == sorted(expected), (count, found, units)
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 3, dtype=torch.int64))
    for shares in ([0, 2], [3, 1], [5, 0], [4, 6]):
        model.zero_grad()
        team.run(run_passes, shares, lambda count: run_passes(SimpleNamespace(model=model), count))
        assert all((p.grad is not None) == (shares[0] > 3) for p in trained_parameters(model))
    model.generate(input_ids=torch.zeros(1, 3, dtype=torch.int64), max_new_tokens=4)


@pytest.mark.slow
def test_ranks_may_have_other_numbers_of_passes(models, tmp_path):
    code = in_ranks(2, tmp_path / "output", pass_unequally, models, timeout=30)
    assert code == [0, 0], (tmp_path / "output" / "stderr0").read_text()


def lose_a_part(post: Any, _: None) -> None:
    for parameter in post.model.parameters():
        if is_part(parameter):
            parameter.to_local().zero_()


def score_with_a_lost_part(team: Any, models: Path) -> None:
    model = hold_a_part(team, models)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        team.tell(lose_a_part)
        after = model(input_ids=ids).logits
    assert (before - after).abs().max() > 1e-2


@pytest.mark.slow
def test_a_part_that_is_lost_shows(models, tmp_path):
    """What the other rank holds is what rank 0 computes with."""
    code = in_ranks(2, tmp_path / "output", score_with_a_lost_part, models)
    assert code == [0, 0], (tmp_path / "output" / "stderr0").read_text()


def leave_at_once(post: Any, _: None) -> None:
    team_module._LAST_SECONDS = 0


def run_out(post: Any, _: None) -> None:
    """Let the memory of a GPU run out in the second layer of a pass, where the others wait for its weights."""

    def fail(*_: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    decoder_layers(post.model)[1].self_attn.register_forward_pre_hook(fail)


def be_killed(post: Any, _: None) -> None:
    decoder_layers(post.model)[1].self_attn.register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))


def break_off(team: Any, models: Path, rank: int, how: Callable) -> None:
    model = hold_a_part(team, models)
    team.tell(leave_at_once)
    if rank:
        team.tell(how)
    else:
        how(SimpleNamespace(model=model), None)
    try:
        team.run(run_passes, [1, 1], lambda count: run_passes(SimpleNamespace(model=model), count))
    except UserError as error:
        sys.exit(f"Error: {error}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "how", "codes", "sentence"),
    [
        (0, run_out, [1, 1], "A GPU has run out of memory, and ranks that share a base cannot"),
        (1, run_out, [1, 1], "A GPU has run out of memory, and ranks that share a base cannot"),
        (1, be_killed, [1, -signal.SIGKILL], "Rank 1 has ended in the midst of its work"),
    ],
)
def test_a_pass_that_breaks_off_ends_all_ranks_with_one_sentence(rank, how, codes, sentence, models, tmp_path):
    assert in_ranks(2, tmp_path / "output", break_off, models, rank, how, timeout=30) == codes
    said = [(tmp_path / "output" / f"stderr{k}").read_text() for k in (0, 1)]
    assert [text.count(sentence) for text in said] == [1, 0]
    assert "Traceback" not in said[0] + said[1]
