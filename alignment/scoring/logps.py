"""From a model and a batch of groups to the per-token log-probs of the completions.

Only positions that score a token reach the LM head.
"""

from __future__ import annotations

import functools
import logging
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from alignment.errors import UserError
from alignment.kernels.attention import SharedRow
from alignment.kernels.base import in_words
from alignment.kernels.gather import select_rows
from alignment.scoring.head import (
    Likeliest,
    LogitTransform,
    OtherModel,
    likeliest_tokens,
    reward_head,
    rewards_of,
    score_hidden,
)
from alignment.scoring.layout import BatchLayout, MicroBatch
from alignment.scoring.states import Fork, run_forked
from alignment.scoring.token_plan import TokenPlan
from alignment.scoring.token_scores import TokenScores
from alignment.types import Group, Quantity, RaggedLogps, to_device

log = logging.getLogger(__name__)

T = TypeVar("T")


def autocast(model: Any, device: torch.device) -> torch.autocast:
    """The precision in which a model scores and samples: that of its weights, also around an adapter in fp32."""
    return torch.autocast(device.type, dtype=model.dtype, enabled=model.dtype in (torch.bfloat16, torch.float16))


def enable_scoring(model: nn.Module) -> None:
    """Teach a causal LM's `forward` to score: with `score_positions` and `targets` it returns per-token results.

    These are the (rows, tokens) of `head.score_hidden`, with `likeliest` (how many, of how many tokens) those of
    `head.likeliest_tokens`, or with `hidden_only` the (tokens, H) hidden states behind them. Scoring goes through
    `forward` so that wrappers around the model (peft, DDP, FSDP, autocast) see an ordinary call. Without positions and
    targets `forward` does what it did before.

    Where `check_scoring` has found that the model's logits are something else than its head makes of its hidden states,
    the logits take the place of the hidden states, and a head that hands them through that of the head.

    A reward model scores otherwise: at each position it returns the reward that its head gives, whatever the target.
    """
    causal: Any = model
    transform = LogitTransform.of(causal.config.get_text_config())
    plain_forward = model.forward

    @functools.wraps(type(model).forward)  # keeps the signature that `generate` and the trainer read
    def forward(
        self: nn.Module,
        *args: Any,
        score_positions: Tensor | None = None,
        targets: Tensor | None = None,
        shared_row: SharedRow | None = None,
        fork: Fork | None = None,
        quantities: frozenset[Quantity] = frozenset(),
        other: OtherModel | Likeliest | None = None,
        likeliest: tuple[int, int] | None = None,
        hidden_only: bool = False,
        **kwargs: Any,
    ) -> Any:
        if score_positions is None or targets is None:
            return plain_forward(*args, **kwargs)
        if shared_row is not None:
            # A mask of four dimensions is handed through as it is: none is made, and attention needs none.
            kwargs |= {"shared_row": shared_row, "attention_mask": targets.new_zeros(1, 1, 1, 1)}
        whole = keeps_logits(self)
        head = scoring_head(self)  # looked up here, since an adapter may have replaced it

        def run(**inputs: Any) -> Tensor:
            states: Tensor = (
                plain_forward(use_cache=False, **inputs).logits
                if whole
                else self.get_decoder()(use_cache=False, **inputs).last_hidden_state
            )
            return states

        # Autocast is entered here so that policy and reference are always scored in the same precision.
        with autocast(self, targets.device):
            if fork is None:
                hidden = run(**kwargs).flatten(0, 1)
            else:
                hidden = run_forked(run, self.get_decoder(), kwargs["input_ids"], kwargs["position_ids"], fork)
            hidden = select_rows(hidden, score_positions)
            if hidden_only:
                return hidden
            if (scorer := reward_head(self)) is not None:
                return rewards_of(scorer, hidden)
            form = LogitTransform() if whole else transform
            if likeliest is not None:
                return likeliest_tokens(head, hidden, targets, form, *likeliest)
            return score_hidden(head, hidden, targets, form, quantities, other)

    model.forward = types.MethodType(forward, model)


class _HandsThrough(nn.Identity):
    """The head of a model whose logits stand in for its hidden states."""

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.out_features = out_features


_KEEPS_LOGITS = "_keeps_logits"


