"""How a LoRA starts where its first values come from the base's float weights, or from the inputs of its layers."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from alignment.config.adapters import DATA_INITS, RESIDUAL_INITS, AdapterConfig
from alignment.errors import UserError
from alignment.files import CacheKind, to_json
from alignment.policy.adapter_kinds import ADAPTER, dora_norm, lora_layers
from alignment.policy.float_weights import FloatWeights
from alignment.policy.identity import policy_identity
from alignment.policy.kept_tensors import read_pairs, write_pairs
from alignment.policy.layer_inputs import input_moments
from alignment.policy.residual_start import ResidualStart, Start, edit_base, put

log = logging.getLogger(__name__)

_PARTS = ("A", "B")


@dataclass(frozen=True, slots=True)
class StartSources:
    """What some inits need beside the loaded model.

    Attributes:
        weights: the base's own weights, for a base in 4 bits.
        cache: folder that all runs share; None computes anew every time.
        sequences: gives tokens of training data.
    """

    weights: FloatWeights | None = None
    cache: Path | None = None
    sequences: Callable[[], Sequence[np.ndarray]] | None = None


def reads_data(config: AdapterConfig | None) -> bool:
    """Whether an adapter's start looks at training data."""
    return config is not None and config.init_family in DATA_INITS


@torch.no_grad()
def start_adapter(model: nn.Module, config: AdapterConfig, seed: int, sources: StartSources) -> None:
    """Give a fresh LoRA the start that the settings ask for; PiSSA, OLoRA and CorDA edit the base in memory.

    Raises:
        UserError: the init knows linear layers only, or lacks weights or data that it needs.
    """
    if config.kind not in ("lora", "dora"):
        return
    layers = lora_layers(model)
    if config.kind == "dora":
        for layer in layers.values():
            layer.lora_magnitude_vector[ADAPTER].weight.data = dora_norm(layer, ADAPTER)
    if config.init == "zero_a":
        _zero_a(layers, seed)
    if config.init in ("default", "gaussian", "orthogonal", "zero_a"):
        return
    for name, layer in layers.items():
        if ADAPTER not in layer.lora_A or hasattr(layer, "parameter_name"):
            raise UserError(
                f"adapter.init={config.init} knows linear layers alone, and {name} is none: take it out of "
                f"adapter.target_modules, or set adapter.init=default."
            )
        if config.init != "eva":
            _require_readable(name, layer.get_base_layer(), config)
    start = _stored(model, layers, config, seed, sources)
    for name, (a, b) in start.items():
        put(layers[name], a, b)
    if config.init_family in RESIDUAL_INITS:
        edit_base(model, ResidualStart(config.init, start), sources.weights)


def _require_readable(name: str, base: Any, config: AdapterConfig) -> None:
    """Refuse a start from weights that are packed in another way than in 4 bits of bitsandbytes."""
    weight = getattr(base, "weight", None)
    if weight is None or not (weight.is_floating_point() or hasattr(weight, "quant_state")):
        raise UserError(
            f"adapter.init={config.init} begins with a part of the weight of {name}, which the checkpoint has packed "
            f"into a {type(base).__name__}: set adapter.init=default, or use the checkpoint that is not quantised."
        )


