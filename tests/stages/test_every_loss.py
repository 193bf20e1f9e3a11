"""Every loss, with its recommended settings, trains on an NF4 base with shared prompts and a cached reference.

Each in this process, on real questions and answers where they are at hand; the whole command runs once for losses of
rows and of lists, for one that compares whole distributions, and for a mixture that keeps a state.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from alignment.config.compose import load
from alignment.config.schema import RunConfig
from alignment.data.preparation.prepare import ReadPreferences, fit_preferences, read_preferences
from alignment.data.sources.loading import load_rows
from alignment.losses import LOSSES
from alignment.policy.adapter import attach_adapter
from alignment.policy.load import load_base, load_tokenizer
from alignment.stages.answers import HeldOutAnswers
from alignment.stages.preference import PreferenceStage
from alignment.stages.stage import Workspace
from tests.conftest import CORE_LOSSES, SHARED_DATA, each, recommended_loss
from tests.helpers.commands import command, write_lines

ALL = [*(name for name, loss in LOSSES.items() if name != "mixture" and not loss.draws), "mpo"]
BY_COMMAND = ("tdpo1", "kto", "plackett_luce", "mpo")
"""Losses of pairs, rows and lists, and one made of others."""

COMMON = [
    *("recipe=quickstart", "sft=none", "tracking=none", "quantization=nf4", "adapter.r=4", "adapter.alpha=8"),
    *("data.system=null", "data.eval_limit=null", "evaluation.prompts=0", "evaluation.judge=none", "optim.lr=0.01"),
    *("trainer.groups_per_step=8", "trainer.max_steps=30", "trainer.eval_every=0", "trainer.save_every=0"),
    *("data.max_length=64", "data.max_prompt_length=24"),
]

FEW_STEPS = ("trainer.max_steps=6", "optim.lr=0.04")
MORE_STEPS = {"cpo", "mpo", "plackett_luce", "mallows_po", "r_dpo"}
"""They raise the likelihood of both answers first, or need more rows than so few steps see."""

LESS_ANCHOR = {
    "cpo": ["beta=0.02", "lam=0.001"],
    "dpop": ["lam=5"],
    "orpo": ["lam=5"],
    "rpo": ["alpha=0.1"],
    "slic_hf": ["delta=100", "lam=0.001"],
    "tpo": ["alpha=0.02"],
    "tpo_l": ["alpha=0.1"],
}
"""At the recommended values the likelihood of the chosen answer is all that so few steps from random weights raise:
what holds it up (an NLL) or keeps it from falling (dpop) outweighs the comparison, or that is won already (cpo and
slic_hf)."""


def bundled_pairs():
    """(prompt, chosen, rejected) of the quickstart's questions: training, held out."""
    data = load_rows(load("recipe=quickstart").data, stage="preference")
    return [[(row.prompt, *row.completions) for row in part] for part in (data.train[:64], data.eval[:16])]


def real_pairs():
    """The same of real questions and answers, long ones cut; the bundled ones where no real data are at hand."""
    file = SHARED_DATA / "llamafactory_demo" / "pairs_en.jsonl"
    if not file.is_file():
        return bundled_pairs()
    rows = map(json.loads, file.read_text().splitlines())
    texts = [(row["prompt"], row["chosen"], row["rejected"]) for row in rows]
    return [texts[:64], texts[200:216]]


def as_records(pairs, unit):
    """Rows of a file for losses of pairs, rows or lists; lists have another prompt's chosen answer in the middle."""
    if unit == "row":
        return [
            {"prompt": prompt, "completion": completion, "label": label}
            for prompt, *completions in pairs
            for completion, label in zip(completions, (True, False), strict=True)
        ]
    if unit == "list":
        others = [pair[1] for pair in (*pairs[1:], pairs[0])]
        return [
            {"prompt": prompt, "completions": [chosen, other, rejected], "scores": [3.0, 2.0, 1.0]}
            for (prompt, chosen, rejected), other in zip(pairs, others, strict=True)
            if len({completion[0]["content"][:40] for completion in (chosen, other, rejected)}) == 3  # cut ones too
        ]
    return [
        {"prompt": prompt, "chosen": chosen, "rejected": rejected, "score_chosen": 2.0, "score_rejected": 1.0}
        for prompt, chosen, rejected in pairs
    ]


