"""Spectrum (arXiv 2406.06623): train the matrices whose singular values stand out most from noise."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from alignment.config.schema import AdapterConfig
from alignment.errors import UserError
from alignment.files import CacheKind, file_lock, mark_used, read_sealed, write_sealed
from alignment.policy.adapter_names import with_targets
from alignment.policy.identity import policy_identity
from alignment.policy.quantize import plain_weight

log = logging.getLogger(__name__)

_NORMAL_RANGE = 1.349
"""The interquartile range of a normal distribution, in standard deviations."""


def signal_to_noise(weight: Tensor) -> float:
    """How far the singular values of a matrix stand out from noise, by the formula of Spectrum's code.

    With S the singular values of an (n, m) matrix and b = min(n, m) / max(n, m): sigma = IQR(S) / 1.349, and
    eps = sigma (1 + sqrt(b)) is the bound between noise and signal. The ratio is (sum of S > eps) / (sum of S <= eps)
    / max S. Marchenko and Pastur's own bound needs the deviation of the entries; that of S stands for it, so ratios
    rank matrices of one shape, and mean little by themselves.

    Returns:
        inf where no value is noise, 0 for a matrix of zeros.
    """
    matrix = weight.double()
    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.T
    # Eigenvalues of the smaller Gram matrix, in fp64, take a fraction of the time of a decomposition.
    values = torch.linalg.eigvalsh(matrix @ matrix.T).clamp_min_(0).sqrt_()
    largest = values[-1].item()
    if largest == 0:
        return 0.0
    quartiles = torch.quantile(values, torch.tensor([0.25, 0.75], dtype=values.dtype, device=values.device))
    sigma = (quartiles[1] - quartiles[0]).item() / _NORMAL_RANGE
    bound = sigma * (1 + (matrix.shape[0] / matrix.shape[1]) ** 0.5)
    noise = values[values <= bound].sum().item()
    signal = values[values > bound].sum().item()
    return signal / noise / largest if noise else float("inf")


@dataclass(frozen=True, slots=True)
class Choice:
    """Which matrices train.

    Attributes:
        share: of the matrices of every type.
        ratios: signal to noise of every matrix that could train, by its module's name.
        chosen: the modules that train, in the order of the model.
    """

    share: float
    ratios: dict[str, float]
    chosen: list[str]

    def table(self) -> list[str]:
        """A line per type: which layers train, and the ratios of those that do and of those that do not."""
        lines, chosen = [], set(self.chosen)
        for kind, names in by_type(self.ratios).items():
            own = [name for name in names if name in chosen]
            rest = [self.ratios[name] for name in names if name not in chosen]
            layers = " ".join(re.sub(r"\D+", " ", name).split()[0] for name in own if re.search(r"\d", name))
            passed = f"; the rest up to {max(rest):.3g}" if rest else ""
            least = min(self.ratios[name] for name in own)
            lines.append(f"{kind}: {len(own)} of {len(names)} (layers {layers}), ratio from {least:.3g}{passed}")
        return lines


def by_type(names: Mapping[str, Any]) -> dict[str, list[str]]:
    """Modules of one type: their names differ in numbers only."""
    found = defaultdict(list)
    for name in names:
        found[re.sub(r"\.\d+(?=\.|$)", ".*", name)].append(name)
    return dict(found)


def choose(ratios: dict[str, float], share: float) -> Choice:
    """The `share` of the matrices of each type with the largest ratios, at least one of each."""
    best: set[str] = set()
    for names in by_type(ratios).values():
        ranked = sorted(names, key=lambda name: -ratios[name])  # stable: among equals the lower layer
        best.update(ranked[: max(1, round(share * len(names)))])
    return Choice(share, ratios, [name for name in ratios if name in best])


def _matrices(model: Any) -> dict[str, nn.Module]:
    """The linear layers without the head."""
    head = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


@torch.no_grad()
def scan(model: nn.Module, cache: Path) -> dict[str, float]:
    """The ratio of every linear layer but the head, in the order of the model; a quantised one is de-quantised.

    They are computed once, and kept in the cache under a digest of the weights.

    Args:
        model: without an adapter.
        cache: folder that all runs share.
    """
    path = CacheKind.spectrum.under(cache) / f"{policy_identity(model)[1]['base'][:32]}.json"
    with file_lock(path.with_suffix(".lock"), "Another run is scanning this model; waiting for its result ..."):
        try:
            if path.exists():
                ratios = {name: float(ratio) for name, ratio in read_sealed(path).items()}
                mark_used(path)
                return ratios
        except UserError:
            log.warning("%s is damaged: the model is scanned anew.", path)
        layers = _matrices(model).items()
        ratios = {name: signal_to_noise(plain_weight(m)) for name, m in tqdm(layers, desc="Spectrum", unit="matrix")}
        write_sealed(path, ratios)
    return ratios


def choose_modules(model: nn.Module, share: float, targets: Sequence[str] | None, cache: Path, kept: Path) -> list[str]:
    """Names of the modules that train: those of the run so far, or the best of the model.

    Args:
        model: without an adapter.
        share: of the matrices of each type.
        targets: names that a module must have, or end with; None: all linear layers but the head.
        cache: folder that all runs share.
        kept: file in the run folder; a run that goes on, perhaps from trained weights, trains the same modules.

    Raises:
        UserError: no linear layer has such a name, or the file is damaged.
    """
    if kept.exists():
        return [name for name, module in read_sealed(kept)["modules"].items() if module["trains"]]
    ratios = {
        name: ratio
        for name, ratio in scan(model, cache).items()
        if targets is None or any(name == target or name.endswith(f".{target}") for target in targets)
    }
    if not ratios:
        raise UserError(
            f"spectrum={share:g} chooses among linear layers, and adapter.target_modules={','.join(targets or ())} "
            f"names none: name some, or set spectrum=null."
        )
    choice = choose(ratios, share)
    log.info("Spectrum: %d of %d matrices train.", len(choice.chosen), len(ratios))
    for line in choice.table():
        log.info("  %s", line)
    chosen = set(choice.chosen)
    modules = {name: {"ratio": ratio, "trains": name in chosen} for name, ratio in ratios.items()}
    write_sealed(kept, {"share": share, "modules": modules}, indent=2)
    return choice.chosen


def choose_trained(
    model: nn.Module, adapter: AdapterConfig | None, share: float | None, cache: Path, kept: Path
) -> tuple[AdapterConfig | None, list[str] | None]:
    """The adapter's settings, or without one the names of the modules that train, as `choose_modules` chooses them.

    Args:
        adapter: settings of the run.
        share: None leaves them as they are, and lets all modules train.
    """
    if share is None:
        return adapter, None
    adapter = None if adapter is None else with_targets(model, adapter)
    targets = None if adapter is None or adapter.target_modules == ["all-linear"] else adapter.target_modules
    modules = choose_modules(model, share, targets, cache, kept)
    return (None, modules) if adapter is None else (replace(adapter, target_modules=modules), None)
