"""Every recipe and every `model=` option made small: what they compose to, local data, and the sizes of a test."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
import yaml
from transformers import AutoModelForCausalLM

from alignment.config.members import sweep_members
from alignment.config.schema import Judge, RunConfig
from alignment.files import asset_dir
from alignment.training.published import PUBLISHED
from tests.helpers.families import FAMILIES, write_chat_model

RECIPES = asset_dir("recipes")
NAMES = [path.relative_to(RECIPES).with_suffix("").as_posix() for path in sorted(RECIPES.rglob("*.yaml"))]
OPTIONS = {published.option: published for published in PUBLISHED}


def write_hub_sets(root: Path) -> dict[str, Path]:
    """Local copies in the layouts and files of the hub's sets, by the hub's names."""

    def messages(*texts):
        return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]

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


class TinyModels:
    """Folders of tiny models that talk, each written once.

    Attributes:
        sets: local copies of the hub's sets, by the hub's names.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self.sets = write_hub_sets(root)

    def folder(self, model_type: str) -> Path:
        """Of an architecture."""
        if not (self._root / model_type).exists():
            [family] = [family for family in FAMILIES if family.model_type == model_type]
            write_chat_model(family, self._root / model_type)
        return self._root / model_type

    def other(self) -> Path:
        """Another model with the same tokenizer, whose weights are those of no other."""
        folder = self._root / "other"
        if not folder.exists():
            shutil.copytree(self.folder("llama"), folder)
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


def in_tiny(config: RunConfig, models: TinyModels, where: tuple[str, ...]) -> list[str]:
    """What makes the run small: sizes, where things are, and what `where` sets; the recipe's choices stay."""
    overrides = [
        f"model.name={models.folder(model_types()[config.model.name])}",
        *where,
        "tracking=none",
        f"evaluation.prompts={min(2, config.evaluation.prompts)}",
        "evaluation.max_new_tokens=2",
        f"evaluation.kl_prompts={min(2, config.evaluation.kl_prompts)}",
    ]
    own_judge = config.onpolicy is not None and config.onpolicy.judge is Judge.implicit
    if config.onpolicy is not None:
        overrides.append("onpolicy.max_new_tokens=12")
        overrides += ["onpolicy.every=1"] if own_judge else []
        overrides += [f"onpolicy.weak={models.other()}", "onpolicy.k=4"] if config.onpolicy.weak is not None else []
    if config.distill is not None:
        overrides.append(f"distill.teacher={models.other()}")
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
        if part.data.source in models.sets:
            overrides.append(f"{prefix}data.source={models.sets[part.data.source]}")
    return overrides
