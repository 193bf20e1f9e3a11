"""Every recipe and every `model=` option runs, with a tiny model of its architecture and a few rows of its data."""

import math

import pytest
from transformers import AutoConfig

from alignment.config.compose import as_plain, compose_node, to_run_config
from alignment.config.preflight import check_machine
from alignment.config.registry import register
from alignment.policy.architecture import build_model
from alignment.stages.chain import Chain
from alignment.training.forecast import Machine, plan_stages
from alignment.training.memory import GIB
from tests.conftest import each
from tests.helpers.rounds import make_easy
from tests.helpers.tiny_recipes import NAMES, OPTIONS, TinyModels, composed, in_tiny

CORE = ("kto_qwen3",)
ON_CPU = ("model.dtype=float32", "device=cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> TinyModels:
    return TinyModels(tmp_path_factory.mktemp("models"))


@pytest.mark.slow
@pytest.mark.parametrize("name", each([*NAMES, *OPTIONS], CORE))
def test_it_runs_in_tiny(name, models, tmp_path, monkeypatch):
    """Composed, planned for a GPU, run for a step on a CPU with its quantisation, adapter, optimizer and sampling."""
    register()
    recipe = composed(name)
    asked = to_run_config(compose_node(recipe))
    node = compose_node([*recipe, *in_tiny(asked, models, ON_CPU)])
    config = to_run_config(node)
    check_machine(config)

    make_easy(monkeypatch)

    machine = Machine("", "cuda", 6 * GIB)
    plans = plan_stages(config, build_model(AutoConfig.from_pretrained(config.model.name)), machine, None)
    assert all(plan.chosen.fits for plan in plans.values())

    summary = Chain(config, tmp_path / "run", name, as_plain(node)).run()
    stages = summary["stages"]
    expected = {"sft": asked.sft is not None, "preference": asked.loss is not None}
    assert list(stages) == list(plans) == [stage for stage, wanted in expected.items() if wanted]
    assert all(math.isfinite(stage["metrics"]["train/loss"]) for stage in stages.values())
    settings = {"sft": config.sft or config, "preference": config}
    assert all(stage["steps"] == settings[name].trainer.max_steps for name, stage in stages.items())
    if asked.loss is not None:
        start = stages["preference"]["start"]
        assert stages["preference"]["loss"] == asked.loss.name
        # LiPO ranks by the policy's rewards, which are 0 but for rounding where an answer's log-probs are the sampler's
        ranked = asked.loss.name == "lipo" and asked.onpolicy is not None
        assert math.isclose(start["loss"], start["closed_form"], rel_tol=0.5 if ranked else 1e-3, abs_tol=1e-6)
        rewards = asked.loss.requirements().rewards
        assert (summary["reference"]["mode"] == "none") == (rewards or not asked.reference.for_metrics)
        assert summary["evaluation"].get("prompts") == (None if rewards else 2)
    assert summary["model"]["quantization"] == ("none" if asked.quantization is None else "nf4")
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
