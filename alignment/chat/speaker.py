"""Policies that answer: those on the same base take turns on it, so that it is in memory once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from alignment.config.data import DataConfig
from alignment.config.schema import ModelConfig, QuantizationConfig
from alignment.data.rows.row import Message, Rejected, Row
from alignment.data.tokens.tokenization import tokenize_prompt
from alignment.errors import UserError, require
from alignment.evaluation.sampling.answer import Answer, Sampling
from alignment.evaluation.sampling.local import Hear, LocalEngine
from alignment.policy.adapter import load_adapter
from alignment.policy.float_weights import FloatWeights
from alignment.policy.load import load_base
from alignment.policy.shared_base import SharedBase, edits_its_base
from alignment.scoring.layout import FlatLayout
from alignment.scoring.logps import join_scores, score_groups
from alignment.stages.finished import Questions
from alignment.types import Group


@dataclass(frozen=True, slots=True)
class Weights:
    """What a policy is made of.

    Attributes:
        source: of a whole model, as transformers can load it.
        model, quantization: how it is loaded.
        adapter: folder of the adapter on it; None for the whole model alone.
    """

    source: str
    model: ModelConfig
    quantization: QuantizationConfig | None
    adapter: Path | None

    @property
    def base(self) -> Weights:
        """The same without an adapter, by what decides what is loaded."""
        return replace(
            self, model=replace(self.model, name=self.source, chat_template=None, eos_token=None), adapter=None
        )


@dataclass(slots=True)
class Memory:
    """The models of a chat, each loaded when somebody first speaks with it.

    Attributes:
        device, cache: for all of them.
    """

    device: torch.device
    cache: Path
    _bases: list[tuple[Weights, SharedBase]] = field(default_factory=list)

    @contextmanager
    def acting(self, weights: Weights) -> Iterator[nn.Module]:
        """The policy of these weights, while no other one acts.

        Raises:
            UserError: it is gone, or cannot be loaded.
        """
        adapter = weights.adapter
        if adapter is not None and weights.quantization is not None and edits_its_base(adapter):
            with self._base(weights, None).acting(None) as model:
                yield model
        else:
            with self._base(weights.base, adapter).acting(adapter) as model:
                yield model

    def _base(self, wanted: Weights, adapter: Path | None) -> SharedBase:
        for known, base in self._bases:
            if known == wanted and (adapter is None or base.takes(adapter)):
                return base
        model = load_base(wanted.model, wanted.quantization, wanted.source, self.device, self.cache)
        if wanted.adapter is not None:
            model = load_adapter(model, wanted.adapter, FloatWeights(wanted.source, wanted.model.revision))
        self._bases.append((wanted, SharedBase(model)))
        return self._bases[-1][1]


@dataclass(slots=True, eq=False)
class Speaker:
    """A policy that answers.

    Attributes:
        name: for people.
        questions: the tokenizer, the template and the ends of its answers.
        memory, weights: where its model is.
    """

    name: str
    questions: Questions
    memory: Memory
    weights: Weights

    @property
    def stops(self) -> tuple[int, ...]:
        """The tokens that end an answer."""
        return tuple(self.questions.stops)

    @property
    def system(self) -> str | None:
        """The system text of its data."""
        return self._data.system

    @property
    def _data(self) -> DataConfig:
        return self.questions.config.last_data

    def prompt(self, messages: Sequence[Message]) -> np.ndarray:
        """The tokens of a conversation that ends with a question.

        Without a chat template a policy goes on with the text of the question alone.

        Raises:
            UserError: the chat template refuses the conversation.
        """
        tokenizer = self.questions.tokenizer
        plain = tokenizer.chat_template is None and self._data.chat_template is None
        data = replace(self._data, system=None)
        row = Row(messages[-1]["content"] if plain else list(messages), ())
        try:
            return tokenize_prompt(row, tokenizer, data, day=self.questions.day)
        except Rejected as why:
            raise UserError(f"{self.name} cannot be asked this: {why}.") from None

    def answer(self, prompt: np.ndarray, index: int, how: Sampling, hear: Hear) -> Answer:
        """One answer; `hear` is told its tokens, and what it raises ends it.

        Raises:
            UserError: prompt and answer are longer than the model reads, or the model cannot be loaded.
        """
        with self.memory.acting(self.weights) as model:
            self._require_room(model, len(prompt), how.max_new_tokens)
            [[answer]] = LocalEngine(model, self.memory.device, 1, hear=hear).draw([(prompt, [index])], how)
        return answer

    def logps(self, prompt: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """(tokens,) log-probs in nats of an answer's tokens, by a scoring pass."""
        groups = [Group(prompt, (tokens,))]
        with self.memory.acting(self.weights) as model:
            passes = list(score_groups(model, groups, FlatLayout(), len(prompt) + len(tokens), self.memory.device))
        return join_scores(groups, passes).values.double().cpu().numpy()

    def _require_room(self, model: Any, asked: int, answered: int) -> None:
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        require(
            longest is None or asked + answered <= longest,
            f"The conversation has {asked} tokens and an answer up to {answered}, and {self.name} reads {longest}: "
            f"lower max_new_tokens, or begin anew with /reset.",
        )
