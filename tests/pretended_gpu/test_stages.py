"""Whole runs on a GPU: SFT, then a preference stage, with answers, on a base in NF4, bfloat16 or, on a T4, float16."""

import contextlib
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from alignment.config.compose import as_plain, compose_node, to_run_config
from alignment.config.registry import register
from alignment.runs.record import RunRecord
from alignment.scoring.layout import FlatLayout
from alignment.scoring.logps import hidden_states, score
from alignment.stages import sft
from alignment.stages.chain import Chain
from alignment.stages.preference import PreferenceStage
from tests.conftest import random_groups
from tests.pretended_gpu.device import GPUTensor
from tests.pretended_gpu.machine import NAME, pretended_gpu

pytestmark = pytest.mark.matrix

COMMON = [
    *("recipe=quickstart", "tracking=none", "device=cuda", "adapter.r=4", "sft.data.limit=8", "sft.optim.lr=1e-2"),
    *("sft.trainer.max_steps=2", "sft.trainer.save_every=0", "data.limit=8", "data.eval_limit=4", "optim.lr=5e-3"),
    *("trainer.max_steps=3", "trainer.groups_per_step=4", "trainer.save_every=2", "evaluation.prompts=2"),
    *("evaluation.max_new_tokens=3", "evaluation.kl_prompts=2", "evaluation.judge=none"),
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """What the runs of this module share: the first SFT policy, and its log-probs."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(tiny_model_folder, cache, tmp_path, monkeypatch):
    """Run the chain on the GPU; what SFT leaves behind is checked before the preference stage."""
    own = PreferenceStage._trained

    def checked(stage: PreferenceStage, model: Any, *args: Any) -> Any:
        check_left_behind(model)
        return own(stage, model, *args)

    def chain(*overrides: str, folder: Path = tmp_path / "run", capability: tuple[int, int] = (9, 0)) -> dict[str, Any]:
        monkeypatch.setattr(PreferenceStage, "_trained", checked)
        register()
        places = [f"model.name={tiny_model_folder}", f"reference.path={cache}"]
        node = compose_node([*COMMON, *places, *overrides])
        with pretended_gpu(capability):
            return Chain(to_run_config(node), folder, "quickstart", as_plain(node)).run()

    return chain


def check_left_behind(model: Any) -> None:
    """Raise unless the policy computes in 16 bits, outside autocast, through its own forward."""
    (batch,) = FlatLayout().batches(random_groups(2, vocab=50), 10_000)
    batch = batch.to(torch.device("cuda", 0))
    assert not torch.is_autocast_enabled("cuda")
    hidden, logps = hidden_states(model, batch), score(model, batch)
    dtype = torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    assert hidden.dtype is dtype, f"hidden states are {hidden.dtype} after SFT"
    assert logps.values.dtype is torch.float32
    assert "forward" not in vars(model), "a wrapper is left on the model"
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    assert all(isinstance(p, GPUTensor) for p in model.parameters())


def assert_complete(summary: dict[str, Any], dtype: str = "bfloat16") -> None:
    assert summary["machine"]["device"] == "cuda:0"
    assert summary["machine"]["gpu"] == NAME
    assert summary["model"]["dtype"] == dtype
    stage = summary["stages"]["preference"]
    assert stage["start"]["loss"] == pytest.approx(stage["start"]["closed_form"], abs=0.02)
    assert summary["evaluation"]["answers"].keys() == {"start", "sft", "final"}
    assert summary["evaluation"]["kl/sampled"]["n"] == 2


def test_nf4_with_a_cached_reference(run):
    summary = run("quantization=nf4", "loss=dpo")
    assert_complete(summary)
    assert summary["model"]["quantization"] == "nf4"
    assert summary["reference"]["mode"] == "cache"


@pytest.mark.parametrize(("capability", "dtype"), [((9, 0), "bfloat16"), ((7, 5), "float16")])
def test_a_run_that_was_interrupted(capability, dtype, run, tmp_path, monkeypatch):
    """In 16 bits, with a statistic of the step: it ends with the numbers of a run that was not."""
    run = partial(run, capability=capability)
    log = RunRecord.log

    def interrupted(record: RunRecord, stage: str, step: int, *args: Any) -> None:
        if (stage, step) == ("preference", 3):
            raise KeyboardInterrupt
        log(record, stage, step, *args)

    settings = ("loss=kto", "quantization=none")
    with monkeypatch.context() as patch:
        patch.setattr(RunRecord, "log", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(*settings, folder=tmp_path / "interrupted")
    resumed = run(*settings, folder=tmp_path / "interrupted")
    assert_complete(resumed, dtype)
    expected = run(*settings)
    assert "taken_over" in expected["stages"]["sft"]
    assert resumed["stages"]["preference"]["metrics"] == expected["stages"]["preference"]["metrics"]
    assert resumed["model"]["final_identity"] == expected["model"]["final_identity"]
    assert ("train/loss_scale" in expected["stages"]["preference"]["metrics"]) == (dtype == "float16")


def test_a_loss_of_whole_distributions(run):
    live = run("loss=tdpo2", "quantization=none")
    assert_complete(live)
    assert live["reference"]["mode"] == "live"


def test_a_trainer_that_leaves_autocast_behind_is_found(run, monkeypatch):
    monkeypatch.setattr(sft, "as_found", lambda model: contextlib.nullcontext())
    with pytest.raises(AssertionError, match=r"hidden states are torch.float32 after SFT|a wrapper is left"):
        run("quantization=none", "sft.seed=1")
