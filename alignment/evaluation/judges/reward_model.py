"""A reward model as judge: a sequence classification model with one score for a prompt and its answer.

Most models give one logit; a model of two classes gives the logit of the second, that of the better answer. Only
safetensors are loaded, and no code of the model's own. The text is the chat template's, as `loss=bradley_terry` trains
it, with one BOS where template and tokenizer both write one; a tokenizer without a template takes prompt and answer as
a pair of texts.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub import snapshot_download

from alignment.errors import UserError
from alignment.evaluation.judges.base import Item, Judge, Judgement
from alignment.evaluation.judges.store import JudgementStore
from alignment.files import file_digest
from alignment.policy.source import ADAPTER_FILE

log = logging.getLogger(__name__)

_READ = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
"""Files that decide the score, or how the text is tokenised."""


class RewardModelJudge(Judge):
    """Scores answers by a reward model, which is loaded when the first unknown answer comes.

    Args:
        name: a folder, of a whole model or of an adapter with its head, or a hub id.
        cache: the folder in which scores are kept.

    Raises:
        UserError: there is no such model, it has no safetensors, or it is none with one score.
    """

    kind: ClassVar[str] = "reward_model"

    def __init__(self, name: str, cache: Path, device: torch.device) -> None:
        self._name = name
        self._cache = cache
        self._device = device
        self._folder = _folder(name)
        self._base = _base(self._folder)
        self._loaded: tuple[Any, Any] | None = None

    @cached_property
    def _digests(self) -> dict[str, str]:
        folders = {"": self._folder} | ({"base/": self._base} if self._base is not None else {})
        return {
            f"{part}{path.name}": file_digest(path)
            for part, folder in folders.items()
            for path in sorted({path for pattern in _READ for path in folder.glob(pattern)})
        }

    def description(self) -> dict[str, Any]:
        """The content of the model's files."""
        return {"version": 1, "model": Path(self._name).name, "files": self._digests}

    def score(self, items: Sequence[Item]) -> list[Judgement]:
        """The model's score of each answer, in its own units."""
        with JudgementStore(self._cache, self) as store:
            found = store.replies(items, self._asked)
        return [_judgement(score) for score in found]

    def _asked(self, items: Sequence[Item]) -> Iterator[tuple[int, Any]]:
        log.info("Scoring %d answers by the reward model %s ...", len(items), self._name)
        if self._loaded is None:
            self._loaded = load_reward_model(self._folder, self._base, self._device)
        model, tokenizer = self._loaded
        for place, item in enumerate(items):
            yield place, reward(model, tokenizer, item)

    def usage(self) -> dict[str, Any]:
        """Scores cost time alone."""
        return {}


def _judgement(score: Any) -> Judgement:
    if isinstance(score, float | int) and math.isfinite(score):
        return Judgement(float(score))
    return Judgement(None, reasons=("the score is not finite",))


def stored_bytes(name: str) -> int:
    """Bytes of a reward model's weights, with its base's; nothing is fetched.

    Raises:
        UserError: it is not on this machine, or has no safetensors.
    """
    folder = _folder(name, fetch=False)
    folders = [folder] if (base := _base(folder, fetch=False)) is None else [folder, base]
    return sum(path.stat().st_size for one in folders for path in one.glob("*.safetensors"))


def _folder(name: str, fetch: bool = True) -> Path:
    """The model's folder, fetched if it is on the hub."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(name, allow_patterns=list(_READ), local_files_only=not fetch))
        except Exception as error:  # whatever the hub's library calls an unknown name or a dead network
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"evaluation.reward_model={name} is no folder, and the hub does not give it ({first.rstrip('.')})."
            ) from None
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"evaluation.reward_model={name} has no *.safetensors: weights in other formats can run code, so they are "
            f"not loaded; save the model again with safetensors."
        )
    return folder


def _base(folder: Path, fetch: bool = True) -> Path | None:
    """The folder of an adapter's base; None for a whole model."""
    path = folder / ADAPTER_FILE
    return _folder(str(json.loads(path.read_bytes()).get("base_model_name_or_path")), fetch) if path.is_file() else None


def load_reward_model(folder: Path, base: Path | None, device: torch.device) -> tuple[Any, Any]:
    """A reward model and its tokenizer; `base` is the folder of an adapter's base.

    Raises:
        UserError: it is no sequence classification model of one or two scores, or asks for code of its own.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    kind: Any = AutoModelForSequenceClassification
    settings: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": False, "dtype": "auto"}
    try:
        if base is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(kind.from_pretrained(str(base), num_labels=1, **settings), str(folder))
        else:
            model = kind.from_pretrained(str(folder), **settings)
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"evaluation.reward_model: {folder} cannot be loaded as a sequence classification model "
            f"({' '.join(str(error).split())[:200]})."
        ) from None
    if model.config.num_labels not in (1, 2):
        raise UserError(
            f"evaluation.reward_model: {folder} has {model.config.num_labels} scores, and a reward model has one, or "
            f"two of which the second is the better answer's."
        )
    # It reads one text at a time, without padding: a text may well end with the token that pads.
    model.config.get_text_config().pad_token_id = None
    return model.to(device).eval(), tokenizer


@torch.no_grad()
def reward(model: Any, tokenizer: Any, item: Item) -> float:
    """The score of an item's only answer."""
    ids = torch.tensor([tokens(tokenizer, item)], device=next(model.parameters()).device)
    return float(model(input_ids=ids).logits[0, -1])  # of one logit, or the second of two


def tokens(tokenizer: Any, item: Item) -> list[int]:
    """What the model reads; it begins with one BOS, if with any."""
    if tokenizer.chat_template is None:
        found: list[int] = tokenizer(item.prompt, item.answers[0])["input_ids"]
    else:
        turns = [{"role": "user", "content": item.prompt}, {"role": "assistant", "content": item.answers[0]}]
        found = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False))["input_ids"]
    doubled = len(found) > 1 and found[0] == found[1] == tokenizer.bos_token_id
    return found[1:] if doubled else found
