"""Model and tokenizer together: what would go wrong later, found out before any weights are loaded."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import nn

from alignment.config.schema import RunConfig
from alignment.data.conversations.ends import ends_of_turn
from alignment.errors import UserError
from alignment.policy.load import read_shape
from alignment.policy.reward_model import require_classifier
from alignment.policy.saved_adapter import require_same_form
from alignment.policy.source import ModelSource
from alignment.policy.stored import Checkpoint, require_usable
from alignment.policy.teacher import require_teacher
from alignment.policy.weight_parts import whole

log = logging.getLogger(__name__)

_PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_model(config: RunConfig, source: ModelSource, tokenizer: Any) -> None:
    """Refuse a model that the tokenizer or the settings do not fit.

    Args:
        config: of the run.
        source: of its model.
        tokenizer: from `load_tokenizer`; it gets an EOS and a padding token if it has none.

    Raises:
        UserError: what does not fit.
    """
    model = config.model
    if config.sft is not None and not tokenizer.is_fast:
        raise UserError(
            f"model.name={model.name}: its tokenizer, a {type(tokenizer).__name__}, does not say where in the text its "
            f"tokens are, which the SFT stage must know: use a model with a fast tokenizer (tokenizer.json), or set "
            f"sft=none."
        )
    whole = read_shape(source.base, model)
    shape = whole.get_text_config()
    require_usable(config, Checkpoint.of(whole))
    if config.loss is not None and config.loss.requirements().rewards:
        require_classifier(whole, model, config.loss.name)
    if config.loss is not None and config.loss.requirements().draws:
        require_teacher(config, tokenizer, getattr(shape, "vocab_size", None))
    if source.adapter is not None:
        require_same_form(source.adapter, config.adapter)
    _settle_ends(config, tokenizer)
    _check_vocabulary(model.name, tokenizer, getattr(shape, "vocab_size", None))
    _check_positions(config, shape)


def damaged_weight(model: nn.Module) -> str | None:
    """Name of the first weight that holds a number that is not finite; None where all are.

    It may be one that a few prompts do not reach, such as the embedding of a rare token. A bias may rule tokens out
    with minus infinity.
    """
    for name, parameter in model.named_parameters():
        if parameter.dtype in _PLAIN and parameter.numel():
            low, high = (bound.item() for bound in torch.aminmax(whole(model, parameter).detach()))
            if not high < math.inf or (parameter.ndim > 1 and low == -math.inf):  # of NaN no comparison holds
                return name
    return None


def _settle_ends(config: RunConfig, tokenizer: Any) -> None:
    """An answer must end with a token: without an EOS of the tokenizer, with the chat template's end of turn."""
    if tokenizer.eos_token_id is None:
        data = config.data if config.sft is None else config.sft.data
        assert data is not None
        ends = ends_of_turn(tokenizer, data)
        if not ends:
            raise UserError(
                f"model.name={config.model.name}: the tokenizer has no EOS token, and no chat template that ends an "
                f"answer with a special token: set model.eos_token to the token that ends one."
            )
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])
        log.info("The tokenizer has no EOS token: answers end with %s, as the template says.", tokenizer.eos_token)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token


def _check_vocabulary(name: str, tokenizer: Any, rows: int | None) -> None:
    """The embeddings must have a row for every token; more rows than tokens are padding."""
    # A text model may lack the tokens that stand for pictures and sound.
    media = {getattr(tokenizer, f"{kind}_token", None) for kind in ("image", "video", "audio")}
    ids = {token: index for token, index in tokenizer.get_vocab().items() if token not in media}
    last = max(ids, key=lambda token: ids[token])
    if rows is not None and ids[last] >= rows:
        raise UserError(
            f"model.name={name}: the tokenizer's largest id is {ids[last]} ({last}), and the model has {rows} "
            f"embeddings: use the tokenizer that belongs to the model, or resize the model's embeddings."
        )


def _check_positions(config: RunConfig, shape: Any) -> None:
    """Learned positions end where the model's table ends; rotary ones go on, less well than the model has learnt."""
    limit = getattr(shape, "max_position_embeddings", None)
    if not isinstance(limit, int):
        return
    stages = {
        "sft.data": config.sft.data if config.sft is not None else None,
        "data": config.data if config.loss is not None else None,
    }
    wanted = {f"{name}.max_length={data.max_length}": data.max_length for name, data in stages.items() if data}
    if stages["data"] is not None and (config.evaluation.prompts or config.evaluation.kl_prompts):
        prompt, new = stages["data"].max_prompt_length, config.evaluation.max_new_tokens
        wanted[f"data.max_prompt_length={prompt} with evaluation.max_new_tokens={new}"] = prompt + new
    beyond = [setting for setting, length in wanted.items() if length > limit]
    if not beyond:
        return
    if any(key.startswith("rope") for key in shape.to_dict()):
        log.info("%s is beyond the %d positions that the model was made for.", " and ".join(beyond), limit)
        return
    raise UserError(
        f"model.name={config.model.name}: the model has {limit} positions, and {' and '.join(beyond)} asks for more: "
        f"lower it."
    )
