"""A whole model of which each rank trains a part: the numbers and files of one process, in its share of the memory."""

from __future__ import annotations

import json
import signal
import weakref
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments

from alignment.config.compose import load as load_config
from alignment.config.schema import Dtype
from alignment.policy import weight_parts as weight_parts_module
from alignment.policy.adapter import attach_adapter, has_adapter
from alignment.policy.full_shards import join_shards, take_shards
from alignment.policy.identity import policy_identity
from alignment.policy.layers import checkpoint_layers
from alignment.policy.tiny_model import write_tiny_model
from alignment.policy.weight_parts import WeightParts, save_whole, weight_parts
from alignment.ranks.team import Post, Team, trained_parameters
from alignment.reference.cached import CachedReference
from alignment.reference.store import ReferenceStore
from alignment.scoring.layout import SharedLayout
from alignment.stages.following import PreferenceBegun, begin_preference, choose_together
from alignment.training.callbacks import Checkpoints, Rhythm, prepare_trainer, training_arguments
from alignment.training.memory import Weights, plan_policy
from alignment.training.objective import groups_to_reference
from alignment.training.sampler import StepSampler
from alignment.training.shared_memory import shared_weights, weights_here
from alignment.training.trainer import PreferenceTrainer
from tests.conftest import recommended_loss
from tests.helpers.mixtures import write_mixture
from tests.helpers.policies import adapter, load
from tests.helpers.rank_steps import CPU, share_base
from tests.helpers.ranks import command_in_ranks, in_ranks
from tests.helpers.runs import TINY, at_row, only_run, run, weights
from tests.helpers.steps import groups_for
from tests.helpers.tiny_runs import project

__all__ = ["project"]

CASES: dict[str, dict[str, Any]] = {
    "dpo": {},
    "kto": {"loss": "kto"},
    "checkpointed": {"checkpoint_every": 1},
    "tied": {"tied": True},
    "some": {"modules": ("model.layers.1.mlp", "model.layers.0.self_attn.q_proj")},
    "bf16": {"dtype": Dtype.bfloat16},
}
LORA = {"lora": {"has_lora": True, "is_shared": False}, "lora-shared": {"has_lora": True}}
CORE = ("dpo", "bf16")
STEPS, SAVED = 4, 2


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


def policy(
    models: Path, tied: bool = False, dtype: Dtype = Dtype.float32, modules: Any = None, has_lora: bool = False
) -> Any:
    """A model as a run loads it, of which all trains, or some modules; what computes in fp32 has 64 bits."""
    model = load(models / ("tied" if tied else "plain"), dtype=dtype)
    model = attach_adapter(model, adapter() if has_lora else None, 0, modules=modules)
    return model.double() if dtype is Dtype.float32 else model


def hold(post: Post, make: Any) -> None:
    post.model = make()


def share(post: Post, _: Any) -> None:
    take(post.model, post.team)


def take(model: Any, team: Team) -> None:
    """What every rank does with its model."""
    if has_adapter(model):
        share_base(model, team)
    else:
        join_shards(take_shards(model, team.machine_groups(CPU), CPU), team)


def bytes_here(post: Any, _: None) -> tuple[int, int]:
    """Of the weights, and of all that the optimizer has beside them."""
    states = [t for state in post.steps.optimizer.state.values() for t in state.values() if t.ndim]
    masters = [master for _, master in post.steps.masters.pairs]
    return sum(p.to_local().nbytes for p in post.model.parameters()), sum(t.nbytes for t in (*states, *masters))


def save(model: Any, folder: Path) -> None:
    if (parts := weight_parts(model)) is None:
        model.save_pretrained(folder)
    else:
        save_whole(model, parts, folder)


def lose_groups(post: Post, _: None) -> None:
    """A planted fault."""
    post.passes.add_gradients = lambda *_: None


