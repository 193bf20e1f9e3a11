"""The command: `python -m alignment.losses` lists the losses, `... show NAME` explains one, `... docs` writes the page.

List, explanation and page have one source: the classes, the values and comments of `conf/loss/<name>.yaml`, and the
checked pair of `alignment.losses.parity`.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from dataclasses import dataclass, fields
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from alignment.files import asset_dir
from alignment.losses import LDDPO, LOSSES, Loss, Mixture, Quantity, SamPO
from alignment.losses.parity import CHECKS, Check, value_here

TOKEN_LEVEL = frozenset({LDDPO.name, SamPO.name})
"""For these the sums of the log-probs and the lengths of the sequences do not suffice."""

COLUMNS = ("loss", "items", "reference", "reads", "state", "defaults", "what for")


@dataclass(frozen=True, slots=True)
class Option:
    """One file of `conf/loss`: values, and the sources that its comments name for them."""

    values: dict[str, Any]
    sources: dict[str, str]


def read_option(name: str) -> Option:
    """The option of that name. A comment line "key, key: source" may go on in indented ones."""
    text = (asset_dir("conf") / "loss" / f"{name}.yaml").read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    values.pop("defaults", None)
    sources: dict[str, str] = {}
    keys: list[str] = []
    for line in (line[1:] for line in text.splitlines() if line.startswith("#")):
        named, _, source = line.partition(": ")
        if not line.startswith("  ") and {key.strip() for key in named.split(",")} <= values.keys():
            keys = [key.strip() for key in named.split(",")]
            sources |= dict.fromkeys(keys, source.strip())
        else:
            sources |= {key: f"{sources[key]} {line.strip()}" for key in keys}
    return Option(values, sources)


def mixtures() -> list[str]:
    """The options that are ready mixtures."""
    found = sorted(path.stem for path in (asset_dir("conf") / "loss").glob("*.yaml"))
    return [name for name in found if name not in {*LOSSES, "none"}]


def recommended(name: str) -> Loss:
    """The loss with the values of its option."""
    return LOSSES[name](**read_option(name).values)


def _text(value: Any) -> str:
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Loss):
        return _settings({field.name: getattr(value, field.name) for field in fields(value)})
    if isinstance(value, dict):
        return "(" + _settings(value) + ")"
    if isinstance(value, float):
        return f"{value:g}"
    return {None: "null", True: "true", False: "false"}.get(value, str(value))


def _settings(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {_text(value)}" for key, value in values.items())


def rows() -> list[tuple[str, ...]]:
    """One row of `COLUMNS` per loss; a star marks what could not be checked against its paper in all."""
    found: list[tuple[str, ...]] = []
    for name, kind in LOSSES.items():
        if kind is Mixture:
            found.append((name, *["by its losses"] * 4, "-", kind.purpose))
            continue
        loss = recommended(name)
        needs = loss.requirements()
        reads = ["tokens"] if name in TOKEN_LEVEL else []
        reads += ["scores"] if needs.scores else []
        reads += ["prompts"] if needs.prompts else []
        reads += [f"distributions ({', '.join(sorted(q.name for q in needs.quantities))})"] if needs.quantities else []
        reads += ["answers to other prompts"] if loss.mismatched(max(2, needs.min_items)) else []
        reads += ["the whole step"] if needs.whole_step else []
        reference = "live" if Quantity.divergence in needs.quantities else "yes" if needs.reference else "no"
        found.append(
            (
                name + "*" * bool(kind.uncertain),
                f"{needs.unit}s",
                reference,
                ", ".join(reads) or "-",
                ", ".join(loss.initial_state()) or "-",
                _settings(read_option(name).values),
                kind.purpose,
            )
        )
    return found


def ready_mixtures() -> list[str]:
    """A line per option that is a mixture."""
    return [f"{name} is a mixture: {_settings(read_option(name).values['weights'])}." for name in mixtures()]


def uncertainties() -> list[str]:
    """A line per loss with a star."""
    return [f"{name}: {kind.uncertain}" for name, kind in LOSSES.items() if kind.uncertain]


def explanation(name: str) -> tuple[str, list[str]]:
    """A loss's docstring, and a line per setting with its default and where that is from."""
    option = read_option(name)
    lines = [
        f"{field.name} {_text(option.values[field.name])}: {option.sources[field.name]}"
        for field in fields(LOSSES[name])
    ]
    return inspect.getdoc(LOSSES[name]) or "", lines


def _markdown_row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def _markdown_table(header: tuple[str, ...], body: list[tuple[str, ...]]) -> list[str]:
    return [_markdown_row(header), _markdown_row(("---",) * len(header)), *map(_markdown_row, body)]


