"""Merge several policies that were trained from one base: their updates become one update.

The update D_i of a policy is what training added to a weight of the base: the scaled product B A of a LoRA, or the
difference of the weights of a whole model. All methods work on D_i, never on B and A by themselves: the mean of two Bs
times the mean of two As is not the mean of the products, though that is what peft's `add_weighted_adapter` computes for
`linear` and `ties`. The methods are peft's functions on single tensors, called with D_i.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alignment.errors import UserError, did_you_mean
from alignment.policy.saved_adapter import read_adapter, require_known_form

METHODS = {
    "linear": "the mean of the updates, weighted",
    "task_arithmetic": "the sum of the updates, each times its weight (Ilharco et al. 2023, arXiv:2212.04089)",
    "magnitude_prune": "of each update the largest entries of every matrix, then their weighted mean",
    "ties": (
        "of each update the largest entries of every matrix; of these the ones with the sign of their sum, averaged, "
        "times the weight (Yadav et al. 2023, arXiv:2306.01708)"
    ),
    "dare_ties": (
        "of each update a random share of the entries, scaled up to the same expectation (Yu et al. 2024, "
        "arXiv:2311.03099); of these the ones with the sign of their sum, averaged, times the weight"
    ),
}
"""What each method computes from the updates."""

_MEANS = ("linear", "magnitude_prune")
"""Their weights are divided by their sum."""
_DENSITY = {"ties": 0.2, "dare_ties": 0.5, "magnitude_prune": 0.2}
"""Share of the entries that stay: 0.2 is what Yadav et al. advise without a search. Yu et al. drop 0.9 and more of the
updates of billions of parameters; a small model's update has fewer to spare."""
_WEIGHT = {"task_arithmetic": 0.4}
"""Weight of each update: 0.4 and, for TIES, 1 are what Yadav et al. advise without a search (section 6)."""


@dataclass(frozen=True, slots=True)
class MergeSettings:
    """How policies are merged.

    Attributes:
        method: one of `METHODS`.
        weights: of each policy; empty for the method's own.
        density: share of each update's entries that stay; None for the method's own, or where the method keeps all.
        rank: of the merged adapter; None for the sum of the ranks, with which `linear` and `task_arithmetic` are exact.
        seed: of the entries that `dare_ties` draws.
    """

    method: str
    weights: tuple[float, ...] = ()
    density: float | None = None
    rank: int | None = None
    seed: int = 0

    def of(self, count: int) -> MergeSettings:
        """With all values filled in, for so many policies.

        Raises:
            UserError: a value that the method does not take.
        """
        if self.method not in METHODS:
            hint = did_you_mean(self.method, METHODS)
            raise UserError(f"method must be one of {', '.join(METHODS)}, not '{self.method}'{hint}.")
        weights = self.weights or (_WEIGHT.get(self.method, 1.0),) * count
        if len(weights) != count or not all(map(math.isfinite, weights)):
            given = ",".join(f"{w:g}" for w in weights)
            raise UserError(f"weights needs a finite number for each of the {count} runs, not {given}.")
        if self.method in _MEANS:
            if not sum(weights) > 0:
                raise UserError(f"weights of method={self.method} are divided by their sum, which must be above 0.")
            weights = tuple(w / sum(weights) for w in weights)
        density = self.density
        if self.method not in _DENSITY:
            if density is not None:
                raise UserError(
                    f"density has no effect with method={self.method}, which keeps all entries: leave it out."
                )
        else:
            density = _DENSITY[self.method] if density is None else density
            if not 0 < density <= 1:
                raise UserError(f"density must be in (0, 1], not {density:g}.")
        if self.rank is not None and self.rank < 1:
            raise UserError(f"rank must be at least 1, not {self.rank}.")
        return MergeSettings(self.method, weights, density, self.rank, self.seed)

    def merged(self, updates: Sequence[Tensor]) -> Tensor:
        """The merged update of one weight, from settings that `of` has filled in."""
        from peft.utils import merge_utils

        weights = torch.tensor(self.weights, device=updates[0].device)
        if self.density is None or (self.density == 1 and self.method == "magnitude_prune"):
            return merge_utils.task_arithmetic(list(updates), weights)
        return getattr(merge_utils, self.method)(list(updates), weights, self.density)


