"""The judge's card in a report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignment.runs.folder import dig, submapping
from alignment.runs.text import DASH, format_value, percent, short_hash

ABOUT_JUDGE = (
    "A judge that sees both answers is asked in both orders, and orders that disagree are a tie. Verdicts that cannot "
    "be read count as ties, too. Cohen's kappa is 1 for full agreement and 0 for that of chance. Longer answers may be "
    "better ones: compare the judge with people, and with the rule that the longer answer wins."
)


def judge_rows(card: Mapping[str, Any]) -> list[list[str]]:
    """The rows of the table: a measure and its value; those that the card does not have are left out."""
    described = submapping(card, "described")
    rows = [
        ["judge", ", ".join([str(card.get("kind")), *(f"{k} {format_value(v)}" for k, v in described.items())])],
        ["identity", short_hash(card.get("identity"))],
        [
            "pairs, of these with two equal answers",
            f"{format_value(card.get('pairs'))}, {format_value(card.get('same'))}",
        ],
        ["unreadable", f"{format_value(card.get('unreadable'))} of {format_value(card.get('verdicts'))} verdicts"],
        ["the same verdict in both orders", percent(card.get("consistent"))],
        ["wins of the answer shown first", percent(card.get("first"))],
        ["wins of the longer answer", _share(submapping(card, "longer"))],
        ["correlation of outcome and length", format_value(card.get("length_correlation"))],
        *_people(submapping(card, "humans")),
        *_usage(submapping(card, "usage")),
    ]
    return [row for row in rows if row[1] != DASH]


def _share(found: Mapping[str, Any]) -> str:
    if not found:
        return DASH
    return f"{percent(found.get('share'))} ({percent(found.get('low'))} to {percent(found.get('high'))})"


def _people(humans: Mapping[str, Any]) -> list[list[str]]:
    """The agreement of the judge, of the longer answer, and of people among each other."""
    titles = {"judge": "agrees with people", "longer": "  so does the longer answer", "annotators": "  so do people"}
    rows = []
    for name, title in titles.items():
        found = submapping(humans, name)
        decisive = dig(found, "decisive", "share")
        kappa = (
            f", kappa {format_value(found.get('kappa'))} ({format_value(found.get('kappa_low'))} to "
            f"{format_value(found.get('kappa_high'))})"
        )
        decided = f"; {percent(decisive)} where both decide" if decisive is not None else ""
        rows.append([title, f"{_share(found)}{kappa}{decided}" if found else DASH])
    return rows


def _usage(used: Mapping[str, Any]) -> list[list[str]]:
    """What the judge cost."""
    if not used:
        return []
    troubles = ", ".join(f"{format_value(count)} x {name}" for name, count in submapping(used, "troubles").items())
    told = (("calls", "calls"), ("stored", "replies from the store"), ("unanswered", "without reply"))
    counts = [f"{format_value(used.get(key))} {title}" for key, title in told]
    if used.get("over_budget"):
        counts.append(f"{format_value(used['over_budget'])} over the budget")
    tokens = f"{format_value(used.get('tokens_in'))} in, {format_value(used.get('tokens_out'))} out"
    return [
        ["asked", ", ".join(counts)],
        ["attempts that failed", troubles or DASH],
        ["tokens", tokens],
        ["cost", format_value(used.get("cost"))],
    ]
