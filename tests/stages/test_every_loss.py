"""Every loss, with its recommended settings, trains through the command: an NF4 base, shared prompts, a cache."""

import json
from pathlib import Path

import pytest

from alignment.config.compose import load
from alignment.data.sources import load_rows
from alignment.losses import LOSSES
from tests.conftest import recommended_loss, shared_data
from tests.helpers.commands import command, write_lines

ALL = [*(name for name in LOSSES if name != "mixture"), "mpo"]
COMMON = [
    *("recipe=quickstart", "sft=none", "tracking=none", "quantization=nf4", "adapter.r=4", "adapter.alpha=8"),
    *("data.system=null", "data.eval_limit=null", "evaluation.prompts=0", "evaluation.judge=none", "optim.lr=0.01"),
    *("trainer.groups_per_step=8", "trainer.max_steps=30", "trainer.eval_every=0", "trainer.save_every=0"),
    *("data.max_length=128", "data.max_prompt_length=48"),
]


LESS_ANCHOR = {
    "cpo": ["lam=0.02"],
    "dpop": ["lam=5"],
    "orpo": ["lam=5"],
    "rpo": ["alpha=0.1"],
    "slic_hf": ["delta=100", "lam=0.001"],
    "tpo": ["alpha=0.02"],
    "tpo_l": ["alpha=0.1"],
}
"""At the recommended values the likelihood of the chosen answer is all that so few steps from random weights raise:
what holds it up (an NLL) or keeps it from falling (dpop) outweighs the comparison, or that is won already (slic_hf)."""


def bundled_pairs():
    """(prompt, chosen, rejected) of the quickstart's questions: training, held out."""
    data = load_rows(load("recipe=quickstart").data, stage="preference")
    return [[(row.prompt, *row.completions) for row in part] for part in (data.train[:64], data.eval[:32])]


def real_pairs():
    """The same of real questions and answers, long ones cut."""
    rows = map(json.loads, (shared_data("llamafactory_demo") / "pairs_en.jsonl").read_text().splitlines())
    texts = [(row["prompt"], row["chosen"], row["rejected"]) for row in rows]
    return [texts[:200], texts[200:248]]


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


@pytest.fixture(scope="module", params=[bundled_pairs, real_pairs], ids=["bundled", "real"])
def files(request, tmp_path_factory) -> Path:
    """Data files of one origin in all three forms."""
    folder = tmp_path_factory.mktemp("data")
    for part, pairs in zip(("train", "held_out"), request.param(), strict=True):
        for unit in ("pair", "row", "list"):
            write_lines(folder / f"{unit}_{part}.jsonl", as_records(pairs, unit))
    return folder


@pytest.mark.parametrize("name", ALL)
def test_training_raises_the_margin_on_held_out_pairs(name, files, tiny_model_folder, tmp_path):
    """Of the loss's own rewards. DiscoPOP lowers it first, since it starts on its hump; NLL has no rejected answer."""
    unit = recommended_loss(name).requirements().unit
    ended = command(
        *COMMON,
        f"loss={name}",
        f"model.name={tiny_model_folder}",
        f"data.source={files}/{unit}_train.jsonl",
        f"data.eval_source={files}/{'list' if unit == 'list' else 'pair'}_held_out.jsonl",
        f"hydra.run.dir={tmp_path}/run",
        *(f"loss.{setting}" for setting in LESS_ANCHOR.get(name, ())),
        cwd=tmp_path,
        cache=tmp_path / "cache",
        timeout=300,
    )
    assert ended.code == 0, ended.err
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    before, after = (row for row in metrics if row["split"] == "eval")
    key = "rewards/chosen" if name == "nll" else "rewards/margins"
    assert after[key] < before[key] if name == "discopop" else after[key] > before[key]
