"""The teacher of a policy: whether it has the policy's tokens, and how it is loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alignment.config.preflight import model_problem
from alignment.config.schema import Calibration, ModelConfig, QuantizationConfig, RunConfig
from alignment.errors import UserError, require
from alignment.files import cache_dir
from alignment.policy.adapter import load_adapter
from alignment.policy.float_weights import FloatWeights
from alignment.policy.identity import fix_base_digest
from alignment.policy.load import load_base, load_tokenizer, read_shape
from alignment.policy.source import ModelSource, model_source

log = logging.getLogger(__name__)


def require_teacher(config: RunConfig, tokenizer: Any, rows: int | None) -> None:
    """Refuse a teacher that is not there or lacks tokens of the policy or the loss, before any weights are loaded.

    Args:
        config: of a run whose loss has a teacher.
        tokenizer: of the policy.
        rows: of the policy's embeddings; None where they are not known.

    Raises:
        UserError: the first token that differs, or why there is no teacher.
    """
    name = config.distill.teacher
    with _named():
        model, source = _teacher(config, cache_dir(config.reference.path))
        theirs = load_tokenizer(model, source.tokenizer).get_vocab()
        size = getattr(read_shape(source.base, model).get_text_config(), "vocab_size", None)
    own, count = tokenizer.get_vocab(), config.loss.requirements().likeliest
    require_same_tokens(str(name), own, theirs)
    require(count <= len(own), f"loss.top_k={count}: the policy has {len(own)} tokens, so set no more.")
    require(
        rows is None or size is None or rows <= size,
        f"distill.teacher={name}: it has {size} embeddings and the policy {rows}, so that the policy can write tokens "
        f"that the teacher does not know: choose a teacher of the same family.",
    )


def require_same_tokens(name: str, own: Mapping[str, int], theirs: Mapping[str, int]) -> None:
    """Refuse a teacher that does not have every token of the policy under the same number; it may have more.

    Args:
        name: of the teacher.
        own: number of each token of the policy.
        theirs: the same of the teacher.

    Raises:
        UserError: the first token that differs.
    """
    other = [token for token, number in own.items() if theirs.get(token) != number]
    if not other:
        return
    first = min(other, key=lambda token: own[token])
    there = f"number {theirs[first]} to the teacher" if first in theirs else "none of the teacher's"
    raise UserError(
        f"distill.teacher={name}: {len(other)} of the policy's {len(own)} tokens are others to it; the first, "
        f"{first!r}, is number {own[first]} to the policy and {there}: choose a teacher with the policy's vocabulary."
    )


def teacher_shape(config: RunConfig) -> tuple[ModelConfig, ModelSource, Any]:
    """The settings of the teacher's model, where it is, and the configuration that it has there; no weights are read.

    Raises:
        UserError: there is no teacher.
    """
    if (problem := model_problem(str(config.distill.teacher))) is not None:
        raise UserError(f"distill.teacher={config.distill.teacher}: {problem}; a folder with its config.json will do.")
    with _named():
        model, source = _teacher(config, cache_dir(config.reference.path))
        return model, source, read_shape(source.base, model)


def packing(config: RunConfig) -> QuantizationConfig | None:
    """How the weights of the teacher are packed when it is loaded; None where they stay as they are."""
    if not config.distill.nf4:
        return None
    return QuantizationConfig(double=True, compute_dtype=config.distill.dtype, calibration=Calibration.none)


def load_teacher(config: RunConfig, device: torch.device, cache: Path) -> nn.Module:
    """The frozen teacher, ready to score.

    Raises:
        UserError: it cannot be loaded.
    """
    log.info("Loading the teacher %s on %s ...", config.distill.teacher, device)
    with _named():
        model, source = _teacher(config, cache)
        teacher = load_base(model, packing(config), source.base, device, cache)
        if source.adapter is not None:
            teacher = load_adapter(teacher, source.adapter, FloatWeights(source.base, model.revision))
    teacher.requires_grad_(False).eval()
    fix_base_digest(teacher)  # the policy's own base is the one that is remembered otherwise
    return teacher


def _teacher(config: RunConfig, cache: Path) -> tuple[ModelConfig, ModelSource]:
    wanted = config.distill
    assert wanted.teacher is not None, "the configuration is checked"
    model = replace(
        config.model,
        name=wanted.teacher,
        revision=wanted.revision,
        dtype=wanted.dtype,
        chat_template=None,
        eos_token=None,
    )
    return model, model_source(model, cache)


@contextmanager
def _named() -> Iterator[None]:
    """Say of the teacher what is said of a model."""
    try:
        yield
    except UserError as error:
        text = str(error).replace("model.name", "distill.teacher").replace("model.revision", "distill.revision")
        raise UserError(text.replace("quantization=nf4", "distill.nf4=true")) from error
