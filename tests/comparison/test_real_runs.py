"""A comparison of runs that really ran."""

import csv
import json
from html import escape

import pytest

from alignment.comparison import write_comparison
from alignment.comparison.measures import ACCURACY, WIN_RATE, kl_measure
from alignment.comparison.members import Variant, read_member, run_folders
from alignment.comparison.ranking import compare, interval
from tests.helpers.commands import command, write_project

pytestmark = pytest.mark.slow


@pytest.mark.matrix
def test_members_measures_and_the_page_are_those_of_the_runs(tmp_path, tiny_model_folder):
    ended = command(
        *("--config-dir", str(write_project(tmp_path / "project", tiny_model_folder)), "-m", "recipe=tiny"),
        *("loss=dpo,simpo", "seed=0,1", "hydra.sweep.dir=sweep", "evaluation.judge=rules", "sft.seed=0"),
        *("sft.trainer.epochs=1", "trainer.max_steps=2", "trainer.eval_every=1", "trainer.save_every=0"),
        cwd=tmp_path,
        cache=tmp_path / "cache",
    )
    assert ended.code == 0, ended.err
    sweep = tmp_path / "sweep"
    members = [read_member(folder, folder.name) for folder in run_folders([sweep])]
    found = compare(members)
    assert [variant.label for variant in found.variants] == ["DPO", "SimPO"]
    assert [variant.seeds for variant in found.variants] == [[0, 1], [0, 1]]
    assert not any(member.run.problems for member in members)
    for member in members:
        summary = member.run.summary
        assert len(member.pairs) == summary["data"]["preference"]["eval"] == 4
        for measure in (ACCURACY, WIN_RATE):
            items = measure.items(member)
            assert len(items) == measure.count(member)
            assert sum(items.values()) / len(items) == pytest.approx(measure.value(member))
        won = summary["evaluation"]["win_rate"]["final_vs_sft"]
        assert WIN_RATE.value(member) == won["rate"]
        assert interval(WIN_RATE, Variant(member.loss, {}, [member])) == (won["low"], won["high"])
    assert set(ACCURACY.items(members[0])) == set(ACCURACY.items(members[-1])), "pairs have the same key in every run"
    assert kl_measure(members) is not None

    # The page shows what the models said.
    page = write_comparison([sweep], sweep).read_text()
    first = next(iter(run_folders([sweep])))
    for line in (first / "samples.jsonl").read_text().splitlines():
        assert escape(json.loads(line)["prompt"]) in page
    rows = list(csv.DictReader((sweep / "comparison.csv").read_text().splitlines()))
    assert [row["loss"] for row in rows] == ["dpo", "dpo", "simpo", "simpo"]
    assert [row["seed"] for row in rows] == ["0", "1", "0", "1"]
    assert all(float(row["tokens_per_second"]) > 0 and row["status"] == "finished" for row in rows)
