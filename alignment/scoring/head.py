"""From hidden states to log-probs of target tokens: the LM head in chunks, so that full logits are never kept."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from alignment.kernels.fused import is_fused
from alignment.kernels.linear import hooked
from alignment.kernels.log_probs import target_log_probs
from alignment.kernels.matmul import matmul, wide_matmul
from alignment.scoring.token_scores import TokenScores
from alignment.types import Quantity

LOGITS_PER_CHUNK = {"cpu": 2**23, "cuda": 2**27}
"""How many logits exist at one time, by device: 32 or 512 MiB in fp32. On a CPU this is small enough for the process to
reuse its memory, on a GPU large enough for a matrix product that fills it."""

# exp of less is a denormal number in fp32: no gradient, and a hundred times slower to compute with.
_SMALLEST_LOG = -80.0


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """What some architectures do to the head's output: logits * scale, or cap * tanh(logits / cap).

    `logps.check_scoring` looks whether anything else happens.
    """

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config: Any) -> LogitTransform:
        """The transform of a model, read from its configuration."""
        if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2
            return cls(cap=cap)
        if divisor := getattr(config, "logits_scaling", None):  # Granite
            return cls(scale=1 / divisor)
        for name in ("logit_scale", "lm_head_multiplier"):  # Cohere, Falcon-H1
            if factor := getattr(config, name, None):
                return cls(scale=factor)
        return cls()

    def __call__(self, logits: Tensor) -> Tensor:
        """Transformed logits, differentiable; 16-bit logits become fp32."""
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self.cap is not None:
            return self.cap * torch.tanh(logits / self.cap)
        return logits * self.scale if self.scale != 1.0 else logits

    def slope(self, transformed: Tensor) -> Tensor | float:
        """Derivative of the transform, computed from its result."""
        return 1 - (transformed / self.cap) ** 2 if self.cap is not None else self.scale


REWARD_HEAD = "score"
"""The name under which transformers' classification models have their head, and a reward model has its own."""


def reward_head(model: nn.Module) -> nn.Module | None:
    """The head that gives rewards; None for a model that is no reward model."""
    return model._modules.get(REWARD_HEAD)


def rewards_of(head: Any, hidden: Tensor) -> Tensor:
    """(1, tokens) rewards of (tokens, H) hidden states, in the head's dtype whatever autocast says; differentiable."""
    with torch.autocast(hidden.device.type, enabled=False):
        rewards: Tensor = head(hidden.to(head.weight.dtype))
    return rewards.T


@dataclass(frozen=True, slots=True)
class OtherModel:
    """The other model's pass over the same positions, for a KL.

    Attributes:
        head: from (tokens, H) to (tokens, V), its head.
        hidden: (tokens, H) its hidden states, without gradient.
    """

    head: Callable[[Tensor], Tensor]
    hidden: Tensor


@dataclass(frozen=True, slots=True)
class Likeliest:
    """The likeliest next tokens of a teacher at the scored positions.

    Attributes:
        ids: (tokens, k) int64.
        logps: (tokens, k) their log-probs.
    """

    ids: Tensor
    logps: Tensor

    def part(self, part: slice) -> Likeliest:
        """Those of a range of positions."""
        return Likeliest(self.ids[part], self.logps[part])

    def forward_kl(self, log_probs: Tensor) -> Tensor:
        """(tokens,) `Quantity.forward_kl`, from (tokens, V) log-probs of the policy; differentiable."""
        own = self.logps.to(log_probs.dtype)
        return (own.exp() * (own - log_probs.gather(1, self.ids))).sum(dim=-1)

    def slope(self, probs: Tensor) -> Tensor:
        """(tokens, V) derivative of the same by the policy's logits, from (tokens, V) probabilities, which it takes
        over: p_v sum_u q_u - q_v."""
        own = self.logps.exp().to(probs.dtype)
        return probs.mul_(own.sum(dim=-1, keepdim=True)).scatter_add_(1, self.ids, -own)


