"""The command: `python -m alignment.losses` lists the losses, `python -m alignment.losses show NAME` explains one."""

from __future__ import annotations

import argparse
import inspect
import sys
from dataclasses import fields
from difflib import get_close_matches

from rich.console import Console
from rich.table import Table

from alignment.losses import LOSSES, Loss


def _formula(loss: type[Loss]) -> str:
    """What stands before the first blank line of the docstring, on one line."""
    return " ".join((inspect.getdoc(loss) or "").split("\n\n")[0].split())


def overview() -> Table:
    """A table of all losses."""
    table = Table("loss", "data", "reference", "settings", "formula", show_lines=True)
    for name, loss in LOSSES.items():
        reference = "needed" if loss.needs_reference else "no"
        table.add_row(name, f"{loss.unit}s", reference, ", ".join(f.name for f in fields(loss)), _formula(loss))
    return table


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m alignment.losses", description="The losses of this package.")
    parser.add_argument("show", nargs="?", choices=["show"], help="explain one loss: show NAME")
    parser.add_argument("name", nargs="?", help="of the loss")
    given = parser.parse_args(arguments)
    console = Console(soft_wrap=True) if given.name else Console()
    if given.show is None:
        console.print(overview())
        return 0
    loss = LOSSES.get(given.name)
    if loss is None:
        near = get_close_matches(given.name or "", LOSSES, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        what = f"There is no loss named '{given.name}'." if given.name else "show needs the name of a loss."
        sys.stderr.write(f"Error: {what}{hint} The losses are {', '.join(LOSSES)}.\n")
        return 1
    console.print(f"{loss.name}\n\n{inspect.getdoc(loss)}", markup=False, highlight=False)
    console.print(f"\nSettings, with their defaults in conf/loss/{loss.name}.yaml:", highlight=False)
    for field in fields(loss):
        console.print(f"  loss.{field.name}: {field.type}", markup=False, highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
