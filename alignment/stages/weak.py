"""A weaker model that answers the same prompts, for pairs of the policy's answers and its own."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from alignment.config.schema import RunConfig
from alignment.errors import UserError
from alignment.evaluation.sampling.local import LocalEngine
from alignment.evaluation.sampling.store import AnswerStore
from alignment.policy.identity import policy_identity
from alignment.policy.load import load_base, load_tokenizer
from alignment.policy.source import model_source
from alignment.ranks.team import Post
from alignment.stages.following import require_same_model
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
        """Draws its answers on all ranks, and keeps them; its memory is free again afterwards.

        Raises:
            UserError: a rank has loaded another model.
        """
        work, config = self._work, self._config
        load = partial(load_base, self._named, config.quantization, self._source.base, cache=work.cache)
        model, at_once = load(device=work.device), config.evaluation.batch_size
        engine = LocalEngine(model, work.device, at_once, work.team, held_as="weak")
        if work.team is not None:
            own = policy_identity(model)[0]
            for rank, found in enumerate(work.team.tell(_load, load), 1):
                require_same_model(rank, found, own, self._named.name)
        try:
            with AnswerStore(work.cache, engine) as store:
                yield store
        finally:
            del model
            engine.model = None  # which the caller's store still has
            _free(work.device)
        if work.team is not None:
            work.team.tell(_drop)  # not after an error, with which the run ends


def _load(post: Post, load: Callable[..., nn.Module]) -> str:
    post.weak = load(device=post.device)
    return policy_identity(post.weak)[0]


def _drop(post: Post, _: Any) -> None:
    post.weak = None
    _free(post.device)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
