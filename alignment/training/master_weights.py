"""fp32 copies of weights that train in 16 bits.

bfloat16 keeps 8 bits of a number: an update below 1/256 of a weight is rounded away, and with the learning rates of
full fine-tuning nearly all are. The optimizer therefore steps an fp32 copy, in which small updates add up, and the
model gets the copy rounded (mixed-precision training, Micikevicius et al. 2018, arXiv:1710.03740, section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alignment.policy.part_files import PartFiles

FILE = "master_weights.safetensors"
BYTES = 4
"""Of a master weight."""
STATE, MASTER = "state.", "master."
"""Before the number of a weight in the optimizer's order, or of a master, where ranks write their parts."""


class MasterWeights:
    """Puts fp32 masters of 16-bit weights into an optimizer, in their place.

    Before a step the masters get the gradients, which the weights give away; after it the weights get the masters.

    Args:
        optimizer: fresh, of weights of any dtype; weights of 32 and 64 bits stay as they are.

    Attributes:
        pairs: each weight of 16 bits with its master.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        for group in optimizer.param_groups:
            group["params"] = [self._in_place_of(weight, optimizer) for weight in group["params"]]
        if not self.pairs:
            return
        optimizer.register_step_pre_hook(lambda *_: self._take_gradients())
        optimizer.register_step_post_hook(lambda *_: self._write())
        for name in ("train", "eval"):  # schedule-free optimizers switch the weights in these
            with suppress(AttributeError):
                setattr(optimizer, name, self._then_write(getattr(optimizer, name)))

    def __len__(self) -> int:
        return len(self.pairs)

    def _in_place_of(self, weight: nn.Parameter, optimizer: torch.optim.Optimizer) -> nn.Parameter:
        if weight.dtype not in (torch.bfloat16, torch.float16):
            return weight
        master = nn.Parameter(weight.detach().float())
        self.pairs.append((weight, master))
        if weight in optimizer.state:  # some optimizers make their states at once
            state = optimizer.state.pop(weight)
            optimizer.state[master] = {key: self._as_master(value, weight) for key, value in state.items()}
        return master

    @staticmethod
    def _as_master(value: Any, weight: Tensor) -> Any:
        return value.float() if isinstance(value, Tensor) and value.dtype is weight.dtype else value

    @torch.no_grad()
    def _take_gradients(self) -> None:
        for weight, master in self.pairs:
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None

    @torch.no_grad()
    def _write(self) -> None:
        for weight, master in self.pairs:
            weight.copy_(master)
            master.grad = None

    def _then_write(self, switch: Callable[[], Any]) -> Callable[[], Any]:
        def switch_and_write() -> Any:
            result = switch()
            self._write()
            return result

        return switch_and_write

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for number, (_, master) in enumerate(self.pairs):
            yield str(number), master.data

    def save(self, folder: Path) -> None:
        """Write the masters into a checkpoint; nothing where there are none."""
        if self.pairs:
            save_file(dict(self._named()), folder / FILE)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Read back what `save` wrote, or ranks that trained parts."""
        if self.pairs:
            files = PartFiles(folder)
            saved = {} if files else load_file(folder / FILE)
            for name, master in self._named():
                master.copy_(files.rows(f"{MASTER}{name}") if files else saved[name])


def has_shape_of(value: Any, stepped: Tensor) -> bool:
    """Whether a state of an optimizer has one number for each of a weight."""
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape == stepped.shape


def load_states(
    optimizer: torch.optim.Optimizer, files: PartFiles, rows: Callable[[int], slice] = lambda _: slice(None)
) -> None:
    """Read the states that are as large as a weight from what ranks have written; the others are there.

    Args:
        rows: of a weight by its place in the optimizer, those that are held here.
    """
    for index, stepped in enumerate(tensor for group in optimizer.param_groups for tensor in group["params"]):
        for key in files.below(f"{STATE}{index}."):
            value = files.rows(f"{STATE}{index}.{key}", rows(index))
            optimizer.state[stepped][key] = value.to(stepped.device)
