"""A reward model: a policy with a head of one number. How it starts, and how it is saved so that others can load it.

The head is a linear layer without bias from the last hidden state, in fp32 and never quantised. It is saved under the
name `score`, which transformers' sequence classification models give to theirs: these load what is saved here.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from alignment.config.schema import ModelConfig
from alignment.errors import UserError
from alignment.files import atomic_write_text
from alignment.policy.adapter_kinds import ADAPTER
from alignment.policy.architecture import build_model
from alignment.policy.load import save_policy
from alignment.policy.source import ADAPTER_FILE
from alignment.scoring.head import REWARD_HEAD, reward_head
from alignment.scoring.logps import keeps_logits

log = logging.getLogger(__name__)

_CLASSIFIER = "SEQ_CLS"
"""peft's name of the task, by which it looks for the head."""
_WEIGHT = f"{REWARD_HEAD}.weight"


def _base_of(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_reward_model(model: nn.Module) -> bool:
    """Whether the model has a head for rewards."""
    return reward_head(_base_of(model)) is not None


def holds_reward_model(folder: Path) -> bool:
    """Whether a saved policy is a reward model.

    Raises:
        UserError: its configuration is damaged.
    """
    is_adapter = (folder / ADAPTER_FILE).is_file()
    path = folder / (ADAPTER_FILE if is_adapter else "config.json")
    try:
        settings = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}.") from None
    if is_adapter:
        return settings.get("task_type") == _CLASSIFIER
    return any(name.endswith("ForSequenceClassification") for name in settings.get("architectures") or [])


# The class with which others load it


def classifier_of(config: Any, trust_remote_code: bool = False) -> Any:
    """transformers' classification model of one number for this configuration, on the meta device.

    Raises:
        ValueError: there is none.
    """
    from transformers import AutoModelForSequenceClassification

    own = copy.deepcopy(config)
    if hasattr(own, "quantization_config"):
        del own.quantization_config
    for part in (own, own.get_text_config()):
        part.num_labels = 1
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(own, trust_remote_code=trust_remote_code)


def require_classifier(config: Any, settings: ModelConfig, loss: str) -> None:
    """Refuse a model that no classification model of transformers could be loaded from.

    Args:
        config: of the model, from `read_shape`.
        settings: of the run's model.
        loss: its name, for the message.

    Raises:
        UserError: transformers has no such class, or its head or its weights have other names.
    """
    problem = ""
    try:
        classifier = classifier_of(config, settings.trust_remote_code)
    except (ValueError, KeyError, AttributeError):
        problem = "transformers has no such class for it"
    else:
        head = getattr(classifier, REWARD_HEAD, None)
        names = classifier.state_dict().keys() - build_model(config, settings.trust_remote_code).state_dict().keys()
        if not isinstance(head, nn.Linear) or head.bias is not None:
            problem = f"its class has another head than a linear layer called {REWARD_HEAD}"
        elif names != {_WEIGHT}:
            problem = f"its class has other weights than the language model (the first: {min(names - {_WEIGHT})})"
    if problem:
        raise UserError(
            f"loss={loss}: a reward model is loaded as a sequence classification model, and {settings.name}, "
            f"a {config.model_type}, cannot be: {problem}; choose a model of another family."
        )


# The head


def put_reward_head(model: Any) -> nn.Linear:
    """Give a model without an adapter a head of zeros, in place; it trains as any of the model's weights does."""
    dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
    width = classifier_of(model.config, bool(getattr(model.config, "auto_map", None))).score.in_features
    head = nn.Linear(width, 1, bias=False, device=model.device, dtype=dtype)
    nn.init.zeros_(head.weight)
    setattr(model, REWARD_HEAD, head)
    return head


@torch.no_grad()
def attach_reward_head(model: nn.Module, seed: int) -> None:
    """Make a policy a reward model, in place: give it a head that trains, as a part of its adapter if it has one.

    The weights are drawn from N(0, 1 / (H + 1)), as in Stiennon et al. 2020 (arXiv:2009.01325): rewards begin at the
    size of a hidden state's components.

    Args:
        model: the policy.
        seed: of the weights.

    Raises:
        UserError: its logits are no function of its hidden states alone, so these may not be all that there is.
    """
    base = _base_of(model)
    if keeps_logits(base):
        raise UserError(
            f"A {type(base).__name__} makes its logits of more than its last hidden states, and a reward model reads "
            f"these alone: choose a model of another family for it."
        )
    head: Any = put_reward_head(base)
    if base is not model:
        from peft.utils.other import ModulesToSaveWrapper

        adapted: Any = model
        settings = adapted.peft_config[ADAPTER]
        settings.modules_to_save = [*(settings.modules_to_save or []), REWARD_HEAD]
        wrapped = ModulesToSaveWrapper(head, ADAPTER)
        setattr(base, REWARD_HEAD, wrapped)
        head = wrapped.modules_to_save[ADAPTER]
    drawn = torch.randn(1, head.in_features, generator=torch.Generator().manual_seed(seed))
    head.weight.copy_(drawn / (head.in_features + 1) ** 0.5)


