"""Steps that several ranks share are those of one process: weights, metrics, state, stored reference."""

from functools import partial
from pathlib import Path

import pytest
import torch

from alignment.losses import LOSSES
from alignment.losses.base import Loss
from tests.helpers.rank_steps import packed_policy, steps, whole_policy
from tests.helpers.ranks import in_ranks

STATEFUL = [n for n, loss in LOSSES.items() if loss.initial_state is not Loss.initial_state and n != "mixture"]

OWN = ("folder", "few_digits")
"""Settings of a case that are not those of its steps."""

_TIED = "accuracies"
"""What rounding decides in the step after a refresh, where the policy is its reference."""


def train_all(team, folder: Path, cases: list[tuple[str, dict]]) -> None:
    """Train every case, and keep what came of it."""
    results = []
    for number, (name, settings) in enumerate(cases):
        part = folder / settings.get("folder", f"{number}-{name}")
        part.mkdir(parents=True, exist_ok=True)
        results.append(steps(team, part, name, **{k: v for k, v in settings.items() if k not in OWN}))
    torch.save(results, folder / "results.pt")


def assert_equal_in_ranks(cases: list[tuple[str, dict]], size: int, folder: Path) -> None:
    """Sums have another order in several ranks, and the norms of the tiny policy compute in fp32. SGD moves by them.

    That leaves some 1e-8 of a weight, and 1e-13 where the norms compute in float64 too (test_played.py). A policy that
    computes all in fp32 is equal to fewer digits.
    """
    assert in_ranks(size, folder / "output", train_all, folder / "ranks", cases) == [0] * size
    train_all(None, folder / "alone", cases)
    found, expected = (torch.load(folder / name / "results.pt", weights_only=False) for name in ("ranks", "alone"))
    for (name, settings), shared, alone in zip(cases, found, expected, strict=True):
        few = 100 if settings.get("few_digits") else 1
        limits = {"rtol": few * 1e-6, "atol": few * 1e-7}
        for key, value in alone["weights"].items():
            torch.testing.assert_close(shared["weights"][key], value, **limits, msg=f"{name} {key}")
        assert shared["state"] == pytest.approx(alone["state"], rel=1e-6, abs=1e-9), name
        assert shared["held_out"] == pytest.approx(alone["held_out"], rel=few * 1e-5, abs=few * 1e-7), name
        assert shared["tokens"] == alone["tokens"] and shared["reference"] == alone["reference"]
        for rows in zip(shared["log"], alone["log"], strict=True):
            row, other = (
                {k: v for k, v in row.items() if not settings.get("refreshes") or _TIED not in k} for row in rows
            )
            assert row == pytest.approx(other, rel=few * 1e-5, abs=few * 1e-7), name
        assert (shared["budget"] < alone["budget"]) == ("out_of_memory" in settings)
        assert shared["stored"].keys() == alone["stored"].keys()
        for key, value in alone["stored"].items():
            torch.testing.assert_close(shared["stored"][key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_two_ranks_are_one(tmp_path):
    """A stored reference with pairs, with mismatched rows (KTO), and with a whole step and a state (beta-DPO)."""
    cases = [(name, {"live": False, "num_steps": 1}) for name in ("dpo", "kto", "beta_dpo")]
    assert_equal_in_ranks(cases, 2, tmp_path)


@pytest.mark.slow
def test_two_ranks_are_one_on_a_packed_base_whole_and_with_a_full_store(tiny_model_folder, tmp_path):
    """A LoRA on NF4, full fine-tuning, and the values of the reference all stored before."""
    step = {"live": False, "num_steps": 1}
    packed = partial(packed_policy, tiny_model_folder)
    cases = [("dpo", step | {"make": packed, "few_digits": True}), ("dpo", step | {"make": whole_policy})]
    cases += [("dpo", step | {"folder": "stored"})] * 2
    assert_equal_in_ranks(cases, 2, tmp_path)


@pytest.mark.slow
def test_four_ranks_are_one(tmp_path):
    """More ranks than held-out groups: some have nothing to do."""
    assert_equal_in_ranks([("dpo", {"live": False})], 4, tmp_path)


@pytest.mark.slow
def test_all_ranks_go_on_with_less_where_one_lacks_memory(tmp_path):
    """Rank 0 or the other: the step starts again, and nothing of the first try is left."""
    cases = [(name, {"live": False, "out_of_memory": rank}) for name, rank in (("dpo", 1), ("kto", 0))]
    assert_equal_in_ranks(cases, 2, tmp_path)


@pytest.mark.matrix
def test_three_ranks_are_one(tmp_path):
    """Every kind of loss; fewer held-out groups than ranks; a reference that follows the policy."""
    names = ["dpo", "orpo", "kto", "bco", "sampo", "aot", "aot_unpaired", "tdpo1", "plackett_luce", *STATEFUL, "mpo"]
    cases = [(name, {"live": name in ("tdpo1", "sampo")}) for name in dict.fromkeys(names)]
    cases += [("dpo", {"live": live, "num_steps": 3, "refreshes": (1, 2)}) for live in (False, True)]
    assert_equal_in_ranks(cases, 3, tmp_path)
