"""What a judge has said, kept so that nobody pays for the same question twice.

Each judge has a folder of its own, named by its identity, with one SQLite file. A reply is found under its prompt and
the answers in the order in which they were shown, as texts, or as tokens for a judge that reads these, and under
nothing else: no run, no seed, no code of this package. It is kept as it came, so a better reader of verdicts needs no
new one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from alignment.evaluation.judges.base import Item, Judge
from alignment.files import CacheKind, mark_used, to_json
from alignment.reference.keyed_store import KeyedStore

Ask = Callable[[Sequence[Item]], Iterable[tuple[int, Any]]]
"""Asks a judge: yields the place of an item and its reply, a JSON value, in any order; nothing where there is none."""


class JudgementStore(KeyedStore):
    """The replies of one judge. `asked` and `found` count the questions that went to it, and those known already."""

    table: ClassVar[str] = "judgements"
    title: ClassVar[str] = "judgement store"
    example: ClassVar[str] = f"{CacheKind.judgements.place}/judgements.sqlite"
    elsewhere: ClassVar[str] = "reference.path or ALIGNMENT_CACHE"

    def __init__(self, cache: Path, judge: Judge) -> None:
        """Open the store of a judge in a cache folder."""
        folder = CacheKind.judgements.under(cache) / judge.identity[:32]
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__(folder / "judgements.sqlite")
        mark_used(folder)
        self._identity = judge.identity
        self.asked = self.found = 0
        self.register(judge.identity, {"kind": judge.kind, **judge.description()})

    def replies(self, items: Sequence[Item], ask: Ask, tokens: bool = False) -> list[Any | None]:
        """The reply to each item, in order; None where the judge gave none.

        What is not known is asked for, once for equal items, and each reply is kept as soon as it is there.

        Args:
            tokens: whether items are equal whose tokens are, of a judge that is given one answer with its group.
        """
        keys = [item.group.key(0) if tokens and item.group is not None else judgement_key(item) for item in items]
        with self.locked(self._identity):
            known = self._known(keys)
            missing = {key: item for key, item in zip(keys, items, strict=True) if key not in known}
            self.found += len(items) - sum(key in missing for key in keys)
            self.asked += len(missing)
            order = list(missing)
            for place, reply in ask(list(missing.values())) if missing else ():
                known[order[place]] = reply
                self.put_bytes(self._identity, {order[place]: to_json(reply)})
        return [known.get(key) for key in keys]

    def _known(self, keys: Sequence[bytes]) -> dict[bytes, Any]:
        return {key: json.loads(value) for key, value in self.get_bytes(self._identity, keys).items()}


def judgement_key(item: Item) -> bytes:
    """32-byte hash of the prompt and the answers in their order."""
    return hashlib.blake2b(to_json([item.prompt, item.answers]), digest_size=32).digest()
