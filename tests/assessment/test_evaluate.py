"""Finished runs are evaluated by the command: who meets whom, what it costs a second time, and what it refuses."""

import importlib.util
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from alignment.assessment import win_rates
from alignment.assessment.entrants import Entrants
from alignment.assessment.page import questions, to_html, win_rate_tables
from alignment.assessment.win_rates import Judged, _cautions
from alignment.comparison.between import read_between
from alignment.comparison.members import read_member
from alignment.comparison.other_tasks import other_tasks
from alignment.config.judging import Judge as JudgeName
from alignment.errors import UserError
from alignment.evaluate import main
from alignment.evaluate import run as evaluate
from alignment.evaluation.judges.card import LongerJudge
from alignment.evaluation.judges.human_labels import HumanLabels
from alignment.evaluation.judges.rules import RuleJudge
from alignment.evaluation.sampling.local import LocalEngine
from alignment.scoring.layout import FlatLayout
from alignment.scoring.logps import score_groups
from alignment.stages.finished import open_run
from alignment.types import Group
from tests.helpers.commands import command, write_lines, write_project
from tests.helpers.judges import KEY, said, serving, shown
from tests.helpers.runs import same_code


@pytest.fixture(scope="module")
def sweep(tmp_path_factory, tiny_model_folder):
    """Two runs of other seeds, which share their SFT stage, with answers by the rules; and the configuration folder."""
    root = tmp_path_factory.mktemp("evaluated")
    config = write_project(root / "project", tiny_model_folder)
    members = [
        "seed=0,1",
        "sft.seed=0",
        "sft.data.eval_size=2",
        "evaluation.judge=rules",
        "evaluation.prompts=4",
        "hydra.sweep.dir=runs",
    ]
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
    assert all("strength" in row for row in first["win_rate"]["policies"])
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
def test_what_cannot_be_evaluated(asked, sweep, tmp_path, tiny_model_folder, monkeypatch):
    config, runs, _ = sweep
    no_prompt, no_json = tmp_path / "no_prompt.jsonl", tmp_path / "no_json.jsonl"
    write_lines(no_prompt, [{"prompt": "Which?"}, {"text": "Which?"}])
    no_json.write_text("Which?\n")
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
        ([one, "export=alpaca"], r"export=alpaca \(did you mean alpaca_eval\?\): accepted are alpaca_eval, arena"),
        ([one, "tasks=ifeval"], "cannot check .*, nor any other prompt: it needs a list `instruction_id_list`"),
        ([one, f"questions={tmp_path / 'none.jsonl'}"], "none.jsonl cannot be read: No such file"),
        ([one, f"questions={no_prompt}"], r"no_prompt.jsonl:2 has no prompt"),
        ([one, f"questions={no_json}"], "holds no JSON Lines"),
        ([one, f"against={tiny_model_folder}", "tasks=implicit", f"questions={no_json}"], "holds no JSON Lines"),
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
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="tasks=lm_eval:piqa needs the package lm-eval, which is not installed"):
        evaluate([str(one), "tasks=lm_eval:piqa", "--config-dir", str(config)])
    with pytest.raises(SystemExit, match="Error: There is no setting judges"):
        main([str(one), "judges=rules"])


# Other tasks


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_drawn(tmp_path, monkeypatch):
    """The runs, which are not even there, are not looked at."""
    (tmp_path / "file").touch()
    for out in ("file", "file/below"):
        with pytest.raises(UserError, match=r"^out=.*file.* cannot be written: .*/file is a file"):
            evaluate([str(tmp_path / "run"), f"out={tmp_path / out}"])
    monkeypatch.setattr("alignment.assessment.tasks.os.access", lambda *_: False)
    with pytest.raises(UserError, match="you have no right to write into"):
        evaluate([str(tmp_path / "run"), f"out={tmp_path / 'new'}"])