def train(
    team: Team | None, folder: Path, models: Path, start: Path | None, fault: Any = None, **case: Any
) -> dict[str, Any]:
    """Train for some steps, or go on from a checkpoint: what came of it."""
    case = dict(case)
    is_shared = case.pop("is_shared", True)
    name, checkpoint_every = case.pop("loss", "dpo"), case.pop("checkpoint_every", 0)
    make = partial(policy, models, **case)
    loss = recommended_loss(name)
    groups, held_out = groups_for(loss, num=10), groups_for(loss, num=2, seed=6)
    torch.manual_seed(0)
    model = make()
    identity = policy_identity(model)[0]
    if team is not None:
        team.tell(hold, make)
        if is_shared:
            team.run(share, [None] * team.size, lambda _: take(model, team))
        assert policy_identity(model)[0] == identity
    checkpoint_layers(model, checkpoint_every)
    layout = choose_together(team, model, CPU)
    if team is not None:
        begun = PreferenceBegun(loss, checkpoint_every, True, None, False, 0.0)
        team.tell(begin_preference, begun, trained_parameters(model))
    if team is not None and fault is not None:
        team.tell(fault)
    sampler = StepSampler(len(groups), 5, 3, 2)
    reference = CachedReference(ReferenceStore(folder / "store.sqlite"), model, layout, 100, CPU, 2, team=team)
    reference.prepare(groups_to_reference(loss, groups, sampler.first_steps(STEPS), held_out))
    config = load_config("recipe=quickstart", "adapter=none", f"trainer.save_every={SAVED}")
    optim = replace(config.optim, lr=1e-3, max_grad_norm=0.5, weight_decay=0.1)
    arguments = training_arguments(
        TrainingArguments, folder=folder / "checkpoints", optim=optim, trainer=config.trainer, num_steps=STEPS, seed=3,
        device=CPU, per_device_train_batch_size=5,
    )  # fmt: skip
    trainer = PreferenceTrainer(
        model=model, args=arguments, groups=groups, eval_groups=held_out, loss=loss, reference=reference,
        layout=layout, tokens_per_batch=60, sampler=sampler, callbacks=[Rhythm(None), Checkpoints(5)], team=team,
    )  # fmt: skip
    prepare_trainer(trainer, optim)
    if start is not None:
        trainer.load_state(start)
    trainer.train(resume_from_checkpoint=None if start is None else str(start))
    trainer.require_finite_weights()
    save(model, folder / "model")
    state = model.state_dict() if has_adapter(model) else load_file(folder / "model" / "model.safetensors")
    found = {
        "weights": {name: tensor.clone() for name, tensor in state.items() if "lora" in name or not has_adapter(model)},
        "log": [row for row in trainer.state.log_history if "loss" in row],
        "held_out": trainer.held_out_metrics(held_out),
        "layout": type(layout),
        "identity": policy_identity(model)[0],
    }
    if weight_parts(model) is not None:
        assert team is not None
        found["bytes"], found["planned"] = team.tell(bytes_here), weights_here(model)
    reference.close()
    return found


def train_all(
    team: Team | None, folder: Path, models: Path, cases: Any, start: Path | None = None, fault: Any = None
) -> None:
    """Train every case, and keep what came of it."""
    results = {}
    for name in cases:
        own = start
        if start is not None and not start.name.startswith("checkpoint-"):
            own = start / name / "checkpoints" / f"checkpoint-{SAVED}"
        (folder / name).mkdir(parents=True)
        results[name] = train(team, folder / name, models, own, fault, **(CASES | LORA)[name])
    torch.save(results, folder / "results.pt")


def read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / "results.pt", weights_only=False)
    return found


def in_team(size: int, folder: Path, *arguments: Any, **settings: Any) -> dict[str, Any]:
    code = in_ranks(size, folder.with_name(f"{folder.name}-output"), train_all, folder, *arguments, **settings)
    assert code == [0] * size, (folder.with_name(f"{folder.name}-output") / "stderr0").read_text()
    return read(folder)


def assert_same(found: dict[str, Any], expected: dict[str, Any], name: str) -> None:
    atol = 2e-6 if name != "bf16" else 5e-3  # a bit of the largest weights
    assert found["weights"].keys() == expected["weights"].keys()
    for key, value in expected["weights"].items():
        torch.testing.assert_close(found["weights"][key], value, rtol=0, atol=atol, msg=f"{name} {key}")
    if name != "bf16":
        assert found["held_out"] == pytest.approx(expected["held_out"], rel=1e-5, abs=1e-6), name
        for row, other in zip(found["log"], expected["log"], strict=True):
            assert row == pytest.approx(other, rel=1e-4, abs=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "names", [CORE, pytest.param(tuple(name for name in CASES if name not in CORE), marks=pytest.mark.matrix)]
)
def test_ranks_that_train_parts_are_one(names, models, tmp_path):
    """Weights, metrics, norms of gradients and files; each rank has its share of weights, masters and states."""
    train_all(None, tmp_path / "alone", models, names)
    expected, found = read(tmp_path / "alone"), in_team(2, tmp_path / "two", models, names)
    for name in names:
        assert_same(found[name], expected[name], name)
        assert found[name]["layout"] is SharedLayout
        files = [sorted(p.name for p in (tmp_path / part / name / "model").iterdir()) for part in ("two", "alone")]
        assert files[0] == files[1]
        configs = [json.loads((tmp_path / p / name / "model" / "config.json").read_text()) for p in ("two", "alone")]
        assert configs[0] == configs[1]
        saved = load_file(tmp_path / "two" / name / "model" / "model.safetensors")
        kept = load_file(tmp_path / "alone" / name / "model" / "model.safetensors")
        assert saved.keys() == kept.keys()
        assert all(found[name]["weights"][key].equal(value) for key, value in saved.items()) and saved
        [(weights, states)] = found[name]["bytes"]
        whole = sum(t.nbytes for key, t in expected[name]["weights"].items() if name != "tied" or "lm_head" not in key)
        assert weights == pytest.approx(whole / 2, rel=0.01), name
        if name != "some":
            assert_planned(models, name, found[name]["planned"])
        [checkpoint] = (tmp_path / "two" / name / "checkpoints").iterdir()
        written = [load_file(path) for path in sorted(checkpoint.glob("*.safetensors"))]
        assert [len(part) for part in written] == [len(written[0])] * 2, "each rank has written its part"
        if name in ("dpo", "bf16"):  # of all weights
            assert sum(t.nbytes for t in written[1].values()) == weights + states, name
        if name in ("dpo", "bf16"):  # two states, and masters of 4 bytes beside weights of 2
            assert states == pytest.approx(whole / 2 * (6 if name == "bf16" else 2), rel=0.01), name


