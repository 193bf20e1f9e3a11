"""A refreshed reference in checkpoints and in resumed runs, and schedules that are refused."""

import json
import shutil
import signal
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from alignment.config.compose import load
from alignment.errors import UserError
from alignment.reference.frozen import FrozenPolicy
from alignment.reference.live import LiveReference
from alignment.scoring.layout import FlatLayout
from alignment.training.schedule import Schedule
from alignment.types import Group
from tests.conftest import random_groups, tiny_config, tiny_policy
from tests.helpers.commands import write_project
from tests.helpers.policies import CPU, start_of
from tests.helpers.references import ROUNDING, cached
from tests.helpers.runs import TINY, assert_same, at_row, metric_rows, only_run, run
from tests.helpers.steps import moved

pytestmark = pytest.mark.slow

GROUPS = [
    Group(group.prompt, group.completions, source=f"pairs:{i}") for i, group in enumerate(random_groups(8, seed=21))
]


@pytest.mark.parametrize("kind", ["cache", "fresh", "trained", "full"])
def test_a_refreshed_reference_is_taken_from_a_checkpoint(kind, tmp_path):
    """Bit for bit, without the store and without the policy that it was."""
    make = partial(tiny_policy, torch.float32, trained=kind == "trained")
    models = [make() if kind != "full" else start_of("full") for _ in range(2)]
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    if kind == "cache":
        references = [cached(model, tmp_path / str(i)) for i, model in enumerate(models)]
        references[1].prepare(GROUPS[:1])
    else:
        references = [LiveReference(model, FlatLayout(), 10_000, CPU, 0.6) for model in models]
    for step in (2, 4):
        moved(models[0], step)
        references[0].refresh(step, GROUPS)
    references[0].save_state(folder)
    references[1].load_state(folder)
    assert torch.equal(references[0].logps(GROUPS).values, references[1].logps(GROUPS).values)
    assert references[0].identity == references[1].identity
    assert references[0].summary()["refreshes"] == references[1].summary()["refreshes"]
    assert [refresh["step"] for refresh in references[1].refreshes] == [2, 4]
    for model, reference in zip(models, references, strict=True):
        moved(model, 9)  # the second policy is another one, but so is every share that it brings
        model.load_state_dict(models[0].state_dict())
        reference.refresh(6, GROUPS)
    torch.testing.assert_close(
        references[0].logps(GROUPS).values, references[1].logps(GROUPS).values, rtol=0, atol=ROUNDING
    )
    assert references[0].identity == references[1].identity
    for name, tensor in references[0]._tensors().items():
        torch.testing.assert_close(references[1]._tensors()[name], tensor, rtol=0, atol=ROUNDING, msg=name)


def test_before_the_first_refresh_a_checkpoint_holds_nothing_of_the_reference(tmp_path):
    model = tiny_policy(torch.float32, trained=True)
    reference = LiveReference(model, FlatLayout(), 10_000, CPU)
    expected = reference.logps(GROUPS).values
    reference.save_state(tmp_path)
    assert load_file(tmp_path / "reference.safetensors") == {}
    reference.load_state(tmp_path)
    assert reference.refreshes == [] and torch.equal(reference.logps(GROUPS).values, expected)


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_model_folder):
    return write_project(tmp_path_factory.mktemp("project"), tiny_model_folder)


def refreshes(folder):
    return json.loads((folder / "summary.json").read_text())["reference"]["refreshes"]


RUNS = {
    # The preference stage has 8 steps; rows are written at 2, 3, 4, 6, 8, checkpoints at 2, 4, 6.
    "soft, after SFT": (["reference=tr_dpo", "reference.sync_every=3"], [3, 6], [6]),
    "soft, whole model": (["reference=tr_dpo", "reference.sync_every=3", "adapter=none", "sft=none"], [3, 6], [6]),
    # The checkpoint of step 6, from which the last process goes on, is that of the refresh itself.
    "hard, cached": (["reference.sync_every=3", "sft=none"], [3, 6], [6, 8]),
    "parts, rows on nf4": (
        ["reference=sdpo", "reference.parts=3", "loss=kto", "sft=none", "quantization=nf4"], [3, 5], [6],
    ),
}  # fmt: skip


@pytest.mark.matrix
@pytest.mark.parametrize("kind", RUNS)
def test_a_run_killed_between_refreshes_ends_like_one_that_was_not(kind, project, tmp_path):
    """The store is lost meanwhile: what the start has to say is computed again, the rest is in the checkpoint."""
    settings, steps, kills = RUNS[kind]
    ended = run(project, tmp_path / "whole", *TINY, *settings)
    assert ended.code == 0, ended.err
    expected = only_run(tmp_path / "whole")
    assert [refresh["step"] for refresh in refreshes(expected)] == steps
    identities = {refresh["identity"] for refresh in refreshes(expected)}
    summary = json.loads((expected / "summary.json").read_text())
    assert len(identities | {summary["reference"]["identity"]}) == len(steps) + 1
    margins = [r["nats/margins"] for r in metric_rows(expected) if r["stage"] == "preference" and r["split"] == "eval"]
    assert len(margins) == 3 and margins[0] == 0 and 0 not in margins[1:]
    cwd, arguments = tmp_path / "killed", (*TINY, *settings)
    for step in kills:
        ended = run(project, cwd, *arguments, patch=partial(at_row, "preference", step))
        assert ended.code == -signal.SIGKILL, ended.err
        arguments = (f"resume={only_run(cwd)}",)
        for file in (cwd / "cache").glob("reference.sqlite*"):
            file.unlink()
    ended = run(project, cwd, *arguments)
    assert ended.code == 0, ended.err
    assert_same(only_run(cwd), expected)
    assert refreshes(only_run(cwd)) == refreshes(expected)


