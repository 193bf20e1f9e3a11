"""What the cache holds, whether it is sound, and how to make it smaller: `python -m alignment.cache`."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import PurePath
from typing import NoReturn

from rich.console import Console
from rich.table import Table
from rich.text import Text

from alignment.errors import UserError
from alignment.files import cache_dir
from alignment.reference.store import REFERENCE_FILE, IdentityInfo, ReferenceStore, damaged_files
from alignment.stages.store import STAGES_FOLDER, StageStore, StoredStage

_WIDE = 160


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message[0].upper()}{message[1:]}; see {self.prog} --help.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 0, or 1 for damage found and for what the user can mend."""
    try:
        arguments = _parser().parse_args(argv)
        folder = cache_dir(arguments.path)
        path, stages = folder / REFERENCE_FILE, StageStore(folder / STAGES_FOLDER)
        if not path.exists() and not damaged_files(path):
            _say(f"No reference log-probs are stored in {folder} yet.")
            if not stages.stored():
                return 0
        with ReferenceStore(path) as store:
            if arguments.command == "list":
                _list(store)
                _list_stages(stages)
                return 0
            if arguments.command == "verify":
                return max(_verify(store), _verify_stages(stages))
            return _prune(store, stages, arguments)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m alignment.cache",
        description="Inspect the stored reference log-probs, SFT stages and answers to held-out prompts.",
    )
    common = _Parser(add_help=False)
    common.add_argument(
        "--path", metavar="FOLDER", help="cache folder (default: $ALIGNMENT_CACHE or ~/.cache/alignment)"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="list|verify|prune")
    commands.add_parser(
        "list", parents=[common], help="the policies whose log-probs are stored, the stages and the answers"
    )
    commands.add_parser("verify", parents=[common], help="check everything; set aside what is damaged and exit with 1")
    prune = commands.add_parser("prune", parents=[common], help="remove some of what is stored, or all")
    which = prune.add_mutually_exclusive_group(required=True)
    which.add_argument("--older-than", metavar="DAYS", type=_days, help="not used for so long, e.g. 30d")
    which.add_argument("--identity", metavar="PREFIX", help="the one whose id begins so")
    which.add_argument(
        "--max-mb", metavar="MB", type=_megabytes, help="of each kind the least recently used beyond this size"
    )
    which.add_argument("--all", action="store_true", help="everything, with the damaged files that were kept")
    return parser


def _days(text: str) -> int:
    match = re.fullmatch(r"(\d{1,6})d", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"a number of days such as 30d is wanted, not '{text}'")
    return int(match[1])


def _megabytes(text: str) -> int:
    if not re.fullmatch(r"\d{1,9}", text):
        raise argparse.ArgumentTypeError(f"a whole number of megabytes such as 500 is wanted, not '{text}'")
    return int(text) * 1_000_000


def _list(store: ReferenceStore) -> None:
    infos = store.identities()
    if infos:
        table = Table()
        table.add_column("id", no_wrap=True)
        table.add_column("model", overflow="fold")
        for name in ("quantization", "adapter", "dtype"):
            table.add_column(name, no_wrap=True)
        for name in ("sequences", "tokens", "MB", "last used"):
            table.add_column(name, justify="right", no_wrap=True)
        for info in infos:
            table.add_row(
                info.identity[:12],
                Text(_model(info)),
                _shown(info, "quantization"),
                _shown(info, "adapter")[:12],
                _shown(info, "dtype"),
                f"{info.sequences:,}",
                f"{info.tokens:,}",
                _mb(info.bytes),
                _date(info.last_used),
            )
        # Into a pipe or a file the rows go whole, whatever width a terminal would have.
        Console(width=None if sys.stdout.isatty() else _WIDE).print(table)
    else:
        _say("No reference log-probs are stored.")
    _say(f"{store.path}: {_mb(store.size())} MB on disk.")
    for file in damaged_files(store.path):
        _say(f"Damaged and kept: {file} ({_mb(file.stat().st_size)} MB).")


