"""The weights of a whole model that trains in parts: those of this rank, and what rank 0 gathers of all.

Every weight is split by its first dimension among the ranks of a machine, by torch's DTensor. Rank 0 gathers one weight
at a time, so that more than one is never whole on a GPU, and no more than a file's in main memory. A saved model has
whole weights, as that of one process. A checkpoint has each rank's parts (`part_files`), or whole weights where one
process has written it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from alignment.errors import UserError
from alignment.files import atomic_write_bytes, to_json
from alignment.policy.layers import decoder_layers
from alignment.policy.part_files import PartFiles, write_part
from alignment.ranks.team import Post, Team

_PARTS = "_weight_parts"
_MODEL = "model.safetensors"
_FILE = 5 * 10**9
"""Bytes of a saved model's file, or a layer's weights if these are more."""
_WEIGHT = "weight."
"""Before a weight's number among all of the model, where ranks write their parts."""


class WeightParts:
    """What this rank holds of a model, and the collectives that make whole tensors of it; one on every rank.

    Args:
        model: between passes, when its parameters are parts.
        team: of the run.
        across: the ranks of other machines with the same parts; None where there is one machine.
        device: where the parts are.

    Attributes:
        parameters: of the model, in its order. Those that do not train may be whole.
    """

    def __init__(self, model: nn.Module, team: Team, across: Any, device: torch.device) -> None:
        self.parameters: list[Any] = list(model.parameters())
        self.team = team
        self._across = across
        self._device = device
        self._numbers = {id(parameter): number for number, parameter in enumerate(self.parameters)}

    def number(self, parameter: Tensor) -> int:
        """Of a parameter, the same on all ranks."""
        return self._numbers[id(parameter)]

    # Every rank's part of a collective

    @torch.no_grad()
    def gather(self, own: Tensor, number: int) -> Tensor:
        """The whole of a tensor of which each rank has the part that it has of a weight."""
        from torch.distributed.tensor import DTensor

        like = self.parameters[number]
        part = DTensor.from_local(
            own, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )
        whole: Tensor = part.full_tensor()
        return whole

    @torch.no_grad()
    def receive(self, number: int, dtype: torch.dtype, whole: Tensor | None = None) -> Tensor:
        """This rank's part of a tensor with the shape of a weight, which rank 0 gives to all."""
        like = self.parameters[number]
        if whole is None:
            whole = torch.empty(like.shape, dtype=dtype, device=self._device)
        whole = whole.to(self._device)
        self.team.spread([whole])
        if not _is_part(like):
            return whole
        return whole[self.rows(number)].clone()

    def rows(self, number: int) -> slice:
        """Those of a weight that this rank holds."""
        like = self.parameters[number]
        if not _is_part(like):
            return slice(None)
        place = like.device_mesh.get_local_rank()
        rows = -(-len(like) // like.device_mesh.size())
        return slice(place * rows, (place + 1) * rows)

    @torch.no_grad()
    def add_up(self, gradients: list[Tensor | None]) -> list[Tensor | None]:
        """Add up the machines' gradients of this rank's parts; None stays where no machine has one."""
        if self._across is None:
            return gradients
        import torch.distributed as dist

        used = torch.tensor([g is not None for g in gradients], dtype=torch.uint8, device=self._device)
        dist.all_reduce(used, dist.ReduceOp.MAX, group=self._across)
        added: list[Tensor | None] = []
        trained = [p for p in self.parameters if p.requires_grad]
        for parameter, gradient, is_used in zip(trained, gradients, used.tolist(), strict=True):
            if is_used:
                own = local(parameter)
                gradient = torch.zeros_like(own) if gradient is None else gradient
                wide = gradient.float() if gradient.dtype.itemsize < 4 else gradient
                dist.all_reduce(wide, group=self._across)
                gradient = gradient.copy_(wide)
            added.append(gradient)
        return added

    def write(self, folder: Path, others: Iterable[tuple[str, Tensor]]) -> None:
        """Write this rank's parts of what trains, and others by name; other machines have the same."""
        if self.team.place.rank < self.team.place.local_size:
            own = ((f"{_WEIGHT}{n}", local(p)) for n, p in enumerate(self.parameters) if p.requires_grad)
            write_part(folder, self.team.place.rank, itertools.chain(own, others))

    def are_finite(self) -> bool:
        """Whether the parts that train here are finite."""
        return all(bool(local(p).isfinite().all()) for p in self.parameters if p.requires_grad)

    # Rank 0

    def whole(self, parameter: Tensor) -> Tensor:
        """A whole weight, where the model is."""
        if not _is_part(parameter):
            return parameter.detach()
        number = self.number(parameter)
        asked = [number] * self.team.size
        found: list[Any] = self.team.run(_give, asked, lambda n: self.gather(local(self.parameters[n]), n))
        whole: Tensor = found[0]
        return whole

    def put(self, parameter: Tensor, value: Tensor) -> None:
        """Give all ranks their parts of a whole weight."""
        number = self.number(parameter)

        def own(_: int) -> None:
            local(parameter).copy_(self.receive(number, parameter.dtype, value.to(parameter.dtype)))

        with torch.no_grad():
            self.team.run(_take, [number] * self.team.size, own)

    def load(self, folder: Path) -> None:
        """Have all ranks read their parts of a checkpoint that ranks have written."""
        asked = [str(folder)] * self.team.size
        self.team.run(_read, asked, lambda found: load_weights(self.parameters, Path(found), self.rows))

    def all_finite(self) -> bool:
        """Whether all weights that train are finite, on all ranks."""
        return all(self.team.run(_are_finite, [None] * self.team.size, lambda _: self.are_finite()))


def _is_part(tensor: Any) -> bool:
    return hasattr(tensor, "to_local")


def local(tensor: Any) -> Tensor:
    """What this rank holds of a tensor, without gradient."""
    found: Tensor = tensor.detach().to_local() if _is_part(tensor) else tensor.detach()
    return found


def _give(post: Post, number: int) -> None:
    parts = weight_parts(post.model)
    assert parts is not None
    parts.gather(local(parts.parameters[number]), number)


@torch.no_grad()
def _take(post: Post, number: int) -> None:
    parts = weight_parts(post.model)
    assert parts is not None
    parameter = parts.parameters[number]
    local(parameter).copy_(parts.receive(number, parameter.dtype))


def _read(post: Post, folder: str) -> None:
    parts = weight_parts(post.model)
    assert parts is not None
    load_weights(parts.parameters, Path(folder), parts.rows)


def _are_finite(post: Post, _: None) -> bool:
    parts = weight_parts(post.model)
    assert parts is not None
    return parts.are_finite()


def weight_parts(model: nn.Module) -> WeightParts | None:
    """The parts of a model that trains in parts; None for any other."""
    return vars(model).get(_PARTS)


def set_weight_parts(model: nn.Module, parts: WeightParts) -> None:
    """Let others find the parts."""
    setattr(model, _PARTS, parts)


def whole(model: nn.Module, tensor: Tensor) -> Tensor:
    """A parameter or buffer of a model, whole also where each rank holds a part; for rank 0."""
    parts = weight_parts(model)
    return tensor if parts is None else parts.whole(tensor)


def save_whole(model: Any, parts: WeightParts, folder: Path) -> None:
    """Save a model that trains in parts as transformers does one that is whole; for rank 0.

    Its weights are gathered one by one and held until a file is full, so no more of it is in main memory at once. Those
    of a layer are in one file: how they were loaded may be undone only for all of them together, such as experts that
    are stacked.
    """
    files: list[Path] = []
    pending: dict[str, Tensor] = {}

    def write() -> None:
        model.save_pretrained(str(folder), state_dict=pending)  # and its settings, each time
        pending.clear()
        files.append((folder / _MODEL).rename(folder / f"weights-{len(files)}"))

    size = 0
    for weights in _by_layer(model):
        added = sum(weight.nbytes for weight in weights.values())
        if pending and size + added > _FILE:
            write()
            size = 0
        pending.update((name, parts.whole(weight).cpu()) for name, weight in weights.items())
        size += added
    write()
    if len(files) == 1:
        files[0].rename(folder / _MODEL)
        return

    # As many files as there are is in their names
    stem, places = _MODEL.removesuffix(".safetensors"), {}
    for number, path in enumerate(files, 1):
        name = f"{stem}-{number:05d}-of-{len(files):05d}.safetensors"
        with safe_open(path.rename(folder / name), "pt") as file:
            places.update(dict.fromkeys(file.keys(), name))
    sizes = {
        "total_parameters": model.num_parameters(),
        "total_size": sum(p.nbytes for p in _saved_once(model).values()),
    }
    atomic_write_bytes(folder / f"{_MODEL}.index.json", to_json({"metadata": sizes, "weight_map": places}))


def _saved_once(model: Any) -> dict[str, Tensor]:
    """The tensors of a saved model by name, tied ones once, under the name that its class does not tie to another."""
    names: dict[int, list[str]] = {}
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        names.setdefault(id(tensor), []).append(name)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {name: state[name] for same in names.values() for name in [min(same, key=lambda one: one in tied)]}


def _by_layer(model: Any) -> list[dict[str, Tensor]]:
    """What is saved of each layer, and each tensor outside of them, in the model's order."""
    layers = set(decoder_layers(model))
    begins = [f"{name}." for name, module in model.named_modules() if module in layers]
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in _saved_once(model).items():
        found.setdefault(next((begin for begin in begins if name.startswith(begin)), name), {})[name] = tensor
    return list(found.values())


@torch.no_grad()
def load_weights(
    parameters: Iterable[Tensor], folder: Path, rows: Callable[[int], slice] = lambda _: slice(None)
) -> None:
    """Read what trains of a checkpoint that ranks have written.

    Args:
        parameters: all of the model, in its order.
        rows: of a weight by its number, those that are held here.
    """
    files = PartFiles(folder)
    for number, parameter in enumerate(parameters):
        if parameter.requires_grad:
            local(parameter).copy_(files.rows(f"{_WEIGHT}{number}", rows(number)))


def load_whole(model: nn.Module, parts: WeightParts, folder: Path) -> None:
    """Read the weights of a checkpoint of one process, one at a time.

    Raises:
        UserError: the checkpoint lacks some of them.
    """
    left = dict(model.named_parameters(remove_duplicate=False))
    for name, value in _saved(folder):
        if name in left:
            number = parts.number(left.pop(name))
            parts.put(parts.parameters[number], value)
            left = {other: p for other, p in left.items() if parts.number(p) != number}
    if left:
        raise UserError(
            f"{folder} lacks {len(left)} weights of the model (the first: {next(iter(left))}): remove it, and the run "
            f"goes on from an earlier checkpoint."
        )


def _saved(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)