def keeps_logits(model: nn.Module) -> bool:
    """Whether a model is scored by its own logits."""
    return getattr(model, _KEEPS_LOGITS, False)


def scoring_head(model: nn.Module) -> nn.Module:
    """The module that makes logits of what `hidden_states` gives."""
    causal: Any = model
    if keeps_logits(model):
        return _HandsThrough(causal.get_input_embeddings().num_embeddings)
    head: nn.Module = causal.get_output_embeddings()
    return head


def _pass(model: nn.Module, batch: MicroBatch, **options: Any) -> Tensor:
    if batch.shared_row is not None:
        options |= {"shared_row": batch.shared_row, "position_ids": batch.position_ids}
    if batch.fork is not None:
        options |= {"fork": batch.fork, "position_ids": batch.position_ids}
    scores: Tensor = model(
        input_ids=batch.input_ids, score_positions=batch.score_positions, targets=batch.targets, **options
    )
    return scores


def score_tokens(
    model: nn.Module,
    batch: MicroBatch,
    quantities: frozenset[Quantity] = frozenset(),
    other: OtherModel | Likeliest | None = None,
) -> TokenScores:
    """Log-probs of all scored tokens of a micro-batch and the quantities asked for, differentiable where enabled.

    Args:
        model: a causal LM after `enable_scoring`, possibly wrapped.
        batch: on the model's device.
        quantities: of the distributions at these tokens.
        other: `hidden_states` of the model that a divergence is from, with its head; or the likeliest tokens of the
            teacher that a forward KL is from.

    Returns:
        The scores of all tokens, in the order of `batch.indices`.
    """
    return TokenScores(_pass(model, batch, quantities=quantities, other=other), quantities)


@torch.no_grad()
def score_likeliest(model: nn.Module, batch: MicroBatch, likeliest: tuple[int, int]) -> Tensor:
    """(1 + 2 k, tokens) of `head.likeliest_tokens` for a micro-batch; `likeliest` is k and the size of its tokens."""
    return _pass(model, batch, likeliest=likeliest)


@torch.no_grad()
def hidden_states(model: nn.Module, batch: MicroBatch) -> Tensor:
    """(tokens, H) hidden states that predict the scored tokens of a micro-batch."""
    return _pass(model, batch, hidden_only=True)


def score(model: nn.Module, batch: MicroBatch) -> RaggedLogps:
    """Log-probs of the scored tokens of all completions of a micro-batch, differentiable where gradients are enabled.

    Args:
        model: a causal LM after `enable_scoring`, possibly wrapped.
        batch: on the model's device, of completions alone.

    Returns:
        RaggedLogps in the order of `batch.indices`; fp32 (fp64 for an fp64 model).
    """
    return RaggedLogps(score_tokens(model, batch).logps, batch.offsets)


def score_groups(
    model: nn.Module, groups: Sequence[Group], layout: BatchLayout, tokens_per_batch: int, device: torch.device
) -> Iterator[tuple[MicroBatch, RaggedLogps]]:
    """Score many groups without gradient, micro-batch by micro-batch, results on the device.

    Raises:
        UserError: not even one group at a time fits.
    """
    for batch, scores in in_passes(lambda b: score_tokens(model, b), groups, layout, tokens_per_batch, device):
        yield batch, RaggedLogps(scores.logps, to_device(batch.offsets, device))


@torch.no_grad()
def in_passes(
    run: Callable[[MicroBatch], T],
    groups: Sequence[Group],
    layout: BatchLayout,
    tokens_per_batch: int,
    device: torch.device,
    prompts: bool = False,
) -> Iterator[tuple[MicroBatch, T]]:
    """Scores of many groups, micro-batch by micro-batch, without gradient.

    The scores are on the device: the next pass may start before they are known. The batches are on the CPU. If a GPU
    runs out of memory, the remaining groups run with half the budget.

    Raises:
        UserError: not even one group at a time fits.
    """
    left = list(range(len(groups)))
    while left:
        rest = [groups[index] for index in left]
        done: set[int] = set()
        for batch in layout.batches(rest, tokens_per_batch, prompts):
            own = replace(batch, indices=tuple(left[index] for index in batch.indices))
            try:
                scores = run(own.to(device))
            except RuntimeError as error:
                if not ran_out_of_memory(error):
                    raise
                break
            done.update(own.indices)
            yield own, scores
        left = [index for index in left if index not in done]
        if left:  # outside the handler: its traceback keeps the tensors of the pass alive
            torch.cuda.empty_cache()
            smaller = smaller_budget(layout, [groups[index] for index in left], tokens_per_batch)
            if smaller is None:
                raise UserError(
                    "The GPU has too little memory to score one group at a time: lower data.max_length, or choose a "
                    "smaller model or quantization=nf4."
                )
            tokens_per_batch = smaller


