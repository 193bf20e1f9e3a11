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


@pytest.fixture(scope="module")
def sweep(tmp_path_factory, tiny_model_folder):
    project = write_project(tmp_path_factory.mktemp("project"), tiny_model_folder)
    cwd = tmp_path_factory.mktemp("cwd")
    ended = command(
        *("--config-dir", str(project), "-m", "recipe=tiny", "loss=dpo,simpo", "seed=0,1", "hydra.sweep.dir=sweep"),
        *("evaluation.judge=rules", "trainer.eval_every=4"),
        cwd=cwd,
        cache=tmp_path_factory.mktemp("cache"),
    )
    assert ended.code == 0, ended.err
    return cwd / "sweep"


def test_members_and_measures_are_those_of_the_runs(sweep):
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


def test_the_page_shows_what_the_models_said(sweep):
    page = write_comparison([sweep], sweep).read_text()
    first = next(iter(run_folders([sweep])))
    for line in (first / "samples.jsonl").read_text().splitlines():
        assert escape(json.loads(line)["prompt"]) in page
    rows = list(csv.DictReader((sweep / "comparison.csv").read_text().splitlines()))
    assert [row["loss"] for row in rows] == ["dpo", "dpo", "simpo", "simpo"]
    assert [row["seed"] for row in rows] == ["0", "1", "0", "1"]
    assert all(float(row["tokens_per_second"]) > 0 and row["status"] == "finished" for row in rows)