def test_a_second_run_finds_every_refresh_in_the_store(project, tmp_path):
    """Its policy is the same at every refresh, to the last bit."""
    for attempt in range(2):
        small = ("sft=none", "trainer.max_steps=4", "trainer.save_every=0", "evaluation.prompts=0")
        ended = run(project, tmp_path, *TINY, *small, "reference.sync_every=3")
        assert ended.code == 0, ended.err
        [folder] = (tmp_path / "outputs" / "tiny").iterdir()
        reference = json.loads((folder / "summary.json").read_text())["reference"]
        assert (reference["misses"] == 0) == (attempt == 1)
        shutil.rmtree(folder)


# Refusals


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["reference.sync_every=0"], "reference.sync_every must be null or at least 1, not 0."),
        (["reference.sync_every=2", "reference.sync_mix=0"], "reference.sync_mix must be in (0, 1], not 0.0."),
        (["reference.sync_every=2", "reference.sync_mix=1.5"], "reference.sync_mix must be in (0, 1], not 1.5."),
        (["reference.parts=0"], "reference.parts must be at least 1, not 0."),
        (["reference.sync_mix=0.5"], "reference.sync_mix=0.5 has no effect without reference.sync_every"),
        (["reference=sdpo", "reference.sync_every=2"], "are two schedules: choose one"),
        (["reference.sync_every=2", "reference.sync_mix=0.5"], "set reference.mode=live."),
        (["reference=sdpo", "loss=simpo"], "need a loss with a reference"),
        (["reference=tr_dpo", "loss=none", "sft=quickstart"], "need a loss with a reference"),
    ],
)
def test_what_has_no_effect_or_no_sense_is_refused(settings, said):
    with pytest.raises(UserError) as caught:
        load("recipe=quickstart", *settings)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["reference.sync_every=4"], r"^reference\.sync_every=4 is never reached: this training has 4 steps\.$"),
        (["reference.parts=9"], r"^reference\.parts=9: there are too few training rows"),
        (["reference.parts=5", "loss=kto"], r"^reference\.parts=5: there are too few training rows"),
        (["reference.parts=6", "trainer.max_steps=5"], r"^reference\.parts=6: too many parts for .* of 5 steps\.$"),
    ],
)
def test_a_schedule_that_the_data_are_too_few_for_is_refused(settings, said):
    groups = [Group(g.prompt, g.completions[:1], labels=(True,), source=g.source) for g in GROUPS]
    config = load("recipe=quickstart", "trainer.groups_per_step=2", *settings)
    with pytest.raises(UserError, match=said):
        Schedule.of(config, groups if "loss=kto" in settings else GROUPS)


def test_a_schedule_goes_by_the_configuration():
    def schedule(*settings):
        return Schedule.of(load("recipe=quickstart", "trainer.groups_per_step=2", *settings), GROUPS)

    assert schedule().refreshes == ()
    first, every, epoch = schedule().until_refresh(0), schedule().steps, schedule().sampler.steps(0)
    assert list(first) == list(every) == list(epoch)
    every = schedule("trainer.epochs=2", "reference.sync_every=3")
    assert (len(every.steps), every.refreshes) == (8, (3, 6))
    assert [every.until_refresh(step) for step in (0, 3, 4, 6)] == [
        every.steps[:3], every.steps[3:6], every.steps[4:6], every.steps[6:],
    ]  # fmt: skip
    staged = schedule("trainer.epochs=2", "reference=sdpo")
    assert staged.refreshes == (4,)
    assert {i for step in staged.steps[:4] for i in step} == {0, 1, 2, 3}
    assert schedule("trainer.max_steps=7", "reference=sdpo").refreshes == (4,)


def test_an_adapter_on_embeddings_survives_a_checkpoint(tmp_path):
    """Its tensors are no modules but entries of a dictionary."""
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_config(tiny_config()), LoraConfig(r=2, target_modules=["embed_tokens"])
    )
    frozen = FrozenPolicy(model)
    moved(model, 1)
    frozen.mix(0.5)
    state = frozen.state()
    assert {tuple(t.shape) for name, t in state.items() if "lora_embedding_A" in name} == {(2, 97)}
    assert {tuple(t.shape) for name, t in state.items() if "lora_embedding_B" in name} == {(32, 2)}