def _zero_a(layers: Mapping[str, Any], seed: int) -> None:
    """A = 0, and B as A usually is: uniform, within 1 / sqrt(r). On an embedding that is the usual start already."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers.values():
        if ADAPTER in layer.lora_A:
            layer.lora_A[ADAPTER].weight.zero_()
            b = layer.lora_B[ADAPTER].weight
            b.copy_((torch.rand(b.shape, generator=generator) * 2 - 1) / math.sqrt(layer.r[ADAPTER]))


def _stored(
    model: nn.Module, layers: Mapping[str, Any], config: AdapterConfig, seed: int, sources: StartSources
) -> Start:
    """The start from the cache, or computed and kept there: a resumed run begins with the same to the last bit."""
    sequences: Sequence[np.ndarray] = ()
    if reads_data(config):
        sequences = () if sources.sequences is None else sources.sequences()
        if not sequences:
            raise UserError(f"adapter.init={config.init} looks at training data, and there are none here.")

    # All that decides the start
    digest = hashlib.blake2b(to_json([config.init, seed, [s.tolist() for s in sequences]]), digest_size=16)
    if sequences:
        digest.update(policy_identity(model)[0].encode())
    for name, layer in layers.items():
        digest.update(f"{name} {layer.r[ADAPTER]} {layer.scaling[ADAPTER]!r}".encode())
        for weight in _weights(name, layer, config, sources):
            digest.update(weight.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)

    # The start
    path: Path | None = None
    if sources.cache is not None:
        path = CacheKind.adapter_starts.under(sources.cache) / f"{digest.hexdigest()}.safetensors"
        if path.exists():
            if (kept := read_pairs(path, _PARTS)) is not None:
                return kept
            log.warning("%s is damaged: the adapter's start is computed anew.", path)
    log.info("Computing the adapter's start (adapter.init=%s) for %d layers ...", config.init, len(layers))
    start = dict(_computed(model, layers, config, seed, sources, sequences))
    if path is not None:
        write_pairs(path, start, _PARTS)
    return start


def _weights(name: str, layer: Any, config: AdapterConfig, sources: StartSources) -> Iterator[Tensor]:
    """(out, in), fp32: the weight that the start is made from, and for LoftQ what 4 bits have left of it."""
    if config.init == "eva":
        return
    base = layer.get_base_layer()
    state = getattr(base.weight, "quant_state", None)
    if state is None:
        yield (base.weight.data.T if isinstance(base, Conv1D) else base.weight.data).float()
        return
    if sources.weights is None:
        raise UserError(f"adapter.init={config.init} on a 4-bit base needs the base's own weights, from its files.")
    yield sources.weights.weight(name, tuple(state.shape)).to(base.weight.device)
    if config.init == "loftq":
        from peft.utils.integrations import dequantize_module_weight

        yield dequantize_module_weight(base).detach().float()


def _computed(
    model: nn.Module,
    layers: Mapping[str, Any],
    config: AdapterConfig,
    seed: int,
    sources: StartSources,
    sequences: Sequence[np.ndarray],
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """(layer, (A, B)): fp32, on the CPU."""
    moments: Any = input_moments(model, layers, sequences) if sequences else ((name, None) for name in layers)
    for name, inputs in moments:
        layer = layers[name]
        r, scaling = layer.r[ADAPTER], layer.scaling[ADAPTER]
        num_out, num_in = layer.out_features, layer.in_features
        most = num_in if config.init == "eva" else min(num_out, num_in)
        if r > most:
            raise UserError(
                f"adapter.r: adapter.init={config.init} finds at most {most} directions in {name}, not {r}: lower it, "
                f"or give this layer a smaller one by adapter.rank_pattern."
            )
        weights = list(_weights(name, layer, config, sources))
        if config.init == "eva":
            a, b = _eva(inputs[0], inputs[1], r), torch.zeros(num_out, r)
        elif config.init == "olora":
            q, upper = torch.linalg.qr(weights[0])
            a, b = upper[:r], q[:, :r]
        elif config.init == "corda":
            a, b = _corda(weights[0], inputs[0], r, scaling)
        elif config.init == "loftq":
            a, b = _largest(weights[0] - weights[1], r, scaling, config.init, seed)
        else:
            a, b = _largest(weights[0], r, scaling, config.init, seed)
        yield name, (a.cpu().contiguous(), b.cpu().contiguous())


def _largest(weight: Tensor, r: int, scaling: float, init: str, seed: int) -> tuple[Tensor, Tensor]:
    """(A, B) with s B A = the best rank-r approximation, its singular values shared between A and B."""
    iterations = init.partition("_niter_")[2]
    if not iterations:
        u, values, v = torch.linalg.svd(weight, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
            torch.manual_seed(seed)
            u, values, right = torch.svd_lowrank(weight, r, niter=int(iterations))
        v = right.T
    root = (values[:r] / scaling).sqrt()
    return root[:, None] * v[:r], u[:, :r] * root


def _eva(moment: Tensor, mean: Tensor, r: int) -> Tensor:
    """(r, in): the main directions of the inputs around their mean, the first the one with the largest variance."""
    _, vectors = torch.linalg.eigh(moment - torch.outer(mean, mean))
    return vectors.flip(1)[:, :r].T


def _corda(weight: Tensor, moment: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """(A, B) from the SVD of W C (CorDA, section 3.2), with C the inputs' second moment; A is multiplied by C^-1.

    C is scaled to a mean diagonal of 1, which changes no product B A, and damped by 0.01 as in the authors' code.
    """
    moment = moment / moment.diagonal().mean().clamp_min(torch.finfo(moment.dtype).tiny)
    moment = moment + 0.01 * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    u, values, v = torch.linalg.svd(weight @ moment, full_matrices=False)
    root = (values[:r] / scaling).sqrt()
    return root[:, None] * torch.linalg.solve(moment, v[:r].T).T, u[:, :r] * root