_OUT_OF_MEMORY = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory")


def ran_out_of_memory(error: RuntimeError) -> bool:
    """Whether a GPU ran out of memory: torch's own allocator says so, or a library that takes memory beside it."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or any(part in str(error) for part in _OUT_OF_MEMORY)


def largest_group(layout: BatchLayout, groups: Sequence[Group]) -> int:
    """Positions of the largest of the groups in a pass of its own."""
    return largest_pass(layout, groups).positions


def largest_pass(layout: BatchLayout, groups: Sequence[Group]) -> MicroBatch:
    """The largest of the groups in a pass of its own."""
    largest: MicroBatch | None = None
    for group in groups:
        # Flat rows are what any layout needs at most, and to lay out every one of a million groups takes a minute.
        flat = len(group.completions) * (len(group.prompt) + max(map(len, group.completions)))
        if largest is None or flat > largest.positions:
            passes = [*layout.batches([group], 1), *([] if largest is None else [largest])]
            largest = max(passes, key=lambda batch: batch.positions)
    assert largest is not None
    return largest


def smaller_budget(layout: BatchLayout, groups: Sequence[Group], tokens_per_batch: int) -> int | None:
    """Half the budget that these groups use, but enough for the largest of them; None if they use no more already.

    Call it after a GPU ran out of memory; it logs the new budget.
    """
    used = max(batch.positions for batch in layout.batches(groups, tokens_per_batch))
    least = largest_group(layout, groups)
    if used <= least:
        return None
    smaller = max(least, used // 2)
    log.warning("The GPU has too little memory for %d positions a pass: continuing with %d.", used, smaller)
    return smaller


def join_scores(groups: Sequence[Group], scored: Sequence[tuple[MicroBatch, RaggedLogps]]) -> RaggedLogps:
    """Put the sequences of several micro-batches back into the order of the groups."""
    plan = TokenPlan.of(groups)
    values = scored[0][1].values.new_empty(plan.num_tokens) if scored else torch.zeros(0)
    for batch, logps in scored:
        values[to_device(plan.columns(batch.indices), values.device)] = logps.values
    return plan.policy(values)


@torch.no_grad()
def check_scoring(model: nn.Module, vocabulary: int, device: torch.device) -> None:
    """Compare scoring with the model's own full logits on eight tokens; where it differs, score by whole logits.

    That is slower and needs more memory, but it is right for every model; a log line says so.

    Raises:
        UserError: the model computes nothing from tokens alone.
    """
    ids = (torch.arange(9, device=device) * 7919 % vocabulary)[None]
    try:
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits[0]
    except Exception as error:
        raise UserError(
            f"model.name: a {type(model).__name__} computes nothing from tokens alone, so it cannot be trained here "
            f"({in_words(error)})."
        ) from error
    expected = logits.double().log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)
    tolerance = 1e-3 if logits.dtype in (torch.float32, torch.float64) else 5e-2
    try:
        values = model(input_ids=ids[:, :-1], score_positions=torch.arange(8, device=device), targets=ids[0, 1:])
        difference = (TokenScores(values).logps.double() - expected).abs().max().item()
        reason = None if difference <= tolerance else f"log-probs differ by {difference:.3g}"
    except Exception as error:  # a decoder or a head that nobody has seen
        reason = in_words(error)
    if reason is not None:
        setattr(model, _KEEPS_LOGITS, True)
        log.info(
            "The logits of %s are not its head's of its hidden states (%s): all logits of a pass are kept, which takes "
            "time and memory.",
            type(model).__name__,
            reason,
        )
