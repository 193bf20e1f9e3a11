"""Tables of what a run has measured on its way: looks at held-out answers, and rounds of the policy's own answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from alignment.runs.folder import RunFiles, by_round, dig
from alignment.runs.text import DASH, format_value, percent

T = TypeVar("T")

_MOST = 20
"""Rows of a table."""

_ROUND_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "informative": ("informative", percent),
    "mean score": ("score_mean", format_value),
    "best score": ("score_best", format_value),
    "tokens": ("length_mean", format_value),
    "chosen": ("length_chosen", format_value),
    "rejected": ("length_rejected", format_value),
    "cut": ("cut_share", percent),
    "distinct": ("distinct_share", percent),
    "KL to start": ("kl_start", format_value),
    "KL of round": ("kl_round", format_value),
    "staleness": ("staleness", format_value),
    "effective": ("effective", percent),
    "server drift": ("server_drift", format_value),
}
"""The columns of the table of rounds, but for what was dropped: the metric of each, and how it is written."""

ABOUT_LOOKS = (
    "The same held-out prompts at each step, with the same random numbers. The win rate is against the answers at the "
    "start of the stage; a tie counts as half a win, and intervals are 95%. Tokens are a mean; an answer is cut at "
    "evaluation.max_new_tokens."
)

ABOUT_ROUNDS = (
    "Informative is the share of prompts with something to train on; dropped are shares of what was drawn. Tokens are "
    "means: of all answers, and of the chosen and rejected completions. The KL to the start is measured when a round "
    "begins; that of the round, staleness (nats per token) and the effective share of its answers after its last step. "
    "KLs are in nats per answer. Server drift is how far the log-probs of the server that draws are from the policy's, "
    "in nats per token. Watch the lengths: a judge that likes long answers gets longer ones."
)


def looks_table(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """A row for each look at the held-out answers; no rows where there was none."""
    looks = dig(summary, "stages", "preference", "answers")
    rows = [
        [
            format_value(look.get("step")),
            format_value(look.get("score")),
            percent(dig(look, "win_rate", "rate")),
            _interval(dig(look, "win_rate")),
            format_value(look.get("length")),
            percent(look.get("cut_share")),
        ]
        for look in _spread(_mappings(looks))
    ]
    return _filled(["step", "judge score", "win rate", "95% interval", "tokens", "cut"], rows)


def rounds_table(run: RunFiles) -> tuple[list[str], list[list[str]], str]:
    """A row for each round, and what else is said of them; no rows for a run without rounds."""
    rounds = _mappings(dig(run.summary, "stages", "preference", "rounds"))
    measured = {name: by_round(run.metrics, f"onpolicy/{name}") for name, _ in _ROUND_COLUMNS.values()}
    numbers = list(range(1, len(rounds) + 1)) or sorted({n for values in measured.values() for n in values})
    rows = []
    for number in _spread(numbers):
        known = rounds[number - 1] if rounds else {}
        cells = [
            write(known.get(f"onpolicy/{name}", measured[name].get(number))) for name, write in _ROUND_COLUMNS.values()
        ]
        rows.append([str(number), *cells, _dropped(known)])
    header, rows = _filled(["round", *_ROUND_COLUMNS, "dropped"], rows)
    left_out = f"{len(rows)} of {len(numbers)} rounds. " if len(rows) < len(numbers) else ""
    return header, rows, left_out + ABOUT_ROUNDS


def _mappings(value: Any) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _spread(rows: Sequence[T]) -> list[T]:
    """At most so many as a table has, at equal distances, with the first and the last."""
    if len(rows) <= _MOST:
        return list(rows)
    return [rows[i * (len(rows) - 1) // (_MOST - 1)] for i in range(_MOST)]


def _interval(won: Any) -> str:
    return DASH if dig(won, "low") is None else f"{percent(won['low'])} to {percent(won.get('high'))}"


def _dropped(metrics: dict[str, Any]) -> str:
    """The reasons with a share above 0, the largest first."""
    start = "onpolicy/dropped/"
    shares = {name.removeprefix(start): share for name, share in metrics.items() if name.startswith(start) and share}
    return (
        ", ".join(f"{name} {percent(shares[name])}" for name in sorted(shares, key=lambda name: -shares[name])) or DASH
    )


def _filled(header: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Without columns that are empty in all rows."""
    kept = [i for i in range(len(header)) if any(row[i] != DASH for row in rows)]
    return [header[i] for i in kept], [[row[i] for i in kept] for row in rows]