def assert_planned(models: Path, name: str, found: Weights) -> None:
    """What the plan says before anything is loaded is what a rank has."""
    value = {"bf16": 2}.get(name, 8)
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(models / ("tied" if name == "tied" else "plain"))
        model = AutoModelForCausalLM.from_config(config)
    planned = shared_weights(plan_policy(model, value, None, None)[1], model, value, 2)
    assert astuple(found)[:2] == pytest.approx(astuple(planned)[:2], rel=0.01)
    assert found.trained == pytest.approx(planned.trained, rel=0.01)
    assert (found.gathered, found.arriving) == (planned.gathered, planned.arriving)


@pytest.mark.matrix
def test_a_checkpoint_is_that_of_any_number_of_ranks(models, tmp_path):
    """Begun on two ranks and gone on with in one process, and on four; begun in one process and gone on with on two."""
    cases = {name: CASES[name] for name in ("dpo", "bf16")}
    train_all(None, tmp_path / "alone", models, cases)
    two = in_team(2, tmp_path / "two", models, cases)
    train_all(None, tmp_path / "on-alone", models, cases, tmp_path / "two")
    four = in_team(4, tmp_path / "on-four", models, cases, tmp_path / "two")
    back = in_team(2, tmp_path / "on-two", models, cases, tmp_path / "alone")
    for found in (two, read(tmp_path / "on-alone"), four, back):
        for name in cases:
            assert_same({**found[name], "log": []}, {**read(tmp_path / "alone")[name], "log": []}, name)


@pytest.mark.matrix
def test_a_lora_goes_on_with_a_shared_base_and_back(models, tmp_path):
    """Two ranks with whole bases, then with parts of one, and the other way round."""
    whole, shared = (in_team(2, tmp_path / name, models, [name]) for name in LORA)
    for first, second in (("lora", "lora-shared"), ("lora-shared", "lora")):
        begun = tmp_path / first / first / "checkpoints" / f"checkpoint-{SAVED}"
        found = in_team(2, tmp_path / f"{second}-on", models, [second], begun)
        for expected in (whole["lora"], shared["lora-shared"]):
            assert_same({**found[second], "log": []}, {**expected, "log": []}, second)


@pytest.mark.matrix
def test_machines_train_the_same_parts(models, tmp_path):
    """Two machines of two ranks: gradients are added up over both, and norms count once."""
    train_all(None, tmp_path / "alone", models, ["dpo"])
    found = in_team(4, tmp_path / "ranks", models, ["dpo"], machines=2)
    assert_same(found["dpo"], read(tmp_path / "alone")["dpo"], "dpo")


@pytest.mark.slow
def test_groups_that_are_lost_show(models, tmp_path):
    """What the other rank adds to gradients makes them those of one process."""
    train_all(None, tmp_path / "alone", models, ["dpo"])
    found = in_team(2, tmp_path / "ranks", models, ["dpo"], None, lose_groups)
    with pytest.raises(AssertionError):
        assert_same(found["dpo"], read(tmp_path / "alone")["dpo"], "dpo")


SMALL_FILE = 40_000
"""Bytes: more than a layer of the tiny models, and less than half of any."""


