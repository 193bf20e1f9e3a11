"""A run on mixtures, killed and resumed: its record, summary and report know every source."""

import json
import re
from functools import partial

import pytest

from tests.helpers.chat_templates import LLAMA3
from tests.helpers.commands import pair, write_lines, write_project
from tests.helpers.runs import assert_whole, at_row, metric_rows, only_run, run, summary

pytestmark = pytest.mark.matrix


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_model_folder):
    return write_project(tmp_path_factory.mktemp("project"), tiny_model_folder)


def written(source: dict) -> str:
    """A source as it is typed."""
    return f"{{{', '.join(f'{key}: {value!r}' for key, value in source.items())}}}"


def test_a_run_on_mixtures(project, tmp_path):
    """Both stages draw from two sources; after a kill the same rows go on."""
    data = project.parent / "data"
    write_lines(data / "other.jsonl", [pair(number) for number in range(40, 52)])
    sums = {"source": f"{data}/pairs.jsonl", "eval_source": f"{data}/held_out.jsonl", "weight": 2}
    template = tmp_path / "llama.jinja"
    template.write_text(LLAMA3.removeprefix("<s>"))
    other = {"source": f"{data}/other.jsonl", "eval_size": 3, "weight": 1, "chat_template": str(template)}
    talk = {"source": f"{data}/sft.jsonl", "eval_size": 2, "count": 4}
    mixed = (
        *("data.source=null", "data.eval_source=null", "sft.data.source=null"),
        f"data.sources={{sums: {written(sums)}, other: {written(other)}}}",
        f"sft.data.sources={{talk: {written(talk)}, sums: {written(sums)}}}",
    )
    killed = run(project, tmp_path, "recipe=tiny", *mixed, patch=partial(at_row, "preference", 6))
    assert killed.code == -9, killed.err
    folder = only_run(tmp_path)
    template.unlink()  # the run has its copy

    ended = run(project, tmp_path, "recipe=tiny", "resume=true")
    assert ended.code == 0, ended.err
    assert_whole(folder)

    # The record
    rows = [row for row in metric_rows(folder) if row["split"] == "eval"]
    for row in rows:
        names = ("talk", "sums") if row["stage"] == "sft" else ("sums", "other")
        counts = {"talk": 2, "sums": 4, "other": 3}
        whole = sum(row[f"{name}/loss"] * counts[name] for name in names) / sum(counts[name] for name in names)
        assert row["loss"] == pytest.approx(whole, rel=1e-6)
    assert {"sums/rewards/margins", "other/nats/accuracies"} <= rows[-1].keys()
    held_out = [json.loads(line) for line in (folder / "held_out.jsonl").read_text().splitlines()]
    assert [row["dataset"] for row in held_out if row["moment"] == "final"] == ["sums"] * 4 + ["other"] * 3

    # The summary and the report
    found = summary(folder)
    assert {name: facts["train"] for name, facts in found["data"]["preference"]["sources"].items()} == {
        "sums": 10,
        "other": 5,
    }
    assert found["stages"]["sft"]["metrics"].keys() == {"train/loss", "eval/loss", "eval/talk/loss", "eval/sums/loss"}
    final = found["stages"]["preference"]["metrics"]
    assert final["eval/other/loss"] == rows[-1]["other/loss"]
    report = (folder / "report.md").read_text()
    assert "a mixture of sums, other" in report
    assert re.search(r"\| other \| 9 \| 5 \| 33\.3 ?% \| 3 \|", report), report
