"""Numbers of the tables by hand, goals, and what the README shows."""

import json
import math

import pytest

from tests.bench import against_trl, tables
from tests.bench.floor import Shape
from tests.bench.summary import GOALS, Goal, check_losses, judge_goals, summarise

TINY = Shape(linear=10, adapter=2, layers=1, attention=3, hidden=2, vocabulary=5)


def test_floor_by_hand():
    """P 2, C 1, R 1: (40 + 12) * 4 = 208; A = 2 * 3 * (4 + 8 + 1 + 1) = 84, three times; 4 * 10 * 2 = 80."""
    assert TINY.floor(2, 1, 1) == 208 + 3 * 84 + 80
    assert TINY.floor(2, 3, 1) - TINY.floor(2, 1, 1) == 52 * 2 + 3 * 6 * (8 + 8) + 80  # 22 + 8 pairs of tokens scored


def result(wall, reference, peak, rates):
    return {
        "losses": [math.log(2)] * 4,
        "seconds": {"wall": wall, "user": wall, "system": [s / 4 for s in wall]},
        "reference_seconds": {"wall": reference, "user": reference / 2, "system": 0.0},
        "setup_seconds": 1.0,
        "peak_bytes": peak * 2**30,
        "torch_rates": rates,
        "our_rates": [2 * rate for rate in rates],
    }


@pytest.fixture
def summary():
    results = {
        "ours_cold": result([100.0, 4.0, 8.0, 12.0], 16.0, 3, [50.0, 54.0, 1000.0]),
        "ours_warm": result([100.0, 4.0, 4.0, 28.0], 0.0, 2, [27.0, 27.0, 27.0]),
        "trl_default": result([100.0, 16.0, 32.0, 48.0], 0.0, 8, [50.0, 54.0, 1000.0]),
        "trl_precomputed": result([100.0, 8.0, 16.0, 24.0], 32.0, 4, [27.0, 27.0, 27.0]),
    }
    lengths = [[1000, 1000, 1000]] * 4 + [[2, 1, 1]] * 12
    return summarise(results, lengths, 4, TINY, "exact")


def test_numbers_of_the_table(summary):
    """By hand: the warm-up step is left out, a reference pass is spread over all pairs and its epochs."""
    assert (summary["tokens_per_pair"], summary["floor_per_pair"], summary["torch_rate"]) == (6, 540, 38.5)
    assert summary["our_rate"] == 77
    assert {name: row["seconds_per_pair"] for name, row in summary["rows"].items()} == {
        "ours, cold": 2.0 + 1.0,
        "ours, warm": 1.0,
        "ours, two epochs": 2.0 + 0.5,
        "TRL, default": 8.0,
        "TRL, precomputed": 4.0 + 2.0,
        "TRL, precomputed, two epochs": 4.0 + 1.0,
    }
    cold, warm = summary["rows"]["ours, cold"], summary["rows"]["ours, warm"]
    assert (cold["reference_seconds_per_pair"], cold["user_seconds_per_pair"], cold["peak_gib"]) == (1.0, 2.5, 3)
    assert (cold["kernel_seconds_per_pair"], cold["kernel_share"]) == (0.5, 0.5 / 3.0)
    assert cold["tokens_per_second"] == pytest.approx(6 / 3)
    assert cold["of_peak"] == pytest.approx(540 / 3 / 54)
    assert cold["of_our_peak"] == pytest.approx(540 / 3 / 108)
    # Steps of 4, 4 and 28 seconds: their mean is 3 seconds a pair, while the median is 1.
    assert warm["tokens_per_second"] == pytest.approx(6 / 3)
    assert warm["of_peak"] == pytest.approx(540 / 3 / 27)


def test_ratios_of_the_table(summary):
    """Against the default the cold run's steps of 2 seconds a pair, against the precomputed the warm run's of 1."""
    found = {name: (r["times_faster"], r["memory"]) for name, r in summary["ratios"].items()}
    assert found == {
        "ours, cold : TRL, default": (8 / 3, 3 / 8),
        "ours, warm : TRL, default": (4.0, 0.25),
        "ours, cold : TRL, precomputed": (6 / (1 + 1), 0.75),
        "ours, two epochs : TRL, precomputed, two epochs": (5 / (1 + 0.5), 0.75),
    }
    assert summary["ratios"]["ours, cold : TRL, default"]["times_less_cpu"] == pytest.approx((8 + 2) / (2.5 + 0.5))


def test_goals(summary):
    """At its bound a goal is met; more memory misses one, more speed does not."""
    cases = {"long": summary}

    def met(quantity, value, ours="ours, warm", against="TRL, default"):
        return Goal("long", ours, against, quantity, value).judge(cases)["met"]

    assert met("times_faster", 4.0) and not met("times_faster", 4.01)
    assert met("memory", 0.25) and not met("memory", 0.24)
    assert met("of_peak", 6.66, against=None) and not met("of_peak", 6.67, against=None)
    judged = judge_goals(cases)
    assert {goal["case"] for goal in judged} == {"long"}
    assert [(g["goal"], g["met"]) for g in judged] == [
        (2.6, True),
        (4.0, True),
        (2.7, True),
        (0.25, False),
        (0.25, True),
        (0.65, True),
    ]


