"""A batch of answers, token by token: each prompt is read once, and a row that has finished leaves the cache."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alignment.evaluation.sampling.answer import Answer, Finish, Sampling
from alignment.evaluation.sampling.presets import REPLACED
from alignment.evaluation.sampling.roomy_cache import make_roomy
from alignment.scoring.logps import autocast

Choose = Callable[[Tensor, Sequence[int]], Tensor]
"""From (rows, V) scores and the answer of each row to a token for each."""


@dataclass(frozen=True, slots=True)
class Way:
    """How a model's answers are drawn.

    Attributes:
        cached: with the model's cache; otherwise every step reads the whole answer again.
        padded: prompts of different lengths in one batch, with padding before the shorter ones.
    """

    cached: bool
    padded: bool


@torch.no_grad()
def draw_batch(
    model: Any,
    prompts: Sequence[np.ndarray],
    rows: Sequence[int],
    choose: Choose,
    how: Sampling,
    way: Way,
    device: torch.device,
) -> list[Answer]:
    """One answer for each row, in the precision in which the model is scored.

    `generate` prepares what it would for its own loop: the model's inputs, its cache, and the processors of the scores
    that the settings ask for. Only its loop is ours.

    Args:
        model: a causal LM, perhaps with an adapter, in eval mode.
        prompts: (tokens,) each.
        rows: the prompt's number, for each answer.
        choose: the next tokens.
    """
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), how.stops[0])
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[row, width - len(prompt) :] = 1
    filters: dict[str, Any] = {"do_sample": False}
    if how.temperature > 0:
        filters = {"do_sample": True, "temperature": how.temperature, "top_k": how.top_k, "top_p": how.top_p}
        filters |= {"min_p": how.min_p} if how.min_p > 0 else {}
    with autocast(model, device):
        return model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=how.max_new_tokens,
            eos_token_id=list(how.stops),
            pad_token_id=how.stops[0],
            use_cache=way.cached,
            custom_generate=_Loop(rows, choose, how),
            **filters,
            **REPLACED,
        )


class _Loop:
    """The loop of one batch, in the place of `generate`'s own."""

    def __init__(self, rows: Sequence[int], choose: Choose, how: Sampling) -> None:
        self._prompts = rows
        self._choose = choose
        self._how = how
        self._tokens: list[list[int]] = [[] for _ in rows]
        self._logps: list[Tensor] = []
        self._answers: list[int] = []  # of all entries of the log-probs

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **inputs: Any,
    ) -> list[Answer]:
        """Called by `generate` with all that it has prepared."""
        last = 1 if inputs["use_cache"] else None  # how many tokens a step reads; None: all
        answers = list(range(len(self._prompts)))
        make_roomy(inputs.get("past_key_values"))
        for step in range(self._how.max_new_tokens):
            reads: dict[str, Any] = {"next_sequence_length": last} if step else {"is_first_iteration": True}
            outputs = model(**model.prepare_inputs_for_generation(input_ids, **reads, **inputs), return_dict=True)
            logits = outputs.logits[:, -1].float()
            inputs = model._update_model_kwargs_for_generation(outputs, inputs)
            del outputs
            if step == 0 and self._prompts != list(range(len(input_ids))):
                rows = torch.tensor(self._prompts, device=logits.device)
                input_ids, logits, inputs = input_ids[rows], logits[rows], _take(inputs, rows, len(input_ids))
            tokens = self._choose(logits_processor(input_ids, logits), answers)
            going = self._note(logits, tokens, answers)
            if not going or step == self._how.max_new_tokens - 1:
                break
            input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)
            if len(going) < len(answers):
                rows = torch.tensor(going, device=logits.device)
                input_ids, inputs = input_ids[rows], _take(inputs, rows, len(answers))
                answers = [answers[row] for row in going]
        return self._finished()

    def _note(self, logits: Tensor, tokens: Tensor, answers: Sequence[int]) -> list[int]:
        """Keep the tokens and their log-probs; returns the rows that go on, in their new order."""
        self._logps.append(logits.gather(1, tokens[:, None]).squeeze(1) - logits.logsumexp(-1))
        self._answers += answers
        going = []
        for row, (answer, token) in enumerate(zip(answers, tokens.tolist(), strict=True)):
            self._tokens[answer].append(token)
            if token not in self._how.stops:
                going.append(row)
        # The last rows take the places of those that leave, so that all others stay where they are
        places = set(going[: bisect_left(going, len(going))])
        moving = iter(going[len(places) :])
        return [row if row in places else next(moving) for row in range(len(going))]

    def _finished(self) -> list[Answer]:
        logps: list[list[float]] = [[] for _ in self._tokens]
        for answer, value in zip(self._answers, torch.cat(self._logps).tolist(), strict=True):
            logps[answer].append(value)
        return [
            Answer(
                np.array(tokens, np.int32),
                np.array(values, np.float32),
                Finish.stop if tokens[-1] in self._how.stops else Finish.length,
            )
            for tokens, values in zip(self._tokens, logps, strict=True)
        ]


def _take(inputs: dict[str, Any], rows: Tensor, count: int) -> dict[str, Any]:
    """The inputs of these rows, of `count`; a cache takes them in place.

    `reorder_cache` is for beam search, where a row may be taken twice or not at all: so every cache has it, those of
    recurrences too.
    """
    taken = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.dim() > 0:
            axis = 1 if name == "position_ids" and value.dim() == 3 else 0  # of time, height and width in an image
            if value.shape[axis] == count:
                value = value.index_select(axis, rows)
        elif hasattr(value, "reorder_cache"):
            value.reorder_cache(rows)
        taken[name] = value
    return taken
