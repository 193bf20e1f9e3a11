"""A cache with room: a step writes its own keys and values, and only a row that takes the place of another moves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

_ROOM = 32
"""Tokens that are made room for at a time."""


class _RoomyLayer(DynamicLayer):
    """Keys and values as views of larger tensors.

    Whatever else puts new keys and values in their place, only takes the room from them.
    """

    _whole: tuple[Tensor, Tensor] | None = None  # (rows, heads, tokens and room, width)
    _shown: tuple[Tensor, Tensor] | None = None  # the keys and values that are views of these

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take the keys and values of a step; returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        stop = start + key_states.shape[-2]
        whole = self._roomy()
        if whole is None or whole[0].shape[-2] < stop:
            whole = self._moved(stop + _ROOM, key_states, value_states)
        rows = len(key_states)
        for tensor, new in zip(whole, (key_states, value_states), strict=True):
            tensor[:rows, :, start:stop] = new
        return self._show(whole, rows, stop)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take these rows. Where rows beyond the new end take the places of some before it, nothing else moves."""
        whole, kept = self._roomy(), len(beam_idx)
        places = torch.arange(kept, device=beam_idx.device)
        moved = (beam_idx != places).nonzero().squeeze(1)
        sources = beam_idx[moved]
        if whole is None or not bool((sources >= kept).all()):
            super().reorder_cache(beam_idx)  # type: ignore[arg-type]
            return
        length = self.get_seq_length()
        for tensor in whole:
            tensor[moved, :, :length] = tensor[sources, :, :length]
        self._show(whole, kept, length)

    def _roomy(self) -> tuple[Tensor, Tensor] | None:
        """The larger tensors, if the keys and values are still views of them."""
        known = self._shown is not None and self.keys is self._shown[0] and self.values is self._shown[1]
        return self._whole if known else None

    def _moved(self, size: int, *states: Tensor) -> tuple[Tensor, Tensor]:
        """Larger tensors that begin with the keys and values."""
        whole = []
        for held, new in zip((self.keys, self.values), states, strict=True):
            tensor = new.new_empty(*new.shape[:2], size, new.shape[-1])
            if held is not None and held.numel():
                tensor[:, :, : held.shape[-2]] = held
            whole.append(tensor)
        return whole[0], whole[1]

    def _show(self, whole: tuple[Tensor, Tensor], rows: int, length: int) -> tuple[Tensor, Tensor]:
        keys, values = (tensor[:rows, :, :length] for tensor in whole)
        self.keys, self.values = keys, values
        self._whole, self._shown = whole, (keys, values)
        return keys, values


def make_roomy(cache: Any) -> None:
    """Give an empty cache room, in its layers of full attention; other layers and other caches stay as they are."""
    if type(cache) is not DynamicCache:
        return
    cache.layers = [_RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = _RoomyLayer