def whole_at_once(monkeypatch: Any) -> list[int]:
    """Bytes of gathered weights that are in memory, from now on: at present, and at most so far."""
    found, gather = [0, 0], WeightParts.whole

    def forget(size: int) -> None:
        found[0] -= size

    def counted(self: WeightParts, parameter: Any) -> Any:
        weight = gather(self, parameter).clone()
        found[0] += weight.nbytes
        found[1] = max(found)
        weakref.finalize(weight, forget, weight.nbytes)
        return weight

    monkeypatch.setattr(WeightParts, "whole", counted)
    return found


def save_all(team: Team, folder: Path, models: Path) -> None:
    """Save models from two ranks in small files, one of them in one file too: how much was whole at most."""
    peaks = {}
    for name in ("plain", "tied", "mixture"):
        make = partial(load, models / name)
        model = make()
        team.tell(hold, make)
        team.run(share, [None] * team.size, lambda _, model=model: take(model, team))
        with pytest.MonkeyPatch.context() as patch:
            found = whole_at_once(patch)
            if name == "plain":
                save(model, folder / "in one")
                peaks["in one"], found[1] = found[1], 0
            patch.setattr(weight_parts_module, "_FILE", SMALL_FILE)
            save(model, folder / name)
            peaks[name] = found[1]
    (folder / "peaks.json").write_text(json.dumps(peaks))


@pytest.mark.slow
def test_a_model_in_parts_is_saved_file_by_file(models, tmp_path):
    """No more than a file's weights are whole at once; transformers reads the same model of the files, experts too."""
    write_mixture(models / "mixture")
    code = in_ranks(2, tmp_path / "output", save_all, tmp_path, models)
    assert code == [0, 0], (tmp_path / "output" / "stderr0").read_text()
    peaks = json.loads((tmp_path / "peaks.json").read_text())
    for name in ("plain", "tied", "mixture"):
        saved, expected = tmp_path / name, load_file(models / name / "model.safetensors")
        size = sum(tensor.nbytes for tensor in expected.values())
        layer = sum(tensor.nbytes for key, tensor in expected.items() if ".layers.0." in key)
        assert 0 < peaks[name] <= max(SMALL_FILE, layer) < size / 2, name
        index = json.loads((saved / "model.safetensors.index.json").read_text())
        files = sorted(path.name for path in saved.glob("*.safetensors"))
        assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
        assert index["metadata"]["total_size"] == size and set(index["weight_map"].values()) == set(files)
        found = {key: tensor for file in files for key, tensor in load_file(saved / file).items()}
        assert found.keys() == expected.keys() == index["weight_map"].keys(), name
        assert all(found[key].equal(tensor) for key, tensor in expected.items()), name
        read, original = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (saved, models / name))
        assert all(read[key].equal(tensor) for key, tensor in original.items()), name
        if name == "plain":
            assert peaks["in one"] == size, "the count sees what is held"
            assert load_file(tmp_path / "in one" / "model.safetensors").keys() == expected.keys()


def killed() -> None:
    at_row("preference", 6, signal.SIGKILL)


@pytest.mark.matrix
def test_a_run_of_a_whole_model_goes_on_in_one_process(project, tmp_path):
    """SFT, reference, preference stage, answers in parts, killed in the last stage; the files are those of one."""
    plain = (*TINY, "adapter=none", "evaluation.kl_prompts=0", "evaluation.every=3")
    plain += ("optim.lr=1e-4", "sft.optim.lr=1e-4")
    alone, ranks = tmp_path / "alone", tmp_path / "ranks"
    assert run(project, alone, *plain).code == 0
    expected = only_run(alone)
    ranks.mkdir()
    whole = ("--config-dir", str(project), *plain, "trainer.shard=node")
    ended = command_in_ranks(2, *whole, cwd=ranks, patches={0: killed})
    assert ended[0].code == -signal.SIGKILL, ended[0].err
    assert "The 2 ranks of a machine train parts of one model (trainer.shard=node)" in ended[0].out + ended[0].err
    again = f"resume={only_run(ranks)}"
    assert run(project, ranks, again, "trainer.shard=off").code == 0
    found = only_run(ranks)
    for name, value in weights(expected).items():
        torch.testing.assert_close(weights(found)[name], value, rtol=0, atol=2e-6, msg=name)
    assert (found / "samples.jsonl").read_text() == (expected / "samples.jsonl").read_text()
    for step in (0, 3, 6, 8):
        looks = [folder / "stages" / "preference" / "answers" / f"{step:06d}.json" for folder in (found, expected)]
        assert looks[0].read_text() == looks[1].read_text()
    names = [{p.relative_to(folder) for p in folder.rglob("*") if p.is_file()} for folder in (found, expected)]
    assert names[0] == names[1]