def test_every_goal_names_rows_that_are_measured(summary):
    for goal in GOALS:
        assert goal.judge({goal.case: summary})["found"] > 0
        assert goal.case in {case.name for case in against_trl.CASES}


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ({"ours_cold": [0.6931, 0.65], "trl_default": [0.6951, 0.65]}, "trl_default starts"),
        ({"ours_cold": [0.6931, 0.65], "trl_default": [0.6931, 0.655]}, "differ by up to 0.0050"),
    ],
)
def test_runs_that_compute_different_things_are_refused(losses, said):
    with pytest.raises(AssertionError, match=said):
        check_losses(losses, "exact")
    assert check_losses(losses, "rounded") > 0


@pytest.fixture
def whole(summary):
    """A run with one case, as it is written."""
    return {
        "date": "2026-11-23",
        "machine": {"cpu": "CPU", "cores": 2, "gpu": None, "system": "Linux", "device": "cpu", "threads": 2},
        "versions": {"torch": "1", "transformers": "2", "peft": "3", "trl": "4"},
        "model": "tiny",
        "minutes": 3.0,
        "quick": False,
        "cases": {"long": {"source": "somewhere"} | summary},
        "goals": judge_goals({"long": summary}),
        "profiles": {},
    }


def test_tables_show_the_numbers(whole):
    text = tables.results_markdown(whole)
    assert "| ours, cold | 3.000 | 1.000 | 2 |" in text
    assert "| ours, warm against TRL, default | 4.00x |" in text
    assert "| long | ours, cold, against TRL, default: of its memory | at most 0.25 | 0.38 | no |" in text


def test_readme_shows_the_newest_whole_run_of_every_machine(whole, tmp_path):
    def put(folder, **changed):
        path = tmp_path / "results" / folder / "results.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(whole | changed))

    put("2026-11-22-cpu", model="old")
    put("2026-11-23-cpu", model="new")
    put("2026-11-24-cpu-quick", model="quick", quick=True)
    put("2026-11-24-gpu", model="other", machine=whole["machine"] | {"gpu": "H", "device": "cuda"})
    block = tables.speed_block(tmp_path / "results", tmp_path / "docs" / "speed.md")
    short = tables.readme_block(tmp_path / "results")
    assert [word for word in ("old", "new", "quick") if f"; {word}, float32" in block] == ["new"]
    assert block.index("; other, bfloat16") < block.index("; new, float32")
    assert "; other, bfloat16" in short and "float32" not in short
    assert "| long | 8.00 s, 8.0 GiB | 6.00 s, 4.0 GiB | 3.00 s, 3.0 GiB | 1.00 s, 2.0 GiB |" in block
    assert "(../results/2026-11-23-cpu/results.md)" in block


def test_readme_gives_the_range_over_processors_and_no_machine_alone(whole, tmp_path):
    def ratios(faster, memory):
        case = whole["cases"]["long"]
        return case | {"ratios": {k: {"times_faster": faster, "memory": memory} for k in case["ratios"]}}

    numbers = {"family": 25, "model": 17, "stepping": None, "vectors": "AVX-512, 256 bits at a time"}
    other = {
        "date": "2026-11-22",
        "machine": whole["machine"] | numbers,
        "how": "told",
        "cases": {"long": ratios(2, 0.1)},
    }
    first = whole | {"cases": {name: ratios(10, 0.3) for name in ("long", "short")}}
    (tmp_path / "2026-11-23-cpu").mkdir()
    (tmp_path / "2026-11-23-cpu" / "results.json").write_text(json.dumps(first))
    (tmp_path / tables.REPORTED).write_text(json.dumps([other]))
    block = tables.readme_block(tmp_path)
    assert "| long | 2.0 to 10.0, 0.30 of its memory |" in block  # and not "10.0 to 2.0", as text is sorted
    assert "| short | 10.0 on one, 0.30 of its memory |" in block
    assert "| CPU, 2 threads | not recorded | 2026-11-23 |" in block
    assert "| CPU, family 25, model 17, 2 threads | AVX-512, 256 bits at a time | 2026-11-22 |" in block
    page = tables.speed_block(tmp_path, tmp_path / "speed.md")
    assert "2026-11-22, CPU, family 25, model 17 (AVX-512, 256 bits at a time), 2 threads; told" in page


def test_block_goes_between_the_markers():
    begin, end = tables.README_MARKERS
    before = f"text\n{begin}\nold\n{end}\nmore\n"
    after = tables.with_block(before, "\nnew \\1\n")
    assert after == f"text\n{begin}\n\nnew \\1\n{end}\nmore\n"
    assert tables.with_block(after, "\nnew \\1\n") == after
    for broken in (before.replace(end, ""), before + begin, ""):
        with pytest.raises(ValueError, match="once each"):
            tables.with_block(broken, "new")


def test_pages_equal_the_newest_results():
    speed = against_trl.ROOT / "docs" / "speed.md"
    blocks = {
        against_trl.ROOT / "README.md": tables.readme_block(against_trl.RESULTS),
        speed: tables.speed_block(against_trl.RESULTS, speed),
    }
    for path, block in blocks.items():
        page = path.read_text()
        assert tables.with_block(page, block) == page, "run python -m tests.bench.against_trl --readme"
