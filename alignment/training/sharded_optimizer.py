"""An optimizer of a whole model that trains in parts: each rank steps the weights that it holds.

Rank 0 decides as in one process: it has the learning rates, measures the gradient's norm over all parts, and says when
to step. Optimizers that treat each number by itself give the very updates of one process. Into a checkpoint each rank
writes the weights, states and fp32 masters that it holds, and any number of ranks reads them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from alignment.policy.part_files import PartFiles
from alignment.policy.weight_parts import WeightParts, local, weight_parts
from alignment.ranks.team import Post
from alignment.training.master_weights import FILE, MASTER, STATE, MasterWeights, has_shape_of, load_states

Groups = Sequence[tuple[dict[str, Any], list[int]]]
"""Of an optimizer: the settings of each group, and the numbers of its weights."""


class PartSteps:
    """The optimizer of the weights that this rank holds; one on every rank.

    Args:
        parts: of the model.
        kind: class of the optimizer, one that treats each number by itself.
        groups: its settings.
        master_weights: whether weights of 16 bits get fp32 masters.
    """

    def __init__(
        self, parts: WeightParts, kind: type[torch.optim.Optimizer], groups: Groups, master_weights: bool
    ) -> None:
        self._parts = parts
        self._trained = [p for p in parts.parameters if p.requires_grad]
        self._own = {parts.number(p): nn.Parameter(local(p)) for p in self._trained}
        made = [{**settings, "params": [self._own[n] for n in numbers]} for settings, numbers in groups]
        self.optimizer = kind(made)  # type: ignore[call-arg]
        self.masters = MasterWeights(self.optimizer) if master_weights else None
        self.numbers = [number for _, numbers in groups for number in numbers]
        self._loading: dict[int, dict[str, Tensor]] = {}

    @property
    def stepped(self) -> list[Tensor]:
        """What the optimizer steps, in its order: parts, or their masters."""
        return [tensor for group in self.optimizer.param_groups for tensor in group["params"]]

    @torch.no_grad()
    def square(self) -> float:
        """Sum of the squares of this rank's gradients, once those of all machines are added up."""
        gradients = [None if p.grad is None else local(p.grad) for p in self._trained]
        total = torch.zeros((), dtype=torch.float64)
        for parameter, gradient in zip(self._trained, self._parts.add_up(gradients), strict=True):
            own = self._own[self._parts.number(parameter)]
            own.grad = gradient
            if gradient is not None:
                dtype = torch.float32 if gradient.dtype.itemsize < 4 else gradient.dtype
                total = total.to(gradient.device) + torch.linalg.vector_norm(gradient, dtype=dtype).double().square()
        return total.item()

    @torch.no_grad()
    def step(self, settings: Sequence[dict[str, Any]], factor: float) -> None:
        """Step with the gradients that `square` has seen, each times a factor."""
        for group, values in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(values)
        for parameter in self._trained:
            own = self._own[self._parts.number(parameter)]
            own.data = local(parameter)  # the same memory, unless the model was moved
            if own.grad is not None and factor != 1.0:
                own.grad.mul_(factor)
        self.optimizer.step()
        for parameter in self._trained:
            parameter.grad = self._own[self._parts.number(parameter)].grad = None

    def write(self, folder: Path) -> None:
        """Write what this rank holds of the weights, the states and the masters."""
        states = (
            (f"{STATE}{index}.{key}", value)
            for index, stepped in enumerate(self.stepped)
            for key, value in self.optimizer.state[stepped].items()
            if has_shape_of(value, stepped)
        )
        masters = ((f"{MASTER}{n}", master) for n, (_, master) in enumerate(self.masters.pairs if self.masters else ()))
        self._parts.write(folder, itertools.chain(states, masters))

    @torch.no_grad()
    def read(self, folder: Path) -> None:
        """Read the states and the masters that this rank holds of what ranks have written."""
        files = PartFiles(folder)
        load_states(self.optimizer, files, lambda index: self._parts.rows(self.numbers[index]))
        for n, (weight, master) in enumerate(self.masters.pairs if self.masters else ()):
            master.copy_(files.rows(f"{MASTER}{n}", self._parts.rows(self._number(weight))))

    @torch.no_grad()
    def put_master(self, index: int, whole: Tensor | None = None) -> None:
        """Take this rank's part of a master that rank 0 gives to all."""
        assert self.masters is not None
        weight, master = self.masters.pairs[index]
        master.copy_(self._parts.receive(self._number(weight), master.dtype, whole))

    def put_state(self, index: int, key: str, dtype: torch.dtype, whole: Tensor | None = None) -> None:
        """Take this rank's part of a state that rank 0 gives to all; `finish` puts it into the optimizer."""
        self._loading.setdefault(index, {})[key] = self._parts.receive(self.numbers[index], dtype, whole)

    def finish(self, groups: list[dict[str, Any]], others: dict[int, dict[str, Any]]) -> None:
        """Load the states that came, and those of no weight's shape."""
        state = {index: {**values, **self._loading.get(index, {})} for index, values in others.items()}
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self._loading = {}

    def _number(self, own: Tensor) -> int:
        return next(number for number, tensor in self._own.items() if tensor is own)


