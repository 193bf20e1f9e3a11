"""Prompts that run once, in rows of their own, and hand their states to every completion.

A recurrence or a convolution carries a state from token to token, so completions cannot stand behind each other in one
row. Each gets a row of its own, which goes on from the prompt's states: what transformers keeps for generation, here
with its gradient. Completions read these states and change none.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, LinearAttentionAndFullAttentionLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from alignment.types import to_device

Run = Callable[..., Tensor]
"""From a decoder's inputs to its (rows, width, H) hidden states."""
States = list[dict[tuple[str, int], Tensor]]
"""For each layer the states that it left, by kind and number: "conv", "recurrent", "keys", "values"."""


@dataclass(frozen=True, slots=True)
class Fork:
    """The completions of a pass whose prompts run before them, in the rows of `MicroBatch.input_ids`.

    Attributes:
        input_ids: (rows, width) int64, one completion each, padded on the right. At least two tokens wide: a single one
            would go through a model's step of generation, which has no gradient.
        position_ids: (rows, width) int64, which continue those of the prompt.
        prompts: (rows,) int64, the row of each completion's prompt.
        mask: (prompts, width of their rows) int64, 0 where a prompt is padded, on the left; None if none is.
    """

    input_ids: Tensor
    position_ids: Tensor
    prompts: Tensor
    mask: Tensor | None

    def to(self, device: torch.device) -> Fork:
        """The same completions with their tensors on that device."""
        return replace(
            self,
            input_ids=to_device(self.input_ids, device),
            position_ids=to_device(self.position_ids, device),
            prompts=to_device(self.prompts, device),
            mask=None if self.mask is None else to_device(self.mask, device),
        )


class _Recording(LinearAttentionAndFullAttentionLayer):  # type: ignore[no-untyped-call]
    """A layer of a cache that is empty whenever it is read, and keeps the states of a pass as they are, undetached.

    A checkpointed layer that runs again leaves nothing: `kept` has been taken by then.
    """

    def __init__(self, number_of_states: int) -> None:
        super().__init__(number_of_states=number_of_states)
        self.kept: dict[tuple[str, int], Tensor] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.kept["keys", 0], self.kept["values", 0] = key_states, value_states
        return key_states, value_states

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: Any
    ) -> Tensor:
        self.kept["conv", state_idx] = conv_states[..., -(conv_kernel_size or conv_states.shape[-1]) :]
        return conv_states

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        self.kept["recurrent", state_idx] = recurrent_states
        return recurrent_states


class _Reading(LinearAttentionAndFullAttentionLayer):  # type: ignore[no-untyped-call]
    """A layer of a cache that has the states of prompts, once for each completion's row, and is never written."""

    def __init__(self, number_of_states: int, kept: dict[tuple[str, int], Tensor], rows: Tensor, length: int) -> None:
        super().__init__(number_of_states=number_of_states)
        self._kept, self._rows, self._length = kept, rows, length
        for kind, states in (("conv", self.conv_states), ("recurrent", self.recurrent_states)):
            states.update({i: kept[kind, i].index_select(0, rows) for i in states if (kind, i) in kept})
        self.has_previous_state = dict.fromkeys(self.has_previous_state, True)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = (self._kept[kind, 0].index_select(0, self._rows) for kind in ("keys", "values"))
        return torch.cat([keys, key_states], -2), torch.cat([values, value_states], -2)

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: Any
    ) -> Tensor:
        before = self._kept["conv", state_idx].index_select(0, self._rows)
        return torch.cat([before, conv_states], -1)

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        return recurrent_states

    def get_seq_length(self) -> int:
        return self._length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._length + query_length, 0


def _takes(decoder: nn.Module, name: str) -> bool:
    return name in inspect.signature(type(decoder).forward).parameters


def _run(run: Run, decoder: nn.Module, layers: Sequence[Any], **inputs: Any) -> Tensor:
    if _takes(decoder, "cache_params"):  # states alone, no attention: neither positions nor keys to hide
        inputs.pop("position_ids")
        return run(cache_params=Cache(layers=list(layers)), **inputs)
    return run(past_key_values=Cache(layers=list(layers)), **inputs)


