"""The judge's card as a report shows it."""

from __future__ import annotations

from alignment.runs.judge_table import judge_rows

AGREES = {"n": 200, "share": 0.71, "low": 0.64, "high": 0.77, "kappa": 0.5, "kappa_low": 0.4, "kappa_high": 0.6}
CARD = {
    "kind": "llm", "identity": "ab" * 32, "described": {"model": "judge-1", "verdicts": "arena"},
    "pairs": 128, "same": 8, "verdicts": 240, "unreadable": 3, "consistent": 0.8, "first": 0.55,
    "longer": {"n": 60, "share": 0.6, "low": 0.47, "high": 0.71}, "length_correlation": 0.123456,
    "humans": {"judge": AGREES | {"decisive": {"n": 90, "share": 0.9}}, "longer": AGREES | {"kappa": None}},
    "usage": {
        "calls": 240, "stored": 0, "unanswered": 2, "over_budget": 0, "tokens_in": 123456, "tokens_out": 2400,
        "troubles": {"429": 7}, "cost": 0.25,
    },
}  # fmt: skip


def test_every_measure_has_a_row():
    """With intervals where there are any, and the cost."""
    rows = dict(judge_rows(CARD))
    assert rows["judge"] == "llm, model judge-1, verdicts arena" and rows["identity"] == "ab" * 8
    assert rows["pairs, of these with two equal answers"] == "128, 8" and rows["unreadable"] == "3 of 240 verdicts"
    assert rows["the same verdict in both orders"] == "80.0%" and rows["wins of the answer shown first"] == "55.0%"
    assert rows["wins of the longer answer"] == "60.0% (47.0% to 71.0%)"
    assert rows["correlation of outcome and length"] == "0.1235"
    agreed = "71.0% (64.0% to 77.0%), kappa 0.5 (0.4 to 0.6); 90.0% where both decide"
    assert rows["agrees with people"] == agreed and "kappa -" in rows["  so does the longer answer"]
    assert rows["asked"] == "240 calls, 0 replies from the store, 2 without reply"
    assert rows["attempts that failed"] == "7 x 429" and rows["tokens"] == "123,456 in, 2,400 out"
    assert rows["cost"] == "0.25" and "  so do people" not in rows


def test_what_was_not_measured_has_no_row():
    """A card of the rules has no orders, no people and no cost; a broken one has what can be read."""
    plain = {key: CARD[key] for key in ("kind", "identity", "pairs", "same", "verdicts", "unreadable")}
    titles = ["judge", "identity", "pairs, of these with two equal answers", "unreadable"]
    assert [title for title, _ in judge_rows(plain)] == titles
    assert judge_rows({"longer": 3, "humans": [], "usage": {"troubles": None}})