class ShardedOptimizer(torch.optim.Optimizer):
    """On rank 0 the optimizers of all ranks as one: to a trainer it is an optimizer of whole weights.

    Args:
        parts: of the model.
        optimizer: fresh, of the model's parameters: all ranks get one of its kind and settings.
        master_weights: whether weights of 16 bits get fp32 masters.
    """

    def __init__(self, parts: WeightParts, optimizer: torch.optim.Optimizer, master_weights: bool) -> None:
        self._team = parts.team
        groups = [
            ({k: v for k, v in group.items() if k != "params"}, [parts.number(p) for p in group["params"]])
            for group in optimizer.param_groups
        ]
        asked = type(optimizer), groups, master_weights
        found: list[Any] = self._all(_make, asked, lambda _: PartSteps(parts, *asked))
        self._steps: PartSteps = found[0]
        self._factor: float | None = None
        super().__init__(self._steps.optimizer.param_groups, {})
        self._share()

    def _share(self) -> None:
        self.param_groups, self.state = self._steps.optimizer.param_groups, self._steps.optimizer.state

    def _all(self, task: Any, asked: Any, own: Any) -> list[Any]:
        return self._team.run(task, [asked] * self._team.size, own)

    # A step

    def clip(self, _: Any, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """The norm of the step's gradients over all parts; the next step scales them to at most `max_norm`.

        Takes the arguments of accelerate's `clip_grad_norm_`.
        """
        assert norm_type == 2.0
        squares = self._all(_square, None, lambda _: self._steps.square())
        norm = math.sqrt(sum(squares[: self._team.place.local_size]))  # other machines have the same parts
        self._factor = min(1.0, max_norm / (norm + 1e-6))
        return torch.tensor(norm, dtype=torch.float64)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step on all ranks."""
        assert closure is None, "a step here is made from gradients that are there"
        if self._factor is None:
            self.clip(None, math.inf)
        assert self._factor is not None
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]
        self._all(_step, (settings, self._factor), lambda asked: self._steps.step(*asked))
        self._factor = None

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """As of one process, without the states that are as large as a weight, of which ranks write their parts."""
        found = self._steps.optimizer.state_dict()
        stepped = self._steps.stepped
        found["state"] = {
            index: {key: value for key, value in state.items() if not has_shape_of(value, stepped[index])}
            for index, state in found["state"].items()
        }
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From what one process has saved, or any number of ranks."""
        others: dict[int, dict[str, Any]] = {}
        for index, state in state_dict["state"].items():
            others[index] = {}
            for key, value in state.items():
                if not isinstance(value, Tensor) or value.ndim == 0:
                    others[index][key] = value.cpu() if isinstance(value, Tensor) else value
                    continue
                own = partial(self._steps.put_state, index, key, value.dtype, value)
                self._all(_take_state, (index, key, value.dtype), lambda _, own=own: own())
        end = state_dict["param_groups"], others
        self._all(_finish, end, lambda asked: self._steps.finish(*asked))
        self._share()

    def save(self, folder: Path) -> None:
        """Have all ranks write their parts into a checkpoint."""
        self._all(_write, str(folder), lambda asked: self._steps.write(Path(asked)))

    def load(self, folder: Path) -> None:
        """Read back what ranks have written, or the masters of one process."""
        if PartFiles(folder):
            self._all(_read, str(folder), lambda asked: self._steps.read(Path(asked)))
        elif count := len(self._steps.masters or ()):
            saved = load_file(folder / FILE)
            for number in range(count):
                whole = saved[str(number)]
                self._all(_take_master, number, lambda n, whole=whole: self._steps.put_master(n, whole))


# On a rank that follows


def _make(post: Post, asked: tuple[type[torch.optim.Optimizer], Groups, bool]) -> None:
    parts = weight_parts(post.model)
    assert parts is not None
    post.steps = PartSteps(parts, *asked)


def _square(post: Post, _: None) -> float:
    found: float = post.steps.square()
    return found


def _step(post: Post, asked: tuple[list[dict[str, Any]], float]) -> None:
    post.steps.step(*asked)


def _take_state(post: Post, asked: tuple[int, str, torch.dtype]) -> None:
    post.steps.put_state(*asked)


def _finish(post: Post, asked: tuple[list[dict[str, Any]], dict[int, dict[str, Any]]]) -> None:
    post.steps.finish(*asked)


def _write(post: Post, folder: str) -> None:
    post.steps.write(Path(folder))


def _read(post: Post, folder: str) -> None:
    post.steps.read(Path(folder))


def _take_master(post: Post, number: int) -> None:
    post.steps.put_master(number)
