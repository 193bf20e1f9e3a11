"""Calibrated NF4 (ICQ of IR-QLoRA, arXiv 2402.05445, section 3.2): a constant per block, found by a search."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from alignment.config.schema import Calibration
from alignment.errors import UserError
from alignment.files import CacheKind, file_lock
from alignment.kernels.calibrated import BLOCK, block_constants, make_calibrated, pack_constants
from alignment.policy.digest import hash_tensor
from alignment.policy.kept_tensors import read_pairs, write_pairs

log = logging.getLogger(__name__)

_PARTS = ("codes", "scales")

_GRIDS = {Calibration.entropy: (0.1 / 1.8482, 201), Calibration.mse: (0.3, 61)}
"""How far from the median candidates lie, as a share of the block's largest distance from it, and how many there are.

For the entropy, the authors' grid: within 0.1 standard deviations, for one of which they take 1 / 1.848 of the largest
distance. For the error a wider one: on SmolLM2-135M it leaves 0.66 of NF4's error, the authors' grid 0.74.
"""
_VALUES_AT_ONCE = {"cpu": 2**18, "cuda": 2**24}
"""Size of the search's temporaries: a core's cache, or enough work for a GPU."""


def search(weight: Tensor, objective: Calibration) -> Tensor:
    """The constant of every block of 64 weights.

    Candidates are points of a grid around the block's median, and it. A block w is quantised as NF4 of (w - tau) / s
    with s = max |w - tau|. `entropy` takes the tau with the largest entropy of the 16 codes' shares (the paper,
    equation 7), `mse` the one with the smallest squared error; among equals the nearest to the median.

    Args:
        weight: (out, in); `in` is a multiple of 64.
        objective: not `none`.

    Returns:
        (out, in / 64), fp32.
    """
    blocks = weight.float().reshape(-1, BLOCK)
    codes = _nf4(weight.device)
    span, points = _GRIDS[objective]
    steps = torch.linspace(-span, span, points, device=weight.device)
    steps = steps[steps.abs().argsort(stable=True)]  # the first of equals is taken
    rows = max(1, _VALUES_AT_ONCE[weight.device.type] // (len(codes) * len(steps)))
    found = [_best_constants(part, steps, codes, objective) for part in blocks.split(rows)]
    return torch.cat(found).view(len(weight), -1)


def _nf4(device: torch.device) -> Tensor:
    from bitsandbytes.functional import get_4bit_type

    return get_4bit_type("nf4", device=device)


def _best_constants(blocks: Tensor, steps: Tensor, codes: Tensor, objective: Calibration) -> Tensor:
    """(n,) constants of (n, 64) blocks.

    Only the numbers of values below the 15 borders between codes are needed, which a sorted block gives by binary
    search, and for the error the sums of the values between them.
    """
    ordered = blocks.sort(-1).values
    median = ordered[:, BLOCK // 2 - 1 : BLOCK // 2 + 1].mean(-1, keepdim=True)
    ordered = ordered - median
    low, high = ordered[:, :1], ordered[:, -1:]
    tau = torch.maximum(high, -low) * steps
    scale = torch.maximum(high - tau, tau - low)
    borders = tau[..., None] + scale[..., None] * (codes[1:] + codes[:-1]) / 2
    below = torch.searchsorted(ordered, borders.flatten(1))

    def between(totals: Tensor) -> Tensor:
        """(n, points, 16): what lies between neighbouring borders, from the totals below each."""
        first, last = torch.zeros_like(tau)[..., None], totals[:, -1:, None].expand(*tau.shape, 1)
        at = totals.gather(1, below).view(borders.shape)
        return torch.cat([first, at, last], -1).diff(dim=-1)

    counts = between(torch.arange(BLOCK + 1, dtype=ordered.dtype, device=ordered.device).expand(len(ordered), -1))
    if objective is Calibration.entropy:
        # Rounded, so that the order of a sum decides nothing between equals.
        cost = torch.xlogy(counts, counts / BLOCK).sum(-1).mul(1024).round()
    else:
        # Of sum (w - v)^2 over the values w of each code v, the part that depends on v.
        sums = between(nn.functional.pad(ordered.cumsum(-1), (1, 0)))
        values = tau[..., None] + scale[..., None] * codes
        cost = (values * (counts * values - 2 * sums)).sum(-1)
    best = cost.argmin(-1, keepdim=True)
    return (median + tau.gather(1, best)).squeeze(1)


@torch.no_grad()
def calibrate(model: nn.Module, load_plain: Callable[[], Any], objective: Calibration, name: str, cache: Path) -> None:
    """Quantise the layers of a model anew, each block less its constant, and have them add the constants back.

    The constants are searched once per model and objective, and kept in the cache under a digest of the weights.

    Args:
        model: in NF4, on its device. Layers whose width is no multiple of 64 stay as they are.
        load_plain: loads the same model unquantised, on the CPU.
        objective: not `none`.
        name: of the model, for people.
        cache: folder that all runs share.

    Raises:
        UserError: the model has no layer that can be calibrated.
    """
    from bitsandbytes.nn import Linear4bit

    quantised = {key: layer for key, layer in model.named_modules() if isinstance(layer, Linear4bit)}
    layers: dict[str, Any] = {key: layer for key, layer in quantised.items() if layer.in_features % BLOCK == 0}
    if not layers:
        raise UserError(
            f"quantization.calibration={objective.name}: {name} has no 4-bit layer whose width is a multiple of "
            f"{BLOCK}: set quantization.calibration=none."
        )
    plain = load_plain()
    weights = {key: plain.get_submodule(key).weight for key in layers}
    device = next(iter(layers.values())).weight.device
    for key, (codes, scales) in _constants(weights, objective, device, cache).items():
        _quantise(layers[key], weights[key], codes.to(device), scales.to(device))
    if left := len(quantised) - len(layers):
        log.info("%d layers stay plain NF4: their width is no multiple of %d.", left, BLOCK)


def _quantise(layer: Any, weight: Tensor, codes: Tensor, scales: Tensor) -> None:
    """Pack what is left of the weights without the constants as they are kept."""
    from bitsandbytes.nn import Params4bit

    old = layer.weight
    constants = block_constants(codes, scales)
    rest = (weight.to(old.device).float().view(*constants.shape, BLOCK) - constants[..., None]).view(weight.shape)
    packed: Any = Params4bit(
        rest,
        requires_grad=False,
        blocksize=BLOCK,
        compress_statistics=old.compress_statistics,
        quant_type=old.quant_type,
        quant_storage=old.quant_storage,
        module=layer,
    )
    layer.weight = packed.to(old.device)
    layer.weight.quant_state.dtype = old.quant_state.dtype  # of the unpacked values; the search was in fp32
    make_calibrated(layer, codes, scales)


_Constants = dict[str, tuple[Tensor, Tensor]]


def _constants(weights: dict[str, Tensor], objective: Calibration, device: torch.device, cache: Path) -> _Constants:
    """(codes, scales) by layer, from the cache or from a search."""
    digest = hashlib.blake2b(f"{objective.name} {_GRIDS[objective]}".encode(), digest_size=16)
    for key, weight in weights.items():
        digest.update(key.encode())
        hash_tensor(digest, weight)
    path = CacheKind.calibration.under(cache) / f"{digest.hexdigest()}.safetensors"
    with file_lock(path.with_suffix(".lock"), "Another run is calibrating this model; waiting for its result ..."):
        found = None
        if path.exists() and (found := read_pairs(path, _PARTS)) is None:
            log.warning("%s is damaged: the model is calibrated anew.", path)
        if found is None or found.keys() != weights.keys():
            found = _searched(weights, objective, device)
            write_pairs(path, found, _PARTS)
    return found


def _searched(weights: dict[str, Tensor], objective: Calibration, device: torch.device) -> _Constants:
    started, found = time.monotonic(), {}
    count = sum(weight.numel() for weight in weights.values())
    with tqdm(total=count, desc="Calibrating NF4", unit="weight", unit_scale=True) as bar:
        for key, weight in weights.items():
            codes, scales = pack_constants(search(weight.to(device), objective))
            found[key] = codes.cpu(), scales.cpu()
            bar.update(weight.numel())
    log.info(
        "Calibrated NF4 by %s: %d layers in %.0f s; other runs of this model find the result.",
        objective.name,
        len(weights),
        time.monotonic() - started,
    )
    return found
