"""Several sources as one set of training rows: how many rows each gives, which, and in which order.

A seed and the content of the rows decide, not the machine, the order of the files or the number of their rows per file.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from itertools import count, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from alignment.config.data import DataConfig, Exhausted
from alignment.data.layouts.recognition import Stage
from alignment.data.preparation.prepared import SOURCES
from alignment.data.rows.reasons import UnusableRows
from alignment.data.rows.row import Row, content_key, fingerprint, prompt_key
from alignment.data.rows.row_facts import RowFacts
from alignment.data.sources.loading import LoadedData, Sieve, load_rows, overlaps
from alignment.data.tokens.token_store import Kind, write_anew
from alignment.data.tokens.tokenization import TokenizedData, TokenizedSFT
from alignment.errors import UserError
from alignment.types import Group, MadeOnDemand


def place_of(source: str, stage: Stage) -> str:
    """The place of a source of a mixture in the settings."""
    return f"{'sft.' if stage == 'sft' else ''}data.sources.{source}"


def of_source(text: str, config: DataConfig, place: str) -> str:
    """A message on a source, with the setting of the template that writes its rows; `config` is of the source."""
    return text if config.chat_template is None else text.replace("model.chat_template", f"{place}.chat_template")


@contextmanager
def _naming(config: DataConfig, place: str) -> Iterator[None]:
    """Say in messages which source of the mixture they are about."""
    try:
        yield
    except UnusableRows as error:
        error.args = (f"{place}: {of_source(str(error), config, place)}",)
        raise
    except UserError as error:
        raise UserError(f"{place}: {of_source(str(error), config, place)}") from error


P = TypeVar("P", TokenizedData, TokenizedSFT)


def mixed(
    config: DataConfig, stage: Stage, tokenize: Callable[..., P], kind: Kind[Any], folder: Path | None
) -> tuple[LoadedData, RowFacts, P, P]:
    """A mixture, read and tokenised: how it was read, its training part as an epoch draws it, its held-out part.

    The sources are tokenised one by one, each with its own settings, and drawn from afterwards: rows that cannot be
    tokenised count for none. If one of them is large, the tokens of the mixture go into files, in the order of an
    epoch.

    Args:
        tokenize: a part of a source, given its rows, `config` and perhaps `folder`.
        kind: of the items.
        folder: for the rows and tokens of large sources; None: everything stays in memory.

    Raises:
        UserError: a source cannot be read, or has nothing that can be used.
    """
    sieve = Sieve(config)
    loaded: dict[str, LoadedData] = {}
    trains: dict[str, Any] = {}
    evals: dict[str, Any] = {}
    for name, own in config.parts.items():
        place = place_of(name, stage)
        with _naming(own, place):
            where = config.sources[name].where
            rows_folder = None if folder is None else folder.parent
            loaded[name] = load_rows(own, stage=stage, folder=rows_folder, where=where, sieve=sieve)
            for rows, parts, part in ((loaded[name].train, trains, "train"), (loaded[name].eval, evals, "eval")):
                are_few = isinstance(rows, list)
                into = {} if folder is None or are_few else {"folder": folder / SOURCES / name / part}
                made = tokenize(rows, config=own, **into)
                drops = [replace(row, message=of_source(row.message, own, place)) for row in made.drops]
                parts[name] = replace(made, drops=drops)
    contents = {name: np.array([content_key(row) for row in part.rows], np.uint64) for name, part in trains.items()}
    order = draw(config, contents)
    every = [(number, index) for number, part in enumerate(evals.values()) for index in range(len(part.rows))]
    train, held_out = _joined(trains, order), _joined(evals, np.array(every, dtype=np.int64).reshape(-1, 2))
    if folder is not None and any(part.written is not None for part in (*trains.values(), *evals.values())):
        train, held_out = _in_files(train, folder / "train", kind), _in_files(held_out, folder / "eval", kind)
    facts = RowFacts.of(row for part in (*trains.values(), held_out) for row in part.rows)
    kept = {name: (len(trains[name].rows), len(evals[name].rows)) for name in loaded}
    return _described(config, loaded, order, train.rows, held_out.rows, contents, kept), facts, train, held_out


def _joined(parts: Mapping[str, P], order: np.ndarray) -> P:
    """One set of tokens in the given order, and all that was said of the parts."""
    first: Any = next(iter(parts.values()))
    in_memory = all(part.written is None for part in parts.values())

    def drawn(field: str) -> Sequence[Any]:
        items = Drawn({name: getattr(part, field) for name, part in parts.items()}, order)
        return list(items) if in_memory else items

    return replace(
        first,
        **{field: drawn(field) for field in (_items(first), "rows")},
        drops=[row for part in parts.values() for row in part.drops],
        counts=dict(sum((Counter(part.counts) for part in parts.values()), Counter())),
        findings=[found for part in parts.values() for found in part.findings],
        written=None,
    )


def _items(part: P) -> str:
    return "groups" if isinstance(part, TokenizedData) else "sequences"


def _in_files(part: P, folder: Path, kind: Kind[Any]) -> P:
    """The same items in files of their own, in their order."""
    found: Any = part
    items, written = write_anew(folder, kind, getattr(part, _items(part)))
    return replace(found, **{_items(part): items}, written=written)


class Drawn(MadeOnDemand[Any]):
    """Items of several sequences in one order; groups know the name of theirs.

    Args:
        parts: the sequences by name.
        order: (items, 2) the number of the sequence and the place in it of each item.
    """

    def __init__(self, parts: Mapping[str, Sequence[Any]], order: np.ndarray) -> None:
        self._names = list(parts)
        self._parts = list(parts.values())
        self._order = order

    def __len__(self) -> int:
        return len(self._order)

    def item(self, place: int) -> Any:
        """See `MadeOnDemand`."""
        part, there = self._order[place].tolist()
        item = self._parts[part][there]
        return replace(item, dataset=self._names[part]) if isinstance(item, Group) else item


def epoch_sizes(config: DataConfig, rows: Mapping[str, int]) -> dict[str, int]:
    """How many training rows each source gives to an epoch.

    Those with a `count` give so many, those without any share all of theirs. The others give rows in proportion to
    their weights: until the first of them has no more rows (`exhausted=stop`), or until each has given all of its rows
    (`exhausted=repeat`). A source with a weight above 0 gives a row at least.

    Args:
        rows: how many rows each source has.

    Raises:
        UserError: a count above the number of rows, without `exhausted=repeat`.
    """
    stops = config.exhausted is Exhausted.stop
    weights = {name: Fraction(str(s.weight)) for name, s in config.sources.items() if s.weight is not None}
    most = [rows[name] / weight for name, weight in weights.items() if weight]
    scale = (min if stops else max)(most, default=Fraction(0))
    sizes = {}
    for name, source in config.sources.items():
        if source.count is not None:
            if stops and source.count > rows[name]:
                raise UserError(
                    f"data.sources.{name}.count={source.count} asks for more than its {rows[name]} rows: lower it, or "
                    f"set data.exhausted=repeat, with which rows are drawn more than once."
                )
            sizes[name] = source.count
        elif name in weights:
            sizes[name] = max(1, math.floor(weights[name] * scale)) if weights[name] else 0
        else:
            sizes[name] = rows[name]
    return sizes


def draw(config: DataConfig, contents: Mapping[str, np.ndarray]) -> np.ndarray:
    """(rows, 2): the training rows of an epoch in their order, each as the number of its source and its place there.

    The rows of a source follow in the order of a hash of the seed and their content; where it gives more rows than it
    has, it begins again in another order. The sources are interleaved evenly: the j-th of n rows stands at (j - 1/2)/n
    of the way, so that every beginning of the epoch is mixed like the whole.

    Args:
        contents: (rows,) the `content_key` of each training row, by source.

    Raises:
        UserError: as `epoch_sizes`.
    """
    sizes = epoch_sizes(config, {name: len(own) for name, own in contents.items()})
    parts = []
    for number, (name, own) in enumerate(contents.items()):
        size = sizes[name]
        drawn = np.fromiter(islice(_passes(own.tolist(), config.seed), size), np.int64, size)
        places = (np.arange(size) + 0.5) / size
        parts.append((places, np.full(size, number), drawn))
    places, numbers, drawn = (np.concatenate(part) for part in zip(*parts, strict=True))
    order = np.lexsort([numbers, places])  # stable: rows of one source keep their order
    return np.stack([numbers, drawn], axis=1)[order][: config.limit]


def _described(
    config: DataConfig,
    loaded: Mapping[str, LoadedData],
    order: np.ndarray,
    train: Sequence[Row],
    held_out: Sequence[Row],
    contents: Mapping[str, np.ndarray],
    kept: Mapping[str, tuple[int, int]],
) -> LoadedData:
    """The mixture as one set.

    Args:
        loaded: what was read of each source.
        order: of `draw`.
        train, held_out: the rows in their order.
        contents: of `draw`.
        kept: how many training and held-out rows each source has, once tokenised.
    """
    drawn = dict(zip(loaded, np.bincount(order[:, 0], minlength=len(loaded)).tolist(), strict=True))
    sources = {
        name: {
            "train": drawn[name],
            "of": kept[name][0],
            "share": drawn[name] / max(1, len(order)),
            "eval": kept[name][1],
            "layout": part.layout,
            "fingerprint": part.fingerprint,
        }
        for name, part in loaded.items()
    }
    notes = [f"{config.title}: {len(train)} training and {len(held_out)} held-out rows"]
    notes += [f"{name}: {part.description}" for name, part in loaded.items()]
    first = next(iter(loaded.values()))
    prompts = [np.array([prompt_key(row) for row in rows]) for rows in (train, held_out)]
    everything = np.concatenate(list(contents.values()))
    notes += [f"in all sources together {note}" for note in overlaps(everything, *prompts)]
    return LoadedData(
        train=train,
        eval=held_out,
        layout=", ".join(dict.fromkeys(part.layout for part in loaded.values())),
        family=next((part.family for part in loaded.values() if part.family == "lists"), first.family),
        bad=[row for part in loaded.values() for row in part.bad],
        fingerprint=fingerprint(train, held_out),
        description="; ".join(notes),
        dropped=[row for part in loaded.values() for row in part.dropped],
        sources=sources,
    )


def source_in_words(name: str, facts: Mapping[str, Any]) -> str:
    """What a source has given, for the log and the report."""
    train, of = facts["train"], facts["of"]
    times = f", {of and train / of:.2g} times each" if train > of else ""
    return (
        f"{name}: {train} training rows of {of}{times} ({facts['share']:.1%} of the mixture), {facts['eval']} held out"
    )


def _passes(keys: Sequence[int], seed: int) -> Iterator[int]:
    """The places of all rows in a shuffled order, again and again."""
    for number in count():
        begin = hashlib.blake2b(f"{seed}:{number}:".encode(), digest_size=8)

        def order(index: int, begin: hashlib.blake2b = begin) -> tuple[bytes, int]:
            digest = begin.copy()
            digest.update(keys[index].to_bytes(8, "big"))
            return digest.digest(), index

        yield from sorted(range(len(keys)), key=order)
