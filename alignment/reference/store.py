"""The reference store: per-token log-probs on disk, keyed by a hash of the policy and the tokens, and by nothing else.

A policy is named by its identity (a digest of base weights, quantisation and active adapters), a sequence by the
content hash of its prompt and completion tokens. Losses, hyper-parameters, seeds and run names are not part of the key,
so all runs that ask the same policy about the same tokens share one computation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from alignment.files import CacheKind
from alignment.reference.keyed_store import KeyedStore


class ReferenceStore(KeyedStore):
    """Per-token reference log-probs in the SQLite file `path`, which is created if it does not exist.

    `alignment.cache list` shows `model`, `quantization`, `adapter` and `dtype` of what is registered.
    """

    table: ClassVar[str] = "logps"
    title: ClassVar[str] = "reference store"
    example: ClassVar[str] = CacheKind.reference.place
    elsewhere: ClassVar[str] = "reference.path or ALIGNMENT_CACHE"

    def get(self, identity: str, keys: Sequence[bytes]) -> dict[bytes, np.ndarray]:
        """The stored log-probs, (tokens,) float32, of those keys that the store has."""
        found = self.get_bytes(identity, keys)
        return {key: np.frombuffer(value, dtype="<f4").astype(np.float32) for key, value in found.items()}

    def put(self, identity: str, items: Mapping[bytes, np.ndarray]) -> None:
        """Store log-probs, (tokens,) float32 each: all or none.

        Raises:
            ValueError: a value is empty or not finite.
        """
        for key, logps in items.items():
            if logps.dtype != np.float32 or logps.ndim != 1 or not len(logps) or not np.isfinite(logps).all():
                raise ValueError(
                    f"Log-probs of sequence {key.hex()[:12]} must be a finite float32 vector with at least one token, "
                    f"not {logps.dtype} of shape {logps.shape} with {np.count_nonzero(~np.isfinite(logps))} not finite."
                )
        self.put_bytes(identity, {key: logps.astype("<f4").tobytes() for key, logps in items.items()})

    def is_value(self, value: bytes) -> bool:
        """Whether bytes can be log-probs."""
        return len(value) > 0 and len(value) % 4 == 0
