"""Comparisons of folders made by hand: what they say is known beforehand."""

import csv
import json
import shutil

import pytest

from alignment import report
from alignment.comparison import write_comparison
from alignment.comparison.answers import questions
from alignment.comparison.charts import curves, frontiers, legend, lengths, overviews, sensitivity
from alignment.comparison.measures import KLS, WIN_RATE, kl_measure
from alignment.comparison.members import read_member, run_folders, variants
from alignment.comparison.ranking import compare, interval
from alignment.comparison.sentences import cautions, headline, judge_contrast
from alignment.comparison.tables import differences, held_out_pairs, member_table, results, settings_and_data
from alignment.errors import UserError
from alignment.evaluation.intervals import tango_interval
from alignment.runs.style import COLOURS
from tests.helpers.run_folders import change_json, make_run


def right(count, of=20):
    return [i < count for i in range(of)]


def compared(*folders):
    return compare([read_member(folder, folder.name) for folder in folders])


def row_of(table, first):
    [row] = [row for row in table.rows if row[0] == first]
    return dict(zip(table.header, row, strict=True))


@pytest.fixture
def sweep(tmp_path):
    """Two losses, two settings each, two seeds; reward accuracy alone."""
    number = 0
    for loss, settings, counts in (
        ("dpo", {"beta": 0.1}, (16, 18)),
        ("dpo", {"beta": 0.5}, (12, 10)),
        ("simpo", {"beta": 2.0, "gamma_beta_ratio": 0.5}, (15, 13)),
        ("simpo", {"beta": 8.0, "gamma_beta_ratio": 0.5}, (11, 11)),
    ):
        for seed, count in enumerate(counts):
            make_run(tmp_path / "sweep" / f"{number}-made", loss, settings, seed, right=right(count))
            number += 1
    return tmp_path / "sweep"


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
    assert "None of these can be called the winner" in said[1], "5 of 5 are not enough: p is 0.0625"
    assert "15.0 points behind" in said[2] and "within noise" in said[2]
    rows = differences(found).rows
    assert [row[0] for row in rows] == ["DPO, beta 0.1", "SimPO, beta 2"], "the best of each loss, the first on top"
    assert rows[1][3:] == ["within noise", "5 to 0\nof 20", "0.062"]


def test_one_loss_compares_its_settings_and_says_noise(tmp_path):
    a = make_run(tmp_path / "a", settings={"beta": 0.1}, right=right(11))
    b = make_run(tmp_path / "b", settings={"beta": 0.5}, right=right(10))
    said = " ".join(headline(compared(a, b)))
    assert "DPO, beta 0.5 is 5.0 points behind" in said
    assert "within noise" in said
    assert "None of these can be called the winner" in said


def test_who_compares_with_several_needs_more_to_be_sure(tmp_path):
    """Better on 8 of 40 and worse on 1: p is 2 (1 + 9) / 2^9 = 0.039, and after Holm twice that with two others."""
    best = right(30, 40)
    other = [wins and i >= 8 for i, wins in enumerate(best[:-1])] + [True]
    folders = [make_run(tmp_path / "a", right=best), make_run(tmp_path / "b", settings={"beta": 0.5}, right=other)]
    [alone] = compared(*folders).contrasts
    assert (alone.difference.better, alone.difference.worse) == (8, 1)
    assert judge_contrast(alone) == "more than noise" and alone.p == pytest.approx(20 / 512)
    found = compared(*folders, make_run(tmp_path / "c", settings={"beta": 0.9}, right=other))
    assert [contrast.p for contrast in found.contrasts] == [pytest.approx(40 / 512)] * 2
    assert all(judge_contrast(contrast).startswith("not certain") for contrast in found.contrasts)
    assert headline(found)[1] == "It is not clearly ahead of any of the other settings."


