"""A comparison as one HTML file that needs nothing else, and as Markdown."""

from __future__ import annotations

import base64
import gzip
import json
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from alignment.comparison.answers import questions
from alignment.comparison.charts import CURVES, GLANCE, Chart, charts, legend, library
from alignment.comparison.judge import answers_against_answers, judge_table
from alignment.comparison.other_tasks import other_tasks
from alignment.comparison.ranking import Comparison
from alignment.comparison.sentences import cautions, headline, not_available, overview
from alignment.comparison.tables import (
    Table,
    differences,
    held_out_pairs,
    member_table,
    results,
    settings_and_data,
    settings_left_out,
)
from alignment.pages import page_templates
from alignment.runs.style import COLOURS
from alignment.runs.text import escape_markdown, markdown_table

_LINES_IN_MARKDOWN = 3
"""Members that a caution names in Markdown, where the list cannot fold."""

_TEMPLATES = page_templates(Path(__file__).parent)


def _shared_note(several: Sequence[Chart]) -> str:
    """The note that most charts of a section share, which the page then shows once; empty if all notes differ."""
    note, times = Counter(chart.note for chart in several).most_common(1)[0]
    return note if times > 1 else ""


def result_tables(found: Comparison) -> list[Table]:
    """The tables of results, without those that would be empty."""
    tables = [differences(found), results(found), *answers_against_answers(found), judge_table(found)]
    tables.append(held_out_pairs(found))
    if found.evaluated_in is not None:
        tables.append(other_tasks(found.evaluated_in, found.members, found.titles))
    return [table for table in tables if table is not None and table.rows]


def fact_tables(found: Comparison) -> list[Table]:
    """The tables of what was run."""
    tables = [settings_and_data(found), settings_left_out(found), member_table(found)]
    return [table for table in tables if table is not None]


def to_html(found: Comparison, title: str) -> str:
    """The page as one file that loads nothing. All texts of models and users are escaped."""
    drawn = charts(found)
    figures = {
        chart.name: chart.figure
        | {"entries": 0 if part == CURVES else chart.num_entries, "height": chart.figure["layout"].get("height")}
        for part, several in drawn.items()
        for chart in several
    }
    # A label must not end the script element that holds the figures.
    data = json.dumps(figures).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return _TEMPLATES.get_template("page.html.j2").render(
        title=title,
        overview=overview(found),
        headline=headline(found),
        cautions=cautions(found),
        tables=result_tables(found),
        charts=drawn,
        slugs={part: number for number, part in enumerate(drawn)},
        shared_notes={part: _shared_note(several) for part, several in drawn.items()},
        first=GLANCE,
        shared_legend=CURVES,
        legend=legend(found),
        shade_colours=COLOURS[:2],
        figures=data,
        library=_packed_library() if figures else "",
        questions=asked if (asked := questions(found)).shown else None,
        facts=fact_tables(found),
        missing=not_available(found),
    )


@cache
def _packed_library() -> str:
    """The library, compressed to less than half its size; the same bytes every time."""
    return base64.b64encode(gzip.compress(library().encode(), mtime=0)).decode()


def _first_lines(lines: Sequence[str]) -> str:
    rest = len(lines) - _LINES_IN_MARKDOWN
    return (
        "; ".join(line.rstrip(".") for line in lines[:_LINES_IN_MARKDOWN])
        + (f"; and {rest} more" if rest > 0 else "")
        + "."
    )


def to_markdown(found: Comparison, title: str) -> str:
    """The comparison as Markdown, without charts."""

    def bullets(lines: Sequence[str]) -> str:
        return "\n".join(f"- {escape_markdown(line)}" for line in lines)

    def table(content: Table) -> list[str]:
        header = [escape_markdown(cell) for cell in content.header]
        parts = [f"### {escape_markdown(content.caption)}", markdown_table(header, content.rows)]
        if content.note:
            parts.append(escape_markdown(content.note))
        if content.columns:
            parts.append(bullets([f"{name}: {what}." for name, what in content.columns.items()]))
        return parts

    parts = [f"# {escape_markdown(title)}", escape_markdown(overview(found)), "## In short", bullets(headline(found))]
    if warned := cautions(found):
        parts += [
            "## Read this first",
            bullets([f"{kind}: {_first_lines(details)}" if details else kind for kind, details in warned]),
        ]
    parts.append("## Results")
    for content in result_tables(found):
        parts += table(content)
    parts.append(
        "[comparison.html](comparison.html) has the charts, [comparison.csv](comparison.csv) the plain numbers."
    )
    asked = questions(found)
    if asked.shown:
        parts += ["## Answers side by side", escape_markdown(asked.note)]
    for question in asked.shown:
        parts.append(f"**{escape_markdown(question.prompt)}**")
        rows = [[answer.model, answer.text, answer.verdict] for answer in (*question.answers, *question.others)]
        parts.append(markdown_table(["model", "answer", "judge"], rows))
    parts.append("## What was run")
    for content in fact_tables(found):
        parts += table(content)
    if lacking := not_available(found):
        parts += ["## Not available", bullets(lacking)]
    return "\n\n".join(parts) + "\n"
