"""`python -m alignment.merge RUN RUN... method=<name>`: makes one policy of several, and compares it with them."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from alignment import spinning  # noqa: F401 - first, because what follows imports torch
from alignment.errors import CommandParser, UserError, did_you_mean, ending_plainly

_KEYS = ("method", "weights", "density", "rank", "seed", "out")


def _settings(words: Sequence[str]) -> tuple[list[Path], dict[str, str]]:
    """The folders and the settings among the words of the command line."""
    folders: list[Path] = []
    given: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or "/" in key:
            folders.append(Path(word).expanduser())
        elif key not in _KEYS:
            raise UserError(f"There is no setting {key}{did_you_mean(key, _KEYS)}; accepted are {', '.join(_KEYS)}.")
        else:
            given[key] = value
    return folders, given


def _number(given: dict[str, str], key: str, kind: type[int] | type[float]) -> int | float | None:
    if key not in given:
        return None
    try:
        return kind(given[key])
    except ValueError:
        raise UserError(f"{key} must be {'an integer' if kind is int else 'a number'}, not '{given[key]}'.") from None


def _weights(given: dict[str, str]) -> tuple[float, ...]:
    if "weights" not in given:
        return ()
    try:
        return tuple(float(part) for part in given["weights"].strip("[]").split(","))
    except ValueError:
        raise UserError(f"weights must be numbers like 1,0.5, not '{given['weights']}'.") from None


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="python -m alignment.merge",
        description="Merge the final policies of runs that were trained from one base. The merged policy is saved as a "
        "run of its own, evaluated on its parents' held-out data, and compared with them.",
        epilog="methods: linear, task_arithmetic, magnitude_prune, ties, dare_ties. "
        "Example: python -m alignment.merge outputs/quickstart/a outputs/quickstart/b method=ties density=0.2",
    )
    parser.add_argument(
        "words", nargs="+", metavar="RUN | key=value", help=f"folders of finished runs, and {', '.join(_KEYS)}"
    )
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help="your own recipes, as for the runs")
    return parser


def run(arguments: Sequence[str] | None) -> Path:
    """What the command does; returns the page that compares the merged policy with its parents.

    Raises:
        UserError: arguments that cannot be followed, or runs that cannot be merged.
    """
    options = _parser().parse_intermixed_args(arguments)
    folders, given = _settings(options.words)
    if "method" not in given:
        raise UserError("method is missing: choose one, as in method=linear; see python -m alignment.merge --help.")
    out = Path(given.get("out", f"outputs/merge/{datetime.now():%Y-%m-%d_%H-%M-%S}")).expanduser()
    rank, seed = _number(given, "rank", int), _number(given, "seed", int)

    # The libraries take seconds to load, and speak while they do: only once the words are understood
    from alignment.stages.quiet import quieten_libraries

    quieten_libraries()
    from alignment.comparison import write_comparison
    from alignment.config.registry import register
    from alignment.policy.model_merging import MergeSettings
    from alignment.stages.merged import merge_runs, read_parents

    register(options.config_dir)
    settings = MergeSettings(
        given["method"],
        _weights(given),
        _number(given, "density", float),
        None if rank is None else int(rank),
        0 if seed is None else int(seed),
    )
    pages = [
        write_comparison([*(parent.folder for parent in parents), folder], folder)
        for folder, parents in merge_runs(read_parents(folders), settings, out)
    ]
    return pages[0]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; `ending_plainly` says how it ends."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with ending_plainly():
        page = run(arguments)
    sys.stdout.write(f"{page}\n")


if __name__ == "__main__":
    main()