def test_the_implicit_reward_ranks_held_out_pairs_as_the_runs_have_written(asked, sweep, tmp_path):
    found = asked("tasks=implicit")["implicit"]["policies"]
    for row in found:
        metrics = summary(asked.runs, row["name"])["stages"]["preference"]["metrics"]
        assert row["sum"]["share"] == metrics["eval/nats/accuracies"] and row["sum"]["n"] == 4
        assert row["mean"]["share"] == metrics["eval/nats_per_token/accuracies"]
        assert row["sum"]["low"] < row["sum"]["share"] and row["sum"]["high"] <= 1
    assert asked.drawn == 0

    other = tmp_path / "other"
    shutil.copytree(sweep[1] / "0-tiny", other)
    rows = [json.loads(line) for line in (other / "held_out.jsonl").read_text().splitlines()]
    write_lines(other / "held_out.jsonl", [row | {"key": row["key"][::-1]} for row in rows])
    with pytest.raises(UserError, match="other has other held-out pairs than"):
        asked("tasks=implicit", folders=["0-tiny", str(other)])
    write_lines(other / "held_out.jsonl", [{k: v for k, v in row.items() if "nats" not in k} for row in rows])
    with pytest.raises(UserError, match="no log-ratios of held-out pairs to a reference"):
        asked("tasks=implicit", folders=[str(other)])


@pytest.mark.slow
def test_the_perplexity_of_held_out_sft_text(asked):
    """After SFT it is the evaluation's of that stage; a run against itself has forgotten nothing."""
    found = asked("tasks=perplexity", folders=["0-tiny"])["perplexity"]
    final, sft = found["policies"]
    told = summary(asked.runs, "0-tiny")["stages"]["sft"]["metrics"]["eval/loss"]
    assert sft["name"] == "after SFT" and sft["nats_per_token"] == pytest.approx(told, rel=1e-4)
    assert sft["perplexity"] == pytest.approx(math.exp(told), rel=1e-3)
    [match] = found["matches"]
    assert match["more"] == pytest.approx(final["nats_per_token"] - sft["nats_per_token"])
    assert match["low"] <= match["more"] <= match["high"] and match["more"] != 0
    assert found["conversations"] == 2
    itself = asked("tasks=perplexity", f"against={asked.runs / '0-tiny'}", folders=["0-tiny"])["perplexity"]
    assert itself["matches"][0]["more"] == 0


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="NO lm-eval: no task of it was done")
def test_a_task_of_lm_eval(asked, tmp_path):
    """Its log-likelihoods are those of the policy: the accuracy is that of the answers' own log-probs."""
    data = tmp_path / "mine.jsonl"
    rows = [{"q": "Add 1 and 7", "choices": ["8.", "9."], "gold": 0}, {"q": "Or", "choices": ["8.", "9."], "gold": 1}]
    write_lines(data, rows)
    task = {
        "task": "mine", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "choices",
        "doc_to_target": "gold", "metric_list": [{"metric": "acc"}], "metadata": {"version": 1},
    }  # fmt: skip
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(task))
    name = f"lm_eval:{tmp_path / 'mine.yaml'}"
    found = asked(f"tasks={name}", folders=["0-tiny"])[name]["policies"]
    assert [row["name"] for row in found] == ["0-tiny", "after SFT"]
    policy = open_run(asked.runs / "0-tiny", "0-tiny", [])
    model, tokenizer = policy.load().eval(), policy.questions.tokenizer
    right = 0.0
    for row in rows:
        ids = [
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (row["q"], *(f" {c}" for c in row["choices"]))
        ]
        prompt, *choices = (np.array(tokens, dtype=np.int32) for tokens in ids)
        [(_, logps)] = score_groups(model, [Group(prompt, tuple(choices))], FlatLayout(), 4096, policy.questions.device)
        right += int(logps.sums().argmax()) == row["gold"]
    assert found[0]["results"]["mine"]["acc,none"] == right / 2
    with pytest.raises(UserError, match="lm-eval knows no task nosuchtask"):
        asked("tasks=lm_eval:nosuchtask", folders=["0-tiny"])


