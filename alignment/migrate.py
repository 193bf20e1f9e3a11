"""`python -m alignment.migrate FILE [OUT] [--from TOOL]`: makes a recipe of another tool's file."""

from __future__ import annotations

import argparse
import logging
import re
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from alignment.errors import CommandParser, UserError, ending_plainly, require
from alignment.files import atomic_write_text
from alignment.migration.draft import Circumstances
from alignment.migration.tools import TOOLS, read_file, recognised, translate
from alignment.migration.trl import METHODS
from alignment.migration.writing import recipe_text, remarks, wrapped

FOLDER = "recipe"
"""The folder of recipes in a user's configuration folder."""


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="python -m alignment.migrate",
        description="Make a recipe of a configuration file of TRL, LLaMA-Factory or Axolotl. Every key is translated, "
        "or named with the reason why it is not.",
        epilog="Example: python -m alignment.migrate dpo.yaml mine/recipe/dpo.yaml, then python -m alignment.run "
        "--config-dir mine recipe=dpo",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the other tool's YAML")
    parser.add_argument(
        "out",
        type=Path,
        nargs="?",
        metavar="OUT",
        help="the recipe, in a folder named recipe; else mine/recipe/<name of FILE>.yaml",
    )
    parser.add_argument("--from", dest="tool", choices=list(TOOLS), help="whose file it is, where its keys do not tell")
    parser.add_argument(
        "--method", choices=METHODS, help="which of TRL's commands reads the file, where its keys do not tell"
    )
    parser.add_argument("--devices", type=int, default=1, metavar="N", help="processes that shared each step there (1)")
    parser.add_argument("--rows", type=int, metavar="N", help="rows of the data, for keys that count epochs or shares")
    return parser


def _target(file: Path, out: Path | None) -> tuple[Path, Path, str]:
    """Where the recipe goes, the folder for --config-dir, and the recipe's name.

    Raises:
        UserError: a place where no run would find it, or a file that is there already.
    """
    stem = re.sub(r"[^\w-]+", "_", file.stem)
    out = Path("mine", FOLDER, f"{stem}.yaml") if out is None else out.expanduser()
    parents = [folder for folder in out.parents if folder.name == FOLDER]
    fine = bool(parents) and out.suffix == ".yaml"
    require(
        fine,
        f"{out} must be a .yaml file in a folder named {FOLDER}, as in mine/{FOLDER}/{stem}.yaml, where --config-dir "
        "finds it.",
    )
    name = out.relative_to(parents[-1]).with_suffix("").as_posix()
    require(
        re.fullmatch(r"[\w/-]+", name) is not None, f"{out}: the name of a recipe has letters, digits, _ and - only."
    )
    require(not out.exists(), f"{out} is there already: name another file.")
    return out, parents[-1].parent, name


def run(arguments: Sequence[str] | None) -> list[str]:
    """What the command does; returns the lines that it prints.

    Raises:
        UserError: a file that has no translation, and why. Nothing is written then.
    """
    options = _parser().parse_args(arguments)
    for key in ("devices", "rows"):
        number = getattr(options, key)
        require(number is None or number >= 1, f"--{key} must be at least 1, not {number}.")
    given = read_file(options.file)
    tool = TOOLS[options.tool or recognised(given, options.file)]
    out, folder, name = _target(options.file, options.out)
    around = Circumstances(options.devices, options.rows, options.method)
    draft, method = translate(given, options.file, tool, around)
    text = recipe_text(draft, options.file.name, method)
    problem = _checked(text, options.file)
    atomic_write_text(out, text)
    lines = wrapped([f"{options.file} is a file of {tool.title}: {method}.", *remarks(draft)])
    if problem:
        lines += wrapped([f"A run would stop: {problem}"])
    return [*lines, str(out), f"python -m alignment.run --config-dir {shlex.quote(str(folder))} recipe={name}"]


def _checked(text: str, file: Path) -> str:
    """Compose the recipe as a run would; returns what the optimizer lacks here, which another machine may have.

    Raises:
        UserError: the settings do not go together.
    """
    # The libraries take seconds to load: only once the file is understood
    from alignment.config.compose import load
    from alignment.training.optimizers import check_optimizer

    with tempfile.TemporaryDirectory() as folder:
        atomic_write_text(Path(folder, FOLDER, "migrated.yaml"), text)
        try:
            config = load("recipe=migrated", config_dir=Path(folder))
        except UserError as error:
            raise UserError(f"{file} makes no recipe that can run: {error}") from None
    try:
        check_optimizer("optim", config.optim, config.adapter, "cuda")
    except UserError as error:
        return str(error)
    return ""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; `ending_plainly` says how it ends."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with ending_plainly():
        lines = run(arguments)
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
