"""Sentences and cautions about folders made by hand, whose result is known."""

import json
import shutil

import pytest

from alignment.comparison import write_comparison
from alignment.comparison.measures import WIN_RATE
from alignment.comparison.ranking import interval
from alignment.comparison.sentences import cautions, headline, judge_contrast
from alignment.comparison.tables import results
from alignment.runs.cautions import cautions as run_cautions
from alignment.runs.folder import read_run
from tests.helpers.run_folders import change_json, change_metrics, compared, make_run, right


def test_one_loss_compares_its_settings_and_says_noise(tmp_path):
    a = make_run(tmp_path / "a", settings={"beta": 0.1}, right=right(11))
    b = make_run(tmp_path / "b", settings={"beta": 0.5}, right=right(10))
    said = " ".join(headline(compared(a, b)))
    assert "DPO, beta 0.5 is 5.0 points behind" in said
    assert "within noise" in said
    assert "There is no clear winner" in said


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


MODEL = {"reward_model": "org/rm", "llm": {"model": "big"}}


@pytest.mark.parametrize(
    ("rounds", "evaluation", "named"),
    [
        ({"judge": "reward_model"}, {"judge": "reward_model"}, "(reward_model, org/rm) is the one"),
        ({"judge": "llm"}, {"judge": "llm"}, "(llm, big) is the one"),
        ({"judge": "llm", "llm": {"model": "big", "verdicts": "rubric"}}, {"judge": "llm"}, "(llm, big) is the one"),
        ({"judge": "reward_model"}, {"judge": "reward_model", "reward_model": "org/another"}, ""),
        ({"judge": "llm"}, {"judge": "llm", "llm": {"model": "another"}}, ""),
        ({"judge": "llm"}, {"judge": "reward_model"}, ""),
        *(({"judge": kind}, {"judge": kind}, "") for kind in ("rules", "ifeval", "math", "none")),
        ({"judge": "rules"}, {"judge": "llm"}, ""),
    ],
)
def test_a_judge_of_rounds_that_judges_the_result_is_warned_of(rounds, evaluation, named, tmp_path):
    """If it has learnt what it judges by, and not if it looks answers up; by the report, too."""
    config = {"onpolicy": MODEL | rounds, "evaluation": MODEL | evaluation}
    folder = make_run(tmp_path / "a", config=config)
    said = dict(cautions(compared(folder))).get("The judge of the rounds judges the result, too", [""])
    assert (named in said[0]) and bool(named) == bool(said[0])
    assert any("learns what its judge likes" in one.text for one in run_cautions(read_run(folder))) == bool(named)


def test_offline_runs_have_no_judge_of_rounds(tmp_path):
    folder = make_run(tmp_path / "a", config={"onpolicy": None, "evaluation": MODEL | {"judge": "llm"}})
    assert "The judge of the rounds judges the result, too" not in dict(cautions(compared(folder)))


def test_how_often_a_run_looks_makes_no_other_variant(tmp_path):
    """Nor does a version of before, which knew no looks."""
    looks = [{}, {"every": 4, "every_prompts": 8}, {"every": None, "every_prompts": 32}]
    configs = [{"evaluation": {"prompts": 4} | one} for one in looks]
    found = compared(*(make_run(tmp_path / str(n), seed=n, config=config) for n, config in enumerate(configs)))
    assert len(found.variants) == 1


def test_unequal_steps_and_falling_log_probs_are_warned_of(tmp_path):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", settings={"beta": 0.5}, steps=48)
    found = dict(cautions(compared(a, b)))
    assert found["Members trained for different numbers of steps"] == ["24: a", "48: b"]
    assert "One seed per variant: you cannot tell how much a result depends on the seed" in found
    change_metrics(a, lambda rows: [*rows[:-1], rows[-1] | {"logps/chosen": -47.5}])
    found = dict(cautions(compared(a, b)))
    [said] = found["The log-prob of chosen completions fell"]
    assert said.startswith("DPO, beta 0.1, seed 0: ") and "fell by 7.5 nats" in said


def test_each_seed_may_start_from_its_own_policy(tmp_path):
    a = make_run(tmp_path / "a", seed=0)
    b = make_run(tmp_path / "b", seed=1, summary={"reference": {"mode": "cache", "identity": "b" * 64}})
    kinds = [kind for kind, _ in cautions(compared(a, b))]
    assert any(kind.startswith("Each seed started from its own policy") for kind in kinds)
    assert not any("Members with the same seed" in kind for kind in kinds)


def test_a_shared_first_place_is_said_to_be_shared(tmp_path):
    a = make_run(tmp_path / "a", right=right(15))
    b = make_run(tmp_path / "b", settings={"beta": 0.5}, right=list(reversed(right(15))))
    found = compared(a, b)
    said = headline(found)
    assert "DPO, beta 0.1 and DPO, beta 0.5 share the first place of 2 variants with 75.0%" in said[0]
    assert any("level with DPO, beta 0.1" in line for line in said)
    assert (found.contrasts[0].difference.better, found.contrasts[0].difference.worse) == (5, 5)
    assert [row[1] for row in results(found).rows] == ["1.5", "1.5"]


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


def test_an_interval_and_a_test_that_disagree_are_both_said(tmp_path):
    """Better on 5 of 40 and worse on none: the interval leaves out 50%, the exact test has p = 2 / 2^5."""
    found = compared(make_run(tmp_path / "a", scores=[1.0] * 5 + [0.5] * 35))
    assert interval(WIN_RATE, found.ranked[0])[0] > 0.5
    assert headline(found)[-1] == (
        "It does not clearly beat the model it started from: better on 5 of 40 prompts, worse on 0; the interval "
        "excludes a draw, the exact test does not."
    )


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


def test_markdown_names_a_few_of_the_members_that_a_warning_is_about(tmp_path):
    for i in range(5):
        make_run(tmp_path / f"{i}-a", settings={"beta": 0.1 * (i + 1)}, steps=24 * (i + 1))
    write_comparison([tmp_path], tmp_path)
    [line] = [
        line for line in (tmp_path / "comparison.md").read_text().splitlines() if "different numbers of steps" in line
    ]
    assert line.endswith("24: 0-a; 48: 1-a; 72: 2-a; and 2 more.")
    assert "120: 4-a" in (tmp_path / "comparison.html").read_text()