@pytest.mark.slow
def test_questions_of_a_file(asked, tmp_path):
    """Prompts of IFEval: what can be checked is, over prompts and over instructions; and both forms of export."""
    ask = [
        {"prompt": "Say nothing with a comma.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
        {
            "prompt": "Say a million words, in quotation marks.",
            "instruction_id_list": ["length_constraints:number_words", "startend:quotation"],
            "kwargs": [{"relation": "at least", "num_words": 1_000_000}, {}],
        },
        {
            "prompt": "In English.",
            "instruction_id_list": ["language:response_language"],
            "kwargs": [{"language": "en"}],
        },
    ]
    write_lines(tmp_path / "ifeval.jsonl", ask)
    tasks = asked(f"questions={tmp_path / 'ifeval.jsonl'}", "tasks=ifeval", "export=alpaca_eval,arena")
    found = tasks["ifeval"]
    assert (found["prompts"], found["left_out"]) == (2, 1) and len(found["policies"]) == 3
    assert asked.drawn == 3 * 3
    exported = json.loads((asked.out / "alpaca_eval" / "0-0-tiny.json").read_text())
    assert [row["instruction"] for row in exported] == [row["prompt"] for row in ask]
    assert {row["generator"] for row in exported} == {"0-tiny"}
    texts = [row["output"] for row in exported]
    for row in found["policies"][:1]:
        right = [bool(texts[0]) and "," not in texts[0], texts[1][:1] == texts[1][-1:] == '"' and len(texts[1]) > 1]
        assert row["prompts"]["share"] == right[0] / 2 and row["prompts"]["n"] == 2
        assert row["instructions"]["share"] == pytest.approx(sum(right) / 3) and row["instructions"]["n"] == 3
    members = [read_member(asked.runs / name, name) for name in ("0-tiny", "1-tiny")]
    table = other_tasks(asked.out, members, {member.name: member.name for member in members})
    assert [row[0] for row in table.rows] == ["0-tiny", "1-tiny"] and "IFEval, prompts followed" in table.header
    arena = [json.loads(line) for line in (asked.out / "arena" / "2-after_SFT.jsonl").read_text().splitlines()]
    assert [row["messages"][0]["content"] for row in arena] == [row["prompt"] for row in ask]
    assert len({row["uid"] for row in arena}) == 3 and {row["model"] for row in arena} == {"after SFT"}


# Without runs


class Written:
    """Questions whose answers are written down."""

    def __init__(self, texts):
        self.texts = texts
        self.rows = [SimpleNamespace(meta={}, source="made")] * len(texts)


def field(*answers, matches, runs=1, names=None):
    asked = Written([f"Question {n}?" for n in range(len(answers[0]))])
    names = names or [f"policy {n}" for n in range(len(answers))]
    each = [[[one] if isinstance(one, str) else list(one) for one in several] for several in answers]
    policies = [
        SimpleNamespace(name=name, questions=asked, identity=None, run=None, answers=lambda count, own=own: own)
        for name, own in zip(names, each, strict=True)
    ]
    return Entrants(policies, matches, runs, len(each[0][0]))


def test_the_text_of_models_and_users_is_escaped():
    bad = "<script>alert(1)</script>"
    entrants = field([bad, "b"], ["a", "bb"], matches=[(0, 1)], names=[bad, "other"])
    judged = Judged(entrants, LongerJudge())
    page = to_html(
        bad, win_rate_tables(judged.found(None)), [bad], *questions(entrants, judged.preferences, judged.scores)
    )
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


@pytest.mark.parametrize(
    ("moment", "kind", "judged", "told"),
    [
        ("final", "reward_model", True, 1),
        ("sft", "reward_model", True, 0),
        ("final", "llm", True, 0),
        ("final", "reward_model", False, 0),
        ("final", "rules", True, 0),
    ],
)
def test_the_judge_that_made_the_training_data_is_told(tmp_path, moment, kind, judged, told, monkeypatch):
    """But for one that looks answers up."""
    entrants = field(["a b", "c"], ["a", "c d"], matches=[(0, 1)], names=["rounds", "sft"])
    entrants.policies[0].run, entrants.policies[0].moment = "a run", moment
    asked = entrants.policies[0].questions
    asked.cache, asked.device = tmp_path, "cpu"
    onpolicy = SimpleNamespace(judge=JudgeName[kind], pairs=SimpleNamespace(is_judged=judged))
    asked.config = SimpleNamespace(onpolicy=onpolicy)
    asked.rows = [SimpleNamespace(meta={"answer": "a"}, source="made")] * 2
    judge = RuleJudge()
    if kind != "rules":
        monkeypatch.setattr(RuleJudge, "kind", "reward_model")
        monkeypatch.setattr(win_rates, "make_judge", lambda config, cache, device: RuleJudge())
    found = [line for line in _cautions(entrants, judge, Judged(entrants, judge).found(None)) if "training" in line]
    assert bool(found) == told
    if told:
        assert "made the training data of rounds: a policy learns what its judge likes" in found[0]
