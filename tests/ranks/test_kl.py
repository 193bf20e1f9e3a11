"""The KL from samples in several ranks: the answers of one process to the last token, and its estimate."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from alignment.evaluation import kl
from alignment.evaluation.kl import sampled_kl
from alignment.evaluation.sampling.local import LocalEngine
from alignment.policy.adapter import attach_adapter
from alignment.policy.tiny_model import write_tiny_model
from alignment.ranks.team import Team, trained_parameters
from alignment.reference.live import LiveReference
from alignment.stages.following import PreferenceBegun, begin_preference, choose_together, frozen_start
from tests.conftest import random_groups, recommended_loss, tiny_policy
from tests.helpers.policies import adapter, load, train_adapter
from tests.helpers.rank_steps import CPU, hold, share, share_base, whole_policy
from tests.helpers.ranks import in_ranks
from tests.helpers.steps import moved

PROMPTS, STOPS = 5, [3, 5]
CASES = ("base", "adapter", "live", "shared")


def shared_policy(folder: Path) -> Any:
    return train_adapter(attach_adapter(load(folder), adapter(), 3))


def policy(case: str, models: Path) -> Any:
    if case == "shared":
        return shared_policy(models)
    return whole_policy() if case == "live" else tiny_policy(trained=case == "adapter")


def estimates(team: Team | None, folder: Path, models: Path) -> None:
    """The estimate of each case, and the answers that it is made of."""
    found = {}
    for case in CASES:
        torch.manual_seed(0)
        model = policy(case, models)
        if team is not None:
            team.tell(hold, partial(policy, case, models))
            if case == "shared":
                team.run(share, [None] * team.size, lambda _, model=model: share_base(model, team))
        layout = choose_together(team, model, CPU)
        live = (1000, 1.0) if case == "live" else None
        if team is not None:
            begun = PreferenceBegun(recommended_loss("dpo"), 0, True, live, True, 0.0)
            team.tell(begin_preference, begun, trained_parameters(model))
        reference = LiveReference(model, layout, 1000, CPU) if live else None
        start = frozen_start(model, reference)
        assert start is not None
        moved(model)
        answers: list[list[list[int]]] = []
        drawn = kl.draw

        def seen(*arguments: Any, drawn: Any = drawn, answers: Any = answers) -> Any:
            result = drawn(*arguments)
            answers.append([one.tokens.tolist() for ones in result for one in ones])
            return result

        kl.draw = seen
        engine = LocalEngine(model, CPU, 2, team)
        prompts = [group.prompt for group in random_groups(PROMPTS, seed=7)]
        value = sampled_kl(model, start, prompts, STOPS, engine, 8, layout, 200, CPU, 0, team)
        kl.draw = drawn
        found[case] = {"value": value, "answers": answers, "form": start.form}
    (folder / "found.json").write_text(json.dumps(found))


def estimated(size: int, folder: Path, models: Path) -> dict[str, Any]:
    folder.mkdir()
    if size == 1:
        estimates(None, folder, models)
    else:
        code = in_ranks(size, folder / "output", estimates, folder, models)
        assert code == [0] * size, (folder / "output" / "stderr0").read_text()
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, pytest.param(PROMPTS + 1, marks=pytest.mark.matrix)])
def test_ranks_estimate_the_kl_of_one(size, tmp_path):
    """Two ranks, and more than there are answers: plain and trained adapters, a live reference, a shared base."""
    write_tiny_model(tmp_path / "model")
    one = estimated(1, tmp_path / "one", tmp_path / "model")
    assert {case: found["form"] for case, found in one.items()} == {
        "base": "adapter switched off",
        "adapter": "frozen copy of the adapter",
        "live": "copy of the model",
        "shared": "frozen copy of the adapter",
    }
    several = estimated(size, tmp_path / "several", tmp_path / "model")
    for case in CASES:
        assert several[case]["answers"] == one[case]["answers"], case
        value, expected = several[case]["value"], one[case]["value"]
        assert abs(expected["mean"]) > 1e-3, case
        assert value == pytest.approx(expected, rel=1e-3 if case == "shared" else 1e-9, abs=1e-6), case
