"""The engine that draws with the model in this process, shared among the ranks of a run."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from alignment.errors import UserError
from alignment.evaluation.sampling.answer import Answer, Sampling, Wanted
from alignment.evaluation.sampling.choice import Drawn, answer_seed, greedy
from alignment.evaluation.sampling.folded import folded
from alignment.evaluation.sampling.loop import Choose, Way, draw_batch
from alignment.evaluation.sampling.presets import acting, inner, presets, without_presets
from alignment.evaluation.sampling.ways import way_of
from alignment.files import to_json
from alignment.policy.identity import policy_identity
from alignment.ranks.shares import evenly
from alignment.ranks.team import Post, Team, trained_parameters
from alignment.scoring.head import LOGITS_PER_CHUNK
from alignment.scoring.logps import ran_out_of_memory

log = logging.getLogger(__name__)

_One = tuple[np.ndarray, int]
"""A prompt and the index of one answer to it."""
Hear = Callable[[Sequence[int], Sequence[int]], None]
"""Is told of each step as it is drawn: the numbers of the answers in their batch, and the next token of each."""


@dataclass(frozen=True, slots=True)
class _Share:
    """What a rank draws: batches of answers."""

    batches: Sequence[Sequence[_One]]
    how: Sampling
    way: Way
    held_as: Literal["model", "weak"]
    hear: Hear | None = None


@dataclass(slots=True)
class LocalEngine:
    """Draws with a model of transformers.

    What is drawn beside an answer, in which order and on how many ranks, does not change it, but for what rounding
    does to scores that all but tie.

    Attributes:
        model: the policy.
        device: where it is.
        at_once: how many answers to the longest prompt are drawn at once; of shorter ones more, within the same number
            of tokens.
        team: the ranks that share the batches, if there are several.
        hear: hears the tokens of one process as they are drawn. What it raises ends the draw.
        held_as: where the other ranks' posts have the model; it is the policy, whose weights they get, unless it is a
            weaker one that stays as it is.
    """

    model: Any
    device: torch.device
    at_once: int
    team: Team | None = None
    hear: Hear | None = None
    held_as: Literal["model", "weak"] = "model"

    def identity(self) -> tuple[str, dict[str, Any]]:
        """64 hex digits of the policy and of this engine, and a description for people."""
        policy, description = policy_identity(self.model)
        identity = hashlib.blake2b(to_json(["transformers", policy]), digest_size=32).hexdigest()
        return identity, {**description, "engine": "transformers"}

    def decisive(self, how: Sampling) -> dict[str, Any]:
        """What of the settings, and of the model's own where these act, decides an answer."""
        return how.decisive() | {"presets": presets(self.model) if how.presets else None}

    def draw(self, wanted: Sequence[Wanted], how: Sampling) -> list[list[Answer]]:
        """The answers that are wanted of each prompt, in order.

        Raises:
            UserError: a GPU has not enough memory for one answer.
        """
        ones = [(prompt, index) for prompt, indices in wanted for index in indices]
        if not ones:
            return [[] for _ in wanted]
        with _evaluating(self.model):
            way = way_of(self.model, self.device)
        numbers = self._batches([len(prompt) for prompt, _ in ones], how, way)
        batches = [[ones[number] for number in batch] for batch in numbers]
        if self.team is None:
            shares = [list(range(len(batches)))]
            found = [_drawn(self.model, _Share(batches, how, way, self.held_as, self.hear), self.device)]
        else:
            sizes = [sum(len(prompt) + how.max_new_tokens for prompt, _ in batch) for batch in batches]
            shares = evenly(sizes, self.team.size)
            found = self.team.run(
                draw_share,
                [_Share([batches[number] for number in share], how, way, self.held_as) for share in shares],
                lambda own: _drawn(self.model, own, self.device, self.team.place.local_size),
                trained_parameters(self.model) if self.held_as == "model" else (),
            )
        answers: dict[int, Answer] = {}
        for share, results in zip(shares, found, strict=True):
            for number, result in zip(share, results, strict=True):
                answers.update(zip(numbers[number], result, strict=True))
        left = iter(range(len(ones)))
        return [[answers[next(left)] for _ in indices] for _, indices in wanted]

    def _batches(self, lengths: Sequence[int], how: Sampling, way: Way) -> list[list[int]]:
        """The answers' numbers in batches of similar prompts, the shortest first.

        A batch has no more tokens than `at_once` answers to the longest prompt, no more logits than a pass of scoring
        keeps, and leaves some for each rank. Processors of scores that look at the tokens would see padding.
        """
        tokens = self.at_once * (max(lengths) + how.max_new_tokens)
        vocabulary = inner(self.model).get_input_embeddings().num_embeddings
        most = max(1, LOGITS_PER_CHUNK[self.device.type] // vocabulary)
        if self.team is not None:
            most = min(most, -(-len(lengths) // self.team.size))
        mixes = way.padded and not (how.presets and acting(self.model))
        batches: list[list[int]] = []
        for number in sorted(range(len(lengths)), key=lambda i: lengths[i]):
            batch = batches[-1] if batches else []
            fits = len(batch) < most and (len(batch) + 1) * (lengths[number] + how.max_new_tokens) <= tokens
            if batch and fits and (mixes or lengths[number] == lengths[batch[0]]):
                batch.append(number)
            else:
                batches.append([number])
        return batches


def draw_share(post: Post, share: _Share) -> list[list[Answer]]:
    """The answers of a rank that follows to its batches."""
    return _drawn(getattr(post, share.held_as), share, post.device, post.team.place.local_size)


def _drawn(model: Any, share: _Share, device: torch.device, processes: int = 1) -> list[list[Answer]]:
    """The answers of each batch, in one of so many processes on this machine."""
    plain = nullcontext() if share.how.presets else without_presets(model)
    with _evaluating(model), plain, folded(model, processes):
        return [_in_parts(model, batch, share, device) for batch in share.batches]


def _in_parts(model: Any, batch: Sequence[_One], share: _Share, device: torch.device) -> list[Answer]:
    """The answers of a batch: at once, or half after half where a GPU runs out of memory."""
    try:
        return _at_once(model, batch, share, device)
    except RuntimeError as error:
        if not ran_out_of_memory(error):
            raise
    if len(batch) == 1:  # outside the handler: its traceback keeps the tensors of the batch alive
        raise UserError(
            f"The GPU has too little memory to draw one answer of {share.how.max_new_tokens} tokens to a prompt of "
            f"{len(batch[0][0])}: lower evaluation.max_new_tokens, or choose a smaller model or quantization=nf4."
        )
    torch.cuda.empty_cache()
    half = len(batch) // 2
    log.warning("The GPU has too little memory for %d answers at once: drawing them in two parts.", len(batch))
    return _in_parts(model, batch[:half], share, device) + _in_parts(model, batch[half:], share, device)


def _at_once(model: Any, batch: Sequence[_One], share: _Share, device: torch.device) -> list[Answer]:
    """The answers of a batch; a prompt that several of them have is read once."""
    prompts: list[np.ndarray] = []
    numbers: dict[bytes, int] = {}
    rows = []
    for prompt, _ in batch:
        number = numbers.setdefault(prompt.tobytes(), len(prompts))
        if number == len(prompts):
            prompts.append(prompt)
        rows.append(number)
    seeds = [answer_seed(prompt, index, share.how.seed) for prompt, index in batch]
    choose: Choose = Drawn(seeds, device) if share.how.temperature > 0 else greedy
    if share.hear is not None:
        choose = _heard(choose, share.hear)
    return draw_batch(model, prompts, rows, choose, share.how, share.way, device)


def _heard(choose: Choose, hear: Hear) -> Choose:
    """The same choice, which tells what it has chosen."""

    def choose_and_tell(scores: Tensor, rows: Sequence[int]) -> Tensor:
        tokens = choose(scores, rows)
        hear(rows, tokens.tolist())
        return tokens

    return choose_and_tell


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