def _token_scores(
    log_probs: Tensor, targets: Tensor, quantities: frozenset[Quantity], other: Tensor | Likeliest | None
) -> TokenScores:
    """Log-probs of the targets and the quantities, from (tokens, V) log-probs of this model and of the other one.

    The collision and the entropy carry no gradient.
    """
    logps = log_probs.gather(1, targets[:, None]).squeeze(1)
    fixed = log_probs.detach()
    found: dict[Quantity, Tensor] = {}
    if Quantity.collision in quantities:
        found[Quantity.collision] = torch.logsumexp(2 * fixed, dim=-1)
    if Quantity.entropy in quantities:
        found[Quantity.entropy] = -(fixed.exp() * fixed).sum(dim=-1) / math.log(fixed.shape[-1])
    other_logps = None
    if isinstance(other, Likeliest):
        found[Quantity.forward_kl] = other.forward_kl(log_probs)
    elif Quantity.divergence in quantities:
        assert other is not None
        found[Quantity.divergence] = (other.exp() * (other - log_probs)).sum(dim=-1)
        other_logps = other.gather(1, targets[:, None]).squeeze(1)
    return TokenScores.stack(logps, found, other_logps)


class _ScoreOnce(torch.autograd.Function):
    """Token scores and, from the same logits, their derivatives, so that the backward pass does not run the head again.

    A score depends on its own hidden state alone. For a log-prob, d logp / d h = W[y] - sum over v of p_v W[v]; for
    a divergence KL(q || p), sum over v of (p_v - q_v) W[v], with `Likeliest.slope` in its place for a forward KL; all
    times the slope of the transform. So only one row of H numbers is kept per position and differentiable score. The
    head's weights get no gradient: they must be frozen.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: nn.Linear,
        targets: Tensor,
        transform: LogitTransform,
        quantities: frozenset[Quantity],
        other: OtherModel | Likeliest | None,
    ) -> Tensor:
        rows = 1 if other is None else 2
        derivatives = hidden.new_empty((rows, *hidden.shape), dtype=head.weight.dtype)
        ctx.quantities = quantities
        if not quantities and _is_fused(head, hidden):
            logps = _log_probs(head, hidden, targets, transform, derivatives[0])
            ctx.save_for_backward(derivatives)
            return TokenScores.stack(logps).values
        results = []
        for part in _chunks(head, hidden):
            logits = transform(head(hidden[part]))
            slope = transform.slope(logits)
            log_probs = torch.log_softmax(logits, dim=-1)
            del logits
            y = targets[part]
            others = _other_log_probs(other, part, transform)
            results.append(_token_scores(log_probs, y, quantities, others).values)
            weights = log_probs.clamp_(min=_SMALLEST_LOG).exp_().neg_()
            if isinstance(others, Likeliest):
                derivatives[1, part] = _through_head(others.slope(-weights), slope, head)
            elif others is not None:
                derivatives[1, part] = _through_head(-weights - others.exp_(), slope, head)
            weights.scatter_add_(1, y[:, None], torch.ones_like(weights[:, :1]))
            derivatives[0, part] = _through_head(weights, slope, head)
        ctx.save_for_backward(derivatives)
        return torch.cat(results, dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (derivatives,) = ctx.saved_tensors
        incoming = TokenScores(gradient, ctx.quantities)
        total = incoming.logps[:, None] * derivatives[0]
        for quantity in ctx.quantities & {Quantity.forward_kl, Quantity.divergence}:  # one of them at most
            total = total + incoming[quantity][:, None] * derivatives[1]
        return total.to(derivatives.dtype), None, None, None, None, None


def _is_fused(head: nn.Module, hidden: Tensor) -> bool:
    """Whether log-probs alone come from fp32 logits by one kernel: a plain head in the dtype of the hidden states."""
    plain = type(head) is nn.Linear and head.bias is None and not hooked(head)
    return plain and head.weight.dtype is hidden.dtype and is_fused(hidden)


def _log_probs(
    head: nn.Linear, hidden: Tensor, targets: Tensor, transform: LogitTransform, derivatives: Tensor | None
) -> Tensor:
    """(tokens,) log-probs of the targets; fills (tokens, H), their derivatives by the hidden states, if given."""
    weight = head.weight.detach()
    dtype = None if derivatives is None else weight.dtype
    results = []
    with torch.autocast(hidden.device.type, enabled=False):
        for part in _chunks(head, hidden):
            logits = wide_matmul(hidden[part], weight.t())
            logps, by_logits = target_log_probs(logits, targets[part], transform.scale, transform.cap, dtype)
            results.append(logps)
            del logits
            if derivatives is not None:
                assert by_logits is not None
                derivatives[part] = wide_matmul(by_logits, weight)
            del by_logits
    return torch.cat(results)


def _through_head(weights: Tensor, slope: Tensor | float, head: nn.Linear) -> Tensor:
    """(tokens, H): from derivatives by the transformed logits to derivatives by the hidden states."""
    if isinstance(slope, Tensor) or slope != 1.0:
        weights = weights.mul_(slope)
    return matmul(weights.to(head.weight.dtype), head.weight)


def _other_log_probs(
    other: OtherModel | Likeliest | None, part: slice, transform: LogitTransform
) -> Tensor | Likeliest | None:
    """Of a range of positions: the other model's log-probs of all tokens, or of its likeliest ones."""
    if other is None:
        return None
    if isinstance(other, Likeliest):
        return other.part(part)
    with torch.no_grad():
        return torch.log_softmax(transform(other.head(other.hidden[part])), dim=-1)


