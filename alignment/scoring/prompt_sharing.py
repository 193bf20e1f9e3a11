"""Decides at the start of every stage, by comparing numbers, whether a model may share prompts."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from alignment.kernels.attention import disable_shared_prompts, enable_shared_prompts
from alignment.kernels.base import in_words
from alignment.scoring.layout import PASS_COST, BatchLayout, FlatLayout, ForkedLayout, MicroBatch, SharedLayout
from alignment.scoring.logps import autocast, join_scores, score
from alignment.scoring.states import carries_states, enable_forking, lost_state
from alignment.types import Group

log = logging.getLogger(__name__)

_PRECISE_FLOOR, _FLOOR, _CEILING = (1e-5, 1e-3), (0.12, 0.5), (0.25, 0.7)
"""Differences of log-probs, in nats per token, and of the gradient, as a share of its norm.

Up to the floor (of 32 bits, of 16 bits) both layouts count as equal. Beyond it they may differ by three times what
another shape of the flat batches changes, but never by more than the ceiling. A real model of 135M parameters differs
by 0.066 and 0.03 in bfloat16, by 0.063 and 0.35 packed in NF4. Wrong layouts differ by 0.27 and 0.44 at the least: one
wrong token, positions that go on from one completion to the next, completions that see each other, a causal mask that
is aligned at the start. docs/gpu.md has the table.
"""
_BESIDE = "its completions see each other beside its attention"
_NO_LIMIT = 10_000
"""Positions of a pass that holds the whole comparison."""
_SHORT_WINDOW = 6
"""Replaces a model's sliding window in the comparison, so that a few tokens already reach beyond it."""


def choose_layout(model: nn.Module, device: torch.device) -> BatchLayout:
    """The shared layout if this model computes the same with it, else the forked one if it does, else the flat one.

    A few random sequences are scored in each layout, with gradients. Unknown kinds of attention and positions that
    cannot restart show as different numbers in a shared row. State-space layers show by the states that they keep, and
    in a fork those that drop them, or hand them on without their gradient. A log line says why prompts share no row.
    """
    flat = FlatLayout(PASS_COST[device.type])
    wrapped: Any = model
    base: Any = wrapped.get_base_model() if hasattr(model, "get_base_model") else model
    groups = _probe(base.get_input_embeddings().num_embeddings)
    windows = [None, _SHORT_WINDOW] if _has_window(base.config.get_text_config()) else [None]
    was_training = model.training
    model.train()  # as in a training step: some layers compute differently in evaluation
    try:
        expected = []
        for window in windows:
            with _window(base, window):
                expected.append((window, _scores_and_gradient(model, groups, flat, device)))
        shared = _why_not(model, base, SharedLayout(), groups, expected, device)
        if shared is None:
            return SharedLayout()
        disable_shared_prompts(base)
        if shared == _BESIDE:  # a state that no cache holds, so that a fork would drop it
            forked: str | None = "what hands it on is outside of the cache"
        else:
            forked = _why_not(model, base, ForkedLayout(_NO_LIMIT, least_gain=0), groups, expected, device)
    finally:
        model.train(was_training)
    if forked is None:
        log.info(
            "Prompts share no row with their completions (%s): long ones run once and hand their states on.", shared
        )
        return ForkedLayout(PASS_COST[device.type])
    log.info("Prompts are not shared between completions: %s. Nor are their states: %s.", shared, forked)
    return flat


def _why_not(
    model: nn.Module,
    base: Any,
    layout: BatchLayout,
    groups: Sequence[Group],
    expected: Sequence[tuple[int | None, tuple[Tensor, Tensor]]],
    device: torch.device,
) -> str | None:
    try:
        if isinstance(layout, ForkedLayout):
            enable_forking(base)
            if (state := _lost_state(base, layout, groups, device)) is not None:
                return f"its completions do not read {state} of their prompt"
        elif carries_states(base, device):
            return "its layers hand a state from token to token"
        elif not enable_shared_prompts(base):
            return f"its attention ({base.config._attn_implementation}) cannot be replaced"
        for window, values in expected:
            with _window(base, window):
                reason = _difference(model, layout, groups, values, base.dtype, device)
            if reason is not None:
                return reason
        if isinstance(layout, SharedLayout) and _reaches(model, base, layout, groups, device):
            return _BESIDE
    except Exception as error:  # whatever an architecture does with an attention or a cache that it does not know
        if device.type == "cuda" and not isinstance(error, NotImplementedError):
            # A GPU's launch error hides here just as well, and costs a third of the speed.
            log.warning("Sharing prompts failed on the GPU with %s.", type(error).__name__, exc_info=error)
        return f"its architecture cannot do it ({in_words(error)})"
    return None