def _parity_row(check: Check) -> tuple[str, ...]:
    settings = {field.name: getattr(check.loss, field.name) for field in fields(check.loss)}
    theirs = "" if check.trl_value is None else f"{check.trl_value:.7g}"
    formula = f"{check.formula:.7g}"
    return (
        f"`{check.loss.name}` {_settings(settings)}",
        formula,
        f"{value_here(check.loss):.7g}",
        theirs if theirs in ("", formula) else f"**{theirs}**",
        check.trl or "absent",
        check.remark,
    )


def page() -> str:
    """The page of the losses, in Markdown."""
    without = sorted(LOSSES.keys() - {check.loss.name for check in CHECKS})
    linked = [(f"[{row[0].rstrip('*')}](#{row[0].rstrip('*')}){row[0].partition('*')[1]}", *row[1:]) for row in rows()]
    lines = [
        "# Losses",
        "",
        "<!-- made by: python -m alignment.losses docs -->",
        "",
        "`loss=<name>` chooses one, `loss.<setting>=<value>` changes it.",
        "",
        "- *items*: what its mean is taken over. Pairs serve losses of rows and of lists too.",
        "- *reference*: `live` where the cache cannot serve it.",
        "- *reads*: beside the sums or means of the answers' log-probs. What reads the whole step is given all of it at"
        " once, however the step is split.",
        "- *state*: carried from step to step, and in checkpoints.",
        "- \\*: something was not checked against the paper, as said below.",
        "",
        *_markdown_table(COLUMNS, [(row[0].replace("*", "\\*"), *row[1:]) for row in linked]),
        "",
        *ready_mixtures(),
        "",
        "Not checked against the paper:",
        "",
        *(f"- {line}" for line in uncertainties()),
        "",
        "[Parity](#parity) has what each loss gives on one pair, here and in TRL.",
    ]
    for name in LOSSES:
        text, settings = explanation(name)
        lines += ["", f"## {name}", "", text, "", *(f"- `{line.replace(' ', '` ', 1)}" for line in settings)]
    lines += [
        "",
        "## Parity",
        "",
        "One pair of completions of 4 and 6 tokens, on which the losses were worked out by their formulas; what this"
        " package gives, and what TRL 1.16's own code gives, to seven digits. Bold: TRL gives another number. The tests"
        " run both. beta is 0.1 in TRL where none is named.",
        "",
        *_markdown_table(
            ("loss", "formula", "here", "TRL", "TRL's name", "where and why they differ"),
            [_parity_row(check) for check in CHECKS],
        ),
        "",
        f"TRL has none of {', '.join(without)}, whose values are derived by hand in their tests.",
    ]
    return "\n".join(lines) + "\n"


def _list(console: Console) -> None:
    table = Table(*COLUMNS, show_lines=True)
    for row in rows():
        table.add_row(*row)
    console.print(table)
    for line in [*ready_mixtures(), "* Not checked against the paper:", *uncertainties()]:
        console.print(line, markup=False, highlight=False)


def _show(name: str) -> None:
    console = Console(soft_wrap=True)
    if name in mixtures():
        text = (asset_dir("conf") / "loss" / f"{name}.yaml").read_text(encoding="utf-8")
        console.print(re.sub(r"^defaults: .*\n", "", text, flags=re.MULTILINE), markup=False, highlight=False)
        return
    text, settings = explanation(name)
    console.print(f"{name}: {LOSSES[name].purpose}\n\n{text}", markup=False, highlight=False)
    if LOSSES[name].uncertain:
        console.print(f"\nNot checked against the paper: {LOSSES[name].uncertain}", markup=False, highlight=False)
    console.print("\nSettings, with their defaults and where these are from:", highlight=False)
    for line in settings:
        console.print(f"  loss.{line}", markup=False, highlight=False)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m alignment.losses", description="The losses of this package.")
    parser.add_argument("action", nargs="?", choices=["show", "docs"], help="show NAME explains; docs writes the page")
    parser.add_argument("name", nargs="?", help="of the loss")
    given = parser.parse_args(arguments)
    if given.action is None:
        _list(Console())
    elif given.action == "docs":
        path = page_path()
        path.write_text(page(), encoding="utf-8")
        Console().print(f"Written: {path}", markup=False, highlight=False)
    elif given.name not in (known := [*LOSSES, *mixtures()]):
        near = get_close_matches(given.name or "", known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        what = f"There is no loss named '{given.name}'." if given.name else "show needs the name of a loss."
        sys.stderr.write(f"Error: {what}{hint} The losses are {', '.join(known)}.\n")
        return 1
    else:
        _show(given.name)
    return 0


def page_path() -> Path:
    """Where the page is kept."""
    return asset_dir("conf") / "loss" / "README.md"


if __name__ == "__main__":
    sys.exit(main())
