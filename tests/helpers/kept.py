"""What a forward pass leaves for the backward pass, measured."""

from weakref import WeakSet

import numpy as np
import torch
from torch.autograd.graph import saved_tensors_hooks

from alignment.scoring.logps import score
from alignment.scoring.prompt_sharing import choose_layout
from alignment.types import Group


class _Kept:
    """A tensor for as long as the graph of a backward pass holds it."""

    def __init__(self, tensor):
        self.tensor = tensor


def saved_bytes(model) -> tuple[int, int]:
    """(bytes that one forward pass leaves for the backward pass, positions): storages once, weights and buffers not."""
    rng = np.random.default_rng(0)
    prompt, *answers = (rng.integers(0, 97, n).astype(np.int32) for n in (20, 64, 64))
    batch = next(choose_layout(model, torch.device("cpu")).batches([Group(prompt, tuple(answers))], 10**6))
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: WeakSet[_Kept] = WeakSet()

    def pack(tensor):
        holder = _Kept(tensor)
        kept.add(holder)
        return holder

    model.train()
    with saved_tensors_hooks(pack, lambda holder: holder.tensor):
        scored = score(model, batch)
    storages = {s.data_ptr(): s.nbytes() for s in (holder.tensor.untyped_storage() for holder in kept)}
    del scored
    return sum(size for address, size in storages.items() if address not in weights), batch.input_ids.numel()