def _reaches(model: nn.Module, base: Any, layout: BatchLayout, groups: Sequence[Group], device: torch.device) -> bool:
    """Whether the log-probs of other completions have a gradient at the first completion of a prompt in their row.

    A layer of unknown form may hand on a state that rounding hides in the log-probs. The gradient is exactly 0 where
    nothing is handed on, in every precision.
    """
    (batch,) = layout.batches(groups, _NO_LIMIT)
    assert batch.shared_row is not None
    inputs: list[Tensor] = []
    handle = base.get_input_embeddings().register_forward_hook(
        lambda *called: inputs.append(called[-1].requires_grad_() if called[-1].is_leaf else called[-1])
    )
    try:
        scores = join_scores(groups, [(batch, score(model, batch.to(device)))]).values
    finally:
        handle.remove()
    others = ~_first(groups).to(scores.device)
    (gradient,) = torch.autograd.grad(scores[others].sum(), inputs[:1])
    return any(bool(gradient[0, slice(*span.completion_ranges()[0])].any()) for span in batch.shared_row)


def _first(groups: Sequence[Group]) -> Tensor:
    """(tokens,) bool, those of the first completion of every group."""
    return torch.cat([torch.full((len(c),), k == 0) for g in groups for k, c in enumerate(g.completions)])


def _lost_state(base: Any, layout: BatchLayout, groups: Sequence[Group], device: torch.device) -> str | None:
    (batch,) = (batch.to(device) for batch in layout.batches(groups, _NO_LIMIT))
    assert batch.position_ids is not None and batch.fork is not None
    with autocast(base, device):
        return lost_state(base, batch.input_ids, batch.position_ids, batch.fork)


def _difference(
    model: nn.Module,
    layout: BatchLayout,
    groups: Sequence[Group],
    expected: tuple[Tensor, Tensor],
    dtype: torch.dtype,
    device: torch.device,
) -> str | None:
    precise = dtype in (torch.float32, torch.float64)
    found = _scores_and_gradient(model, groups, layout, device)
    differences, limits = _distance(found, expected), _PRECISE_FLOOR if precise else _FLOOR
    if not _within(differences, limits):
        noise = _distance(_scores_and_gradient(model, groups, FlatLayout(), device, tokens_per_batch=1), expected)
        limits = tuple(min(most, max(least, 3 * n)) for least, n, most in zip(limits, noise, _CEILING, strict=True))  # type: ignore[assignment]
    if not _within(differences, limits):
        return (
            f"its log-probs differ by {differences[0]:.2g} nats per token and its gradient by "
            f"{differences[1]:.2g} of its norm"
        )
    leak = _leak(model, layout, groups, found[0], device)
    if not leak <= (1e-6 if precise else 5e-3):
        return f"its completions see each other (log-probs change by {leak:.2g} nats per token)"
    return None