def test_without_pairs_the_difference_is_of_two_shares(tmp_path):
    a = make_run(tmp_path / "a", right=right(56, 70), keep_pairs=False)
    b = make_run(tmp_path / "b", settings={"beta": 0.5}, right=right(48, 80), keep_pairs=False)
    [contrast] = compared(a, b).contrasts
    assert contrast.p is None
    assert (contrast.difference.low, contrast.difference.high) == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_a_win_rate_goes_before_accuracy_and_is_that_of_its_questions(tmp_path):
    before = [0.5] * 10
    a = make_run(tmp_path / "a", scores=[1.0] * 5 + [0.5] * 2 + [0.0] * 3, before=before, right=right(1))
    b = make_run(tmp_path / "b", settings={"beta": 0.5}, scores=[1.0] * 4 + [0.0] * 6, before=before, right=right(20))
    found = compared(a, b)
    assert found.rank_by is WIN_RATE
    assert found.ranked[0].label == "DPO, beta 0.1"
    for variant, rate in zip(found.ranked, (0.6, 0.4), strict=True):
        assert WIN_RATE.mean(variant) == pytest.approx(rate)
        items = WIN_RATE.by_item(variant)
        assert sum(items.values()) / len(items) == pytest.approx(rate)
    assert (found.contrasts[0].difference.better, found.contrasts[0].difference.worse) == (3, 0)
    said = " ".join(headline(found))
    assert "does not clearly beat the model it started from: better on 5 of 10 prompts, worse on 3" in said
    assert "By reward accuracy, DPO, beta 0.5 is first of 2 variants with 100.0%" in said
    assert said.endswith("It is ahead of the other settings by more than noise.")


@pytest.mark.parametrize(
    ("summary", "said"),
    [
        ({"data": {"preference": {"train": 100, "eval": 4, "fingerprint": "0" * 64}}}, "different preference data"),
        ({"data": {"preference": {"train": 100, "eval": 5, "fingerprint": "f" * 64}}}, "numbers of held-out pairs"),
        ({"reference": {"mode": "cache", "identity": "0" * 64}}, "started from different policies"),
        ({"reference": {"mode": "live", "identity": "a" * 64}}, "references of different kinds"),
        ({"git_commit": "0" * 40}, "different versions of the code"),
    ],
)
def test_members_that_cannot_be_compared_are_warned_of(tmp_path, summary, said):
    a = make_run(tmp_path / "a")
    same = make_run(tmp_path / "b", settings={"beta": 0.5})
    assert not any(said in kind for kind, _ in cautions(compared(a, same)))
    other = make_run(tmp_path / "c", settings={"beta": 0.9}, summary=summary)
    [details] = [details for kind, details in cautions(compared(a, same, other)) if said in kind]
    assert len(details) == 2
    assert "a, b" in details[0] and "c" in details[1]


def test_unequal_steps_and_falling_log_probs_are_warned_of(tmp_path):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", settings={"beta": 0.5}, steps=48)
    found = dict(cautions(compared(a, b)))
    assert found["Members trained for different numbers of steps"] == ["24: a", "48: b"]
    assert "One seed per variant: you cannot tell how much a result depends on the seed" in found
    text = (a / "metrics.jsonl").read_text()
    (a / "metrics.jsonl").write_text(text.replace('"logps/chosen": -40.5', '"logps/chosen": -47.5'))
    found = dict(cautions(compared(a, b)))
    [said] = found["The log-prob of chosen completions fell"]
    assert said.startswith("DPO, beta 0.1, seed 0: ") and "fell by 7.5 nats" in said


def test_each_seed_may_start_from_its_own_policy(tmp_path):
    a = make_run(tmp_path / "a", seed=0)
    b = make_run(tmp_path / "b", seed=1, summary={"reference": {"mode": "cache", "identity": "b" * 64}})
    kinds = [kind for kind, _ in cautions(compared(a, b))]
    assert any(kind.startswith("Each seed started from its own policy") for kind in kinds)
    assert not any("Members with the same seed" in kind for kind in kinds)