@torch.no_grad()
def rewards_of_texts(model: nn.Module, texts: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """(texts,) float64 rewards of a reward model at the last of each text's tokens, in passes of their own."""
    found = []
    for text in texts:
        ids = torch.from_numpy(text.astype(np.int64))[None].to(device)
        last = torch.tensor([len(text) - 1], device=device)
        found.append(model(input_ids=ids, score_positions=last, targets=ids[0, -1:])[0].double())
    return torch.cat(found)


# Files


def save_trained(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Save a policy as `save_policy` does; a reward model as others load it.

    That is an adapter with its head for `AutoModelForSequenceClassification`, or without an adapter a whole model of
    that class, whose configuration names the padding token. The saved tokenizer pads with a token that ends no text:
    the class takes the last token that is no padding for the end.
    """
    if not is_reward_model(model):
        save_policy(model, tokenizer, folder)
        return
    tokenizer = with_padding(tokenizer)
    if _base_of(model) is not model:
        save_policy(model, tokenizer, folder)
        path = folder / ADAPTER_FILE
        settings = json.loads(path.read_bytes()) | {"task_type": _CLASSIFIER}
        atomic_write_text(path, json.dumps(settings, indent=2, sort_keys=True) + "\n")
        return
    whole: Any = model
    classifier, weights = classifier_of(whole.config, bool(getattr(whole.config, "auto_map", None))), whole.state_dict()
    classifier.load_state_dict({name: weights[name] for name in classifier.state_dict()}, assign=True)
    for part in (classifier.config, classifier.config.get_text_config()):
        part.pad_token_id = tokenizer.pad_token_id
    if hasattr(whole, "_weight_conversions"):  # how its files were read
        classifier._weight_conversions = whole._weight_conversions
    save_policy(classifier, tokenizer, folder)


@torch.no_grad()
def load_reward_weights(model: Any, folder: Path) -> None:
    """Take the weights of a whole reward model that `save_trained` has written into one of the same form."""
    from transformers import AutoModelForSequenceClassification

    saved = AutoModelForSequenceClassification.from_pretrained(str(folder), dtype=model.dtype, use_safetensors=True)
    own = model.state_dict()
    for name, weight in saved.state_dict().items():
        own[name].copy_(weight)
    for path in folder.glob("*.safetensors"):  # the head itself, of more bits than the rest
        with safe_open(path, "pt") as file:
            if _WEIGHT in file.keys():  # noqa: SIM118
                own[_WEIGHT].copy_(file.get_tensor(_WEIGHT))


def with_padding(tokenizer: Any) -> Any:
    """The tokenizer, or a copy that pads with another token where a text may end with the padding token."""
    ends = _last_tokens(tokenizer)
    if tokenizer.pad_token_id not in ends:
        return tokenizer
    special = [(i, str(token)) for i, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    named_so = sorted(special, key=lambda found: "pad" not in found[1].lower())
    rarest = [(i, token) for token, i in sorted(tokenizer.get_vocab().items(), key=lambda found: -found[1])]
    padding = next(token for i, token in [*named_so, *rarest] if i not in ends)
    own = copy.deepcopy(tokenizer)
    own.pad_token = padding
    log.info(
        "The saved tokenizer pads with %s: a text may end with %s, which a reward model would take for padding.",
        padding,
        tokenizer.pad_token,
    )
    return own


def _last_tokens(tokenizer: Any) -> set[int]:
    """The tokens with which whole texts end: what the chat template writes last, or without one the end of text."""
    if tokenizer.chat_template is not None:
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False)
        except Exception:  # a template that wants other turns: any of the tokens may be the last
            return set(tokenizer.all_special_ids)
        return {tokenizer(text, add_special_tokens=False)["input_ids"][-1]}
    return {tokenizer.eos_token_id}
