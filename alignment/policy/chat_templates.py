"""The chat templates of a run: the model's, and those of data that have their own."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from alignment.config.data import DataConfig, SourceConfig, TemplateText
from alignment.config.schema import ModelConfig, RunConfig
from alignment.errors import UserError, did_you_mean

log = logging.getLogger(__name__)

TRAINING = "training"
"""The name of the template that TRL trains with, where the model's own writes earlier answers differently."""
MODEL = "model"
"""Whose template every source without one of its own is written by."""


def settle_template(tokenizer: Any, config: ModelConfig, kept: Mapping[str, str]) -> None:
    """Give the tokenizer the template that `model.chat_template` asks for; else its own, of several the default one.

    The others stay known as `tokenizer.named_templates`, for data that name one.

    Raises:
        UserError: no such template, or several of which none is the default.
    """
    own, asked = tokenizer.chat_template, config.chat_template
    named: dict[str, str] = own if isinstance(own, dict) else {}
    tokenizer.named_templates = named
    if named and (asked is None or _is_training(asked, named)):
        if "default" not in named:
            raise UserError(
                f"model.name={config.name}: the tokenizer has several chat templates and none is called default: set "
                f"model.chat_template to one of {', '.join(named)}."
            )
        others = ", ".join(name for name in named if name != "default")
        if others:
            log.info(
                "The tokenizer's chat template `default` is used; model.chat_template may name another: %s.", others
            )
        tokenizer.chat_template = named["default"]
    if asked is not None:
        tokenizer.chat_template = _text(tokenizer, asked, MODEL, kept)


def with_templates(config: RunConfig, tokenizer: Any, kept: Mapping[str, str]) -> RunConfig:
    """The settings of a run with the text of each template that data name as their own.

    Args:
        tokenizer: from `load_tokenizer`.
        kept: the templates that a run began with, which goes on where a file is gone.

    Raises:
        UserError: no such template; names the data.
    """

    def read(part: Any, place: str) -> Any:
        if part.chat_template is None:
            return part
        text = _text(tokenizer, part.chat_template, place, kept)
        log.info("%s: its rows are written by the chat template %s.", place, part.chat_template)
        return replace(part, chat_template=TemplateText(text, part.chat_template))

    stages: dict[str, DataConfig] = {}
    for key, data in _stages(config):
        sources = {name: read(source, f"{key}.sources.{name}") for name, source in data.sources.items()}
        # A mixture's is that of its sources, which have taken it over or have others.
        stages[key] = replace(data, sources=sources, chat_template=None) if sources else read(data, key)
    if config.sft is not None:
        config = replace(config, sft=replace(config.sft, data=stages["sft.data"]))
    if config.loss is not None:
        config = replace(config, data=stages["data"])
    last = [part.chat_template for _, part in _parts("", config.last_data)]
    if None not in last and tokenizer.chat_template not in last:
        log.warning(
            "No row of the last stage is written by the model's chat template, which is saved with the policy: set "
            "model.chat_template to the one that the policy will be used with."
        )
    return config


def templates_of(config: RunConfig, tokenizer: Any) -> dict[str, str]:
    """The text of each template of a run whose settings `with_templates` returned, by what it belongs to."""
    found = {MODEL: tokenizer.chat_template}
    for key, data in _stages(config):
        found |= {place: part.chat_template for place, part in _parts(key, data)}
    return {place: str(text) for place, text in found.items() if text is not None}


def _stages(config: RunConfig) -> Iterator[tuple[str, DataConfig]]:
    """The data of each stage with their place in the settings."""
    if config.sft is not None:
        yield "sft.data", config.sft.data
    if config.loss is not None and config.data is not None:
        yield "data", config.data


def _parts(key: str, data: DataConfig) -> list[tuple[str, DataConfig | SourceConfig]]:
    """The sources of a mixture, or the one set that it is."""
    return [(f"{key}.sources.{name}", source) for name, source in data.sources.items()] or [(key, data)]


def _is_training(asked: str, named: Mapping[str, str]) -> bool:
    return asked == TRAINING and asked not in named and not Path(asked).is_file()


def _text(tokenizer: Any, asked: str, place: str, kept: Mapping[str, str]) -> str:
    """The template that `<place>.chat_template` asks for: one of the tokenizer's by its name, a file's, or TRL's."""
    named: dict[str, str] = tokenizer.named_templates
    if asked in named:
        return named[asked]
    if _is_training(asked, named):
        return _training_template(tokenizer, place)
    path = Path(asked).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError):
        if place in kept:
            log.info("%s.chat_template: the file %s is gone; the run goes on with its copy.", place, path)
            return kept[place]
        names = f", nor a template of the tokenizer, which has {', '.join(named)}" if named else ""
        hint = did_you_mean(asked, named)
        raise UserError(f"{place}.chat_template: the file {path} does not exist{hint}{names}.") from None
    except (OSError, UnicodeError) as error:
        raise UserError(f"{place}.chat_template: {path} cannot be read as text: {error}.") from None


def _training_template(tokenizer: Any, place: str) -> str:
    """TRL's variant of the tokenizer's template, or the template itself if it needs none."""
    problem = "TRL knows no training variant of this model's template"
    if tokenizer.chat_template is not None:
        try:
            from trl.chat_template_utils import get_training_chat_template

            return get_training_chat_template(tokenizer) or str(tokenizer.chat_template)
        except (ImportError, ValueError):
            pass
    else:
        problem = "the tokenizer has no template that TRL could know"
    raise UserError(
        f"{place}.chat_template={TRAINING}: {problem}: give a Jinja file that writes every answer as it writes the "
        f"last one, or leave the template and set data.score=last."
    )
