"""Sweeps: numbers by hand, what is refused, and all sides on a tiny model, which train the same members."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from alignment.config.compose import compose_node, to_run_config
from alignment.config.members import sweep_members
from alignment.config.registry import register
from tests.bench import against_trl, preparation, sweeps, tables, trl_side
from tests.bench.job import Case, Preparation
from tests.bench.slices import Spent
from tests.bench.sweeps import (
    COHORT,
    COHORT_CHECKPOINTED,
    MULTIRUN,
    ONE_CHECKPOINTED,
    TRL,
    Ended,
)
from tests.helpers.commands import command

GIB = 2**30


def ended(side, seconds, peak, last, betas=("0.1", "0.5")):
    spent = Spent(seconds, 2 * seconds, seconds / 2, peak * GIB)
    return Ended(side, spent, {beta: [math.log(2), last] for beta in betas}, None)


@pytest.fixture
def found():
    return [
        ended(ONE_CHECKPOINTED, 5, 2, 0.5, betas=("0.1",)),
        ended(COHORT_CHECKPOINTED, 8, 3, 0.5),
        ended(TRL, 60, 8, 0.5, betas=("0.1",)),
        ended(MULTIRUN, 25, 2, 0.5 + 2**-12),
        ended(TRL, 40, 10, 0.5, betas=("0.5",)),
        ended(COHORT, 20, 4, 0.5 + 2**-12 + 2**-20),
    ]


@pytest.fixture
def summary(found):
    return sweeps.summarise(found, "exact", on_gpu=False)


def test_numbers_of_a_sweep(summary):
    """By hand: seconds of TRL's runs add up, the largest of their peaks counts."""
    assert summary["betas"] == [0.1, 0.5]
    assert {name: (row["seconds"], row["peak_gib"]) for name, row in summary["rows"].items()} == {
        TRL: (100, 10),
        MULTIRUN: (25, 2),
        COHORT: (20, 4),
        ONE_CHECKPOINTED: (5, 2),
        COHORT_CHECKPOINTED: (8, 3),
    }
    trl = summary["rows"][TRL]
    assert (trl["seconds_per_member"], trl["user_seconds"], trl["kernel_seconds"]) == (50, 200, 50)
    ratios = {name: (r["times_faster"], r["memory"], r["loss_difference"]) for name, r in summary["ratios"].items()}
    assert ratios == {
        f"{MULTIRUN} : {TRL}": (4, 0.2, 2**-12),
        f"{COHORT} : {TRL}": (5, 0.4, 2**-12 + 2**-20),
        f"{COHORT} : {MULTIRUN}": (1.25, 2, 2**-20),
        f"{COHORT_CHECKPOINTED} : {ONE_CHECKPOINTED}": (5 / 8, 1.5, 0),
    }


def test_goals_of_a_sweep(found, summary):
    assert [(g["quantity"], g["goal"], g["met"]) for g in summary["goals"]] == [
        ("times_faster", 3.5, True),
        ("times_faster", 1.0, True),
        ("loss_difference", 1e-4, True),
        ("memory", 1.3, False),
    ]
    slower = [replace(e, spent=replace(e.spent, seconds=30)) if e.side in (MULTIRUN, COHORT) else e for e in found]
    assert [g["met"] for g in sweeps.summarise(slower, "exact", on_gpu=False)["goals"]] == [False, True, True, False]
    assert [g["met"] for g in sweeps.summarise(found, "exact", on_gpu=True)["goals"]] == [True, False, True, False]
    rounded = [replace(e, losses={b: [math.log(2), 0.502] for b in e.losses}) if e.side == COHORT else e for e in found]
    with pytest.raises(AssertionError, match=r"differ by up to 0\.0020"):
        sweeps.summarise(rounded, "exact", on_gpu=False)
    assert [g["met"] for g in sweeps.summarise(rounded, "rounded", on_gpu=True)["goals"]] == [True, False, True, False]


def test_a_quick_sweep_has_no_memory_goal(found):
    summary = sweeps.summarise(found[2:6], "exact", on_gpu=False)
    assert {goal["quantity"] for goal in summary["goals"]} == {"times_faster", "loss_difference"}
    assert len(summary["ratios"]) == 3


def test_a_side_without_a_member_is_refused(found):
    found[5] = ended(COHORT, 20, 4, 0.5, betas=("0.1",))
    with pytest.raises(AssertionError, match=r"ours, cohort has trained beta 0\.1 and not 0\.1, 0\.5"):
        sweeps.summarise(found, "exact", on_gpu=False)


@pytest.fixture
def whole(summary):
    """A sweep as it is written."""
    return summary | {
        "date": "2026-11-23",
        "machine": {"cpu": "CPU", "cores": 2, "gpu": None, "system": "Linux", "device": "cpu", "threads": 2},
        "versions": {"torch": "1", "transformers": "2", "peft": "3", "trl": "4"},
        "model": "tiny",
        "source": "somewhere",
        "steps": 6,
        "pairs_per_step": 4,
        "minutes": 3.0,
        "quick": False,
    }


