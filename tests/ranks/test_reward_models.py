"""Reward models in several ranks, and a loss without a reference whose answers such a model judges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from alignment.config.compose import load
from alignment.errors import UserError
from alignment.ranks.team import Team
from alignment.stages.chain import Chain
from alignment.training.forecast import require_ranks
from tests.helpers.ranks import in_ranks
from tests.helpers.reward_runs import settings
from tests.helpers.runs import metric_rows, weights

SMALL = ("sft=none", "adapter.dropout=0", "trainer.max_steps=2", "trainer.save_every=0", "data.eval_size=6")
CASES: dict[str, tuple[str, ...]] = {
    "reward": (),
    "judged": (
        *("loss=simpo", "reference.for_metrics=false", "evaluation=judged", "evaluation.prompts=5"),
        *("evaluation.max_new_tokens=4", "evaluation.judge=reward_model", "evaluation.temperature=1"),
        *("evaluation.kl_prompts=3",),
    ),
    "shared": ("trainer.shard=node",),
}


def train_all(team: Team | None, folder: Path, model: Path, judge: Path) -> None:
    """Each case in a folder of its own; in one process a base is never shared."""
    for name, own in CASES.items():
        others = [setting for setting in own if team is not None or not setting.startswith("trainer.shard")]
        others += [f"evaluation.reward_model={judge}"] if name == "judged" else []
        config = load(*settings(folder, model, *SMALL, f"reference.path={folder / 'cache'}", *others))
        Chain(config, folder / name, name, {}, team=team).run()


def samples(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_ranks_train_the_reward_model_of_one(tiny_model_folder, tmp_path):
    """Weights with the head, metrics, rewards of held-out pairs; a whole base on each rank, or a part of one.

    A loss that reads no reference sends none to the other ranks either; what they answer is judged as in one process.
    """
    alone, ranks = tmp_path / "alone", tmp_path / "ranks"
    for folder in (alone, ranks):
        folder.mkdir()
    judge = alone / "reward" / "adapter"
    train_all(None, alone, tiny_model_folder, judge)
    code = in_ranks(2, tmp_path / "output", train_all, ranks, tiny_model_folder, judge)
    assert code == [0, 0], (tmp_path / "output" / "stderr0").read_text()
    for name in CASES:
        found, expected = weights(ranks / name), weights(alone / name)
        assert found.keys() == expected.keys()
        assert any(key.endswith("score.weight") for key in found) == (name != "judged")
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=2e-5, msg=f"{name} {key}")
        for row, other in zip(metric_rows(ranks / name), metric_rows(alone / name), strict=True):
            assert (row.pop("stage"), row.pop("split")) == (other.pop("stage"), other.pop("split"))
            assert row == pytest.approx(other, rel=1e-3, abs=1e-5), name
    # The answers are the same to the last token, judged where they are gathered
    for sample, other in zip(samples(ranks / "judged"), samples(alone / "judged"), strict=True):
        for moment, verdict in sample.pop("verdicts").items():
            assert verdict["score"] == pytest.approx(other["verdicts"][moment]["score"], abs=1e-6)
        assert sample == {key: value for key, value in other.items() if key != "verdicts"}
    kl = [json.loads((f / "judged" / "summary.json").read_text())["evaluation"]["kl/sampled"] for f in (ranks, alone)]
    assert kl[0] == pytest.approx(kl[1], abs=1e-5) and abs(kl[1]["mean"]) > 1e-4


def test_ranks_do_not_train_parts_of_a_whole_reward_model(tiny_model_folder, tmp_path):
    config = load(*settings(tmp_path, tiny_model_folder, "sft=none", "adapter=none", "trainer.shard=node"))
    with pytest.raises(UserError, match="the head of a reward model is added when the stage begins: choose an adapter"):
        require_ranks(config, 2)
