"""Data as a stage uses them, made of its sources and put into the cache, or taken from there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any, Generic, TypeVar

from alignment.config.data import DataConfig
from alignment.data.layouts.recognition import Stage
from alignment.data.preparation.mixture import mixed
from alignment.data.preparation.prepared import Place
from alignment.data.rows.findings import Found
from alignment.data.rows.row import BadRow
from alignment.data.rows.row_facts import RowFacts
from alignment.data.sources.loading import LoadedData, load_rows
from alignment.data.tokens.token_store import TEXTS, Kind, Stored, write_anew
from alignment.data.tokens.tokenization import TokenizedData, TokenizedSFT

_PARTS = ("train", "eval")
_LEFT_OUT = ("bad", "dropped")
_TEXTS = "texts"

P = TypeVar("P", TokenizedData, TokenizedSFT)


@dataclass(frozen=True, slots=True)
class Use(Generic[P]):
    """What the data are prepared for.

    Attributes:
        stage: that they are for.
        kind: of the items.
        part_type: of the training and of the held-out part.
        items: of a part.
        texts: what is kept of many rows, given both parts.
        digest: of the items of both parts.
    """

    stage: Stage
    kind: Kind[Any]
    part_type: type[P]
    items: Callable[[P], Sequence[Any]]
    texts: Callable[[P, P], Iterator[str]]
    digest: Callable[..., str]


@dataclass(frozen=True, slots=True)
class Made(Generic[P]):
    """Data, read and tokenised.

    Attributes:
        texts: what is kept of many rows, which themselves are gone; None for few.
        digest: of many items; None for few.
    """

    loaded: LoadedData
    facts: RowFacts
    train: P
    held_out: P
    texts: Sequence[str] | None = None
    digest: str | None = None


def prepare(config: DataConfig, place: Place | None, tokenize: Callable[..., P], use: Use[P]) -> Made[P]:
    """The data of the place, or data that are made and put there. Few rows stay in memory, with their tokens."""
    found = None if place is None else place.take()
    if place is not None and found is not None:
        try:
            return _taken(*found, use)
        except (OSError, ValueError, KeyError, TypeError) as error:
            place.drop(error)

    folder = None if place is None else place.folder
    read = mixed if config.sources else _single
    loaded, facts, train, held_out = read(config, use.stage, tokenize, use.kind, folder)
    if place is None or (train.written is None and held_out.written is None):
        return Made(loaded, facts, train, held_out)

    # Into files, of which the rest of the content says how they were made
    kept, written = write_anew(place.folder / _TEXTS, TEXTS, use.texts(train, held_out))
    loaded = replace(loaded, train=(), eval=())
    train, held_out = replace(train, rows=()), replace(held_out, rows=())
    digest = use.digest(use.items(train), use.items(held_out))
    place.put(
        {
            "loaded": {f.name: getattr(loaded, f.name) for f in fields(loaded)}
            | {name: _all_as_dict(getattr(loaded, name)) for name in _LEFT_OUT},
            "facts": facts.as_json(),
            "texts": written,
            "digest": digest,
            "parts": [
                {"drops": _all_as_dict(part.drops), "findings": _all_as_dict(part.findings)}
                | {name: getattr(part, name) for name in ("counts", "written")}
                for part in (train, held_out)
            ],
        }
    )
    return Made(loaded, facts, train, held_out, kept, digest)


def _single(
    config: DataConfig, stage: Stage, tokenize: Callable[..., P], kind: Kind[Any], folder: Path | None
) -> tuple[LoadedData, RowFacts, P, P]:
    """One set, read and tokenised; arguments and result as of `mixed`."""
    loaded = load_rows(config, stage=stage, folder=None if folder is None else folder.parent)
    facts = RowFacts.of(chain(loaded.train, loaded.eval))
    are_few = isinstance(loaded.train, list) and isinstance(loaded.eval, list)
    into = [{} if folder is None or are_few else {"folder": folder / name} for name in _PARTS]
    rows = (loaded.train, loaded.eval)
    train, held_out = (tokenize(some, config=config, **there) for some, there in zip(rows, into, strict=True))
    return loaded, facts, train, held_out


def _all_as_dict(items: Sequence[Any]) -> list[dict[str, Any]]:
    return [asdict(item) for item in items]


def _taken(folder: Path, content: dict[str, Any], use: Use[P]) -> Made[P]:
    """What an entry of the cache holds.

    Raises:
        OSError, ValueError: a file is missing or damaged.
        KeyError, TypeError: the content is not what was written.
    """
    train, held_out = (
        use.part_type(
            Stored(folder / name, use.kind, part["written"]),
            (),
            [BadRow(**row) for row in part["drops"]],
            part["counts"],
            [Found(**one) for one in part["findings"]],
            part["written"],
        )
        for name, part in zip(_PARTS, content["parts"], strict=True)
    )
    others = {name: [BadRow(**row) for row in content["loaded"][name]] for name in _LEFT_OUT}
    loaded = LoadedData(**content["loaded"] | others)
    texts = Stored(folder / _TEXTS, TEXTS, content["texts"])
    return Made(loaded, RowFacts.from_json(content["facts"]), train, held_out, texts, content["digest"])
