"""The weights of a model as its files have them, one by one: a base in 4 bits has lost them."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from alignment.errors import UserError

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class FloatWeights:
    """Reads single weights of a model that transformers can load.

    Args:
        source: a folder, or a hub id that is in the local cache.
        revision: of a hub id.
    """

    def __init__(self, source: str, revision: str | None) -> None:
        self._source = source
        self._revision = revision

    def weight(self, layer: str, shape: tuple[int, ...]) -> Tensor:
        """The weight of a layer in fp32, on the CPU.

        Args:
            layer: its name in the model.
            shape: that it must have.

        Raises:
            UserError: the files have no such weight in floating point.
        """
        found: list[Tensor] = []
        for key in self._candidates(layer):
            with safe_open(self._files[key], "pt") as file:
                weight: Tensor = file.get_tensor(key)
            if weight.is_floating_point() and weight.element_size() > 1 and tuple(weight.shape) == shape:
                found.append(weight)
        if len(found) == 1:
            return found[0].to(torch.float32)
        raise UserError(
            f"adapter.init needs the float weight of {layer}, and the files of {self._source} have none of this name "
            f"and shape: use a checkpoint in 16 or 32 bits, or adapter.init=default."
        )

    def _candidates(self, layer: str) -> list[str]:
        """The names that a layer's weight may have in the files.

        Files of a model without a head leave a prefix out, and those of a language model within a larger one have its
        parts in another order; a tower beside it may have layers of the same names, but not under the same parts.
        """
        path = layer.split(".")
        start = next((i - 1 for i, part in enumerate(path) if part.isdigit()), len(path) - 1)
        parts, tail = set(path[:start]), ".".join(path[start:])
        found = [key for key in self._files if f".{key}".endswith(f".{tail}.weight")]
        near = {key: len(parts & set(key.removesuffix(f"{tail}.weight").split("."))) for key in found}
        return [key for key in found if key == f"{layer}.weight"] or [
            key for key in found if near[key] == max(near.values())
        ]

    @cached_property
    def _files(self) -> dict[str, Path]:
        """The file of every weight."""
        index = self._file(_INDEX)
        if index is not None:
            names: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = {name: self._file(name) for name in set(names.values())}
            return {key: path for key, name in names.items() if (path := files[name]) is not None}
        whole = self._file(_WHOLE)
        if whole is None:
            return {}
        with safe_open(whole, "pt") as file:
            return dict.fromkeys(file.keys(), whole)

    def _file(self, name: str) -> Path | None:
        from transformers.utils import cached_file

        found = cached_file(self._source, name, revision=self._revision, _raise_exceptions_for_missing_entries=False)
        return None if found is None else Path(found)
