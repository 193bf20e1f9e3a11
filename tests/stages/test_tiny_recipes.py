"""Every recipe and every `model=` option runs, with a tiny model of its architecture and a few rows of its data."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from alignment.config.compose import as_plain, compose_node, to_run_config
from alignment.config.members import sweep_members
from alignment.config.preflight import check_machine
from alignment.config.registry import register
from alignment.config.schema import Judge, RunConfig
from alignment.files import asset_dir
from alignment.policy.architecture import build_model
from alignment.stages.chain import Chain
from alignment.training.forecast import Machine, plan_stages
from alignment.training.memory import GIB
from alignment.training.published import PUBLISHED
from tests.conftest import each
from tests.helpers.families import FAMILIES, write_chat_model
from tests.helpers.rounds import make_easy

RECIPES = asset_dir("recipes")
NAMES = [path.relative_to(RECIPES).with_suffix("").as_posix() for path in sorted(RECIPES.rglob("*.yaml"))]
OPTIONS = {published.option: published for published in PUBLISHED}
CORE = ("kto_qwen3",)


@pytest.fixture(scope="module")
def hub_sets(tmp_path_factory) -> dict[str, Path]:
    """Local copies in the layouts and files of the hub's sets."""

    def messages(*texts):
        return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]

    root = tmp_path_factory.mktemp("hub_sets")
    for part, count in (("train", 6), ("test", 2)):
        questions = [f"{part} {i}?" for i in range(count)]
        preferences = [
            {
                "prompt": q,
                "prompt_id": q,
                "chosen": messages(q, "yes " * (i + 1)),
                "rejected": messages(q, "no"),
                "messages": messages(q, "yes"),
                "score_chosen": 8.0,
                "score_rejected": 5.5,
            }
            for i, q in enumerate(questions)
        ]
        conversations = [{"prompt": q, "prompt_id": q, "messages": messages(q, "a", "b?", "c")} for q in questions]
        for name, split, rows in (
            ("ultrafeedback", f"{part}_prefs", preferences),
            ("ultrachat", f"{part}_sft", conversations),
        ):
            (root / name).mkdir(exist_ok=True)
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (root / name / f"{split}-00000-of-00001.jsonl").write_text(text)
    return {
        "HuggingFaceH4/ultrafeedback_binarized": root / "ultrafeedback",
        "HuggingFaceH4/ultrachat_200k": root / "ultrachat",
    }


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory):
    """The folder of a tiny model that talks, by its `model_type`: written once."""
    root = tmp_path_factory.mktemp("models")

    def folder(model_type: str) -> Path:
        if not (root / model_type).exists():
            [family] = [family for family in FAMILIES if family.model_type == model_type]
            write_chat_model(family, root / model_type)
        return root / model_type

    return folder


@pytest.fixture(scope="module")
def other_model(tiny_models, tmp_path_factory) -> Path:
    """Another model with the same tokenizer, whose weights are those of no other."""
    folder = tmp_path_factory.mktemp("other") / "llama"
    shutil.copytree(tiny_models("llama"), folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.flip(0))
    model.save_pretrained(folder)
    return folder


def composed(name: str) -> list[str]:
    """The overrides that make the run: a recipe's own, those of a sweep's last member, or a model under its recipe."""
    if name in OPTIONS:
        published = OPTIONS[name]
        return [f"recipe={published.recipe}", f"model={name}", *published.settings]
    return sweep_members([f"recipe={name}"])[-1]


def model_types() -> dict[str, str]:
    """The architecture of every model that has an option, by the model's name."""
    types = {published.option: published.model_type for published in PUBLISHED} | {"smollm2_135m": "llama"}
    files = sorted((asset_dir("conf") / "model").glob("*.yaml"))
    named = {yaml.safe_load(file.read_text())["name"]: types[file.stem] for file in files}
    return named | {"Qwen/Qwen3-1.7B": "qwen3"}  # which a recipe names beside its option


def in_tiny(config: RunConfig, model: Path, other: Path, hub_sets: dict[str, Path]) -> list[str]:
    """What makes the run small: sizes, where things are, and the device; the recipe's choices stay."""
    overrides = [
        f"model.name={model}",
        "model.dtype=float32",
        "device=cpu",
        "tracking=none",
        f"evaluation.prompts={min(2, config.evaluation.prompts)}",
        "evaluation.max_new_tokens=2",
        f"evaluation.kl_prompts={min(2, config.evaluation.kl_prompts)}",
    ]
    own_judge = config.onpolicy is not None and config.onpolicy.judge is Judge.implicit
    if config.onpolicy is not None:
        overrides.append("onpolicy.max_new_tokens=12")
        overrides += ["onpolicy.every=1"] if own_judge else []
        overrides += [f"onpolicy.weak={other}", "onpolicy.k=4"] if config.onpolicy.weak is not None else []
    if config.distill is not None:
        overrides.append(f"distill.teacher={other}")
    for prefix, part in {"": config if config.loss is not None else None, "sft.": config.sft}.items():
        if part is None:
            continue
        overrides += [
            f"{prefix}trainer.groups_per_step=2",
            f"{prefix}trainer.max_steps={2 if own_judge and not prefix else 1}",  # it judges from the second round on
            f"{prefix}trainer.checkpoint_every=2",
            f"{prefix}data.limit=4",
            f"{prefix}data.eval_limit=2",
        ]
        if part.data.source in hub_sets:
            overrides.append(f"{prefix}data.source={hub_sets[part.data.source]}")
    return overrides


@pytest.mark.slow
@pytest.mark.parametrize("name", each([*NAMES, *OPTIONS], CORE))
def test_it_runs_in_tiny(name, hub_sets, tiny_models, other_model, tmp_path, monkeypatch):
    """Composed, planned for a GPU, run for a step on a CPU with its quantisation, adapter, optimizer and sampling."""
    register()
    recipe = composed(name)
    asked = to_run_config(compose_node(recipe))
    model = tiny_models(model_types()[asked.model.name])
    node = compose_node([*recipe, *in_tiny(asked, model, other_model, hub_sets)])
    config = to_run_config(node)
    check_machine(config)

    make_easy(monkeypatch)

    machine = Machine("", "cuda", 6 * GIB)
    plans = plan_stages(config, build_model(AutoConfig.from_pretrained(model)), machine, None)
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