@dataclass(slots=True)
class MergeFacts:
    """What a merge found, for its report.

    Attributes:
        norms: of each policy's update, over all weights.
        merged_norm: of the merged update.
        cosines: between the updates of each two policies, in the order (0, 1), (0, 2), ..., (1, 2), ...; 1 is the same
            direction, 0 none in common.
        rank: of the merged adapter; None for whole models.
        error: norm of what the merged adapter leaves out of the merged update, as a share of its norm.
    """

    norms: list[float] = field(default_factory=list)
    merged_norm: float = 0.0
    cosines: list[float] = field(default_factory=list)
    rank: int | None = None
    error: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


class _Sums:
    """Squares and products of the updates, weight by weight."""

    def __init__(self, count: int) -> None:
        self._products = torch.zeros(count, count, dtype=torch.float64)
        self._merged = self._left_out = 0.0

    def add(self, updates: Sequence[Tensor], merged: Tensor, saved: Tensor | None = None) -> None:
        flat = [update.flatten().double() for update in updates]
        for i, one in enumerate(flat):
            for j, other in enumerate(flat[: i + 1]):
                self._products[i, j] += torch.dot(one, other).item()
        self._merged += merged.double().square().sum().item()
        if saved is not None:
            self._left_out += (merged - saved).double().square().sum().item()

    def facts(self, rank: int | None) -> MergeFacts:
        norms = self._products.diagonal().sqrt()
        pairs = [(i, j) for i in range(len(norms)) for j in range(i + 1, len(norms))]
        cosines = [(self._products[j, i] / (norms[i] * norms[j]).clamp_min(1e-30)).item() for i, j in pairs]
        error = math.sqrt(self._left_out / self._merged) if self._merged else 0.0
        return MergeFacts(norms.tolist(), math.sqrt(self._merged), cosines, rank, error)


# Adapters


@dataclass(frozen=True, slots=True)
class _Updates:
    """The updates of a saved adapter by layer, each as (r, in) and (out, r) whose product is the update."""

    name: str
    layers: dict[str, tuple[Tensor, Tensor]]


def _read_updates(folder: Path, name: str) -> _Updates:
    """Read a saved LoRA, its scaling multiplied into B.

    Raises:
        UserError: it is no LoRA, or more than products of two matrices.
    """
    from peft.utils.other import get_pattern_key
    from peft.utils.save_and_load import load_peft_weights

    saved = read_adapter(folder)
    require_known_form(folder, saved, whole=True)
    config = saved.settings
    beside = ("use_dora", "target_parameters", "modules_to_save", "trainable_token_indices")
    special = [key for key in beside if getattr(config, key, None)]
    init = saved.init or getattr(config, "init_lora_weights", True)
    if init not in (True, False, "gaussian", "eva", "orthogonal"):
        special.append(f"init={init}")
    if config.peft_type != "LORA":
        special.append(f"kind={config.peft_type.lower()}")
    # peft saves base embeddings beside an adapter of theirs; they are those of the base.
    weights = load_peft_weights(str(folder), device="cpu")
    left = {key for key in weights if ".lora_" in key}
    layers: dict[str, tuple[Tensor, Tensor]] = {}
    for key in sorted(left):
        for up, down in ((".lora_A.", ".lora_B."), (".lora_embedding_A", ".lora_embedding_B")):
            if up not in key:
                continue
            layer = key.removeprefix("base_model.model.").rpartition(up)[0]
            a, b = weights[key].float(), weights[key.replace(up, down)].float()
            alpha = config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), layer), config.lora_alpha)
            layers[layer] = a, b * (alpha / (math.sqrt(len(a)) if config.use_rslora else len(a)))
            left -= {key, key.replace(up, down)}
    special += [key.rpartition(".lora_")[2] for key in sorted(left)][:1]
    if special:
        raise UserError(
            f"{name} cannot be merged, because its adapter has {' and '.join(special)} and so is more than products of "
            f"two matrices: merge runs with a plain LoRA, or with adapter=none."
        )
    return _Updates(name, layers)


