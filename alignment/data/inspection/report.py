"""An inspection of data for people: in a terminal or a pipe, and as a page for a browser."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from alignment.data.inspection.histogram import histogram, quantile, summary
from alignment.data.inspection.inspection import Inspection, LeftOut
from alignment.data.inspection.token_view import Part, Token, TokenView
from alignment.pages import page_templates

STAGES = {"preference": "Preferences", "sft": "SFT data"}
LEGEND = {
    "prompt": "read",
    "scored": "learnt",
    "context": "read, between the turns of an answer",
    "cut": "left away at the settings given",
    "template": "written by the chat template or the tokenizer, not by the row",
}
"""What becomes of a token, in the words of the views."""

_STYLES = {Part.prompt: "", Part.scored: "green", Part.context: "cyan", Part.cut: "red strike"}
_FIRST, _LAST = 48, 16
"""Tokens of a long run that a terminal shows."""
_BAR = 10

_TEMPLATES = page_templates(Path(__file__).parent)


@dataclass(frozen=True, slots=True)
class Numbers:
    """A table: its title, its columns, its rows as text, and a sentence below it."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def left_out_table(left_out: Sequence[LeftOut]) -> Numbers:
    """The rows that are left out, by reason."""
    rows = [(f"{one.count}", one.reason, plain(one.first)) for one in left_out]
    return Numbers("Rows left out", ("rows", "reason", "the first"), rows)


def tables(found: Inspection) -> Iterator[Numbers]:
    """What the inspection has found, but for the bins of lengths and the views of rows."""
    if found.left_out:
        yield left_out_table(found.left_out)
    header = ("tokens of", "count", "least", "median", "mean", "90 %", "99 %", "most")
    rows = []
    for name, lengths in found.lengths.items():
        count, least, median, mean, q90, q99, most = astuple(summary(lengths))
        rows.append((name, *map(str, (count, least, median)), f"{mean:.1f}", *map(str, (q90, q99, most))))
    yield Numbers("Lengths before any cut", header, rows, _overlap(found.overlaps))
    rows = []
    for cut in found.cuts:
        setting = f"{cut.setting}={getattr(found.config, cut.setting.rpartition('.')[2])}"
        share = f"{100 * cut.count / max(1, cut.of):.1f} %"
        rows.append((setting, f"{cut.count} of {cut.of} {cut.what}", share, f"{cut.tokens} of {cut.of_tokens}"))
    needed = [quantile(found.needed, share) for share in (0.9, 0.99, 1)]
    note = "Whole, 90 % of the rows need up to {} tokens, 99 % up to {}, all up to {}.".format(*needed)
    yield Numbers("What the settings cut", ("setting", "cuts", "share", "tokens cut"), rows, note)
    rows = [(f"{'! ' if trait.suspect else ''}{trait.name}", plain(trait.verdict)) for trait in found.traits]
    yield Numbers("The chat template", ("", "verdict"), rows)


def _overlap(overlaps: Sequence[float]) -> str:
    if not overlaps:
        return ""
    middle, high = (sorted(overlaps)[min(int(share * len(overlaps)), len(overlaps) - 1)] for share in (0.5, 0.9))
    same = sum(overlap == 1 for overlap in overlaps)
    return (
        f"Overlap: the two answers of a pair share {100 * sum(overlaps) / len(overlaps):.0f} % of their words on "
        f"average, the median {100 * middle:.0f} %, nine in ten pairs up to {100 * high:.0f} %; {same} of "
        f"{len(overlaps)} have the same words."
    )


def heading(found: Inspection) -> str:
    """The title of one data set."""
    source = f", source {found.source}" if found.source else ""
    return f"{STAGES[found.stage]}{source}: {plain(found.config.title)}"


# Texts


def plain(text: str) -> str:
    """Text on one line, in which nothing can steer a terminal or turn the direction of what follows."""
    return "".join(sign if sign.isprintable() else _escaped(sign) for sign in text)


def visible(text: str, space: str = "·", line: str = "⏎") -> str:
    """The text of a token, in which spaces and line breaks can be seen."""
    signs = {" ": space, "\n": line, "\t": "⇥"}
    return "".join(signs.get(sign) or (sign if sign.isprintable() else _escaped(sign)) for sign in text) or "▫"


