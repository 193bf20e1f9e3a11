"""Adapters that begin with a part of the base, which the base loses: PiSSA, OLoRA, CorDA.

They start at s B0 A0, and the base keeps the rest, W - s B0 A0, in 4 bits again if it was. The policy starts where W
was, up to what 4 bits round; its reference is the policy as it starts, with this adapter on this base.

The base in memory is then another than the base on disk. So an adapter is saved as [A; A0] and [B, -B0], of twice the
rank: its update s (B A - B0 A0), on the base on disk, is the policy for everybody who loads it with peft. On a 4-bit
base it is so up to what 4 bits round, because they round W - s B0 A0 otherwise than W.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from alignment.errors import UserError
from alignment.files import atomic_write_text, read_sealed, write_sealed
from alignment.policy.adapter_kinds import ADAPTER, lora_layers
from alignment.policy.float_weights import FloatWeights

START_FILE = "adapter_start.json"
"""Beside a saved adapter that holds its start too: the init that it is from."""

_WEIGHTS, _SETTINGS = "adapter_model.safetensors", "adapter_config.json"
_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"

Start = dict[str, tuple[Tensor, Tensor]]
"""(A, B) in fp32, by the name of the layer in the base."""


@dataclass(frozen=True, slots=True)
class ResidualStart:
    """What the base in memory lacks.

    Attributes:
        init: that it is from.
        start: what the adapter began with.
    """

    init: str
    start: Start


def residual_start(model: nn.Module) -> ResidualStart | None:
    """What the base of this model lacks because its adapter began with it; None for most models."""
    return vars(model).get("residual_start")


def put(layer: Any, a: Tensor, b: Tensor) -> None:
    """Write (r, in) and (out, r) into the adapter of a layer."""
    layer.lora_A[ADAPTER].weight.data.copy_(a)
    layer.lora_B[ADAPTER].weight.data.copy_(b)


@torch.no_grad()
def edit_base(model: nn.Module, residual: ResidualStart, weights: FloatWeights | None) -> None:
    """Take a start out of the base in memory. Its tensors are replaced, not written to: other models may share them.

    Args:
        model: with the adapter, in place.
        residual: kept with the model, for saving it.
        weights: the base's own weights, for a base in 4 bits.

    Raises:
        UserError: a 4-bit base without its own weights.
    """
    layers = lora_layers(model)
    for name, (a, b) in residual.start.items():
        base = layers[name].get_base_layer()
        packed, state = base.weight, getattr(base.weight, "quant_state", None)
        device = packed.device
        if state is None:
            weight = packed.data.T if isinstance(base, Conv1D) else packed.data
        elif weights is not None:
            weight = weights.weight(name, tuple(state.shape)).to(device)
        else:
            raise UserError(f"adapter.init={residual.init} on a 4-bit base needs the base's own weights.")
        # In fp64, so that every machine rounds to the same.
        part = layers[name].scaling[ADAPTER] * (b.to(device).double() @ a.to(device).double())
        rest = weight.double() - part
        if state is None:
            rest = (rest.T if isinstance(base, Conv1D) else rest).to(packed.dtype).contiguous()
            base.weight = nn.Parameter(rest, requires_grad=False)
            continue
        base.weight = type(packed)(
            rest.to(state.dtype),
            requires_grad=False,
            blocksize=packed.blocksize,
            compress_statistics=packed.compress_statistics,
            quant_type=packed.quant_type,
            quant_storage=packed.quant_storage,
            module=base,
        ).to(device)
    vars(model)["residual_start"] = residual


def save_with_start(folder: Path, residual: ResidualStart) -> None:
    """Make a saved adapter one for the base on disk: of twice the rank, with the start in its second half."""
    weights = load_file(folder / _WEIGHTS)
    for name, (a, b) in residual.start.items():
        for key, part, axis in ((f"{_PREFIX}{name}{_A}", a, 0), (f"{_PREFIX}{name}{_B}", -b, 1)):
            weights[key] = torch.cat([weights[key], part.to(weights[key])], axis).contiguous()
    save_file(weights, folder / _WEIGHTS, {"format": "pt"})
    settings = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
    write_sealed(folder / START_FILE, {"init": residual.init, "settings": settings})
    atomic_write_text(folder / _SETTINGS, json.dumps(_of_twice_the_rank(settings), indent=2, sort_keys=True))


def _of_twice_the_rank(settings: dict[str, Any]) -> dict[str, Any]:
    """An adapter's settings with all ranks doubled; alphas follow, so that its factors stay."""
    by = math.sqrt(2) if settings["use_rslora"] else 2
    return settings | {
        "r": 2 * settings["r"],
        "lora_alpha": by * settings["lora_alpha"],
        "rank_pattern": {name: 2 * r for name, r in (settings["rank_pattern"] or {}).items()},
        "alpha_pattern": {name: by * alpha for name, alpha in (settings["alpha_pattern"] or {}).items()},
    }


def read_start(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], ResidualStart] | None:
    """Settings and weights of a saved adapter without the start that it holds, and that start; None without one."""
    path = folder / START_FILE
    if not path.exists():
        return None
    found = read_sealed(path)
    halves: dict[str, Tensor] = {}
    start: Start = {}
    weights = load_file(folder / _WEIGHTS)
    for key, weight in weights.items():
        axis = 0 if key.endswith(_A) else 1 if key.endswith(_B) else None
        halves[key] = weight if axis is None else weight.chunk(2, axis)[0].contiguous()
        if axis == 0:
            other = weights[key.removesuffix(_A) + _B]
            name = key.removeprefix(_PREFIX).removesuffix(_A)
            start[name] = (weight.chunk(2, 0)[1].float(), -other.chunk(2, 1)[1].float())
    return found["settings"], halves, ResidualStart(found["init"], start)