def test_the_distance_is_the_sampled_kl_only_where_all_have_it(tmp_path):
    a, b = make_run(tmp_path / "a", kl=3.0), make_run(tmp_path / "b", settings={"beta": 0.5})
    members = [read_member(folder, folder.name) for folder in (a, b)]
    assert kl_measure(members) is KLS[1]
    assert KLS[1].value(members[0]) == -3.0
    for folder, mean in ((a, 2.5), (b, 4.0)):
        change_json(folder / "summary.json", evaluation={"kl/sampled": {"n": 8, "mean": mean, "se": 0.1}})
        members = [read_member(each, each.name) for each in (a, b)]
        assert kl_measure(members) is (KLS[0] if folder == b else KLS[1])
    assert [KLS[0].value(member) for member in members] == [2.5, 4.0]
    [chart] = frontiers(compare(members))
    points = chart.figure["data"]
    assert [list(point["x"]) for point in points] == [[2.5], [4.0]]
    assert [list(point["error_x"]["array"]) for point in points] == [[pytest.approx(0.196)]] * 2


def test_charts_hold_the_values(sweep):
    found = compared(*run_folders([sweep]))
    margins = next(chart for chart in curves(found) if chart.name == "nats-margins")
    assert len(margins.figure["data"]) == 8
    assert margins.num_entries == 4, "seeds of a variant share an entry of the legend"
    assert [line["meta"] for line in margins.figure["data"]] == [0, 0, 1, 1, 2, 2, 3, 3], "places in the legend of all"
    assert [choice.label for choice in legend(found)] == [variant.label for variant in found.variants]
    assert list(margins.figure["data"][0]["y"]) == [0.0, 2.0, 4.0, 6.0, 8.0]
    dpo, simpo = sensitivity(found)
    assert [chart.title for chart in (dpo, simpo)] == ["DPO: beta", "SimPO: beta"]
    seeds, means = dpo.figure["data"]
    assert (list(seeds["x"]), list(seeds["y"])) == ([0.1, 0.1, 0.5, 0.5], [0.8, 0.9, 0.6, 0.5])
    assert (list(means["x"]), list(means["y"])) == ([0.1, 0.5], [pytest.approx(0.85), pytest.approx(0.55)])
    assert list(simpo.figure["data"][1]["y"]) == [pytest.approx(0.7), pytest.approx(0.55)]
    heights = [chart.figure["layout"]["yaxis"]["range"] for chart in (dpo, simpo)]
    assert heights[0] == heights[1], "so that losses can be laid beside each other"
    assert lengths(found) == [], "nothing was answered"
    assert dpo.figure["layout"]["xaxis"]["type"] == "log", "values that lie many times apart"
    bars = means["error_y"]  # Wilson at 0.85, n = 20: 0.6396 to 0.9476
    assert (bars["arrayminus"][0], bars["array"][0]) == (
        pytest.approx(0.85 - 0.6396, abs=5e-5),
        pytest.approx(0.9476 - 0.85, abs=5e-5),
    )


def test_a_row_for_every_variant_at_a_glance(sweep):
    [chart] = overviews(compared(*run_folders([sweep])))
    means = [trace for trace in chart.figure["data"] if "error_x" in trace]
    assert [trace["y"][0] for trace in means] == ["DPO, beta 0.1", "SimPO, beta 2", "DPO, beta 0.5", "SimPO, beta 8"]
    assert [round(trace["x"][0], 3) for trace in means] == [0.85, 0.7, 0.55, 0.55]
    bars = means[0]["error_x"]  # Wilson at 0.85, n = 20: 0.6396 to 0.9476
    assert (bars["arrayminus"][0], bars["array"][0]) == (
        pytest.approx(0.85 - 0.6396, abs=5e-5),
        pytest.approx(0.9476 - 0.85, abs=5e-5),
    )
    seeds = [trace for trace in chart.figure["data"] if "error_x" not in trace]
    assert [list(trace["x"]) for trace in seeds][:2] == [[0.8, 0.9], [0.75, 0.65]]


