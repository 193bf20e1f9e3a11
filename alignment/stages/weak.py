"""A weaker model that answers the same prompts, for pairs of the policy's answers and its own."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from alignment.config.schema import RunConfig
from alignment.errors import UserError
from alignment.evaluation.sampling.local import LocalEngine
from alignment.evaluation.sampling.store import AnswerStore
from alignment.policy.load import load_base, load_tokenizer
from alignment.policy.source import model_source
from alignment.stages.stage import Workspace


class WeakModel:
    """The model that `onpolicy.weak` names: in memory only while a round is drawn.

    Raises:
        UserError: it cannot be found, is an adapter, or has another vocabulary than the policy.
    """

    def __init__(self, config: RunConfig, work: Workspace) -> None:
        assert config.onpolicy is not None and config.onpolicy.weak is not None
        self._config = config
        self._work = work
        self._named = replace(config.model, name=config.onpolicy.weak, revision=None)
        try:
            self._source = model_source(self._named, work.cache)
            tokenizer = load_tokenizer(self._named, self._source.tokenizer)
        except UserError as error:
            raise UserError(str(error).replace("model.name", "onpolicy.weak")) from None
        if self._source.adapter is not None:
            raise UserError(f"onpolicy.weak={self._named.name} is an adapter: give a whole model, merged if need be.")
        if tokenizer.get_vocab() != work.tokenizer.get_vocab():
            raise UserError(
                f"onpolicy.weak={self._named.name} has another vocabulary than {config.model.name}, and its answers "
                f"are tokens: choose a smaller model of the same family."
            )

    @contextmanager
    def engine(self) -> Iterator[AnswerStore]:
        """Draws its answers, and keeps them; its memory is free again afterwards."""
        work, config = self._work, self._config
        model = load_base(self._named, config.quantization, self._source.base, work.device, work.cache)
        try:
            with AnswerStore(work.cache, LocalEngine(model, work.device, config.evaluation.batch_size)) as store:
                yield store
        finally:
            del model
            gc.collect()
            if work.device.type == "cuda":
                torch.cuda.empty_cache()
