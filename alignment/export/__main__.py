"""`python -m alignment.export RUN to=gguf,vllm,... [type=q8_0] [out=DIR]`: hands a policy to other programs."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from alignment import spinning  # noqa: F401 - first, because what follows imports torch
from alignment.errors import CommandParser, UserError, did_you_mean, ending_plainly

_KEYS = ("to", "type", "out", "converter", "device", "dtype")
_NEEDED = {"type": {"gguf", "ollama"}, "converter": {"gguf", "ollama"}, "dtype": {"merged", "vllm"}}
"""The forms that a setting is for."""


def _settings(words: Sequence[str]) -> tuple[Path, dict[str, str]]:
    """The folder and the settings among the words of the command line."""
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
    if len(folders) != 1:
        raise UserError(f"Name one folder of a finished run, or of a saved adapter, and not {len(folders)}.")
    return folders[0], given


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="python -m alignment.export",
        description="Hand the policy of a finished run to other programs. What is written is read back and compared.",
        epilog="to: adapter (peft), merged (safetensors), gguf (llama.cpp), vllm (a command line, with the adapter), "
        "ollama (a Modelfile, with a GGUF file); several with commas. type: of GGUF files, f32, f16, bf16, q8_0, q5_1, "
        "q5_0, q4_1 or q4_0. converter: a checkout of llama.cpp, for families that are not written here. "
        "Example: python -m alignment.export outputs/quickstart/monday to=gguf,ollama type=q8_0",
    )
    parser.add_argument(
        "words", nargs="+", metavar="RUN | key=value", help=f"folder of a finished run, and {', '.join(_KEYS)}"
    )
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help="your own recipes, as for the runs")
    return parser


def run(arguments: Sequence[str] | None) -> list[Path]:
    """What the command does; returns the paths of what it has made.

    Raises:
        UserError: arguments that cannot be followed, or a policy that cannot have such a form.
    """
    options = _parser().parse_intermixed_args(arguments)
    folder, given = _settings(options.words)
    forms = tuple(dict.fromkeys(form for form in given.get("to", "").strip("[]").split(",") if form))

    # The libraries take seconds to load, and speak while they do: only once the words are understood
    from alignment.stages.quiet import quieten_libraries

    quieten_libraries()
    from alignment.config.registry import register
    from alignment.export.exporting import FORMS, Export, Order, types_of
    from alignment.export.opened import open_policy

    if not forms:
        raise UserError(f"to is missing: choose among {', '.join(FORMS)}, as in to=merged.")
    for form in forms:
        if form not in FORMS:
            raise UserError(f"There is no to={form}{did_you_mean(form, FORMS)}; accepted are {', '.join(FORMS)}.")
    for key, needed in _NEEDED.items():
        if key in given and needed.isdisjoint(forms):
            raise UserError(f"{key} has no effect without to={' or to='.join(sorted(needed))}.")
    types = types_of(given.get("type"))
    register(options.config_dir)
    opened = open_policy(folder, given.get("device"), given.get("dtype"))
    beside = opened.saved.with_name(f"{opened.saved.name}-export" if opened.run is None else "export")
    out = Path(given["out"]).expanduser().absolute() if "out" in given else beside
    converter = Path(given["converter"]).expanduser() if "converter" in given else None
    return Export(opened, Order(forms, types, out, converter)).make()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; `ending_plainly` says how it ends."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with ending_plainly():
        made = run(arguments)
    for path in made:
        sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