def _escaped(sign: str) -> str:
    return sign.encode("unicode_escape").decode("ascii")


def runs(tokens: Sequence[Token]) -> list[tuple[Part, bool, list[Token]]]:
    """For the page, which shows all tokens."""
    return list(TokenView.runs(tokens))


# Terminal


def print_inspection(found: Inspection, console: Console) -> None:
    """Print everything; colours are for a terminal, the words say the same in a pipe."""

    def say(line: str) -> None:
        console.print(Text(plain(line)), soft_wrap=True)

    say(heading(found))
    for line in found.overview:
        say(f"  {line}")
    say("")
    if found.refusal is not None:
        say(f"A run would stop: {found.refusal}")
        say("")
    say(f"Likely mistakes: {'none found.' if not found.mistakes else ''}")
    for sentence in found.mistakes:
        say(f"  ! {sentence}")
    say("")
    for numbers in tables(found):
        print_table(numbers, console)
        if numbers.title.startswith("Lengths"):
            console.print(_bars(found))
    for view in found.views:
        _print_view(view, console)


def print_table(numbers: Numbers, console: Console) -> None:
    """Print a table that reads well at 80 columns, in a pipe and in a file."""
    table = Table(title=numbers.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    counts = [all(row[column][:1].isdigit() for row in numbers.rows) for column in range(len(numbers.header))]
    for name, is_count in zip(numbers.header, counts, strict=True):
        table.add_column(name, justify="right" if is_count and len(counts) > 4 else "left", overflow="fold")
    for row in numbers.rows:
        table.add_row(*map(Text, row))
    console.print(table)
    if numbers.note:
        console.print(Text(numbers.note + "\n"), soft_wrap=True)


def _bars(found: Inspection) -> Table:
    table = Table(title="Rows by length, in tokens", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("tokens")
    for name in found.lengths:
        table.add_column(name)
    bins = histogram(found.lengths)
    largest = {name: max(one.counts[name] for one in bins) for name in found.lengths}
    for one in bins:
        cells = [
            f"{count:>6} {'█' * max(int(count > 0), round(_BAR * count / max(1, largest[name])))}"
            for name, count in one.counts.items()
        ]
        table.add_row(one.label, *cells)
    return table


def _print_view(view: TokenView, console: Console) -> None:
    remark = f" ({view.remark})" if view.remark else ""
    console.print(Text(plain(f"Row {view.source}{remark}"), style="bold"), soft_wrap=True)
    for name, tokens in view.sequences.items():
        console.print(Text(f"  {name}: {len(tokens)} tokens"), soft_wrap=True)
        grid = Table.grid(padding=(0, 1))
        grid.add_column(min_width=11, no_wrap=True)
        grid.add_column(min_width=8, no_wrap=True)
        grid.add_column(overflow="fold")
        for part, of_template, run in TokenView.runs(tokens):
            style = f"{_STYLES[part]}{' dim' if of_template else ''}".strip()
            grid.add_row(
                Text(f"    {part.name}"), Text("template" if of_template else ""), Text(_line(run), style=style)
            )
        console.print(grid)
    console.print()


def _line(run: Sequence[Token]) -> str:
    """The tokens of a run with spaces between them; of a long run both ends."""
    texts = [visible(token.text) for token in run]
    if len(texts) > _FIRST + _LAST + 1:
        left_away = f"[... {len(texts) - _FIRST - _LAST} tokens ...]"
        texts = [*texts[:_FIRST], left_away, *texts[-_LAST:]]
    return " ".join(texts)


# Page


def to_html(found: Sequence[Inspection]) -> str:
    """The page as one file that loads nothing and runs nothing. All texts are escaped."""
    return _TEMPLATES.get_template("inspection.html.j2").render(
        title="Data as the model sees them",
        inspections=found,
        heading=heading,
        tables=tables,
        histogram=histogram,
        legend=LEGEND,
        plain=plain,
        visible=visible,
        runs=runs,
    )
