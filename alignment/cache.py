"""`python -m alignment.cache list | verify | prune`: shows, checks or removes what runs keep for later ones."""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path, PurePath

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from alignment.errors import CommandParser, UserError, ending_plainly
from alignment.files import CacheKind, cache_dir
from alignment.reference.keyed_store import IdentityInfo, damaged_files
from alignment.reference.store import ReferenceStore
from alignment.stages.store import StageStore

_WIDE = 1000
"""Into a pipe or a file every row goes whole, however wide."""


def run(arguments: Sequence[str] | None) -> int:
    """What the command does; returns the exit status: 1 if it found damage.

    Raises:
        UserError: arguments that cannot be followed, or a store that cannot be read.
    """
    options = _parser().parse_args(arguments)
    folder = cache_dir(options.path)
    path, stages = CacheKind.reference.under(folder), StageStore(CacheKind.stages.under(folder))
    files = _entries(folder)
    if not path.exists() and not damaged_files(path):
        _say(f"No reference log-probs are stored in {folder} yet.")
        if not stages.stored() and not files:
            return 0
    with ReferenceStore(path) as store:
        if options.command == "verify":
            return max(_verify(store), _verify_stages(stages))
        if options.command == "prune":
            return _prune(store, stages, files, options)
        _list(store)
    _list_stages(stages)
    _list_entries(files)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status, and `ending_plainly` says how it ends where it cannot."""
    with ending_plainly():
        status = run(arguments)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="python -m alignment.cache",
        description=f"Look at what runs keep for later ones, or remove it: {', '.join(k.place for k in CacheKind)}.",
    )
    common = CommandParser(add_help=False)
    common.add_argument("--path", metavar="FOLDER", help="default: $ALIGNMENT_CACHE or ~/.cache/alignment")
    commands = parser.add_subparsers(dest="command", required=True, metavar="list|verify|prune")
    commands.add_parser("list", parents=[common], help="show what is stored")
    commands.add_parser("verify", parents=[common], help="check everything and drop damaged entries")
    prune = commands.add_parser(
        "prune",
        parents=[common],
        usage="%(prog)s [--path FOLDER]\n  (--older-than DAYS | --identity PREFIX | --max-mb MB | --all)",
        help="remove some entries, or all",
    )
    which = prune.add_mutually_exclusive_group(required=True)
    which.add_argument("--older-than", metavar="DAYS", type=_days, help="entries not used for so long, e.g. 30d")
    which.add_argument("--identity", metavar="PREFIX", help="the one entry whose id begins with this")
    which.add_argument(
        "--max-mb", metavar="MB", type=_megabytes, help="of each kind the least recently used over this size"
    )
    which.add_argument("--all", action="store_true", help="everything, damaged files too")
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


def _table(numbers: Sequence[str], texts: Sequence[str], last: str) -> Table:
    """Columns of texts and numbers, and last a long one, which wraps on a screen and stays whole in a pipe."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in texts:
        table.add_column(name, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column(last, overflow="fold")
    return table


def _show(table: Table) -> None:
    Console(width=None if sys.stdout.isatty() else _WIDE).print(table)


def _list(store: ReferenceStore) -> None:
    infos = store.identities()
    if infos:
        table = _table(["sequences", "tokens", "MB", "last used"], ["id"], "policy")
        for info in infos:
            table.add_row(
                info.identity[:12],
                f"{info.entries:,}",
                f"{info.value_bytes // 4:,}",
                _mb(info.bytes),
                _date(info.last_used),
                Text(_policy(info)),
            )
        _show(table)
    else:
        _say("No reference log-probs are stored.")
    _say(f"{store.path}: {_mb(store.size())} MB on disk.")
    for file in damaged_files(store.path):
        _say(f"Damaged and kept: {file} ({_mb(file.stat().st_size)} MB).")


def _list_stages(stages: StageStore) -> None:
    stored = stages.stored()
    if not stored:
        return
    table = _table(["steps", "MB", "last used"], ["id", "stage"], "model")
    for stage in stored:
        described = stage.content.get("description", {})
        table.add_row(
            stage.key[:12],
            described.get("stage", "damaged"),
            str(stage.content.get("result", {}).get("steps", "-")),
            _mb(stage.bytes),
            _date(stage.last_used),
            Text(_short(str(described.get("model", "-")))),
        )
    _show(table)
    _say(f"{stages.folder}: {_mb(sum(stage.bytes for stage in stored))} MB on disk.")


# Kinds whose entries are files that a run makes anew when they are gone, and checks when it reads them


@dataclass(frozen=True, slots=True)
class _Entry:
    """One of them; `last_used` in seconds since 1970."""

    kind: CacheKind
    path: Path
    bytes: int
    last_used: float

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def id(self) -> str:
        """As it is listed: a hash is cut, the name of a model stays whole."""
        return self.name[:12] if re.match("[0-9a-f]{32}", self.name) else self.name

    def remove(self) -> None:
        """At once for those that look for it: what is being removed has another name."""
        going = self.path.with_name(f".{self.name}.removed")
        shutil.rmtree(going, ignore_errors=True)
        self.path.rename(going)
        if going.is_dir():
            shutil.rmtree(going)
        else:
            going.unlink()


def _entries(folder: Path) -> list[_Entry]:
    """Of every kind but reference and stages, which have stores of their own; of each kind the last used first."""
    found = []
    for kind in CacheKind:
        if kind not in (CacheKind.reference, CacheKind.stages):
            for path in kind.under(folder).glob("[!.]*"):
                if path.suffix != ".lock":
                    inner = [path, *path.rglob("*")]
                    size = sum(file.stat().st_size for file in inner if file.is_file())
                    found.append(_Entry(kind, path, size, path.stat().st_mtime))
    order = list(CacheKind)
    return sorted(found, key=lambda entry: (order.index(entry.kind), -entry.last_used, entry.name))


def _list_entries(files: Sequence[_Entry]) -> None:
    if not files:
        return
    table = _table(["MB", "last used"], ["id", "kind"], "what it is")
    for entry in files:
        table.add_row(entry.id, entry.kind.place, _mb(entry.bytes), _date(entry.last_used), entry.kind.holds)
    _show(table)


def _unused(files: Sequence[_Entry], older_than_days: float | None, max_bytes: int | None) -> list[_Entry]:
    """Those that were not used for so many days, and the least recently used ones of a kind over a size."""
    found = []
    for kind in CacheKind:
        own = [entry for entry in files if entry.kind is kind]
        for entry, total in zip(own, accumulate(entry.bytes for entry in own), strict=True):
            old = older_than_days is not None and entry.last_used <= time.time() - older_than_days * 86400
            if old or (max_bytes is not None and total > max_bytes):
                found.append(entry)
    return found


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


def _prune(store: ReferenceStore, stages: StageStore, files: Sequence[_Entry], arguments: argparse.Namespace) -> int:
    if arguments.identity is not None:
        identity = _resolve(store, stages, files, arguments.identity)
        pruned = store.prune(identity=identity)
        removed = stages.prune(key=identity)
        dropped = [entry for entry in files if entry.name == identity]
    else:
        dropped = _unused(files, 0 if arguments.all else arguments.older_than, arguments.max_mb)
        pruned = store.prune(older_than_days=0 if arguments.all else arguments.older_than, max_bytes=arguments.max_mb)
        removed = stages.prune(older_than_days=0 if arguments.all else arguments.older_than, max_bytes=arguments.max_mb)
    for stage in removed:
        _say(f"Removed the result {stage.key[:12]}: {_mb(stage.bytes)} MB.")
    for entry in dropped:
        entry.remove()
        _say(f"Removed {entry.id} of {entry.kind.place}: {_mb(entry.bytes)} MB.")
    freed = pruned.freed
    if arguments.all:
        for file in damaged_files(store.path):
            freed += file.stat().st_size
            file.unlink()
    for info in pruned.identities:
        _say(f"Removed {info.identity[:12]} ({info.description.get('model', '-')}): {info.entries:,} sequences.")
    _say(f"{len(pruned.identities)} policies removed, {_mb(max(0, freed))} MB freed, {_mb(store.size())} MB left.")
    return 0


def _resolve(store: ReferenceStore, stages: StageStore, files: Sequence[_Entry], prefix: str) -> str:
    known = [info.identity for info in store.identities()] + [stage.key for stage in stages.stored()]
    known += [entry.name for entry in files]
    matches = [identity for identity in known if prefix and identity.startswith(prefix.lower())]
    if len(matches) != 1:
        found = ", ".join(sorted(match[:12] for match in matches)) or "none"
        raise UserError(f"--identity must begin exactly one stored id, and '{prefix}' begins {found}.")
    return matches[0]


def _policy(info: IdentityInfo) -> str:
    """The model, and what is special about its weights."""
    described = info.description
    parts = [_short(str(described.get("model") or "-"))]
    parts += [str(described[key]) for key in ("dtype", "quantization") if described.get(key) is not None]
    if described.get("adapter") is not None:
        parts.append(f"adapter {str(described['adapter'])[:12]}")
    return ", ".join(parts)


def _short(name: str) -> str:
    """A hub id as it is, of a folder the last part."""
    return PurePath(name).name if PurePath(name).is_absolute() else name


def _mb(count: int) -> str:
    return f"{count / 1e6:,.1f}"


def _date(seconds: float) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds, UTC).astimezone():%Y-%m-%d}"
    except (OverflowError, ValueError, OSError):  # the row's own bytes are damaged
        return "?"


def _say(line: str) -> None:
    Console().print(line, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
