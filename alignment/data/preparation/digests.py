"""Digests of tokens as they train: they name results that another run may take over."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import fields

import numpy as np

from alignment.types import Group

_APART = ("prompt", "completions", "source", "scored", "dataset")
_BESIDE_TOKENS = tuple(f.name for f in fields(Group) if f.name not in _APART)


def groups_digest(*parts: Sequence[Group]) -> str:
    """Digest of groups as they train: tokens, weights, labels and scores, but not where they came from."""
    digest = hashlib.blake2b(digest_size=16)
    for groups in parts:
        digest.update(f"{len(groups)} groups;".encode())
        for group in groups:
            for tokens in (group.prompt, *group.completions):
                digest.update(f"{len(tokens)}:".encode())
                digest.update(np.ascontiguousarray(tokens, dtype="<i4").data)
            digest.update(repr([getattr(group, name) for name in _BESIDE_TOKENS]).encode())
            for mask in group.scored or ():
                digest.update(b"scored" + np.packbits(mask).tobytes())
    return digest.hexdigest()


def sequences_digest(*parts: Sequence[Mapping[str, Sequence[float]]]) -> str:
    """The same for SFT sequences; it names their stage's result too."""
    digest = hashlib.blake2b(digest_size=16)
    for sequences in parts:
        digest.update(f"{len(sequences)} sequences;".encode())
        for sequence in sequences:
            for name, values in sorted(sequence.items()):
                digest.update(f"{name}{len(values)}:".encode())
                digest.update(np.asarray(values, dtype="<f8").data)
    return digest.hexdigest()
