"""What a forward pass leaves for the backward pass, measured."""

import numpy as np
import torch
from torch.autograd.graph import saved_tensors_hooks

from alignment.scoring.logps import score
from alignment.scoring.prompt_sharing import choose_layout
from alignment.types import Group


def saved_bytes(model) -> tuple[int, int]:
    """(bytes that one forward pass leaves for the backward pass, positions): storages once, weights not."""
    rng = np.random.default_rng(0)
    prompt, *answers = (rng.integers(0, 97, n).astype(np.int32) for n in (20, 64, 64))
    batch = next(choose_layout(model, torch.device("cpu")).batches([Group(prompt, tuple(answers))], 10**6))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is given out twice
        return tensor

    model.train()
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        score(model, batch)
    return sum(size for size, _ in seen.values()), batch.input_ids.numel()