def _chunks(head: Any, hidden: Tensor) -> Iterator[slice]:
    """Ranges of positions whose logits exist at one time."""
    size = max(1, LOGITS_PER_CHUNK[hidden.device.type] // int(head.out_features))
    for start in range(0, len(hidden), size):
        yield slice(start, start + size)


def score_hidden(
    head: Any,
    hidden: Tensor,
    targets: Tensor,
    transform: LogitTransform,
    quantities: frozenset[Quantity] = frozenset(),
    other: OtherModel | Likeliest | None = None,
) -> Tensor:
    """Log-probs of target tokens, and quantities of the model's distributions at these positions.

    A frozen linear head runs once, and the derivatives come from the same logits. Any other head, also one that
    trains, runs again in the backward pass.

    Args:
        head: module from (tokens, H) to (tokens, V), with `out_features`.
        hidden: (tokens, H).
        targets: (tokens,) int64.
        transform: what the model does to the head's output.
        quantities: wanted beside the log-probs.
        other: the other model of a divergence KL(other || this), or the likeliest tokens of a forward KL.

    Returns:
        (rows, tokens) fp32 (fp64 for an fp64 head), the `values` of `TokenScores`. A plain tensor, because it passes
        through wrappers of `forward`.
    """

    assert isinstance(other, OtherModel) == (Quantity.divergence in quantities), "another model is for a divergence"
    assert isinstance(other, Likeliest) == (Quantity.forward_kl in quantities), "likeliest tokens are for a forward KL"

    def score_one(h: Tensor, y: Tensor, part: slice) -> Tensor:
        logits = transform(head(h))
        if not quantities:
            return TokenScores.stack(-F.cross_entropy(logits, y, reduction="none")).values
        others = _other_log_probs(other, part, transform)
        return _token_scores(torch.log_softmax(logits, dim=-1), y, quantities, others).values

    frozen = isinstance(head, nn.Linear) and head.weight.is_floating_point() and not head.weight.requires_grad
    if torch.is_grad_enabled() and frozen:
        scores: Tensor = _ScoreOnce.apply(  # type: ignore[no-untyped-call]
            hidden, head, targets, transform, quantities, other
        )
        return scores
    if frozen and not quantities and _is_fused(head, hidden):
        return TokenScores.stack(_log_probs(head, hidden, targets, transform, None)).values
    score = functools.partial(checkpoint, score_one, use_reentrant=False) if torch.is_grad_enabled() else score_one
    return torch.cat([score(hidden[part], targets[part], part) for part in _chunks(head, hidden)], dim=1)


def likeliest_tokens(
    head: Any, hidden: Tensor, targets: Tensor, transform: LogitTransform, count: int, size: int
) -> Tensor:
    """Log-probs of target tokens, and the likeliest tokens with theirs, without gradient.

    Args:
        head, hidden, targets, transform: as of `score_hidden`.
        count: k, of the likeliest tokens.
        size: only tokens with smaller ids are among them.

    Returns:
        (1 + 2 k, tokens) fp32 (fp64 for an fp64 head): the targets' log-probs, those of the likeliest, likeliest
        first, and the ids of these, which are exact below 2^24.
    """
    found = []
    for part in _chunks(head, hidden):
        log_probs = torch.log_softmax(transform(head(hidden[part])), dim=-1)
        logps, ids = log_probs[:, :size].topk(count, dim=-1)
        rows = [log_probs.gather(1, targets[part, None]), logps, ids.to(logps.dtype)]
        found.append(torch.cat(rows, dim=1).T)
    return torch.cat(found, dim=1)
