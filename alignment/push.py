"""`python -m alignment.push RUN HUB_ID [--yes]`: puts the policy of a finished run on the hub, with a model card."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from alignment import spinning  # noqa: F401 - first, because what follows imports torch
from alignment.errors import CommandParser, ending_plainly

FOLDER = "push"
"""In the run's folder: what was made for the hub."""


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="python -m alignment.push",
        description="Put the policy of a finished run on the Hugging Face hub: safetensors, tokenizer, report, "
        "settings and a model card, which is made from the run. Without --yes nothing is sent: you see what would go "
        "up. The repository is private unless you say --public.",
        epilog="Example: python -m alignment.push outputs/quickstart/a me/my-model --license apache-2.0",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a finished run")
    parser.add_argument("repo", metavar="HUB_ID", help="where to, as in me/my-model")
    parser.add_argument("--yes", action="store_true", help="send it")
    parser.add_argument("--public", action="store_true", help="make a public repository, or write to one")
    parser.add_argument("--license", metavar="NAME", help="of what goes up, as the hub writes it (that of the base)")
    parser.add_argument("--base", metavar="HUB_ID", help="the base model, where the run has it from elsewhere")
    return parser


def run(arguments: Sequence[str] | None) -> list[str]:
    """What the command does; returns what it says.

    Raises:
        UserError: arguments that cannot be followed, or a run that cannot be pushed.
    """
    options = _parser().parse_args(arguments)

    # The libraries take seconds to load: only once the words are understood
    from alignment.files import atomic_write_bytes
    from alignment.publishing.contents import left_out, refuse_secrets
    from alignment.publishing.hub import check_name, send
    from alignment.publishing.push import gathered

    check_name(options.repo)
    if options.base is not None:
        check_name(options.base)
    found = gathered(options.run.expanduser(), options.repo, options.base, options.license)
    refuse_secrets(found.uploads)
    folder = found.run.folder / FOLDER
    lines = []
    for upload in found.uploads:
        made = ""
        if isinstance(upload.content, bytes):
            atomic_write_bytes(folder / upload.name, upload.content)
            made = f"   {folder / upload.name}"
        lines.append(f"  {upload.name:<32} {upload.size / 1e6:>10.3f} MB{made}")
    total = sum(upload.size for upload in found.uploads) / 1e6
    seen = "everybody can see it" if options.public else "private"
    lines = [
        f"{options.repo} ({seen}), {len(found.uploads)} files, {total:.1f} MB:",
        *lines,
        *(f"  {name:<32} {'stays here':>13}" for name in left_out(found.policy)),
        *found.hints,
    ]
    if not options.yes:
        return [*lines, "Nothing was sent. Read the card, then add --yes."]
    return [*lines, send(options.repo, found.uploads, options.public)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; `ending_plainly` says how it ends."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with ending_plainly():
        lines = run(arguments)
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
