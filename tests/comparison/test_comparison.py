"""Comparisons of folders made by hand: what they say is known beforehand."""

import csv
import json
import shutil

import pytest

from alignment import report
from alignment.comparison import write_comparison
from alignment.comparison.answers import questions
from alignment.comparison.charts import COLOURS, curves, frontier, lengths, sensitivity
from alignment.comparison.measures import KLS, WIN_RATE, kl
from alignment.comparison.members import read_member, run_folders, variants
from alignment.comparison.ranking import compare
from alignment.comparison.sentences import cautions, headline
from alignment.comparison.tables import best_of_each, results, what_ran
from alignment.errors import UserError
from tests.comparison.folders import change_json, make_run


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
    assert found.differing == ["loss.beta"], "a setting that only one loss has, or a seed, is no difference"
    labels = ["DPO, beta 0.1", "DPO, beta 0.5", "SIMPO, beta 2", "SIMPO, beta 8"]
    assert [variant.label for variant in found.variants] == labels
    assert [variant.seeds for variant in found.variants] == [[0, 1]] * 4
    assert [member.name for member in found.members] == [f"{i}-made" for i in range(8)]


def test_means_intervals_and_ranks(sweep):
    found = compared(*run_folders([sweep]))
    assert found.rank_by.name == "reward accuracy"
    best = row_of(results(found), "DPO, beta 0.1")
    # (16 + 18) / 2 of 20: Wilson at 0.85, n = 20 (two seeds ask the same 20) is 0.6396 to 0.9476.
    assert best["reward accuracy"] == "85.0% of 20\n(64.0 to 94.8)\nseeds 80.0 to 90.0"
    assert best["rank"] == "1"
    assert best["margin, nats"] == "8.5\nseeds 8 to 9"
    assert best["drift of chosen, nats"] == "-0.5\nseeds alike"
    # Seed 0: 16, 15, 12, 11; seed 1: 18, 13, 11, 10. So DPO with 0.5 is 3rd, then 4th.
    ranked = {row[0]: row[3] for row in results(found).rows}
    assert ranked == {
        "DPO, beta 0.1": "1\nseeds alike",
        "SIMPO, beta 2": "2\nseeds alike",
        "DPO, beta 0.5": "3.5\nseeds 3 to 4",
        "SIMPO, beta 8": "3.5\nseeds 3 to 4",
    }
    assert [row[:2] for row in best_of_each(found).rows] == [["DPO", "DPO, beta 0.1"], ["SIMPO", "SIMPO, beta 2"]]


def test_the_best_of_each_loss_are_compared_by_pairs(sweep):
    """By pair, means over seeds: DPO 16 ones and 2 halves, SimPO 13 and 2. Better on 13 < i <= 18: 5, worse on none."""
    found = compared(*run_folders([sweep]))
    [against] = found.against
    difference = against.difference
    assert against.other.label == "SIMPO, beta 2"
    assert (difference.better, difference.worse, difference.count) == (5, 0, 20)
    assert difference.value == pytest.approx(0.85 - 0.70)
    assert against.p == pytest.approx(2 / 32)
    said = headline(found)
    assert "DPO, beta 0.1 is first of 4 variants with 85.0% (64.0% to 94.8%) on 20 held-out items" in said[0]
    assert "15.0 points behind" in said[1]
    assert "not certain" in said[1], "the interval leaves out zero, 5 of 5 do not: p is 0.0625"


def test_one_loss_compares_its_settings_and_says_noise(tmp_path):
    a = make_run(tmp_path / "a", settings={"beta": 0.1}, right=right(11))
    b = make_run(tmp_path / "b", settings={"beta": 0.5}, right=right(10))
    said = " ".join(headline(compared(a, b)))
    assert "DPO, beta 0.5 is 5.0 points behind" in said
    assert "within noise" in said
    assert "none of these can be called the winner" in said


def test_without_pairs_the_difference_is_of_two_shares(tmp_path):
    a = make_run(tmp_path / "a", right=right(56, 70), keep_pairs=False)
    b = make_run(tmp_path / "b", settings={"beta": 0.5}, right=right(48, 80), keep_pairs=False)
    [against] = compared(a, b).against
    assert against.p is None
    assert (against.difference.low, against.difference.high) == pytest.approx((0.0524, 0.3339), abs=5e-5)


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
    assert (found.against[0].difference.better, found.against[0].difference.worse) == (3, 0)
    said = " ".join(headline(found))
    assert "cannot be told from a draw with the model" in said
    assert "By reward accuracy the first is DPO, beta 0.5 with 100.0%" in said


