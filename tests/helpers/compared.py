"""Rows with two answers and a verdict, read as a data file would be."""

from alignment.data.layouts.comparisons import Verdicts
from alignment.data.layouts.recognition import recognise, rows_of
from alignment.data.rows.row import Row

X, Y = ("x", "y"), ("y", "x")
"""The pair of `x` and `y` if the first wins, and if the second does."""


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def read(*records, stage="preference", columns=None, **verdicts):
    """The layout's name, what was decided, and what becomes of the records."""
    layout = recognise(records, columns or {}, stage, "f", Verdicts(**verdicts))
    numbered = [("f", number, record) for number, record in enumerate(records, 1)]
    return layout.name, layout.reading.note, list(rows_of(numbered, layout, columns or {}))


def outcomes(rows):
    """(chosen, rejected) of every row, or the reason why it was left out."""
    return [row.completions if isinstance(row, Row) else row.reason for row in rows]