def merge_adapters(
    folders: Mapping[str, Path], settings: MergeSettings, device: torch.device
) -> tuple[dict[str, tuple[Tensor, Tensor]], MergeFacts]:
    """Merge saved LoRA adapters of one base.

    Args:
        folders: by what people call the policies.
        settings: as `MergeSettings.of` fills them in.
        device: where matrices are multiplied and decomposed.

    Returns:
        By layer, (r, in) and (out, r) in fp32 whose product is the merged update, all of one rank; and what was found.

    Raises:
        UserError: an adapter that is none, or layers that differ.
    """
    parents = [_read_updates(folder, name) for name, folder in folders.items()]
    first = parents[0]
    for other in parents[1:]:
        if other.layers.keys() != first.layers.keys():
            odd = sorted(other.layers.keys() ^ first.layers.keys())
            raise UserError(
                f"{other.name} and {first.name} have adapted other layers ({odd[0]} is in one of them alone): merge "
                f"runs with the same adapter.target_modules."
            )
    total = max(sum(len(parent.layers[name][0]) for parent in parents) for name in first.layers)
    rank = total if settings.rank is None else settings.rank
    is_exact = settings.density is None and rank >= total
    sums = _Sums(len(parents))
    found: dict[str, tuple[Tensor, Tensor]] = {}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(settings.seed)
        for name in sorted(first.layers):
            pairs = [tuple(part.to(device) for part in parent.layers[name]) for parent in parents]
            updates = [b @ a for a, b in pairs]
            merged = settings.merged(updates)
            if is_exact:  # sum_i w_i B_i A_i = [w_1 B_1, w_2 B_2, ...] [A_1; A_2; ...]
                a = torch.cat([a for a, _ in pairs])
                b = torch.cat([w * b for w, (_, b) in zip(settings.weights, pairs, strict=True)], 1)
            else:
                a, b = _factors(merged, rank)
            a, b = _padded(a, 0, rank), _padded(b, 1, rank)
            sums.add(updates, merged, b @ a)
            found[name] = a.cpu(), b.cpu()
    return found, sums.facts(rank)


def _factors(update: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(r, in) and (out, r), the best approximation of a matrix by so many ranks or fewer; both of one size."""
    u, s, vh = torch.linalg.svd(update, full_matrices=False)
    root = s[:rank].sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root


def _padded(matrix: Tensor, axis: int, rank: int) -> Tensor:
    """With zeros up to a rank."""
    lacking = list(matrix.shape)
    lacking[axis] = rank - lacking[axis]
    return torch.cat([matrix, matrix.new_zeros(lacking)], axis) if lacking[axis] else matrix


@torch.no_grad()
def put_adapter(model: Any, updates: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Put merged updates into a policy whose adapter has the same layers; its rank becomes theirs.

    Layers keep their scaling, which a frozen copy of the policy beside it relies on.
    """
    from peft.tuners.lora import LoraLayer

    rank = len(next(iter(updates.values()))[0])
    alphas: dict[str, float] = {}
    (key,) = model.active_adapters
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        a, b = updates[name]
        b = b / layer.scaling[key]
        alphas[name] = layer.scaling[key] * rank
        if key in layer.lora_A:
            down, up = layer.lora_A[key], layer.lora_B[key]
            down.weight, up.weight = (nn.Parameter(m.to(down.weight)) for m in (a, b))  # type: ignore[arg-type]
            down.out_features = up.in_features = rank  # type: ignore[assignment]
        else:
            layer.lora_embedding_A[key] = nn.Parameter(a.to(layer.lora_embedding_A[key]))
            layer.lora_embedding_B[key] = nn.Parameter(b.to(layer.lora_embedding_B[key]))
        layer.r[key], layer.lora_alpha[key], layer.use_rslora[key] = rank, alphas[name], False
    config = model.peft_config[key]
    usual = next(iter(alphas.values()))
    config.r, config.lora_alpha, config.use_rslora, config.rank_pattern = rank, usual, False, {}
    config.alpha_pattern = {name: alpha for name, alpha in alphas.items() if alpha != usual}


# Whole models


@torch.no_grad()
def merge_models(base: nn.Module, models: Sequence[nn.Module], settings: MergeSettings) -> MergeFacts:
    """Merge whole models, into the base's weights.

    Args:
        base: that all were trained from; it becomes the merged model.
        models: with the same weights by name and shape.
        settings: as `MergeSettings.of` fills them in.
    """
    sums = _Sums(len(models))
    others = [dict(model.named_parameters()) for model in models]
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        for name, weight in base.named_parameters():
            start = weight.float()
            updates = [other[name].to(start) - start for other in others]
            merged = settings.merged(updates)
            sums.add(updates, merged)
            weight.copy_(start + merged)
    return sums.facts(None)
