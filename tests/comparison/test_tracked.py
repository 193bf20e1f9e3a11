"""What a tracker is sent of a comparison."""

import pytest

from alignment.comparison import write_comparison
from alignment.comparison.members import read_member, run_folders
from alignment.comparison.ranking import compare
from alignment.comparison.tracked import sweep_summary
from tests.helpers.run_folders import make_run


def summary_of(folder):
    return sweep_summary(compare([read_member(run, run.name) for run in run_folders([folder])]), [])


def test_the_table_has_plain_numbers_best_first(tmp_path):
    for number, (loss, settings, seed, wins) in enumerate(
        [
            ("dpo", {"beta": 0.5}, 0, 12),
            ("dpo", {"beta": 0.1}, 0, 16),
            ("dpo", {"beta": 0.1}, 1, 18),
            ("simpo", {"beta": 2.0, "gamma_beta_ratio": 0.5}, 0, 15),
        ]
    ):
        make_run(tmp_path / f"{number}-made", loss, settings, seed, right=[i < wins for i in range(20)])
    sent = summary_of(tmp_path)
    rows = [dict(zip(sent.header, row, strict=True)) for row in sent.rows]
    assert [(row["variant"], row["loss"], row["beta"], row["seeds"], row["rank"]) for row in rows] == [
        ("DPO, beta 0.1", "dpo", 0.1, "0, 1", 1),
        ("SimPO", "simpo", None, "0", 2),
        ("DPO, beta 0.5", "dpo", 0.5, "0", 3),
    ]
    # (16 + 18) / 2 of 20; Wilson's interval at 0.85 with n = 20.
    best = [rows[0][f"reward accuracy{part}"] for part in ("", ", low", ", high", ", items")]
    assert best == pytest.approx([0.85, 0.6396, 0.9476, 20], abs=5e-5)
    assert rows[0]["margin, nats"] == pytest.approx(8.5)
    assert (sent.values["members"], sent.values["members_with_result"]) == (4, 4)
    assert sent.values["best"]["variant"] == sent.values["best_dpo"]["variant"] == "DPO, beta 0.1"
    assert sent.values["best_simpo"]["value"] == pytest.approx(0.75)
    assert {"nats-margins", "logps-chosen"} <= sent.figures.keys()
    assert sent.figures["nats-margins"].layout.title.text == "Margin over the reference"
    assert "DPO, beta 0.1 is first of 3 variants" in sent.notes
    loss, beta, *_, last = sent.figures["settings"].data[0].dimensions
    assert [axis.label for axis in (loss, beta, last)] == ["loss", "beta", "reward accuracy"]
    assert (loss.values, loss.ticktext) == ((0, 1, 0), ("dpo", "simpo"))
    assert (beta.values, beta.ticktext) == ((0, 1, 2), ("0.1", "None", "0.5")), "a loss without it has a place too"
    assert last.values == pytest.approx((0.85, 0.75, 0.6))


def test_all_that_share_the_first_place_are_named(tmp_path):
    for number, beta in enumerate((0.1, 0.2, 0.3)):
        make_run(tmp_path / f"{number}-made", settings={"beta": beta}, right=[number < 2, True, False])
    sent = summary_of(tmp_path)
    assert sent.values["best"]["variant"] == sent.values["best_dpo"]["variant"] == "DPO, beta 0.1; DPO, beta 0.2"
    assert [row[sent.header.index("rank")] for row in sent.rows] == [1.5, 1.5, 3]


def test_members_without_a_result(tmp_path):
    for seed in (0, 1):
        folder = make_run(tmp_path / f"{seed}-made", seed=seed)
        (folder / "summary.json").unlink()
    sent = summary_of(tmp_path)
    assert sent.values == {"members": 2, "members_with_result": 0}
    assert [row[sent.header.index("rank")] for row in sent.rows] == [None]
    assert "No member has a result" in sent.notes and "settings" not in sent.figures


def test_the_first_member_that_has_settings_says_where_a_sweep_is_tracked(tmp_path, monkeypatch):
    for number in range(2):
        make_run(tmp_path / str(number), seed=number, config={"tracking": {"project": f"p{number}"}})
    (tmp_path / "0" / "config.yaml").unlink()
    sent = []
    monkeypatch.setattr("alignment.comparison.send_summary", lambda config, *others: sent.append(config))
    write_comparison([tmp_path], tmp_path, track=True)
    assert sent == [{"project": "p1"}]
