"""Finished runs are evaluated by the command: who meets whom, what it costs a second time, and what it refuses."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from alignment.assessment.entrants import Entrants
from alignment.assessment.page import questions, to_html, win_rate_tables
from alignment.assessment.tasks import _identities
from alignment.assessment.win_rates import Judged
from alignment.comparison.between import read_between
from alignment.comparison.members import read_member
from alignment.errors import UserError
from alignment.evaluate import main
from alignment.evaluate import run as evaluate
from alignment.evaluation.judges.card import LongerJudge
from alignment.evaluation.judges.human_labels import HumanLabels
from alignment.evaluation.sampling.local import LocalEngine
from alignment.stages.finished import OpenedPolicy
from tests.helpers.commands import command, write_lines, write_project
from tests.helpers.judges import KEY, said, serving, shown
from tests.helpers.runs import same_code


@pytest.fixture(scope="module")
def sweep(tmp_path_factory, tiny_model_folder):
    """Two runs of other seeds, which share their SFT stage, with answers by the rules; and the configuration folder."""
    root = tmp_path_factory.mktemp("evaluated")
    config = write_project(root / "project", tiny_model_folder)
    members = ["seed=0,1", "sft.seed=0", "evaluation.judge=rules", "evaluation.prompts=4", "hydra.sweep.dir=runs"]
    ended = command(
        "--config-dir", str(config), "-m", "recipe=tiny", *members, cwd=root, cache=root / "cache", patch=same_code
    )
    assert ended.code == 0, ended.err
    return config, root / "runs", root / "cache"


class Asked:
    """The command on the two runs; `drawn` counts the answers that a model was asked for."""

    def __init__(self, sweep, out: Path) -> None:
        self.config, self.runs, _ = sweep
        self.out = out
        self.drawn = 0

    def __call__(self, *words, folders=("0-tiny", "1-tiny")):
        folders = [str(self.runs / folder) for folder in folders]
        page, _ = evaluate([*folders, *words, f"out={self.out}", "--config-dir", str(self.config)])
        assert page == self.out / "evaluation.html" and page.is_file()
        return json.loads((self.out / "evaluation.json").read_text())


@pytest.fixture
def asked(sweep, tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGNMENT_CACHE", str(sweep[2]))
    found, own = Asked(sweep, tmp_path / "out"), LocalEngine.draw

    def counted(self, wanted, how):
        found.drawn += sum(len(indices) for _, indices in wanted)
        return own(self, wanted, how)

    monkeypatch.setattr(LocalEngine, "draw", counted)
    return found


def summary(runs: Path, run: str) -> dict:
    return json.loads((runs / run / "summary.json").read_text())


# Runs


@pytest.mark.slow
def test_a_run_evaluated_as_it_was_tells_what_its_report_tells(asked):
    """No model is loaded: answers, scores and win rates are those of the run."""
    found = asked(folders=["0-tiny"])["win_rate"]
    told = summary(asked.runs, "0-tiny")["evaluation"]
    [match] = found["matches"]
    wanted = told["win_rate"]["final_vs_sft"]
    assert {key: match[key] for key in wanted} == wanted
    assert match["second"] == "after SFT"
    for row, name in zip(found["policies"], ("final", "sft"), strict=True):
        assert row["words"] == told["answers"][name]["words"] and row["correct"] == told["answers"][name]["correct"]
    assert found["judge"]["identity"] == told["judge"]["identity"]
    assert asked.drawn == 0


@pytest.mark.slow
def test_the_second_time_costs_no_token_and_no_judgement(asked, monkeypatch):
    """Several drawn answers to each prompt, of both runs and of what both have begun with, judged in both orders."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving(lambda body: said(f"[[{'AB'[len(shown(body)[1]) < len(shown(body)[2])]}]]")) as server:
        words = ("judge=llm", f"evaluation.llm.address={server.address}", "evaluation.llm.model=judge-1")
        words = (*words, "answers=3", "evaluation.temperature=1")
        first = asked(*words)
        drawn, calls = asked.drawn, len(server.bodies)
        again = asked(*words)
        assert len(server.bodies) == calls and asked.drawn == drawn == 3 * 4 * 3
    assert again["win_rate"]["matches"] == first["win_rate"]["matches"]
    one, two = first["win_rate"]["matches"]
    assert (one["first"], two["first"]) == ("0-tiny", "1-tiny") and one["second"] == two["second"] == "after SFT"
    assert one["wins"] + one["ties"] + one["losses"] == 12
    assert first["per_prompt"] == 3 and all("strength" in row for row in first["win_rate"]["policies"])
    assert KEY not in (asked.out / "evaluation.json").read_text()


