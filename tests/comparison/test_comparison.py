"""Comparisons of folders made by hand: what they say is known beforehand."""

import csv
import json

import pytest

from alignment import report
from alignment.comparison import write_comparison
from alignment.comparison.answers import questions
from alignment.comparison.curves import curves
from alignment.comparison.measures import WIN_RATE
from alignment.comparison.members import read_member, run_folders, variants
from alignment.comparison.ranking import compare, interval
from alignment.comparison.sentences import headline
from alignment.comparison.tables import differences, held_out_pairs, member_table, results, settings_and_data
from alignment.errors import UserError
from alignment.evaluation.intervals import tango_interval
from tests.helpers.run_folders import compared, make_run, right, row_of


def test_variants_are_told_apart_by_what_differs(sweep):
    found = compare([read_member(folder, folder.name) for folder in run_folders([sweep])])
    assert found.differing_settings == ["loss.beta"], "a setting that only one loss has, or a seed, is no difference"
    labels = ["DPO, beta 0.1", "DPO, beta 0.5", "SimPO, beta 2", "SimPO, beta 8"]
    assert [variant.label for variant in found.variants] == labels
    assert [variant.seeds for variant in found.variants] == [[0, 1]] * 4
    assert [member.name for member in found.members] == [f"{i}-made" for i in range(8)]


def test_means_intervals_and_ranks(sweep):
    found = compared(*run_folders([sweep]))
    assert found.rank_by.name == "reward accuracy"
    best = row_of(results(found), "DPO, beta 0.1")
    # (16 + 18) / 2 of 20: Wilson at 0.85, n = 20 (two seeds ask the same 20) is 0.6396 to 0.9476.
    assert best["reward accuracy (n\u00a020)"] == "85.0%\n(64.0 to 94.8)\nseeds 80.0, 90.0"
    assert best["rank"] == "1"
    pairs = row_of(held_out_pairs(found), "DPO, beta 0.1")
    assert pairs["margin, nats"] == "8.5\nseeds 8, 9"
    assert pairs["drift of chosen, nats"] == "-0.5\nseeds alike"
    # Seed 0: 16, 15, 12, 11; seed 1: 18, 13, 11, 10. So DPO with 0.5 is 3rd, then 4th.
    ranked = {row[0]: row_of(results(found), row[0])["rank by seed"] for row in results(found).rows}
    assert ranked == {
        "DPO, beta 0.1": "1\nseeds alike",
        "SimPO, beta 2": "2\nseeds alike",
        "DPO, beta 0.5": "3.5\nseeds 3, 4",
        "SimPO, beta 8": "3.5\nseeds 4, 3",
    }


def test_the_best_of_each_loss_are_compared_by_pairs(sweep):
    """By pair, means over seeds: DPO 16 ones and 2 halves, SimPO 13 and 2. Better on 13 < i <= 18: 5, worse on none."""
    found = compared(*run_folders([sweep]))
    [contrast] = found.contrasts
    difference = contrast.difference
    assert contrast.other.label == "SimPO, beta 2"
    assert (difference.better, difference.worse, difference.count) == (5, 0, 20)
    assert difference.value == pytest.approx(0.85 - 0.70)
    assert contrast.p == pytest.approx(2 / 32)
    said = headline(found)
    assert "DPO, beta 0.1 is first of 4 variants with 85.0% (64.0% to 94.8%) on 20 held-out pairs" in said[0]
    assert "There is no clear winner" in said[1], "5 of 5 are not enough: p is 0.0625"
    assert "15.0 points behind" in said[2] and "within noise" in said[2]
    rows = differences(found).rows
    assert [row[0] for row in rows] == ["DPO, beta 0.1", "SimPO, beta 2"], "the best of each loss, the first on top"
    assert rows[1][3:] == ["within noise", "5 to 0\nof 20", "0.062", "about 77 pairs\n10 seeds"]


def test_without_pairs_the_difference_is_of_two_shares(tmp_path):
    a = make_run(tmp_path / "a", right=right(56, 70), keep_pairs=False)
    b = make_run(tmp_path / "b", settings={"beta": 0.5}, right=right(48, 80), keep_pairs=False)
    [contrast] = compared(a, b).contrasts
    assert contrast.p is None
    assert (contrast.difference.low, contrast.difference.high) == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_the_csv_has_plain_numbers(sweep):
    page = write_comparison([sweep], sweep)
    rows = list(csv.DictReader((sweep / "comparison.csv").read_text().splitlines()))
    assert [row["member"] for row in rows] == [f"{i}-made" for i in range(8)]
    first = rows[0]
    assert (first["loss"], first["loss.beta"], first["seed"], first["n_pairs"]) == ("dpo", "0.1", "0", "20")
    assert float(first["reward accuracy"]) == 0.8
    assert float(first["reward accuracy low"]) == pytest.approx(0.5840, abs=5e-5)  # Wilson, 16 of 20
    assert first["win rate"] == ""
    assert page.parent == sweep
    assert sorted(path.name for path in sweep.glob("comparison*")) == [
        "comparison.csv",
        "comparison.html",
        "comparison.md",
    ]


