"""The comparison itself on a tiny model: all runs train along one trajectory, and the tables hold the right numbers."""

import json
import math
from dataclasses import replace

import pytest

from alignment.config import AdapterConfig, Device
from alignment.policy import attach_adapter, load_base, resolve_device
from tests.bench import against_trl, one_run
from tests.bench.job import RUNS, Job
from tests.conftest import random_groups


@pytest.fixture
def job(tiny_model_folder, tmp_path):
    """The same four pairs of random tokens in two steps, at a learning rate that moves the loss at once."""
    source = str(tiny_model_folder)
    adapter = AdapterConfig(r=4, alpha=8, dropout=0.0, target_modules=["all-linear"], init="default", rslora=False)
    model = load_base(one_run.model_config(source), None, source, resolve_device(Device.auto))
    attach_adapter(model, adapter, seed=0).save_pretrained(str(tmp_path / "adapter"))
    pairs = [[ids.tolist() for ids in (group.prompt, *group.completions)] for group in random_groups(4)] * 2
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    return Job(
        run="",
        model=source,
        adapter=str(tmp_path / "adapter"),
        pairs=str(tmp_path / "pairs.json"),
        cache=str(tmp_path),
        lr=3e-2,
        tokens_per_batch=64,
    )


def test_all_runs_follow_one_trajectory(job):
    results = {run: one_run.run(replace(job, run=run)) for run in RUNS}
    losses = {run: result["losses"] for run, result in results.items()}
    assert against_trl.check_losses(losses) < 1e-4
    assert abs(losses["ours_cold"][1] - math.log(2)) > 1e-2  # the second loss depends on the first update
    assert [results[run]["stored"] for run in ("ours_cold", "ours_warm")] == [0, 8]
    assert [result["reference_seconds"]["wall"] > 0 for result in results.values()] == [True, False, False, True]
    assert all(len(result["seconds"]["wall"]) == 2 for result in results.values())


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ({"ours_cold": [0.6931, 0.65], "trl_default": [0.6951, 0.65]}, "trl_default starts"),
        ({"ours_cold": [0.6931, 0.65], "trl_default": [0.6931, 0.68]}, "differ by up to 0.03"),
    ],
)
def test_runs_that_compute_different_things_are_refused(losses, said):
    with pytest.raises(AssertionError, match=said):
        against_trl.check_losses(losses)


def test_numbers_of_the_table():
    """By hand: the warm-up step is left out, a cold run pays its reference for all pairs, tokens are not padding."""

    def result(wall, reference, peak):
        times = {"wall": wall, "user": wall, "system": [0.0] * 4}
        return {
            "losses": [math.log(2)] * 4,
            "seconds": times,
            "reference_seconds": {"wall": reference, "user": reference / 2, "system": 0.0},
            "setup_seconds": 1.0,
            "peak_bytes": peak * 2**20,
        }

    results = {
        "ours_cold": result([100.0, 4.0, 8.0, 12.0], 16.0, 300),
        "ours_warm": result([100.0, 4.0, 8.0, 12.0], 0.5, 300),
        "trl_default": result([100.0, 16.0, 32.0, 48.0], 0.0, 600),
        "trl_precomputed": result([100.0, 8.0, 16.0, 24.0], 32.0, 400),
    }
    lengths = [[1000, 1000, 1000]] * 4 + [[10, 20, 40]] * 12
    summary = against_trl.summarise(results, lengths)
    assert summary["tokens_per_pair"] == 80
    assert {name: row["seconds_per_pair"] for name, row in summary["rows"].items()} == {
        "ours, cold": 3.0,
        "ours, warm": 2.0,
        "TRL, default": 8.0,
        "TRL, precomputed, cold": 6.0,
        "TRL, precomputed, warm": 4.0,
    }
    cold = summary["rows"]["ours, cold"]
    assert (cold["reference_seconds_per_pair"], cold["user_seconds_per_pair"], cold["peak_mib"]) == (1.0, 2.5, 300)
    assert cold["tokens_per_second"] == pytest.approx(80 / 3)
    found = {name: (r["seconds_per_pair"], r["peak_mib"]) for name, r in summary["ratios"].items()}
    assert found == {
        "ours, cold / TRL, default": (0.375, 0.5),
        "ours, cold / TRL, precomputed, cold": (0.5, 0.75),
        "ours, warm / TRL, default": (0.25, 0.5),
        "ours, warm / TRL, precomputed, warm": (0.5, 0.75),
    }