@pytest.mark.slow
def test_a_judge_that_always_says_a_gives_ties_alone(asked, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving(lambda body: said("[[A]]")) as server:
        found = asked(
            "judge=llm", f"evaluation.llm.address={server.address}", "evaluation.llm.model=judge-a", "against=start"
        )["win_rate"]
    for match in found["matches"]:
        assert (match["wins"], match["ties"], match["losses"]) == (0, 4, 0) and match["rate"] == 0.5
        assert match["length_controlled"]["rate"] == pytest.approx(0.5)
    assert found["judge"]["consistent"] == 0.0 and found["judge"]["first"] == 1.0


@pytest.mark.slow
def test_opponents(asked, sweep, tiny_model_folder):
    """The base in its folder gives the answers of the run before training; runs meet each other."""
    runs = sweep[1]
    base = asked(f"against={tiny_model_folder}", folders=["0-tiny"])["win_rate"]
    start = asked("against=start", folders=["0-tiny"])["win_rate"]
    told = [{k: v for k, v in found["matches"][0].items() if k != "second"} for found in (base, start)]
    assert told[0] == told[1] and base["matches"][0]["second"] == str(tiny_model_folder)

    [match] = asked("against=all")["win_rate"]["matches"]
    between = read_between(asked.out, [read_member(runs / name, name) for name in ("0-tiny", "1-tiny")])
    [shares] = between.shares.values()
    assert list(between.shares) == [("0-tiny", "1-tiny")], "a comparison of the runs knows their policies"
    assert sum(shares.values()) / len(shares) == pytest.approx(match["rate"]) and between.card["kind"] == "rules"
    there = asked(f"against={runs / '1-tiny'}", folders=["0-tiny"])["win_rate"]["matches"][0]
    back = asked(f"against={runs / '0-tiny'}", folders=["1-tiny"])["win_rate"]["matches"][0]
    assert (match["first"], match["second"]) == ("0-tiny", "1-tiny")
    assert there["rate"] == match["rate"] == 1 - back["rate"]
    assert there["length_controlled"]["rate"] == pytest.approx(1 - back["length_controlled"]["rate"])


@pytest.mark.slow
def test_what_cannot_be_evaluated(asked, sweep, tmp_path, capsys):
    config, runs, _ = sweep
    one = runs / "0-tiny"
    unfinished, other = tmp_path / "unfinished", tmp_path / "other"
    for copy in (unfinished, other):
        shutil.copytree(one, copy)
    (unfinished / "summary.json").unlink()
    saved = yaml.safe_load((other / "config.yaml").read_text())
    held_out = tmp_path / "held_out.jsonl"
    lines = Path(saved["data"]["eval_source"]).read_text().splitlines()
    held_out.write_text("\n".join([lines[0].replace("Add", "Sum"), *lines[1:]]) + "\n")
    saved["data"]["eval_source"] = str(held_out)
    (other / "config.yaml").write_text(yaml.safe_dump(saved))
    changed = tmp_path / "changed"
    shutil.copytree(other, changed)
    for words, told in (
        ([unfinished], "unfinished cannot be evaluated, because it is not finished"),
        ([tmp_path / "nowhere"], "is no run folder and holds none"),
        ([one, "judge=none"], "needs a judge, and the run had none"),
        ([one, "judge=ruels"], r"evaluation\.judge"),
        ([one, "judges=rules"], r"no setting judges \(did you mean judge\?\)"),
        ([one, "evaluation.prompt=3"], "evaluation.prompt"),
        ([one, "answers=0"], "answers must be an integer from 1"),
        ([one, "answers=2"], "answers=2 needs evaluation.temperature above 0"),
        ([one, "tasks=winrate"], r"no task winrate \(did you mean win_rate\?\)"),
        ([one, "tasks="], "names no task"),
        ([one, "against=all"], "there is only one"),
        ([one, f"against={tmp_path / 'nowhere'}"], "does not exist"),
        ([one, "judge=llm"], "needs evaluation.llm.address"),
        ([one, "judge=ifeval"], "instruction_id_list"),
        ([one, other], r"other has other held-out prompts than .*0-tiny \(1 of its 4"),
        ([changed], "has answered other held-out prompts than its data have now"),
        (["judge=rules"], "Name at least one folder"),
    ):
        out = tmp_path / "nothing"
        with pytest.raises(UserError, match=told):
            evaluate([*map(str, words), f"out={out}", "--config-dir", str(config)])
        assert not out.exists()
    with pytest.raises(SystemExit, match="Error: There is no setting judges"):
        main([str(one), "judges=rules"])


# Without runs


class Written:
    """Questions whose answers are written down."""

    def __init__(self, texts):
        self.texts = texts
        self.rows = [SimpleNamespace(meta={}, source="made")] * len(texts)


def field(*answers, matches, runs=1, names=None):
    asked = Written([f"Question {n}?" for n in range(len(answers[0]))])
    names = names or [f"policy {n}" for n in range(len(answers))]
    policies = [OpenedPolicy(name, asked) for name in names]
    each = [[[one] if isinstance(one, str) else list(one) for one in several] for several in answers]
    return Entrants(policies, each, matches, runs)


def test_the_text_of_models_and_users_is_escaped():
    bad = "<script>alert(1)</script>"
    entrants = field([bad, "b"], ["a", "bb"], matches=[(0, 1)], names=[bad, "other"])
    judged = Judged(entrants, LongerJudge())
    page = to_html(bad, win_rate_tables(judged.found(None)), [bad], *questions(entrants, judged))
    assert "<script" not in page and page.count("&lt;script&gt;") >= 5


def test_more_answers_to_a_prompt_do_not_narrow_the_interval():
    """Six copies of each answer are the same prompts."""
    long, short = ["a long answer"] * 6 + ["no"] * 4, ["short"] * 10
    once = Judged(field(long, short, matches=[(0, 1)]), LongerJudge()).found(None)["matches"][0]
    copied = Judged(
        field([[one] * 6 for one in long], [[one] * 6 for one in short], matches=[(0, 1)]), LongerJudge()
    ).found(None)["matches"][0]
    assert copied["rate"] == once["rate"] == 0.6 and copied["wins"] == 36
    assert copied["high"] - copied["low"] >= once["high"] - once["low"]


def test_labels_of_the_pairs_themselves_mend_the_win_rate(tmp_path):
    """The judge of length has 0.8; people, who labelled every second pair, in any order, say that it is 0.4."""
    ours = [f"{n} a long answer" if n % 5 else "no" for n in range(40)]
    theirs = [f"{n}" + "!" * 5 for n in range(40)]
    entrants = field(ours, theirs, matches=[(0, 1)])
    rows = []
    for n in range(0, 40, 2):
        pair, label = (
            ([ours[n], theirs[n]], 1 if n % 10 < 4 else 2) if n % 4 else ([theirs[n], ours[n]], 2 if n % 10 < 4 else 1)
        )
        rows.append({"prompt": f"Question {n}?", "answers": pair, "label": label})
    write_lines(tmp_path / "labels.jsonl", rows)
    judged = Judged(entrants, LongerJudge())
    match = judged.found(HumanLabels(tmp_path / "labels.jsonl"))["matches"][0]
    assert match["rate"] == 0.8
    assert match["humans"]["labelled"] == 20 and match["humans"]["items"] == 40
    assert match["humans"]["mean"] == pytest.approx(0.4, abs=0.03)
    assert match["humans"]["low"] < 0.4 < match["humans"]["high"] < 0.8
    # of other pairs: they tell of the judge alone
    write_lines(tmp_path / "other.jsonl", [row | {"prompt": "Another?"} for row in rows])
    found = judged.found(HumanLabels(tmp_path / "other.jsonl"))
    assert "humans" not in found["matches"][0] and found["judge"]["humans"]["judge"]["n"] == 20


def test_the_judges_that_a_summary_names():
    card = {"identity": "a" * 64}
    assert _identities({"evaluation": {"judge": card}, "data": {"preference": {"train": 3}}}) == set()
    assert _identities({"stages": {"preference": {"rounds": {"judge": card}}}}) == {"a" * 64}
