"""Held-out answers judged at the end of a run: what stands in the summary and in the samples."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
import torch

from alignment.config.judging import Judge
from alignment.config.schema import EvaluationConfig
from alignment.data.rows.row import Row
from alignment.errors import UserError
from alignment.evaluation.intervals import tango_interval
from alignment.runs.record import RunRecord
from alignment.stages.judging import AnswersJudge
from tests.helpers.commands import command, write_project
from tests.helpers.judges import KEY, llm_settings, said, serving, shown

CPU = torch.device("cpu")
CONFIG = EvaluationConfig(
    prompts=2, every=None, every_prompts=32, kl_prompts=0, max_new_tokens=4, temperature=0.0, batch_size=2,
    judge=Judge.rules, reward_model=None, human_labels=None, llm=llm_settings(),
)  # fmt: skip
ROWS = [
    Row("Capital of France?", ("Paris.", "Rome."), meta={"answer": ["Paris"], "kind": "capitals"}, source="f:1"),
    Row("Is ice cold?", ("Yes.", "No."), meta={"answer": "yes"}, source="f:2"),
]
ANSWERS = {"start": ["Rome.", "Yes."], "sft": ["Great question! Paris.", "No."], "final": ["Paris.", "Yes."]}


def judged(config, folder, rows=ROWS, answers=ANSWERS):
    """The part of the summary, and the samples."""
    found = AnswersJudge(config, rows, folder / "cache", CPU)(answers, RunRecord(folder))
    return found, [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def won(*numbers):
    return dict(zip(("wins", "ties", "losses", "rate", "low", "high"), numbers, strict=True))


def test_the_rules_say_what_they_said_before_there_were_other_judges(tmp_path):
    """Every number and every key of summary and samples, beside the card."""
    found, samples = judged(CONFIG, tmp_path)
    card = found.pop("judge")
    assert found == {
        "prompts": 2,
        "answers": {
            "start": {"n": 2, "words": 1.0, "judge_score": 0.5, "correct": 0.5, "direct": 1.0},
            "sft": {"n": 2, "words": 2.0, "judge_score": 0.35, "correct": 0.5, "direct": 0.5},
            "final": {"n": 2, "words": 1.0, "judge_score": 1.0, "correct": 1.0, "direct": 1.0},
        },
        "win_rate": {
            "final_vs_start": won(1, 1, 0, 0.75, *tango_interval(0.75, 0.5, 2)),
            "final_vs_sft": won(2, 0, 0, 1.0, *tango_interval(1.0, 0.0, 2)),
        },
    }  # fmt: skip
    right = {"score": 1.0, "correct": True, "direct": True, "words": 1}
    assert samples[0] == {
        "prompt": "Capital of France?", "start": "Rome.", "sft": "Great question! Paris.", "final": "Paris.",
        "kind": "capitals",
        "verdicts": {
            "start": right | {"score": 0.0, "correct": False, "reasons": ["no accepted answer"]},
            "sft": {
                "score": 0.7, "correct": True, "direct": False, "words": 3,
                "reasons": ["says paris", "chatter: great question"],
            },
            "final": right | {"reasons": ["says paris"]},
        },
        "winner": "final",
    }  # fmt: skip
    assert list(samples[0]) == ["prompt", "start", "sft", "final", "kind", "verdicts", "winner"]
    assert samples[1]["winner"] == "tie" and "kind" not in samples[1]
    assert (card["kind"], card["unreadable"], card["verdicts"], card["pairs"]) == ("rules", 0, 6, 4)


def test_without_a_judge_answers_are_written_and_measured(tmp_path):
    """Nothing of verdicts anywhere."""
    found, samples = judged(replace(CONFIG, judge=Judge.none), tmp_path)
    assert found == {"prompts": 2, "answers": {n: {"n": 2, "words": found["answers"][n]["words"]} for n in ANSWERS}}
    assert list(samples[1]) == ["prompt", "start", "sft", "final"]


def test_a_judge_that_compares_leaves_preferences(tmp_path, monkeypatch):
    """The final answers against those of each other moment; and a second run asks for nothing."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def prefers_paris(body):
        first, second = (text.rstrip(".").endswith("Paris") for text in shown(body)[1:])
        return said("[[A]]" if first > second else "[[B]]" if second > first else "[[C]]")

    with serving(prefers_paris) as server:
        config = replace(CONFIG, judge=Judge.llm, llm=llm_settings(server.address))
        found, samples = judged(config, tmp_path)
        asked = len(server.bodies)
        again, _ = judged(config, tmp_path)
        assert asked == 6 and len(server.bodies) == 6, "two equal answers tie unasked"
    assert (found["win_rate"]["final_vs_start"]["wins"], found["win_rate"]["final_vs_sft"]["ties"]) == (1, 2)
    assert found["win_rate"] == again["win_rate"] and "judge_score" not in found["answers"]["final"]
    assert samples[0]["preferences"]["start"]["outcome"] == 1 and samples[0]["winner"] == "final"
    assert "the final answer is better" in (tmp_path / "samples.md").read_text()
    assert found["judge"]["usage"]["calls"] == 6 and again["judge"]["usage"]["calls"] == 0
    assert found["judge"]["identity"] == again["judge"]["identity"] and found["judge"]["consistent"] == 1.0
    assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("change", "said_"),
    [
        ({"judge": Judge.rules}, r"f:2 has none; add it or set evaluation.judge=none"),
        ({"judge": Judge.ifeval}, "cannot judge f:1: it needs a list `instruction_id_list`"),
        ({"judge": Judge.llm, "llm": llm_settings("http://host/v1")}, "OPENAI_API_KEY names an environment variable"),
        (
            {"judge": Judge.llm, "llm": llm_settings("http://host/v1", auth_env=None), "human_labels": "/no/x"},
            "cannot be",
        ),
    ],
)
def test_what_cannot_be_judged_is_refused_before_the_run(change, said_, tmp_path, monkeypatch):
    """In one sentence that names what is missing."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(UserError, match=said_):
        AnswersJudge(replace(CONFIG, **change), [ROWS[0], Row("q", ("a", "b"), source="f:2")], tmp_path, CPU)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"judge": Judge.llm}, "evaluation.judge=llm needs evaluation.llm.address"),
        ({"judge": Judge.reward_model}, "evaluation.judge=reward_model needs evaluation.reward_model"),
        ({"human_labels": "x.jsonl"}, "evaluation.judge=rules has nothing to say of these pairs"),
    ],
)
def test_settings_without_what_they_need_are_refused(change, words):
    """When they are composed."""
    with pytest.raises(UserError, match=words):
        replace(CONFIG, **change)


def plant_key() -> None:
    os.environ["OPENAI_API_KEY"] = KEY


@pytest.mark.slow
def test_a_whole_run_is_judged_once(tiny_model_folder, tmp_path):
    """Its report has the judge's card; the same run again asks for no verdict; the key is in no file of either."""
    project = write_project(tmp_path / "project", tiny_model_folder)
    cases = []
    with serving(lambda body: said(f"So it is.\n[[{'A' if shown(body)[1] > shown(body)[2] else 'B'}]]")) as server:
        for number in (1, 2):
            ended = command(
                *("--config-dir", str(project), "recipe=tiny", "sft=none", "trainer.max_steps=3", "optim.lr=0.1"),
                *("evaluation.prompts=4", "evaluation.kl_prompts=0", "evaluation.judge=llm", "evaluation.llm.model=j"),
                *(f"evaluation.llm.address={server.address}", f"hydra.run.dir=run_{number}"),
                cwd=tmp_path,
                cache=tmp_path / "cache",
                patch=plant_key,
            )
            assert ended.code == 0, ended.err
            evaluation = json.loads((tmp_path / f"run_{number}" / "summary.json").read_text())["evaluation"]
            cases.append((evaluation["win_rate"], evaluation["judge"], len(server.bodies)))
    (first, card, asked), (second, again, still) = cases
    assert first == second and asked == still == card["usage"]["calls"] > 0 == again["usage"]["calls"]
    assert again["usage"]["stored"] == asked and card["consistent"] == 1.0
    report = (tmp_path / "run_1" / "report.md").read_text()
    assert "## The judge" in report and f"{asked} calls, 0 replies from the store" in report
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