def test_the_same_files_give_the_same_page(sweep):
    first = write_comparison([sweep], sweep).read_bytes()
    assert write_comparison([sweep], sweep).read_bytes() == first
    assert b"http-equiv" in first
    assert b"src=" not in first.split(b"<script>")[0], "nothing is loaded"


def test_members_that_failed_or_were_cut_off_are_named(tmp_path):
    make_run(tmp_path / "0-a")
    cut = make_run(tmp_path / "1-b", settings={"beta": 0.5})
    (cut / "summary.json").unlink()
    (cut / ".hydra").mkdir()
    (cut / ".hydra" / "hydra.yaml").write_text("hydra: {runtime: {choices: {loss: dpo}}}")
    (tmp_path / "2-c").mkdir()
    (tmp_path / "2-c" / "failed.json").write_text(json.dumps({"error": "The data are gone."}))
    (tmp_path / "notes").mkdir()
    write_comparison([tmp_path], tmp_path)
    text = (tmp_path / "comparison.md").read_text()
    assert "1-b: summary.json is missing." in text
    assert "2-c: it failed: The data are gone." in text
    assert "is no run folder" not in text
    assert "| DPO, beta 0.5 | - |" in text, "a run without results keeps its place, and no rank"
    assert "notes" not in text


def test_texts_are_escaped_in_the_page(tmp_path):
    attack = '</script><script>alert(1)</script><img src=x onerror="alert(2)">'
    folder = make_run(tmp_path / "0-a", scores=[1.0] * 2, config={"model": {"name": attack}})
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row | {"final": attack}) + "\n" for row in rows))
    make_run(tmp_path / "1-b", config={"model": {"name": "other"}})
    page = write_comparison([tmp_path], tmp_path).read_text()
    assert "alert(1)" in page
    assert "<script>alert" not in page
    assert "<img" not in page
    assert "<img" not in (tmp_path / "comparison.md").read_text()
    figures = page.split('id="figures">')[1].split("</script>")[0]
    assert "alert(1)" in figures and "<" not in figures
    names = [trace["name"] for chart in curves(compared(*run_folders([tmp_path]))) for trace in chart.figure["data"]]
    assert names and not any("<" in name for name in names), "Plotly reads tags in its texts"


def test_settings_of_any_kind_tell_variants_apart(tmp_path):
    a = make_run(tmp_path / "a", config={"adapter": {"target_modules": ["q"], "rslora": True}})
    b = make_run(tmp_path / "b", config={"adapter": {"target_modules": ["q", "k"], "rslora": 1}})
    found = variants([read_member(folder, folder.name) for folder in (a, b)])
    assert [list(variant.settings) for variant in found] == [["adapter.rslora", "adapter.target_modules"]] * 2


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    a, b = make_run(tmp_path / "dpo" / "now"), make_run(tmp_path / "kto" / "now", "kto")
    report.main([str(a), str(b)])
    assert capsys.readouterr().out == f"{tmp_path / 'comparison.html'}\n"
    assert "| dpo/now | DPO |" in (tmp_path / "comparison.md").read_text()
    report.main([str(tmp_path / "kto")])
    assert (tmp_path / "kto" / "comparison.html").is_file()
    report.main([str(a)])
    assert (a / "report.md").is_file()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is no run folder and holds none"):
        write_comparison([tmp_path / "empty"], tmp_path / "empty")
    assert not list((tmp_path / "empty").iterdir())


def test_a_setting_that_varies_in_one_loss_alone_is_no_part_of_another_loss(tmp_path):
    settings = {"beta": 0.1, "label_smoothing": 0.0}
    a, b = make_run(tmp_path / "a", settings=settings), make_run(tmp_path / "b", settings=settings | {"beta": 0.5})
    c = make_run(tmp_path / "c", "kto", {"beta": 0.3})
    found = compared(a, b, c)
    assert [variant.label for variant in found.variants] == ["DPO, beta 0.1", "DPO, beta 0.5", "KTO"]
    facts = {row[0]: row[1] for row in settings_and_data(found).rows}
    assert facts["settings that all DPO runs share"] == "label_smoothing 0"
    assert facts["settings that all KTO runs share"] == "beta 0.3"
    assert facts["what differs between members"] == "loss.beta"


