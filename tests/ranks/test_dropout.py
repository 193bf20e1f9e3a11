"""Dropout in several ranks: a mask of its own for each rank and step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from alignment.config.compose import load
from alignment.ranks.team import Post, trained_parameters
from alignment.stages import sft
from alignment.stages.chain import Chain
from alignment.stages.preference import PreferenceStage
from tests.helpers.commands import pair, write_lines
from tests.helpers.played_ranks import PlayedTeam

RANKS, STEPS = 3, 2
SEEDS: list[int] = []
"""Of each share of a rank that follows."""

add_rows = sft.add_rows


def gradients(post: Post) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in trained_parameters(post.model) if parameter.grad is not None]


def noted(post: Post, share: sft.SFTShare) -> Any:
    """The share's gradients are those of its seed: again the same, and with another seed others."""
    add_rows(post, replace(share, seed=share.seed ^ 1))
    other = gradients(post)
    first, again = (add_rows(post, share), gradients(post)), (add_rows(post, share), gradients(post))
    assert first[0] == again[0] and all(map(torch.equal, first[1], again[1]))
    assert not all(map(torch.equal, first[1], other))
    SEEDS.append(share.seed)
    return again[0]


class Done(Exception):
    """The SFT stage has ended."""


@pytest.mark.slow
def test_each_rank_and_step_has_a_mask_of_its_own(tiny_model_folder, tmp_path, monkeypatch):
    def done(*_: Any) -> None:
        raise Done

    monkeypatch.setattr(sft, "add_rows", noted)
    monkeypatch.setattr(PreferenceStage, "run", done)
    write_lines(tmp_path / "pairs.jsonl", [pair(number) for number in range(1, 13)])
    sources = [f"{part}.source={tmp_path / 'pairs.jsonl'}" for part in ("data", "sft.data")]
    nulls = [f"{part}.{key}=null" for part in ("data", "sft.data") for key in ("eval_source", "system", "limit")]
    config = load(
        *("recipe=quickstart", "tracking=none", "device=cpu", f"model.name={tiny_model_folder}", "adapter.r=2"),
        *("adapter.dropout=0.2", *sources, *nulls, "data.eval_limit=null", "data.eval_size=2", "sft.data.eval_size=2"),
        *(f"sft.trainer.max_steps={STEPS}", "sft.trainer.groups_per_step=6"),
        *("evaluation.prompts=0", "evaluation.judge=none", "evaluation.kl_prompts=0"),
        f"reference.path={tmp_path / 'cache'}",
    )
    SEEDS.clear()
    with pytest.raises(Done):
        Chain(config, tmp_path, "dropout", {}, team=PlayedTeam(RANKS)).run()
    assert len(set(SEEDS)) == len(SEEDS) == (RANKS - 1) * STEPS