def write_files(folder: Path, origin) -> Path:
    """Data files of one origin in all three forms."""
    for part, pairs in zip(("train", "held_out"), origin, strict=True):
        for unit in ("pair", "row", "list"):
            write_lines(folder / f"{unit}_{part}.jsonl", as_records(pairs, unit))
    return folder


def overrides(name: str, unit: str, files: Path, model: Path) -> Iterator[str]:
    yield from COMMON
    yield from (f"loss={name}", f"model.name={model}", f"data.source={files}/{unit}_train.jsonl")
    yield f"data.eval_source={files}/{'list' if unit == 'list' else 'pair'}_held_out.jsonl"
    yield from (f"loss.{setting}" for setting in LESS_ANCHOR.get(name, ()))


def assert_learned(name: str, before: dict[str, float], after: dict[str, float]) -> None:
    """The margin of the loss's own rewards rose on held-out pairs.

    DiscoPOP lowers it first, since it starts on its hump; NLL has no rejected answer.
    """
    if name == "bradley_terry":  # a new head on a random model: the mean margin of a few pairs says little
        assert after["loss"] < before["loss"]
        return
    key = "rewards/chosen" if name == "nll" else "rewards/margins"
    assert after[key] < before[key] if name == "discopop" else after[key] > before[key]


@pytest.fixture(scope="module")
def real_files(tmp_path_factory) -> Path:
    return write_files(tmp_path_factory.mktemp("real"), real_pairs())


@pytest.fixture(scope="module")
def prepared(
    real_files, tiny_model_folder, tmp_path_factory
) -> tuple[dict[str, tuple[RunConfig, ReadPreferences]], Any, Path]:
    """By unit the configuration for any loss of it, and the data in tokens; the tokenizer; a cache for all losses."""
    by_unit = {}
    for unit, name in {"pair": "dpo", "row": "kto", "list": "plackett_luce"}.items():
        config = load(*overrides(name, unit, real_files, tiny_model_folder), *FEW_STEPS)
        tokenizer = load_tokenizer(config.model, str(tiny_model_folder))
        by_unit[unit] = config, read_preferences(config.data, tokenizer)
    return by_unit, tokenizer, tmp_path_factory.mktemp("cache")


@pytest.mark.slow
@pytest.mark.parametrize("name", each(ALL, CORE_LOSSES))
def test_training_raises_the_margin_on_held_out_pairs(name, prepared, tiny_model_folder, tmp_path):
    loss = recommended_loss(name, *LESS_ANCHOR.get(name, ()))
    by_unit, tokenizer, cache = prepared
    config, read = by_unit[loss.requirements().unit]
    config = replace(config, loss=loss)
    if name in MORE_STEPS:
        config = replace(config, trainer=replace(config.trainer, max_steps=30), optim=replace(config.optim, lr=0.01))
    device = torch.device("cpu")
    model = load_base(config.model, config.quantization, str(tiny_model_folder), device)
    model = attach_adapter(model, config.adapter, config.seed)
    work = Workspace(
        run_dir=tmp_path,
        cache=cache,
        device=device,
        tokenizer=tokenizer,
        slot=None,
        final_policy=tmp_path / "adapter",
    )
    data = fit_preferences(read, config.data, loss)[0]
    stage = PreferenceStage(config, data, work, (), HeldOutAnswers(config, data, work, ()))
    logged = []
    stage.run(model, lambda step, split, metrics, held_out=(): logged.append(metrics) if split == "eval" else None)
    before, after = logged
    assert_learned(name, before, after)


@pytest.mark.slow
@pytest.mark.parametrize("name", each(BY_COMMAND, ["kto"]))
def test_the_command_trains_each_kind_of_loss(name, real_files, tiny_model_folder, tmp_path):
    ended = command(
        *overrides(name, recommended_loss(name).requirements().unit, real_files, tiny_model_folder),
        f"hydra.run.dir={tmp_path}/run",
        cwd=tmp_path,
        cache=tmp_path / "cache",
        timeout=300,
    )
    assert ended.code == 0, ended.err
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    before, after = (row for row in metrics if row["split"] == "eval")
    assert_learned(name, before, after)
