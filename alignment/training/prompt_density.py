"""Weights for undesirable rows whose prompts differ from those of the desirable ones (BCO's distribution matching).

A logistic regression on prompt embeddings tells desirable from undesirable prompts. With equal weight for both labels
its odds p / (1 - p) estimate p(prompt | desirable) / p(prompt | undesirable), the weight of an undesirable row.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alignment.errors import UserError
from alignment.scoring.logps import autocast, keeps_logits
from alignment.types import Group, MadeOnDemand

log = logging.getLogger(__name__)

PROMPTS_PER_LABEL = 1024
"""The classifier is fitted on this many prompts of each label (as in TRL's BCO trainer)."""

LEAST_WEIGHT, GREATEST_WEIGHT = 0.5, 10.0
"""Bounds of a weight (as in TRL's BCO trainer)."""


@torch.no_grad()
def _embedded(
    model: Any, prompts: Sequence[np.ndarray], tokens_per_batch: int, device: torch.device
) -> Iterator[tuple[list[int], Tensor]]:
    """(indices of the prompts, (n, H) float32 on the CPU) pass by pass, long prompts first.

    Padding follows the prompt, so no token of the prompt sees it, and the mean leaves it out.
    """
    sizes = np.array([len(prompt) for prompt in prompts])
    order = np.argsort(-sizes, kind="stable")
    start = 0
    while start < len(order):
        width = int(sizes[order[start]])
        members = order[start : start + max(1, tokens_per_batch // width)].tolist()
        start += len(members)
        ids = np.zeros((len(members), width), dtype=np.int64)
        for row, i in enumerate(members):
            ids[row, : sizes[i]] = prompts[i]
        lengths = torch.from_numpy(sizes[members]).to(device)
        with autocast(model, device):
            hidden = model.get_decoder()(input_ids=torch.from_numpy(ids).to(device), use_cache=False).last_hidden_state
        real = torch.arange(width, device=device) < lengths[:, None]
        yield members, (hidden.float().masked_fill(~real[..., None], 0).sum(1) / lengths[:, None]).cpu()


def prompt_embeddings(model: Any, prompts: Sequence[np.ndarray], tokens_per_batch: int, device: torch.device) -> Tensor:
    """(n, H) float32 on the CPU: the mean over a prompt's tokens of the decoder's last hidden states.

    Args:
        model: a causal LM with its adapter, without dropout.
        prompts: n arrays of token ids.
        tokens_per_batch: at most this many positions in a pass, padding included, unless a single prompt has more.
        device: of the model.

    Raises:
        UserError: the model shows no hidden states.
    """
    if keeps_logits(model):
        raise UserError(
            f"loss.density_weights compares prompts by the hidden states of the model, and "
            f"{model.config.model_type} gives none: set loss.density_weights=false."
        )
    parts = list(_embedded(model, prompts, tokens_per_batch, device))
    embeddings = torch.cat([embeddings for _, embeddings in parts])
    return embeddings[torch.tensor([i for members, _ in parts for i in members]).argsort()]


def fit_log_odds(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The classifier: (H,) coefficients w and a scalar b, float64, of log p / (1 - p) = w e + b.

    It minimises |w|^2 / 2 + sum_i c_i log(1 + exp(-y_i (w e_i + b))), y = 1 for desirable and -1 for undesirable rows.
    c_i gives both labels the same weight: the rows of each share n / 2. This is scikit-learn's
    `LogisticRegression(class_weight="balanced")`, solved exactly; the solution is unique.

    It uses Newton's method: a few dimensions of hidden states are hundreds of times larger than the others, and there
    first-order methods stop far from the solution.

    Args:
        embeddings: (n, H).
        labels: (n,) bool, some True and some False.
    """
    x, y = embeddings.double(), 2.0 * labels.double() - 1
    shares = torch.where(labels, 0.5 / labels.double().mean(), 0.5 / (~labels).double().mean())
    # w is a combination of the centred embeddings (b absorbs their mean), so there are no more unknowns than rows.
    mean = x.mean(0)
    basis, coordinates = torch.linalg.qr((x - mean).T)
    features = torch.cat([coordinates.T, torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
    penalty = torch.ones(features.shape[1], dtype=torch.float64)
    penalty[-1] = 0

    def objective(parameters: Tensor) -> Tensor:
        return (penalty * parameters.square()).sum() / 2 + (shares * F.softplus(-y * (features @ parameters))).sum()

    parameters = torch.zeros_like(penalty)
    decrement = torch.inf
    while decrement > 1e-8:  # below that, one full step squares the error
        margins = y * (features @ parameters)
        slopes = shares * torch.sigmoid(-margins)
        gradient = penalty * parameters - features.T @ (y * slopes)
        hessian = (features.T * (slopes * torch.sigmoid(margins))) @ features + penalty.diag()
        step = torch.linalg.solve(hessian, gradient)
        decrement = (gradient @ step).item()
        while decrement > 1e-8 and not objective(parameters - step) < objective(parameters):
            step = step / 2
        parameters = parameters - step
    w = basis @ parameters[:-1]
    return w, parameters[-1] - w @ mean


def density_weights(log_odds: Tensor, labels: Tensor) -> Tensor:
    """(n,) factors of the losses: p / (1 - p) within the bounds for undesirable rows, 1 for desirable ones."""
    return torch.where(labels, 1.0, log_odds.exp().clamp(LEAST_WEIGHT, GREATEST_WEIGHT))


class _Prompts(MadeOnDemand[np.ndarray]):
    """The prompts of some groups, (P,) int32 each."""

    def __init__(self, groups: Sequence[Group], places: Sequence[int] | np.ndarray) -> None:
        self._groups = groups
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    def item(self, place: int) -> np.ndarray:
        """See `MadeOnDemand`."""
        return self._groups[int(self._places[place])].prompt


class _Weighted(MadeOnDemand[Group]):
    """Groups whose weights are multiplied by a factor each."""

    def __init__(self, groups: Sequence[Group], factors: np.ndarray) -> None:
        self._groups = groups
        self._factors = factors

    def __len__(self) -> int:
        return len(self._groups)

    def item(self, place: int) -> Group:
        """See `MadeOnDemand`."""
        group = self._groups[place]
        return replace(group, weight=group.weight * float(self._factors[place]))


def with_density_weights(
    groups: Sequence[Group], model: nn.Module, tokens_per_batch: int, device: torch.device
) -> Sequence[Group]:
    """The labelled rows, with their weights multiplied by the density weights of their prompts.

    The weights come from the policy that the stage starts from, without randomness, so a resumed run finds the same.
    Hashes of the prompts, not the order of the rows, decide which rows the classifier is fitted on. Of each row, a hash
    and a few numbers are in memory; the rows stay where they are.

    Raises:
        UserError: all rows have the same label, or the policy's hidden states are not finite.
    """
    found, hashes = bytearray(), bytearray()
    for group in groups:
        found.append(group.labels == (True,))
        hashes += hashlib.blake2b(group.prompt.tobytes(), digest_size=16).digest()
    labels = torch.frombuffer(found, dtype=torch.bool)
    if labels.all() or not labels.any():
        raise UserError(
            f"loss.density_weights compares the prompts of desirable and undesirable rows, and all {len(groups)} rows "
            f"of data.source are {'desirable' if labels.all() else 'undesirable'}."
        )
    first, second = np.frombuffer(hashes, dtype=">u8").reshape(-1, 2).T
    by_hash = torch.from_numpy(np.lexsort((second, first)))
    fitted = torch.cat([by_hash[labels[by_hash] == label][:PROMPTS_PER_LABEL] for label in (True, False)])
    embeddings = prompt_embeddings(model, _Prompts(groups, fitted.numpy()), tokens_per_batch, device)
    if not embeddings.isfinite().all():
        raise UserError(
            "The policy that this stage starts from has hidden states that are not finite: its weights are damaged or "
            "overflow in this dtype (model.dtype, quantization.compute_dtype)."
        )
    w, b = fit_log_odds(embeddings, labels[fitted])
    undesirable = (~labels).nonzero().flatten()
    log_odds = torch.zeros(len(groups), dtype=torch.float64)
    for members, part in _embedded(model, _Prompts(groups, undesirable.numpy()), tokens_per_batch, device):
        log_odds[undesirable[members]] = part.double() @ w + b
    weights = density_weights(log_odds, labels)
    low, high = weights[~labels].min().item(), weights[~labels].max().item()
    log.info(
        "Weights of %d undesirable rows by the density of their prompts: %.3g to %.3g.", len(undesirable), low, high
    )
    weighted = _Weighted(groups, weights.numpy())
    return list(weighted) if isinstance(groups, list) else weighted