def _distance(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Mean difference of the log-probs, and difference of the gradients as a share of the expected one's norm."""
    (values, gradient), (expected_values, expected_gradient) = found, expected
    norm = expected_gradient.norm().clamp_min(1e-30)
    return (values - expected_values).abs().mean().item(), ((gradient - expected_gradient).norm() / norm).item()


def _within(differences: tuple[float, float], limits: tuple[float, float]) -> bool:
    return all(found <= limit for found, limit in zip(differences, limits, strict=True))


def _probe(vocabulary: int) -> list[Group]:
    rng = np.random.default_rng(0)

    def tokens(length: int) -> np.ndarray:
        return rng.integers(0, vocabulary, length).astype(np.int32)

    return [Group(tokens(7), (tokens(6), tokens(9), tokens(1), tokens(4))), Group(tokens(3), (tokens(5), tokens(2)))]


def _scores_and_gradient(
    model: nn.Module,
    groups: Sequence[Group],
    layout: BatchLayout,
    device: torch.device,
    tokens_per_batch: int = _NO_LIMIT,
) -> tuple[Tensor, Tensor]:
    """Log-probs of all completions, and the gradient of a few trainable tensors close to the input.

    Of tensors of which each rank holds a part, a pass uses copies. Then it is the gradient of the embeddings.
    """
    parameters = [p for p in model.parameters() if p.requires_grad][:8]
    if any(hasattr(p, "to_local") for p in parameters):
        return _scores_and_embedded_gradient(model, groups, layout, device, tokens_per_batch)
    total = torch.zeros((), device=device)
    scored = []
    for batch in layout.batches(groups, tokens_per_batch):
        logps = score(model, batch := batch.to(device))
        total = total + _weighed(logps.values, batch)
        scored.append((batch, logps.detach().to("cpu")))
    # Some, such as the scalars of an elastic connection, train beside the graph and have no gradient in it.
    found = torch.autograd.grad(total, parameters, allow_unused=True) if parameters else ()
    gradients = [g.float().flatten() for g in found if g is not None] or [torch.ones(1)]
    return join_scores(groups, scored).values, torch.cat(gradients)


def _weighed(values: Tensor, batch: MicroBatch) -> Tensor:
    """A sum whose weights belong to the tokens, so that the order of the sequences does not matter.

    All are positive, so that the gradient is no difference of large numbers, of which 16 bits would leave little.
    """
    return (values * (2 + torch.cos(batch.targets.to(values)))).sum()


def _scores_and_embedded_gradient(
    model: Any, groups: Sequence[Group], layout: BatchLayout, device: torch.device, tokens_per_batch: int
) -> tuple[Tensor, Tensor]:
    """As `_scores_and_gradient`: of what the embeddings give, added up for each token."""
    tokens = [np.zeros(1, np.int32), *(s for g in groups for s in (g.prompt, *g.completions))]  # 0: padding
    known = torch.from_numpy(np.unique(np.concatenate(tokens))).to(device)
    gradient: Tensor | None = None
    scored = []
    for batch in layout.batches(groups, tokens_per_batch):
        calls: list[tuple[Tensor, Tensor]] = []  # a fork has two

        def keep(_: nn.Module, inputs: Any, output: Tensor, calls: Any = calls) -> None:
            calls.append((inputs[0], output.requires_grad_() if output.is_leaf else output))

        handle = model.get_input_embeddings().register_forward_hook(keep)
        try:
            logps = score(model, batch := batch.to(device))
        finally:
            handle.remove()
        scored.append((batch, logps.detach().to("cpu")))
        found = torch.autograd.grad(_weighed(logps.values, batch), [output for _, output in calls])
        for (ids, _), own in zip(calls, found, strict=True):
            if gradient is None:
                gradient = torch.zeros(len(known), own.shape[-1], device=device)
            gradient.index_add_(0, torch.searchsorted(known, ids.flatten().int()), own.flatten(0, 1).float())
    assert gradient is not None
    return join_scores(groups, scored).values, gradient.flatten()


@torch.no_grad()
def _leak(
    model: nn.Module, layout: BatchLayout, groups: Sequence[Group], values: Tensor, device: torch.device
) -> float:
    """How much the other sequences' log-probs change when the first completion of every prompt is replaced."""
    changed = [Group(g.prompt, (g.completions[0][::-1].copy(), *g.completions[1:])) for g in groups]
    (batch,) = layout.batches(changed, _NO_LIMIT)
    found = join_scores(changed, [(batch, score(model, batch.to(device)).to("cpu"))]).values
    return (found - values)[~_first(groups)].abs().mean().item()


def _has_window(owner: Any) -> bool:
    return isinstance(getattr(owner, "sliding_window", None), int)


@contextmanager
def _window(base: Any, window: int | None) -> Iterator[None]:
    """Shorten every sliding window of the model for a while; None leaves them as they are."""
    if window is None:
        yield
        return
    configs = {id(c): c for c in (base.config, base.config.get_text_config())}.values()
    owners = [o for o in (*configs, *base.modules()) if _has_window(o)]
    before = [o.sliding_window for o in owners]
    try:
        for owner in owners:
            owner.sliding_window = window
        yield
    finally:
        for owner, value in zip(owners, before, strict=True):
            owner.sliding_window = value
