"""Answers that were drawn before: found by who answers and what is asked, so that nobody draws them twice.

Who answers is an engine's identity: that of the policy, with its adapter, and of what draws. What is asked is the
prompt's tokens, the settings that decide an answer, and the answer's index. No run, no code of this package and no
device is part of it: what a policy has answered once is an answer of this policy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from alignment.evaluation.sampling.answer import Answer, Finish, Sampling, Wanted
from alignment.evaluation.sampling.draw import Engine
from alignment.files import CacheKind, mark_used, to_json
from alignment.reference.keyed_store import KeyedStore

_PART = 1024
"""Answers that are drawn before they are kept: what a run that is killed loses at most."""
_FINISHES = list(Finish)


class AnswerStore(KeyedStore):
    """An engine that keeps what another one draws, in a folder of its identity below the cache.

    Attributes:
        drawn: answers that the other engine was asked for.
        tokens: of these answers.
        found: answers that were there.
    """

    table: ClassVar[str] = "answers"
    title: ClassVar[str] = "store of answers"
    example: ClassVar[str] = f"{CacheKind.answers.place}/answers.sqlite"
    elsewhere: ClassVar[str] = "reference.path or ALIGNMENT_CACHE"

    def __init__(self, cache: Path, engine: Engine) -> None:
        self._engine = engine
        self._identity, description = engine.identity()
        folder = CacheKind.answers.under(cache) / self._identity[:32]
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__(folder / "answers.sqlite")
        mark_used(folder)
        self.register(self._identity, description)
        self.drawn = self.tokens = self.found = 0

    def identity(self) -> tuple[str, dict[str, Any]]:
        """That of the engine."""
        return self._engine.identity()

    def decisive(self, how: Sampling) -> dict[str, Any]:
        """What the engine says of the settings."""
        return self._engine.decisive(how)

    def draw(self, wanted: Sequence[Wanted], how: Sampling) -> list[list[Answer]]:
        """The answers that are wanted of each prompt, in order; those that are not known are drawn, and kept.

        Another process that wants answers of the same policy waits.
        """
        settings = to_json(self._engine.decisive(how))
        keys = {(n, i): _key(settings, prompt, i) for n, (prompt, indices) in enumerate(wanted) for i in indices}
        with self.locked(self._identity):
            known = {
                key: _from_bytes(value) for key, value in self.get_bytes(self._identity, list(keys.values())).items()
            }
            self.found += len(known)
            missing = [(n, [i for i in indices if keys[n, i] not in known]) for n, (_, indices) in enumerate(wanted)]
            for part in _parts([(n, indices) for n, indices in missing if indices], [len(p) for p, _ in wanted]):
                answers = self._engine.draw([(wanted[n][0], indices) for n, indices in part], how)
                new = {
                    keys[n, index]: answer
                    for (n, indices), found in zip(part, answers, strict=True)
                    for index, answer in zip(indices, found, strict=True)
                }
                self.put_bytes(self._identity, {key: _to_bytes(answer) for key, answer in new.items()})
                known |= new
                self.drawn += len(new)
                self.tokens += sum(len(answer.tokens) for answer in new.values())
        return [[known[keys[n, index]] for index in indices] for n, (_, indices) in enumerate(wanted)]

    def is_value(self, value: bytes) -> bool:
        """Whether bytes can be an answer."""
        return len(value) % 8 == 4 and len(value) > 4


def _parts(missing: list[tuple[int, list[int]]], lengths: Sequence[int]) -> list[list[tuple[int, list[int]]]]:
    """The prompts and indices in parts that are kept together, prompts of similar length in one."""
    parts: list[list[tuple[int, list[int]]]] = []
    room = 0
    for number, indices in sorted(missing, key=lambda one: lengths[one[0]]):
        if room <= 0:
            parts.append([])
            room = _PART
        parts[-1].append((number, indices))
        room -= len(indices)
    return parts


def _key(settings: bytes, prompt: np.ndarray, index: int) -> bytes:
    digest = hashlib.blake2b(settings, digest_size=32)
    digest.update(index.to_bytes(8, "little"))
    digest.update(prompt.astype("<i4").tobytes())
    return digest.digest()


def _to_bytes(answer: Answer) -> bytes:
    finish = np.array([_FINISHES.index(answer.finish)], "<i4")
    return b"".join((finish.tobytes(), answer.tokens.astype("<i4").tobytes(), answer.logps.astype("<f4").tobytes()))


def _from_bytes(value: bytes) -> Answer:
    finish, *_ = np.frombuffer(value[:4], "<i4")
    half = 4 + (len(value) - 4) // 2
    tokens, logps = np.frombuffer(value[4:half], "<i4"), np.frombuffer(value[half:], "<f4")
    return Answer(tokens.astype(np.int32), logps.astype(np.float32), _FINISHES[finish])