def _list_stages(stages: StageStore) -> None:
    stored = stages.stored()
    if not stored:
        return
    table = Table()
    for name in ("id", "stage", "model"):
        table.add_column(name, overflow="fold")
    for name in ("steps", "MB", "last used"):
        table.add_column(name, justify="right", no_wrap=True)
    for stage in stored:
        described = stage.content.get("description", {})
        table.add_row(
            stage.key[:12],
            described.get("stage", "damaged"),
            Text(_short(str(described.get("model", "-")))),
            str(stage.content.get("result", {}).get("steps", "-")),
            _mb(stage.bytes),
            _date(stage.last_used),
        )
    Console(width=None if sys.stdout.isatty() else _WIDE).print(table)
    _say(f"{stages.folder}: {_mb(sum(stage.bytes for stage in stored))} MB on disk.")


def _verify(store: ReferenceStore) -> int:
    sound = store.verify()
    for file, reason in store.damaged.items():
        _say(f"The store was damaged ({reason}). It is kept as {file}; its values are computed again when needed.")
    _say(f"{sound:,} sequences are sound in {store.path}.")
    return 1 if store.damaged else 0


def _verify_stages(stages: StageStore) -> int:
    sound, damaged = stages.verify()
    for key in damaged:
        _say(f"The result {key[:12]} was damaged and is dropped; it will be computed again when it is needed.")
    if sound or damaged:
        _say(f"{sound:,} results of stages are sound in {stages.folder}.")
    return 1 if damaged else 0


def _prune(store: ReferenceStore, stages: StageStore, arguments: argparse.Namespace) -> int:
    if arguments.identity is not None:
        identity = _resolve(store, stages, arguments.identity)
        pruned = store.prune(identity=identity)
        removed = [stage for stage in stages.stored() if stage.key == identity]
    else:
        pruned = store.prune(older_than_days=0 if arguments.all else arguments.older_than, max_bytes=arguments.max_mb)
        removed = _too_many(stages.stored(), 0 if arguments.all else arguments.older_than, arguments.max_mb)
    for stage in removed:
        with stages.locked(stage.key):
            stages.drop(stage.key)
        _say(f"Removed the result {stage.key[:12]}: {_mb(stage.bytes)} MB.")
    freed = pruned.freed
    if arguments.all:
        for file in damaged_files(store.path):
            freed += file.stat().st_size
            file.unlink()
    for info in pruned.identities:
        _say(f"Removed {info.identity[:12]} ({_shown(info, 'model')}): {info.sequences:,} sequences.")
    _say(f"{len(pruned.identities)} policies removed, {_mb(max(0, freed))} MB freed, {_mb(store.size())} MB left.")
    return 0


def _too_many(stored: Sequence[StoredStage], days: int | None, max_bytes: int | None) -> list[StoredStage]:
    """Those that were not used for so many days, or that do not fit into so many bytes; `stored` begins with the last
    used.
    """
    if days is not None:
        return [stage for stage in stored if stage.last_used <= time.time() - days * 86400]
    totals = accumulate(stage.bytes for stage in stored)
    return [stage for stage, total in zip(stored, totals, strict=True) if max_bytes is not None and total > max_bytes]


def _resolve(store: ReferenceStore, stages: StageStore, prefix: str) -> str:
    known = [info.identity for info in store.identities()] + [stage.key for stage in stages.stored()]
    matches = [identity for identity in known if prefix and identity.startswith(prefix.lower())]
    if len(matches) != 1:
        found = ", ".join(sorted(match[:12] for match in matches)) or "none"
        raise UserError(f"--identity must begin exactly one stored id, and '{prefix}' begins {found}.")
    return matches[0]


def _shown(info: IdentityInfo, key: str) -> str:
    value = info.description.get(key)
    return "-" if value is None else str(value)


def _model(info: IdentityInfo) -> str:
    return _short(_shown(info, "model"))


def _short(name: str) -> str:
    """A hub id as it is, of a folder the last part."""
    return PurePath(name).name if PurePath(name).is_absolute() else name


def _mb(count: int) -> str:
    return f"{count / 1e6:,.1f}"


def _date(seconds: float) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds, UTC).astimezone():%Y-%m-%d %H:%M}"
    except (OverflowError, ValueError, OSError):  # the row's own bytes are damaged
        return "?"


def _say(line: str) -> None:
    Console().print(line, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
