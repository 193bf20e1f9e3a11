"""`python -m alignment.chat RUN [RUN2] [--blind] [--web]`: talks to policies side by side and keeps votes."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from alignment import spinning  # noqa: F401 - first, because what follows imports torch
from alignment.errors import CommandParser, did_you_mean, ending_plainly, require

_OWN = ("against", "votes", "system", "device")
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "max_new_tokens", "seed")
_KEYS = (*_OWN, *_SAMPLING)


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="python -m alignment.chat",
        description="Chat with the policy of a finished run, beside the one that it began with, or with two policies "
        "side by side. Votes are kept in a file that a run trains on.",
        epilog="Example: python -m alignment.chat outputs/quickstart/a --blind, then python -m alignment.run "
        "recipe=quickstart data.source=votes.jsonl",
    )
    parser.add_argument(
        "words",
        nargs="+",
        metavar="RUN | key=value",
        help=f"one or two folders of runs, of models or of adapters, or hub ids, and {', '.join(_KEYS)}; against: "
        "start (the default for one run), sft or none",
    )
    parser.add_argument("--blind", action="store_true", help="hide which policy is which until you have voted")
    parser.add_argument("--web", action="store_true", help="in a browser, on this machine alone; needs gradio")
    parser.add_argument("--port", type=int, metavar="N", help="of --web; without it a free one from 7860 on")
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help="your own recipes, as for the runs")
    return parser


def _settings(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The policies and the settings among the words of the command line."""
    names: list[str] = []
    given: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or "/" in key:
            names.append(word)
        else:
            require(
                key in _KEYS,
                f"There is no setting {key}{did_you_mean(key, _KEYS)}; accepted are {', '.join(_KEYS)}.",
            )
            given[key] = value
    return names, given


def run(arguments: Sequence[str] | None) -> None:
    """What the command does.

    Raises:
        UserError: arguments that cannot be followed, or policies that nobody can chat with.
    """
    options = _parser().parse_intermixed_args(arguments)
    names, given = _settings(options.words)
    require(1 <= len(names) <= 2, f"Name one or two policies, not {len(names)}; see python -m alignment.chat --help.")
    require(options.port is None or options.web, "--port is the address of --web: give both, or neither.")
    fits = options.port is None or 0 < options.port < 2**16
    require(fits, f"--port must be from 1 to {2**16 - 1}, not {options.port}.")
    against = given.get("against", "start")
    require(
        "against" not in given or len(names) == 1,
        "against= says whom a single run meets, and there are two: leave it out.",
    )

    # The libraries take seconds to load, and speak while they do: only once the words are understood
    from alignment.stages.quiet import quieten_libraries

    quieten_libraries()
    from alignment.chat.opening import AGAINST, open_guests
    from alignment.chat.session import Session, Settings
    from alignment.chat.votes import check_votes
    from alignment.config.registry import register
    from alignment.config.typed_text import as_text

    require(against in AGAINST, f"against must be one of {', '.join(AGAINST)}, not '{against}'.")
    settings = Settings()
    for key in given.keys() & set(_SAMPLING):
        settings = settings.changed(key, given[key])
    votes = Path(given.get("votes", "votes.jsonl")).expanduser()
    check_votes(votes)
    if options.web:
        from alignment.chat.web import require_gradio

        require_gradio()

    register(options.config_dir)
    overrides = as_text([f"device={given['device']}"] if "device" in given else [], sweeps=False)
    guests = open_guests(names, against, overrides)
    system = given.get("system", guests.speakers[0].system)
    system = None if system in (None, "", "none") else system

    def begun() -> Session:
        return Session(guests, settings, system, options.blind)

    session = begun()
    guests.load()
    logging.getLogger().setLevel(logging.WARNING)  # lines would stand amid the answers
    if options.web:
        from alignment.chat.web import serve

        serve(begun, votes, options.port)
    else:
        from rich.console import Console

        from alignment.chat.terminal import Terminal

        Terminal(session, votes, Console(highlight=False, width=None if sys.stdout.isatty() else 1000)).run()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; `ending_plainly` says how it ends."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with ending_plainly():
        run(arguments)


if __name__ == "__main__":
    main()
