"""Charts of folders made by hand: they hold the known values."""

import pytest

from alignment.comparison.charts import frontiers, legend, overviews, sensitivity
from alignment.comparison.curves import curves, lengths, rounds
from alignment.comparison.measures import KLS, kl_measure
from alignment.comparison.members import read_member, run_folders
from alignment.comparison.ranking import compare
from alignment.comparison.tables import results
from alignment.runs.style import COLOURS
from tests.helpers.run_folders import change_json, change_metrics, compared, make_run, right


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


def test_rounds_have_a_line_for_each_run_that_has_them(tmp_path):
    """The first row of a round has its metrics; the others have none, and runs without rounds have no line."""
    a = make_run(tmp_path / "a")
    assert rounds(compared(a)) == [], "nobody has rounds"

    def with_rounds(rows):
        found = {0: (1.0, 0.25, 0.5), 12: (2.0, 0.5, 0.75), 24: (3.0, 0.75, None)}
        made = []
        for row in rows:
            row = {**row, "split": "train"}
            if row["step"] in found:
                number, score, informative = found[row["step"]]
                row |= {"onpolicy/round": number, "onpolicy/score_mean": score}
                row |= {} if informative is None else {"onpolicy/informative": informative}
            if row["step"] in (6, 18):
                row["onpolicy/staleness"] = -row["step"] / 100  # of the round before, whose last step this is
            made.append(row)
        return made

    b = make_run(tmp_path / "b", settings={"beta": 0.5})
    change_metrics(b, with_rounds)
    score, informative, staleness = rounds(compared(a, b))
    assert (list(staleness.figure["data"][0]["x"]), list(staleness.figure["data"][0]["y"])) == ([1, 2], [-0.06, -0.18])
    [line] = score.figure["data"]
    assert (list(line["x"]), list(line["y"])) == ([1, 2, 3], [0.25, 0.5, 0.75]) and line["meta"] == 1
    [line] = informative.figure["data"]
    assert (list(line["x"]), list(line["y"])) == ([1, 2], [0.5, 0.75]), "a mean of nothing is left out"
    assert score.figure["layout"]["xaxis"]["title"]["text"] == "round"
    assert [chart.name for chart in (score, informative)] == ["onpolicy-score-mean", "onpolicy-informative"]


def test_looks_at_answers_have_a_line_for_each_run_that_has_them(tmp_path):
    """Over the steps; their note says that they are of answers, and not of pairs."""
    scores = {0: 0.25, 12: 0.5, 24: 0.75}

    def looked(rows):
        return [row | ({"answers/score": scores[row["step"]]} if row["step"] in scores else {}) for row in rows]

    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", settings={"beta": 0.5})
    assert "answers-score" not in {chart.name for chart in curves(compared(a, b))}
    change_metrics(b, looked)
    [chart] = [chart for chart in curves(compared(a, b)) if chart.name == "answers-score"]
    [line] = chart.figure["data"]
    assert (list(line["x"]), list(line["y"]), line["meta"]) == ([0, 12, 24], [0.25, 0.5, 0.75], 1)
    assert "Values are of answers to held-out prompts." in chart.note and "pairs" not in chart.note


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


def test_long_names_leave_space_for_the_charts(tmp_path):
    """Lines of at most 28 characters beside a chart and in its legend, with height for them."""
    for number in range(2):
        name = f"organisation-{number}/a-model-with-a-long-name"
        make_run(tmp_path / str(number), config={"model": {"name": name}})
    found = compared(*sorted(tmp_path.iterdir()))
    [glance], [frontier] = overviews(found), frontiers(found)
    lines = [f"DPO, model.name organisation<br>-{number}/a-model-with-a-long-name" for number in range(2)]
    assert glance.figure["layout"]["yaxis"]["ticktext"] == lines
    assert glance.figure["layout"]["height"] == 110 + 2 * (28 + 16)
    assert frontier.num_entries == 4 and [trace["name"] for trace in frontier.figure["data"]] == lines


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


def test_without_the_offline_metric_it_is_the_mean_of_both_sides(tmp_path):
    a = make_run(tmp_path / "a")
    metrics = {"eval/nats/chosen": -1.0, "eval/nats/rejected": -4.0}
    change_json(a / "summary.json", stages={"preference": {"loss": "dpo", "metrics": metrics}})
    member = read_member(a, "a")
    assert kl_measure([member]) is KLS[1]
    assert KLS[1].value(member) == -2.5


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

    def ends_and_training(rows):
        trained = [row | {"split": "train", "nats/margins": 100.0 + row["step"]} for row in rows]
        trained.append(trained[-1] | {"step": 5, "nats/margins": 105.0})
        return [row for row in rows if row["step"] in (0, 4)] + trained

    change_metrics(folder, ends_and_training)
    charts = {chart.name: chart for chart in curves(compared(folder))}
    trailing = [100.0, 100.5, 101.0, 101.5, 102.0, 103.0]  # means of up to the last five
    assert list(charts["nats-margins"].figure["data"][0]["y"]) == trailing
    assert "mean of the last 5 steps" in charts["nats-margins"].note


def test_a_chart_says_whose_line_is_not_in_it(tmp_path):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", "kto")
    change_metrics(b, lambda rows: [{k: v for k, v in row.items() if k != "nats/accuracies"} for row in rows])
    notes = {chart.name: chart.note for chart in curves(compared(a, b))}
    assert notes["nats-accuracies"].endswith("Not measured for KTO.")
    assert "Not measured" not in notes["nats-margins"]


def test_of_many_variants_the_best_of_each_loss_are_drawn_first(tmp_path):
    for i in range(8):
        loss = ("dpo", "kto")[i % 2]
        make_run(tmp_path / str(i), loss, {"beta": 0.1 * (i + 1)}, right=right(10 + i))
    shown = [choice.label for choice in legend(compared(*sorted(tmp_path.iterdir()))) if choice.is_shown]
    assert shown == ["DPO, beta 0.7", "KTO, beta 0.8"]
