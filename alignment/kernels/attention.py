"""Attention over a row that holds every prompt once, followed by all of its completions.

A completion attends to its prompt and to itself, but not to its siblings or to other prompts. No mask of the row's
width is ever made, so packing prompts into one row costs nothing.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from alignment.kernels.base import passed_over, probing
from alignment.kernels.block_attention import Part, block_attention
from alignment.kernels.gather import sum_rows
from alignment.types import to_device

_PREFIX = "shared_prompts_"
_BLOCKS_FROM = 384
"""From this length on, large blocks are faster on a CPU than torch's kernel: 1.4 times at this length."""
# Further arguments that some models pass to their attention; the routes below do not support them.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")


@dataclass(frozen=True, slots=True)
class PromptSpan:
    """One prompt and its completions, end to end in a row.

    Attributes:
        start: position of the prompt's first token in the row.
        prompt: tokens of the prompt, at least 1.
        completions: for each completion, how many of its tokens are run, 0 or more.
    """

    start: int
    prompt: int
    completions: tuple[int, ...]

    @property
    def prompt_end(self) -> int:
        """Position after the prompt."""
        return self.start + self.prompt

    @property
    def end(self) -> int:
        """Position after the last completion."""
        return self.prompt_end + sum(self.completions)

    def completion_ranges(self) -> list[tuple[int, int]]:
        """First position and position after the last, for every completion."""
        ranges = []
        position = self.prompt_end
        for length in self.completions:
            ranges.append((position, position + length))
            position += length
        return ranges


SharedRow = tuple[PromptSpan, ...]
"""The spans of a row, in order and without gaps."""


def position_ids(row: SharedRow) -> Tensor:
    """(1, width) int64: every completion continues the positions of its prompt."""
    parts = []
    for span in row:
        parts.append(torch.arange(span.prompt))
        parts += [torch.arange(span.prompt, span.prompt + length) for length in span.completions]
    return torch.cat(parts)[None]


def longest_sequence(row: SharedRow) -> int:
    """Tokens of the longest prompt with one completion."""
    return max(span.prompt + max(span.completions) for span in row)


def _sequences(row: SharedRow) -> list[tuple[PromptSpan, int, int]]:
    """(span, start, end) of every prompt and every completion that is not empty, in the order of the row."""
    found = []
    for span in row:
        ranges = [(span.start, span.prompt_end), *span.completion_ranges()]
        found += [(span, start, end) for start, end in ranges if end > start]
    return found


def parts_of(row: SharedRow) -> list[Part]:
    """The row as causal sequences: a prompt with its first completion is one, every other completion one more.

    Each is (own positions, positions of the prompt that it sees before its own; none for the first).
    """
    parts: list[Part] = []
    for span in row:
        (_, first_end), *others = span.completion_ranges()
        parts.append((range(span.start, first_end), range(0)))
        parts += [(range(start, end), range(span.start, span.prompt_end)) for start, end in others if end > start]
    return parts