def test_answers_stand_side_by_side_to_the_prompts_that_most_members_answered(tmp_path):
    a = make_run(tmp_path / "a", scores=[1.0, 0.0, 1.0], seed=0)
    b = make_run(tmp_path / "b", "kto", {"beta": 0.1}, scores=[0.0, 1.0])
    asked = questions(compared(a, b)).shown
    assert [question.prompt for question in asked] == ["Question 0?", "Question 1?"]
    assert [answer.model for answer in asked[0].answers] == ["after SFT", "DPO, seed 0", "KTO, seed 0"], "SFT once"
    assert [answer.text for answer in asked[1].answers] == ["It is 1.", "1 from dpo", "1 from kto"]
    assert [answer.verdict.split(",")[0] for answer in asked[1].answers] == ["right", "wrong", "right"]


def test_what_the_best_answered_comes_first_and_equal_answers_of_the_others_once(tmp_path):
    """On prompt 2 the judge is not of one mind: it goes before the others. The others of a loss are folded below it."""
    scores = {"a": [1.0, 1.0, 1.0], "b": [1.0, 1.0, 0.0], "c": [1.0, 1.0, 0.0], "d": [1.0, 1.0, 1.0]}
    settings = {"a": {"beta": 0.1}, "b": {"beta": 0.5}, "c": {"beta": 0.5}, "d": {"tau": 0.1}}
    for name, given in scores.items():
        make_run(tmp_path / name, "ipo" if name == "d" else "dpo", settings[name], int(name == "c"), scores=given)
    found = compared(*(tmp_path / name for name in scores))
    asked = questions(found)
    assert [question.prompt for question in asked.shown] == ["Question 2?", "Question 0?", "Question 1?"]
    assert asked.note.startswith("3 of 3 prompts. On 1 of the 3 prompts the judge")
    first = asked.shown[0]
    assert [answer.model for answer in first.answers] == ["after SFT", "DPO, beta 0.1, seed 0", "IPO, seed 0"]
    [others] = first.others
    assert others.model == "DPO, beta 0.5, seed 0\nDPO, beta 0.5, seed 1"
    assert (others.text, others.verdict.split(",")[0]) == ("2 from dpo", "wrong")


def test_runs_without_a_preference_stage_are_listed_and_not_ranked(tmp_path):
    a = make_run(tmp_path / "a", summary={"stages": {"sft": {"steps": 8}}}, config={"loss": None})
    found = compared(a)
    assert found.variants == []
    assert headline(found) == ["No member has a result to rank by."]
    write_comparison([tmp_path], tmp_path)
    assert "| a | - |" in (tmp_path / "comparison.md").read_text()


def test_members_of_a_sweep_are_in_the_order_of_their_numbers(tmp_path):
    for name in ("10-a", "2-a", "last"):
        make_run(tmp_path / name)
    assert [folder.name for folder in run_folders([tmp_path])] == ["2-a", "10-a", "last"]


def test_of_several_seeds_the_ties_are_their_mean(tmp_path):
    a = make_run(tmp_path / "a", scores=[1.0] * 8 + [0.5] * 32)
    b = make_run(tmp_path / "b", seed=1, scores=[1.0] * 12 + [0.5] * 20 + [0.0] * 8)
    [variant] = compared(a, b).variants
    assert interval(WIN_RATE, variant) == tango_interval((24 + 22) / 80, (32 + 20) / 80, 40)


def test_equal_ones_are_in_the_order_of_reward_accuracy(tmp_path):
    a = make_run(tmp_path / "a", scores=[1.0, 0.0], right=right(10))
    b = make_run(tmp_path / "b", settings={"beta": 0.5}, scores=[0.0, 1.0], right=right(12))
    found = compared(a, b)
    assert [variant.label for variant in found.ranked] == ["DPO, beta 0.5", "DPO, beta 0.1"]
    assert [row[1] for row in results(found).rows] == ["1.5", "1.5"]


def test_members_that_trained_together_share_their_time_and_memory(tmp_path):
    a = make_run(tmp_path / "a", summary={"cohort": {"size": 2}})
    b = make_run(tmp_path / "b", settings={"beta": 0.5}, summary={"cohort": {"size": 2}})
    alone = make_run(tmp_path / "c", settings={"beta": 0.9})
    table = member_table(compared(a, b, alone))
    assert [row[-1] for row in table.rows] == ["2", "2", "1"]
    assert table.header[-1] == "trained together" and "the whole process" in table.note
    assert "trained together" not in member_table(compared(alone)).header
    write_comparison([tmp_path], tmp_path)
    rows = csv.DictReader((tmp_path / "comparison.csv").read_text().splitlines())
    assert [row["trained_together"] for row in rows] == ["2", "2", "1"]