@pytest.mark.parametrize(
    ("summary", "said"),
    [
        ({"data": {"preference": {"train": 100, "eval": 4, "fingerprint": "0" * 64}}}, "preference data are not"),
        ({"data": {"preference": {"train": 100, "eval": 5, "fingerprint": "f" * 64}}}, "numbers of held-out pairs"),
        ({"reference": {"mode": "cache", "identity": "0" * 64}}, "started from different policies"),
        ({"reference": {"mode": "live", "identity": "a" * 64}}, "References of different kinds"),
        ({"git_commit": "0" * 40}, "The code is not the same"),
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
    assert found["The numbers of steps are not the same"] == ["24: a", "48: b"]
    assert "One seed per variant: how much the result moves with the seed is not known" in found
    text = (a / "metrics.jsonl").read_text()
    (a / "metrics.jsonl").write_text(text.replace('"logps/chosen": -40.5', '"logps/chosen": -47.5'))
    found = dict(cautions(compared(a, b)))
    [said] = found["The log-prob of chosen completions fell"]
    assert said.startswith("a: ") and "fell by 7.5 nats" in said


def test_each_seed_may_start_from_its_own_policy(tmp_path):
    a = make_run(tmp_path / "a", seed=0)
    b = make_run(tmp_path / "b", seed=1, summary={"reference": {"mode": "cache", "identity": "b" * 64}})
    kinds = [kind for kind, _ in cautions(compared(a, b))]
    assert any(kind.startswith("Each seed started from a policy of its own") for kind in kinds)
    assert not any("Members of one seed" in kind for kind in kinds)


def test_the_distance_is_the_sampled_kl_only_where_all_have_it(tmp_path):
    a, b = make_run(tmp_path / "a", kl=3.0), make_run(tmp_path / "b", settings={"beta": 0.5})
    members = [read_member(folder, folder.name) for folder in (a, b)]
    assert kl(members) is KLS[1]
    assert KLS[1].value(members[0]) == -3.0
    for folder, mean in ((a, 2.5), (b, 4.0)):
        change_json(folder / "summary.json", evaluation={"kl/sampled": {"n": 8, "mean": mean, "se": 0.1}})
        members = [read_member(each, each.name) for each in (a, b)]
        assert kl(members) is (KLS[0] if folder == b else KLS[1])
    assert [KLS[0].value(member) for member in members] == [2.5, 4.0]
    points = frontier(compare(members)).figure["data"]
    assert [list(point["x"]) for point in points] == [[2.5], [4.0]]
    assert [list(point["error_x"]["array"]) for point in points] == [[pytest.approx(0.196)]] * 2


def test_charts_hold_the_values(sweep):
    found = compared(*run_folders([sweep]))
    margins = next(chart for chart in curves(found) if chart.name == "nats-margins")
    assert len(margins.figure["data"]) == 8
    assert margins.num_entries == 4, "seeds of a variant share an entry of the legend"
    assert list(margins.figure["data"][0]["y"]) == [0.0, 2.0, 4.0, 6.0, 8.0]
    [chart] = sensitivity(found)
    lines = {line["name"]: (list(line["x"]), list(line["y"])) for line in chart.figure["data"]}
    assert lines["DPO"] == ([0.1, 0.5], [pytest.approx(0.85), pytest.approx(0.55)])
    assert lines["SIMPO"] == ([2.0, 8.0], [pytest.approx(0.7), pytest.approx(0.55)])
    assert lengths(found) is None, "nothing was answered"
    assert chart.figure["layout"]["xaxis"]["type"] == "log", "values that lie many times apart"
    bars = chart.figure["data"][0]["error_y"]  # Wilson at 0.85, n = 20: 0.6396 to 0.9476
    assert (bars["arrayminus"][0], bars["array"][0]) == (
        pytest.approx(0.85 - 0.6396, abs=5e-5),
        pytest.approx(0.9476 - 0.85, abs=5e-5),
    )


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


@pytest.mark.parametrize("damage", ["remove", "empty", "binary", "list", "deep"])
@pytest.mark.parametrize("name", ["config.yaml", "summary.json", "metrics.jsonl", "samples.jsonl", "held_out.jsonl"])
def test_a_broken_file_is_named_and_the_rest_is_there(tmp_path, name, damage):
    make_run(tmp_path / "0-a", scores=[1.0] * 4)
    broken = make_run(tmp_path / "1-b", settings={"beta": 0.5}, scores=[1.0] * 4) / name
    if damage == "remove":
        broken.unlink()
    else:
        content = {"empty": b"", "binary": b"\xff\xfe{\x00\n", "list": b"[1, 2]\n", "deep": b"[" * 100_000 + b"\n"}
        broken.write_bytes(content[damage])
    write_comparison([tmp_path], tmp_path)
    text = (tmp_path / "comparison.md").read_text()
    assert f"1-b: {name}" in text or f"{broken}" in text
    assert "| 0-a | dpo |" in text
    assert "| 1-b |" in text


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
    assert "| DPO, beta 0.5 | 0 | - |" in text, "a run without results keeps its place, and no rank"
    assert "notes" not in text


def test_broken_shapes_of_a_summary_break_nothing(tmp_path):
    make_run(tmp_path / "0-a", scores=[1.0] * 4)
    for path in ("seed", "stages", "evaluation", "data", "reference", "git_commit", "versions", "machine"):
        for value in (None, "x | <y>", [1], 3):
            make_run(tmp_path / "1-b", settings={"beta": 0.5}, scores=[1.0] * 4, summary={path: value})
            page = write_comparison([tmp_path], tmp_path)
            assert "<y>" not in page.read_text().split("<main>")[1].split("<script>")[0]
            shutil.rmtree(tmp_path / "1-b")


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
    assert "| dpo/now | dpo |" in (tmp_path / "comparison.md").read_text()
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
    assert "DPO, beta 0.1, DPO, beta 0.5 share the first place of 2 variants with 75.0%" in said[0]
    assert (found.against[0].difference.better, found.against[0].difference.worse) == (5, 5)
    assert [row[2] for row in results(found).rows] == ["1.5", "1.5"]


def test_a_setting_that_varies_in_one_loss_alone_is_no_part_of_another_loss(tmp_path):
    settings = {"beta": 0.1, "label_smoothing": 0.0}
    a, b = make_run(tmp_path / "a", settings=settings), make_run(tmp_path / "b", settings=settings | {"beta": 0.5})
    c = make_run(tmp_path / "c", "kto", {"beta": 0.3})
    found = compared(a, b, c)
    assert [variant.label for variant in found.variants] == ["DPO, beta 0.1", "DPO, beta 0.5", "KTO"]
    facts = {row[0]: row[1] for row in what_ran(found).rows}
    assert facts["settings of DPO that do not differ"] == "label_smoothing 0"
    assert facts["settings of KTO that do not differ"] == "beta 0.3"
    assert facts["what differs between members"] == "loss.beta"


def test_markdown_names_a_few_of_the_members_that_a_warning_is_about(tmp_path):
    for i in range(5):
        make_run(tmp_path / f"{i}-a", settings={"beta": 0.1 * (i + 1)}, steps=24 * (i + 1))
    write_comparison([tmp_path], tmp_path)
    [line] = [
        line for line in (tmp_path / "comparison.md").read_text().splitlines() if "numbers of steps are not" in line
    ]
    assert line.endswith("24: 0-a; 48: 1-a; 72: 2-a; and 2 more.")
    assert "120: 4-a" in (tmp_path / "comparison.html").read_text()


def test_answers_stand_side_by_side_to_the_prompts_that_most_members_answered(tmp_path):
    a = make_run(tmp_path / "a", scores=[1.0, 0.0, 1.0], seed=0)
    b = make_run(tmp_path / "b", "kto", {"beta": 0.1}, scores=[0.0, 1.0])
    asked = questions(compared(a, b))
    assert [question.prompt for question in asked] == ["Question 0?", "Question 1?"]
    assert [answer.model for answer in asked[0].answers] == ["after SFT", "DPO, seed 0", "KTO, seed 0"], "SFT once"
    assert [answer.text for answer in asked[1].answers] == ["It is 1.", "1 from dpo", "1 from kto"]
    assert [answer.verdict.split(",")[0] for answer in asked[1].answers] == ["right", "wrong", "right"]


def test_runs_without_a_preference_stage_are_listed_and_not_ranked(tmp_path):
    a = make_run(tmp_path / "a", summary={"stages": {"sft": {"steps": 8}}}, config={"loss": None})
    found = compared(a)
    assert found.variants == []
    assert headline(found) == ["No member has a result that variants could be ranked by."]
    write_comparison([tmp_path], tmp_path)
    assert "| a | - |" in (tmp_path / "comparison.md").read_text()


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
        assert said in headline(compared(*folders))[1]


def test_without_the_offline_metric_it_is_the_mean_of_both_sides(tmp_path):
    a = make_run(tmp_path / "a")
    metrics = {"eval/nats/chosen": -1.0, "eval/nats/rejected": -4.0}
    change_json(a / "summary.json", stages={"preference": {"loss": "dpo", "metrics": metrics}})
    member = read_member(a, "a")
    assert kl([member]) is KLS[1]
    assert KLS[1].value(member) == -2.5


def test_members_of_a_sweep_are_in_the_order_of_their_numbers(tmp_path):
    for name in ("10-a", "2-a", "last"):
        make_run(tmp_path / name)
    assert [folder.name for folder in run_folders([tmp_path])] == ["2-a", "10-a", "last"]