class _CPUAttention(torch.autograd.Function):
    """Queries (1, H, T, D), keys and values (1, H_kv, T, D) -> (1, T, H, D), by torch's flash kernel for CPUs.

    A prompt and its first completion are one causal product. The other completions attend to their prompt all at once
    and to themselves one by one; their normalisers join the two results. The kernel's backward takes the joined result
    and normaliser, so each part gives its own share of the gradient.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, row: SharedRow, scale: float) -> Tensor:
        out = q.new_empty(q.shape).transpose(1, 2).contiguous()
        by_head = out.transpose(1, 2)
        lse = torch.empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))

        def attend(queries: slice, keys: slice, causal: bool) -> tuple[Tensor, Tensor]:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q[:, :, queries], k[:, :, keys], v[:, :, keys], 0.0, causal, scale=scale
            )

        for span in row:
            (_, first_end), *others = span.completion_ranges()
            prompt, joined, rest = _parts(span, first_end)
            by_head[:, :, joined], lse[:, :, joined] = attend(joined, joined, True)
            if rest.stop == rest.start:
                continue
            to_prompt, prompt_lse = attend(rest, prompt, False)
            by_head[:, :, rest], lse[:, :, rest] = to_prompt, prompt_lse
            for start, end in others:
                if end == start:
                    continue
                own = slice(start, end)
                to_own, own_lse = attend(own, own, True)
                total = torch.logaddexp(lse[:, :, own], own_lse)
                by_head[:, :, own] = by_head[:, :, own] * (lse[:, :, own] - total).exp_()[..., None] + (
                    to_own * (own_lse - total).exp_()[..., None]
                )
                lse[:, :, own] = total
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.row, ctx.scale = row, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        by_head, gradient = out.transpose(1, 2), gradient.transpose(1, 2)
        # Laid out like the projections, so that these receive contiguous gradients.
        grads = [x.new_empty(1, x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in (q, k, v)]

        def attend(queries: slice, keys: slice, causal: bool) -> list[Tensor]:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                gradient[:, :, queries],
                q[:, :, queries],
                k[:, :, keys],
                v[:, :, keys],
                by_head[:, :, queries],
                lse[:, :, queries],
                0.0,
                causal,
                scale=ctx.scale,
            )

        for span in ctx.row:
            (_, first_end), *others = span.completion_ranges()
            prompt, joined, rest = _parts(span, first_end)
            for grad, part in zip(grads, attend(joined, joined, True), strict=True):
                grad[:, :, joined] = part
            if rest.stop == rest.start:
                continue
            dq, dk, dv = attend(rest, prompt, False)
            grads[0][:, :, rest] = dq
            grads[1][:, :, prompt] += dk
            grads[2][:, :, prompt] += dv
            for start, end in others:
                if end == start:
                    continue
                own = slice(start, end)
                dq, dk, dv = attend(own, own, True)
                grads[0][:, :, own] += dq
                grads[1][:, :, own] = dk
                grads[2][:, :, own] = dv
        return *grads, None, None


def _parts(span: PromptSpan, first_end: int) -> tuple[slice, slice, slice]:
    """The prompt, the prompt with the first completion, and the other completions."""
    return slice(span.start, span.prompt_end), slice(span.start, first_end), slice(first_end, span.end)


@dataclass(frozen=True, slots=True)
class _Lengths:
    """A row for kernels of variable length.

    The row already holds the queries, in order. The keys of a second or later completion are gathered: its prompt's and
    its own. Plain causal attention, aligned at the end, then does the right thing.

    Attributes:
        keys: (K,) int32, the position of every gathered key.
        order, starts: (K,) and (T,) int32, which gathered keys each of the row's positions is; see `sum_rows`.
        query_ends, key_ends: (sequences + 1,) int32, where each sequence starts, and the end.
        most_queries, most_keys: of the longest sequence.
    """

    keys: Tensor
    order: Tensor
    starts: Tensor
    query_ends: Tensor
    key_ends: Tensor
    most_queries: int
    most_keys: int


@functools.lru_cache(maxsize=4)
def _variable_lengths(row: SharedRow, device: torch.device) -> _Lengths:
    parts = parts_of(row)
    keys = np.concatenate([np.arange(p.start, p.stop) for own, prompt in parts for p in (prompt, own)])
    lengths = [len(own) for own, _ in parts]
    key_lengths = [len(own) + len(prompt) for own, prompt in parts]
    by_position = np.argsort(keys, kind="stable")
    first = np.searchsorted(keys[by_position], np.arange(row[-1].end))
    tables = [keys, by_position, first, np.cumsum([0, *lengths]), np.cumsum([0, *key_lengths])]
    joined = to_device(torch.from_numpy(np.concatenate(tables).astype(np.int32)), device)  # one copy
    positions, order, starts, query_ends, key_ends = joined.split([len(t) for t in tables])
    return _Lengths(positions, order, starts, query_ends, key_ends, max(lengths), max(key_lengths))


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, lengths: _Lengths, scale: float) -> tuple[Tensor, ...]:
    """torch's flash kernel: (queries, H, D), the normalisers, and two tensors that its backward asks for."""
    return torch.ops.aten._flash_attention_forward(
        q, k, v, lengths.query_ends, lengths.key_ends, lengths.most_queries, lengths.most_keys, 0.0, True, False,
        scale=scale, window_size_left=-1, window_size_right=0,
    )[:4]  # fmt: skip


def _flash_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, forward: tuple[Tensor, ...], lengths: _Lengths, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from what `_flash_forward` returned."""
    out, lse, *random = forward
    return torch.ops.aten._flash_attention_backward(
        gradient, q, k, v, out, lse, lengths.query_ends, lengths.key_ends, lengths.most_queries, lengths.most_keys,
        0.0, True, *random, scale=scale, window_size_left=-1, window_size_right=0,
    )  # fmt: skip


class _VariableLengthAttention(torch.autograd.Function):
    """Queries (1, H, T, D), keys and values (1, H_kv, T, D) -> (1, T, H, D), by the flash kernel of variable lengths.

    Nothing is copied but the gathered keys and values, and gradients are laid out like the projections. It calls the
    kernel's two operations itself: `varlen_attn` around them, and one operation each for every view and gather, would
    cost more time on the host than the kernel takes.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, row: SharedRow, scale: float) -> Tensor:
        lengths = _variable_lengths(row, q.device)
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        q, k, v = q.contiguous(), k.index_select(0, lengths.keys), v.index_select(0, lengths.keys)
        out, *rest = _flash_forward(q, k, v, lengths, scale)
        out = out[None]
        ctx.save_for_backward(q, k, v, out, *rest)
        ctx.lengths, ctx.scale = lengths, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *rest = ctx.saved_tensors
        lengths = ctx.lengths
        dq, dk, dv = _flash_backward(gradient[0].contiguous(), q, k, v, (out[0], *rest), lengths, ctx.scale)
        dk, dv = (sum_rows(grad, lengths.order, lengths.starts) for grad in (dk, dv))
        return dq[None].transpose(1, 2), dk[None].transpose(1, 2), dv[None].transpose(1, 2), None, None


