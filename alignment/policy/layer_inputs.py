"""What goes into the layers of a model on some sequences: means and second moments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from alignment.errors import UserError
from alignment.scoring.logps import autocast

_BYTES = 2**31
"""Of all second moments that are held at once; a layer of width w has 4 w^2."""


@dataclass(slots=True)
class _Sums:
    squares: Tensor
    values: Tensor
    count: int = 0


@torch.no_grad()
def input_moments(
    model: Any, layers: Mapping[str, Any], sequences: Sequence[np.ndarray]
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """(name, (second moment, mean)) of the inputs of each layer, over all positions: fp32, (in, in) and (in,).

    The model runs over the sequences as often as the moments need to fit into 2 GiB.

    Raises:
        UserError: no position of the sequences reaches a layer.
    """
    modes = {part: part.training for part in model.modules()}
    model.eval()
    try:
        for part in _parts(layers):
            sums: dict[str, _Sums] = {}
            handles = [layers[name].register_forward_pre_hook(partial(_add, sums, name)) for name in part]
            try:
                _run(model, sequences)
            finally:
                for handle in handles:
                    handle.remove()
            for name in part:
                if name not in sums:
                    raise UserError(
                        f"adapter.init: no token of the training data reaches {name}, so its inputs are not known: "
                        f"take it out of adapter.target_modules, or set adapter.init=default."
                    )
                found = sums.pop(name)
                yield name, (found.squares / found.count, found.values / found.count)
    finally:
        for module, mode in modes.items():
            module.training = mode


def _parts(layers: Mapping[str, Any]) -> Iterator[list[str]]:
    part: list[str] = []
    size = 0
    for name, layer in layers.items():
        own = 4 * layer.in_features**2
        if part and size + own > _BYTES:
            yield part
            part, size = [], 0
        part.append(name)
        size += own
    yield part


def _add(sums: dict[str, _Sums], name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    rows = inputs[0].detach().flatten(0, -2).float()
    own = sums.setdefault(name, _Sums(rows.new_zeros(rows.shape[1], rows.shape[1]), rows.new_zeros(rows.shape[1])))
    own.squares.addmm_(rows.T, rows)
    own.values.add_(rows.sum(0))
    own.count += len(rows)


def _run(model: Any, sequences: Sequence[np.ndarray]) -> None:
    device = next(model.parameters()).device
    decoder = model.get_base_model().get_decoder()
    with autocast(model, device):
        for sequence in sequences:
            decoder(input_ids=torch.from_numpy(sequence.astype(np.int64))[None].to(device), use_cache=False)