def luminance(colour):
    def linear(value):
        return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4

    red, green, blue = (linear(int(colour[i : i + 2], 16) / 255) for i in (1, 3, 5))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("page", ["#ffffff", "#14181d"])
def test_colours_can_be_seen_on_both_pages(page):
    for colour in COLOURS:
        light, dark = sorted((luminance(colour), luminance(page)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 3, colour


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


def test_the_command(tmp_path, capsys):
    a, b = make_run(tmp_path / "dpo" / "now"), make_run(tmp_path / "kto" / "now", "kto")
    assert report.main([str(a), str(b)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'comparison.html'}\n"
    assert "| dpo/now | DPO |" in (tmp_path / "comparison.md").read_text()
    assert report.main([str(tmp_path / "kto")]) == 0
    assert (tmp_path / "kto" / "comparison.html").is_file()
    assert report.main([str(a)]) == 0
    assert (a / "report.md").is_file()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is no run folder and holds none"):
        write_comparison([tmp_path / "empty"], tmp_path / "empty")
    assert not list((tmp_path / "empty").iterdir())


def test_a_shared_first_place_is_said_to_be_shared(tmp_path):
    a = make_run(tmp_path / "a", right=right(15))
    b = make_run(tmp_path / "b", settings={"beta": 0.5}, right=list(reversed(right(15))))
    found = compared(a, b)
    said = headline(found)
    assert "DPO, beta 0.1 and DPO, beta 0.5 share the first place of 2 variants with 75.0%" in said[0]
    assert any("level with DPO, beta 0.1" in line for line in said)
    assert (found.contrasts[0].difference.better, found.contrasts[0].difference.worse) == (5, 5)
    assert [row[1] for row in results(found).rows] == ["1.5", "1.5"]


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


def test_markdown_names_a_few_of_the_members_that_a_warning_is_about(tmp_path):
    for i in range(5):
        make_run(tmp_path / f"{i}-a", settings={"beta": 0.1 * (i + 1)}, steps=24 * (i + 1))
    write_comparison([tmp_path], tmp_path)
    [line] = [
        line for line in (tmp_path / "comparison.md").read_text().splitlines() if "different numbers of steps" in line
    ]
    assert line.endswith("24: 0-a; 48: 1-a; 72: 2-a; and 2 more.")
    assert "120: 4-a" in (tmp_path / "comparison.html").read_text()


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


def test_of_several_that_noise_parts_the_furthest_behind_is_told(tmp_path):
    folders = [
        make_run(tmp_path / str(wins), settings={"beta": beta}, right=right(wins))
        for beta, wins in ((0.1, 12), (0.5, 11), (0.9, 10))
    ]
    [told] = [line for line in headline(compared(*folders)) if "points behind" in line]
    assert told.startswith("Furthest behind: DPO, beta 0.9 is 10.0 points behind the first (95%")
    alike = [make_run(tmp_path / f"alike-{beta}", settings={"beta": beta}, right=right(12)) for beta in (0.1, 0.5, 0.9)]
    assert any(line.startswith("DPO, beta 0.5 is level with DPO, beta 0.1 ") for line in headline(compared(*alike)))


def test_what_seeds_do_is_said_beside_what_items_do(tmp_path):
    """Far apart in the mean, which is certain over items, whether or not the seeds overlap."""
    for name, counts, said in (
        ("apart", (20, 30), "more than noise."),
        ("across", (10, 100), "single seeds of the two"),
    ):
        folders = [make_run(tmp_path / name / f"a{i}", right=right(c, 100), seed=i) for i, c in enumerate((90, 100))]
        folders += [
            make_run(tmp_path / name / f"b{i}", settings={"beta": 0.5}, right=right(c, 100), seed=i)
            for i, c in enumerate(counts)
        ]
        assert said in headline(compared(*folders))[2]


def test_without_the_offline_metric_it_is_the_mean_of_both_sides(tmp_path):
    a = make_run(tmp_path / "a")
    metrics = {"eval/nats/chosen": -1.0, "eval/nats/rejected": -4.0}
    change_json(a / "summary.json", stages={"preference": {"loss": "dpo", "metrics": metrics}})
    member = read_member(a, "a")
    assert kl_measure([member]) is KLS[1]
    assert KLS[1].value(member) == -2.5


def test_members_of_a_sweep_are_in_the_order_of_their_numbers(tmp_path):
    for name in ("10-a", "2-a", "last"):
        make_run(tmp_path / name)
    assert [folder.name for folder in run_folders([tmp_path])] == ["2-a", "10-a", "last"]


def test_a_copy_of_a_run_is_no_second_seed(tmp_path):
    """The same configuration, seed and final policy, under another name; another policy of that seed counts."""
    a = make_run(tmp_path / "a", summary={"model": {"final_identity": "0" * 64}})
    shutil.copytree(a, tmp_path / "b")
    c = make_run(tmp_path / "c", summary={"model": {"final_identity": "1" * 64}})
    d = make_run(tmp_path / "d", settings={"beta": 0.5}, summary={"model": {"final_identity": "0" * 64}})
    e = make_run(tmp_path / "e", seed=1, summary={"model": {"final_identity": "0" * 64}})
    found = compared(a, tmp_path / "b", c, d, e)
    assert [member.name for member in found.members] == ["a", "c", "d", "e"]
    warned = dict(cautions(found))
    assert warned["Copies of a run are left out"] == ["b: the same run as a"]
    assert warned["Members with the same settings and seed ended with different policies; each counts"] == ["a, c"]


def test_one_variant_is_first_of_nothing(tmp_path):
    [said] = [line for line in headline(compared(make_run(tmp_path / "a"))) if "DPO" in line]
    assert "DPO is alone, with 75.0%" in said and "first" not in said


def test_many_that_are_level_are_counted_and_not_listed(tmp_path):
    folders = [make_run(tmp_path / str(i), settings={"beta": 0.1 * (i + 1)}, right=right(15)) for i in range(6)]
    said = headline(compared(*folders))
    assert "6 of 6 variants share the first place, with 75.0%" in said[0]
    assert not any("points behind" in line for line in said)


def test_what_is_ahead_of_some_alone_is_said_so(tmp_path):
    """Of 20 pairs DPO is better than KTO on 15 and than IPO on 1, and worse on none."""
    folders = [
        make_run(tmp_path / loss, loss, right=right(count)) for loss, count in (("dpo", 19), ("kto", 4), ("ipo", 18))
    ]
    said = headline(compared(*folders))
    assert said[1] == "It is ahead of KTO by more than noise, but not clearly ahead of IPO."
    more = [make_run(tmp_path / str(i), f"loss{i}", right=right(18)) for i in range(4)]
    assert headline(compared(*folders, *more))[1] == (
        "It is ahead of KTO by more than noise, but not clearly ahead of 5 others."
    )
    sure = headline(compared(*folders[:2]))
    assert sure[1] == "It is ahead of the other losses' best by more than noise."


def test_a_win_rate_with_many_ties_is_no_share_of_as_many_wins(tmp_path):
    """Better on 8 of 40 and worse on none is certain: p is 2 / 2^8. As 60% of 40 it is not: Wilson begins at 45%."""
    folder = make_run(tmp_path / "a", scores=[1.0] * 8 + [0.5] * 32)
    said = headline(compared(folder))
    assert "60.0% (54.7% to 67.4%)" in said[0]
    assert any(line.endswith("by more than noise: better on 8 of 40 prompts, worse on 0.") for line in said)
    (folder / "samples.jsonl").unlink()
    assert any(line.endswith("it started from by more than noise.") for line in headline(compared(folder)))
    summary = json.loads((folder / "summary.json").read_text())
    del summary["evaluation"]["win_rate"]["final_vs_sft"]["ties"]
    change_json(folder / "summary.json", evaluation=summary["evaluation"])
    said = headline(compared(folder))
    assert "60.0% (44.6% to 73.7%)" in said[0]
    assert any("does not clearly beat" in line for line in said)


def test_of_several_seeds_the_ties_are_their_mean(tmp_path):
    a = make_run(tmp_path / "a", scores=[1.0] * 8 + [0.5] * 32)
    b = make_run(tmp_path / "b", seed=1, scores=[1.0] * 12 + [0.5] * 20 + [0.0] * 8)
    [variant] = compared(a, b).variants
    assert interval(WIN_RATE, variant) == tango_interval((24 + 22) / 80, (32 + 20) / 80, 40)


def test_an_interval_and_a_test_that_disagree_are_both_said(tmp_path):
    """Better on 5 of 40 and worse on none: the interval leaves out 50%, the exact test has p = 2 / 2^5."""
    found = compared(make_run(tmp_path / "a", scores=[1.0] * 5 + [0.5] * 35))
    assert interval(WIN_RATE, found.ranked[0])[0] > 0.5
    assert headline(found)[-1] == (
        "It does not clearly beat the model it started from: better on 5 of 40 prompts, worse on 0; the interval "
        "excludes a draw, the exact test does not."
    )


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


def test_the_kl_has_its_interval(tmp_path):
    """Two seeds with errors of 0.1 and 0.3, which were asked the same: 3 with 1.96 times 0.2 to either side."""
    for seed, (mean, error) in enumerate(((2.0, 0.1), (4.0, 0.3))):
        folder = make_run(tmp_path / str(seed), seed=seed)
        change_json(folder / "summary.json", evaluation={"kl/sampled": {"n": 8, "mean": mean, "se": error}})
    found = compared(tmp_path / "0", tmp_path / "1")
    [row] = results(found).rows
    assert "3\n(2.61 to 3.39)\nseeds 2, 4" in row
    large = frontiers(found)[0].figure["data"][-1]
    assert list(large["x"]) == [3.0] and list(large["error_x"]["array"]) == [pytest.approx(0.392)]


def test_curves_are_of_training_where_the_held_out_pairs_were_looked_at_twice_only(tmp_path):
    folder = make_run(tmp_path / "a", steps=4)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    ends = [row for row in rows if row["step"] in (0, 4)]
    trained = [row | {"split": "train", "nats/margins": 100.0 + row["step"]} for row in rows]
    trained.append(trained[-1] | {"step": 5, "nats/margins": 105.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ends + trained))
    charts = {chart.name: chart for chart in curves(compared(folder))}
    trailing = [100.0, 100.5, 101.0, 101.5, 102.0, 103.0]  # means of up to the last five
    assert list(charts["nats-margins"].figure["data"][0]["y"]) == trailing
    assert "mean of the last 5 steps" in charts["nats-margins"].note


def test_a_chart_says_whose_line_is_not_in_it(tmp_path):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", "kto")
    (b / "metrics.jsonl").write_text((b / "metrics.jsonl").read_text().replace("nats/accuracies", "other"))
    notes = {chart.name: chart.note for chart in curves(compared(a, b))}
    assert notes["nats-accuracies"].endswith("Not measured for KTO.")
    assert "Not measured" not in notes["nats-margins"]


def test_of_many_variants_the_best_of_each_loss_are_drawn_first(tmp_path):
    for i in range(8):
        loss = ("dpo", "kto")[i % 2]
        make_run(tmp_path / str(i), loss, {"beta": 0.1 * (i + 1)}, right=right(10 + i))
    shown = [choice.label for choice in legend(compared(*sorted(tmp_path.iterdir()))) if choice.is_shown]
    assert shown == ["DPO, beta 0.7", "KTO, beta 0.8"]