def goes_by_masks(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a GPU has no flash attention for this dtype: it needs 16 bits, and Ampere or newer."""
    if device.type != "cuda":
        return False
    return dtype not in (torch.bfloat16, torch.float16) or torch.cuda.get_device_capability(device) < (8, 0)


def _has_flash_kernel(q: Tensor) -> bool:
    """Flash attention needs a GPU that has it, and a supported width of heads."""
    if q.device.type != "cuda" or goes_by_masks(q.device, q.dtype):
        return False
    return q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


def _masked_attention(
    q: Tensor, k: Tensor, v: Tensor, row: SharedRow, scale: float, window: int | None = None
) -> Tensor:
    """Works on any device and dtype, with or without a sliding window: one mask for each prompt and completion.

    It splits and joins instead of slicing, because the backward pass of a slice fills a tensor as long as the row.
    """
    sequences = _sequences(row)
    sizes = [end - start for _, start, end in sequences]
    keys, values = k.split(sizes, dim=2), v.split(sizes, dim=2)
    repeats = q.shape[1] // k.shape[1]
    results = []
    prompt = 0
    for i, ((span, start, end), queries) in enumerate(zip(sequences, q.split(sizes, dim=2), strict=True)):
        if start == span.start:
            prompt = i
        parts = [i] if i == prompt else [prompt, i]
        seen_keys, seen_values = (
            torch.cat([x[j] for j in parts], dim=2).repeat_interleave(repeats, dim=1) for x in (keys, values)
        )
        query_positions = torch.arange(seen_keys.shape[2] - (end - start), seen_keys.shape[2], device=q.device)[:, None]
        distance = query_positions - torch.arange(seen_keys.shape[2], device=q.device)
        mask = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        results.append(F.scaled_dot_product_attention(queries, seen_keys, seen_values, attn_mask=mask, scale=scale))
    return torch.cat(results, dim=2).transpose(1, 2).contiguous()


@functools.cache
def _has_cpu_kernel() -> bool:
    """Whether torch's flash kernel for CPUs, which is private to torch, gives what masked attention gives."""
    row = (PromptSpan(0, 3, (2, 4)),)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 9, 8, generator=generator).requires_grad_() for heads in (4, 2, 2))
    results = []
    try:
        with probing(), torch.autocast("cpu", enabled=False):
            for function in (_CPUAttention.apply, _masked_attention):
                out = function(q, k, v, row, 0.3)
                results.append([out.detach(), *torch.autograd.grad(out.sin().sum(), (q, k, v))])
    except Exception as error:
        passed_over("torch's flash attention for CPUs is", error)
        return False
    return all(torch.allclose(one, other, rtol=1e-4, atol=1e-5) for one, other in zip(*results, strict=True))


def attend(q: Tensor, k: Tensor, v: Tensor, row: SharedRow, scale: float, window: int | None = None) -> Tensor:
    """Attention of a row with shared prompts.

    Args:
        q: (1, H, T, D) queries, already rotated.
        k, v: (1, H_kv, T, D) with H a multiple of H_kv.
        row: spans that cover the T positions.
        scale: factor of the products of queries and keys.
        window: a token sees at most this many positions, itself included; None for all.

    Returns:
        (1, T, H, D), contiguous.
    """
    if window is not None and longest_sequence(row) > window:
        return _masked_attention(q, k, v, row, scale, window)
    if q.device.type == "cpu":
        if longest_sequence(row) >= _BLOCKS_FROM:
            return block_attention(q, k, v, parts_of(row), scale)
        return (_CPUAttention.apply if _has_cpu_kernel() else _masked_attention)(q, k, v, row, scale)
    if _has_flash_kernel(q):
        return _VariableLengthAttention.apply(q, k, v, row, scale)
    return _masked_attention(q, k, v, row, scale)


def enable_shared_prompts(model: Any) -> bool:
    """Let the model's attention accept a keyword `shared_row`; calls without it run the original attention.

    Returns:
        False if this model's attention cannot be replaced.
    """
    name = model.config._attn_implementation
    if name.startswith(_PREFIX):
        return True
    if name not in ALL_ATTENTION_FUNCTIONS or not model._can_set_attn_implementation():
        return False
    plain = ALL_ATTENTION_FUNCTIONS[name]

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        shared_row: SharedRow | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        if shared_row is None:
            return plain(module, query, key, value, attention_mask, **kwargs)
        if any(kwargs.get(key) is not None for key in _UNSUPPORTED) or kwargs.get("dropout"):
            raise NotImplementedError("attention over shared prompts supports only scale and window")
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        return attend(query, key, value, shared_row, scale, kwargs.get("sliding_window")), None

    AttentionInterface.register(_PREFIX + name, attention)
    if name in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(_PREFIX + name, ALL_MASK_ATTENTION_FUNCTIONS[name])
    model.set_attn_implementation(_PREFIX + name)
    return True


def disable_shared_prompts(model: Any) -> None:
    """Undo `enable_shared_prompts`."""
    model.set_attn_implementation(model.config._attn_implementation.removeprefix(_PREFIX))