def run_prompts(
    run: Run, decoder: Any, input_ids: Tensor, position_ids: Tensor, mask: Tensor | None
) -> tuple[Tensor, States]:
    """(prompts, width, H) hidden states of the prompts, and the states that each layer leaves."""
    sizes = (getattr(layer, "number_of_states", 1) for layer in DynamicCache(config=decoder.config).layers)
    layers = [_Recording(size) for size in sizes]
    hidden = _run(run, decoder, layers, input_ids=input_ids, position_ids=position_ids, attention_mask=mask)
    states = [layer.kept for layer in layers]
    for layer in layers:
        layer.kept = {}
    return hidden, states


def run_completions(run: Run, decoder: Any, states: States, fork: Fork, length: int) -> Tensor:
    """(rows, width, H) hidden states of completions that go on from the states of prompts in rows of that length."""
    layers = [_Reading(1 + max((i for _, i in kept), default=0), kept, fork.prompts, length) for kept in states]
    mask = None
    if fork.mask is not None and not _takes(decoder, "cache_params"):
        # Tokens after a completion need none: what they leave is never read.
        mask = torch.cat([fork.mask.index_select(0, fork.prompts), torch.ones_like(fork.input_ids)], 1)
    return _run(run, decoder, layers, input_ids=fork.input_ids, position_ids=fork.position_ids, attention_mask=mask)


def run_forked(run: Run, decoder: nn.Module, input_ids: Tensor, position_ids: Tensor, fork: Fork) -> Tensor:
    """(positions, H) hidden states: of all rows of prompts, then of all rows of completions."""
    hidden, states = run_prompts(run, decoder, input_ids, position_ids, fork.mask)
    completions = run_completions(run, decoder, states, fork, input_ids.shape[1])
    return torch.cat([hidden.flatten(0, 1), completions.flatten(0, 1)])


def enable_forking(model: Any) -> None:
    """Let checkpointed layers keep their cache: what is read there is the same when they run again.

    Raises:
        NotImplementedError: these layers would drop it without a word.
    """
    for layer in model.get_decoder().modules():
        if isinstance(layer, GradientCheckpointingLayer):
            if not hasattr(layer, "_can_checkpoint_with_cache"):
                raise NotImplementedError("its checkpointed layers keep no states")
            layer._can_checkpoint_with_cache = True


def _hidden(decoder: nn.Module, **inputs: Any) -> Tensor:
    hidden: Tensor = decoder(use_cache=False, **inputs).last_hidden_state
    return hidden


@torch.no_grad()
def carries_states(model: Any, device: torch.device) -> bool:
    """Whether a layer hands a state from token to token, as recurrences and convolutions do: no row can be shared then.

    Rounding in 16 bits may hide such a layer in the log-probs.
    """
    ids = torch.arange(3, device=device)[None]
    decoder = model.get_decoder()
    try:
        _, states = run_prompts(partial(_hidden, decoder), decoder, ids, ids, None)
    except Exception:  # without a cache of this form there is nothing to see
        return False
    return any(kind in ("conv", "recurrent") for kept in states for kind, _ in kept)


def lost_state(model: Any, input_ids: Tensor, position_ids: Tensor, fork: Fork) -> str | None:
    """The first state of a prompt that is handed on without a gradient, or that no completion reads; None if all are.

    Rounding may hide in the log-probs that a layer drops a state; the gradient does not.
    """
    decoder = model.get_decoder()
    run = partial(_hidden, decoder)
    handle = model.get_input_embeddings().register_forward_hook(lambda *hooked: hooked[-1].requires_grad_())
    try:
        with torch.enable_grad():
            _, states = run_prompts(run, decoder, input_ids, position_ids, fork.mask)
    finally:
        handle.remove()
    found = {(i, key): state for i, kept in enumerate(states) for key, state in kept.items()}
    # Cut off from the prompts: there, a layer's last token may have read the same tensor
    leaves = [{key: state.detach().requires_grad_() for key, state in kept.items()} for kept in states]
    with torch.enable_grad():
        hidden = run_completions(run, decoder, leaves, fork, input_ids.shape[1])
    gradients = torch.autograd.grad(hidden.sum(), [leaves[i][key] for i, key in found], allow_unused=True)
    for ((i, (kind, _)), state), gradient in zip(found.items(), gradients, strict=True):
        if gradient is None or not state.requires_grad:
            return f"the {kind} state of layer {i}"
    return None if found else "any state"
