"""The installed command: `alignment run recipe=quickstart` is `python -m alignment.run recipe=quickstart`."""

from __future__ import annotations

import ast
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import alignment
from alignment.errors import did_you_mean

COMMANDS = (
    "run",
    "plan",
    "data",
    "losses",
    "report",
    "evaluate",
    "chat",
    "merge",
    "push",
    "export",
    "migrate",
    "cache",
    "doctor",
)
"""The modules of this package that have a command line, in the order in which they are listed."""

_COMPOSE = ("run", "plan", "data")
"""Those that take the settings of a run."""
_COMPLETION = ("-sc", "--shell-completion")


def source_of(name: str) -> Path:
    """The file of a command."""
    module = Path(alignment.__file__).with_name(name)
    return module / "__main__.py" if module.is_dir() else module.with_suffix(".py")


def purpose(name: str) -> str:
    """What a command does: of the first line of its docstring, what comes after its usage."""
    # Read as text: to import all commands takes seconds
    docstring = ast.get_docstring(ast.parse(source_of(name).read_text("utf-8"))) or ""
    return docstring.partition("\n")[0].partition("`: ")[2]


def main(arguments: Sequence[str] | None = None) -> int | None:
    """Hand the command line to its command; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(_listing())
        return 0
    name, *rest = words
    if name == "--version":
        sys.stdout.write(f"{alignment.__version__}\n")
        return 0
    if name in _COMPLETION:
        return _complete(rest)
    if name not in COMMANDS:
        hint = f": settings follow one, as in alignment run {name}" if "=" in name else did_you_mean(name, COMMANDS)
        sys.stderr.write(f"Error: There is no command {name}{hint}; there are {', '.join(COMMANDS)}.\n")
        return 1
    module = f"alignment.{name}"
    if source_of(name).name == "__main__.py":
        module += ".__main__"
    return importlib.import_module(module).main(rest)


def _listing() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {purpose(name)}" for name in COMMANDS]
    return "\n".join(
        [
            "Usage: alignment COMMAND ..., the same as python -m alignment.COMMAND ...; each has --help.",
            "",
            *lines,
            "",
            'Completion by the Tab key, in bash and zsh: eval "$(alignment -sc install=bash)"',
            "",
        ]
    )


def _complete(words: Sequence[str]) -> int:
    """Hydra's completion. It knows no commands, so a line that it is asked to complete begins with ours."""
    action, _, shell = words[0].partition("=") if len(words) == 1 else ("", "", "")
    if action not in ("install", "uninstall", "query") or shell not in ("bash", "zsh", "fish"):
        sys.stderr.write(
            "Error: -sc needs install=, uninstall= or query= with bash, zsh or fish, as in "
            'eval "$(alignment -sc install=bash)".\n'
        )
        return 1
    if action == "query":
        _, _, line = os.environ.get("COMP_LINE", "").lstrip().partition(" ")
        name, space, _ = line.lstrip().partition(" ")
        if not space:
            sys.stdout.write(("\n" if shell == "fish" else " ").join(COMMANDS) + "\n")
            return 0
        if name not in _COMPOSE:
            return 0  # the shell completes names of files
        os.environ["COMP_LINE"] = line
    from alignment.config.completion import complete

    complete(action, shell)
    return 0