def test_tables_of_a_sweep(whole):
    text = tables.sweep_markdown(whole)
    assert "| ours, multirun | 25.0 | 12.5 | 50.0 | 12.5 | 2.00 |" in text
    assert "| ours, multirun against TRL, a run each | 4.00x | 4.00x | 0.20x | 2.4e-04 |" in text
    assert (
        "| sweep | ours, cohort, against ours, multirun: largest difference between losses | at most 1.0e-04 |" in text
    )
    assert "| ours, cohort, checkpointed, against ours, one run, checkpointed: of its memory | at most 1.30 |" in text


def test_the_pages_show_the_newest_sweep_beside_the_rows(whole, tmp_path):
    for folder, changed in (("2026-11-23-cpu", {}), ("2026-11-24-cpu-quick", {"model": "quickly", "quick": True})):
        path = tmp_path / "results" / folder / "sweep.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(whole | changed))
    said = "4.0 times faster as a multirun, 5.0 times faster as a cohort"
    assert said in tables.readme_block(tmp_path / "results")
    block = tables.speed_block(tmp_path / "results", tmp_path / "speed.md")
    assert "| TRL, a run each | 100 |  | 10.0 GiB |" in block
    assert "| ours, cohort | 20 | 5.0 | 4.0 GiB |" in block
    assert ", checkpointed" not in block and "quickly" not in block
    assert "(results/2026-11-23-cpu/sweep.md)" in block


@pytest.fixture
def sweep(tiny_model_folder, tmp_path):
    """Two members, two steps, at a learning rate that moves the loss at once."""
    case = Case(name="sweep", source=against_trl.BUNDLED, steps=2, pairs_per_step=4, warm_up=0)
    wanted = Preparation(folder=str(tmp_path), model=str(tiny_model_folder), random_qwen3=None, cases=(case,))
    return sweeps.Sweep(case, preparation.prepare(wanted), (0.1, 0.5), 3e-2, None, tmp_path)


@pytest.mark.matrix
def test_our_command_and_trl_train_the_same_members(sweep, tmp_path, monkeypatch):
    """Ours in a process of its own, TRL in this one. The files of a cohort are those of a multirun."""

    def run_sides(sides, seconds):
        for side in sides:
            for number, (_, _, module, *arguments) in enumerate(c.words for c in side.commands):
                if side.name == MULTIRUN:
                    ran = command(*arguments, cwd=tmp_path, cache=tmp_path / "cache")
                    assert ran.code == 0, ran.err
                elif side.name == TRL:
                    assert module == trl_side.__name__
                    monkeypatch.setattr(sys, "argv", [module, *arguments])
                    trl_side.main()
                else:
                    continue
                yield side.name, number, Spent(1.0, 1.0, 1.0, GIB)

    monkeypatch.setattr(sweeps, "run_sides", run_sides)
    kept = []
    found = sweeps.measure(sweep, quick=False, keep=lambda ended: kept.append(len(ended)))
    assert kept == [1, 2, 3] and [e.side for e in found] == [TRL, TRL, MULTIRUN]
    ours = found[2].losses
    assert [found[0].losses, found[1].losses] == [
        {beta: pytest.approx(ours[beta], abs=1e-4)} for beta in ("0.1", "0.5")
    ]
    assert len(ours["0.1"]) == 2 and abs(ours["0.1"][1] - math.log(2)) > 1e-2 < abs(ours["0.1"][1] - ours["0.5"][1])
    assert (tmp_path / "trl-1" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_sides_differ_in_nothing_but_how_they_run(sweep, monkeypatch):
    """By the configurations of their members."""
    configs, slices = {}, {}

    def run_sides(sides, seconds):
        for side in sides:
            slices[side.name] = (seconds, side.share)
            if side.name != TRL:
                [(_, _, _, multirun, _, folder, *overrides)] = (c.words for c in side.commands)
                assert multirun == "-m"
                register(Path(folder))
                configs[side.name] = [to_run_config(compose_node(member)) for member in sweep_members(overrides)]
        yield from ()

    monkeypatch.setattr(sweeps, "run_sides", run_sides)
    sweeps.measure(sweep, quick=False, keep=lambda ended: None)
    assert slices == {
        ONE_CHECKPOINTED: (math.inf, 1),
        COHORT_CHECKPOINTED: (math.inf, 1),
        TRL: (sweeps.SECONDS, 2),
        MULTIRUN: (sweeps.SECONDS, 1),
        COHORT: (sweeps.SECONDS, 1),
    }
    assert {side: [config.loss.beta for config in members] for side, members in configs.items()} == {
        ONE_CHECKPOINTED: [0.1],
        COHORT_CHECKPOINTED: [0.1, 0.5],
        MULTIRUN: [0.1, 0.5],
        COHORT: [0.1, 0.5],
    }
    loops = {side: members[0].trainer for side, members in configs.items()}
    assert replace(loops[MULTIRUN], cohort=2) == loops[COHORT]
    assert (loops[COHORT].checkpoint_every, loops[COHORT].groups_per_step) == (0, 4)
    one, cohort = loops[ONE_CHECKPOINTED], loops[COHORT_CHECKPOINTED]
    assert (one.cohort, cohort.cohort, cohort.checkpoint_every, cohort.groups_per_step) == (1, 2, 1, 4)
    assert replace(one, cohort=2) == cohort
    assert one.tokens_per_batch == 2 * max(map(sum, sweep._prepared["lengths"]["sweep"]))
    stores = {config.reference.path for members in configs.values() for config in members}
    assert len(stores) == 4 and not any(Path(store).exists() for store in stores)
