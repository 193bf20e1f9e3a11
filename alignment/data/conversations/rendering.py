"""Messages to text by a chat template, without what transformers does anew for each of them."""

from __future__ import annotations

import datetime
import logging
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from jinja2 import TemplateError

from alignment.data.rows.row import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_PROBED = 64
"""The first texts, which are written in both ways: they must agree."""
_PLAIN = {"role", "content"}


class ChatTemplate:
    """Writes messages as the tokenizer's `apply_chat_template` does.

    That copies every message and variable, because they may hold anything. Most messages are a role and a text: these
    go to the compiled template as they are, in half the time. Whatever else is there goes the usual way.

    Args:
        template: in place of the tokenizer's; None: that.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._probes_left = _PROBED
        self._compiled = _compiled(tokenizer, template)
        self._constants = dict(tokenizer.special_tokens_map)

    def write(self, messages: Sequence[Message], generation: bool, variables: Mapping[str, Any]) -> str:
        """The text; `variables` are those of the template.

        Raises:
            TemplateError, TypeError, ValueError, KeyError, AttributeError: the template cannot write it.
        """
        if self._compiled is None or not _is_plain(messages, variables):
            return self._usual(messages, generation, variables)
        given = self._constants | dict(variables)
        text: str = self._compiled.render(
            messages=messages, tools=None, documents=None, add_generation_prompt=generation, **given
        )
        if self._probes_left:
            self._probes_left -= 1
            if (usual := self._usual(messages, generation, variables)) != text:
                self._compiled = None
                log.info("The chat template writes other texts when it is asked directly: it is asked the usual way.")
                return usual
        return text

    def _usual(self, messages: Sequence[Message], generation: bool, variables: Mapping[str, Any]) -> str:
        text = self._tokenizer.apply_chat_template(
            list(messages),
            chat_template=self._template,
            tokenize=False,
            add_generation_prompt=generation,
            **variables,
        )
        return cast(str, text)


def _compiled(tokenizer: PreTrainedTokenizerBase, template: str | None) -> Any:
    """The template that transformers has compiled; None where the tokenizer, or its transformers, has other ways."""
    from transformers import PreTrainedTokenizerBase
    from transformers.utils import chat_template_utils

    compile_template = getattr(chat_template_utils, "_compile_jinja_template", None)
    is_usual = type(tokenizer).apply_chat_template is PreTrainedTokenizerBase.apply_chat_template
    source = tokenizer.chat_template if template is None else template
    if compile_template is None or not is_usual or not isinstance(source, str):
        return None
    try:
        return compile_template(source)
    except TemplateError:  # said of each row, by the usual way
        return None


def _is_plain(messages: Sequence[Message], variables: Mapping[str, Any]) -> bool:
    return all(
        message.keys() == _PLAIN and type(message["role"]) is str and type(message["content"]) is str
        for message in messages
    ) and all(type(value) in (str, bool, int, float) for value in variables.values())


def dated(template: str, day: datetime.date) -> str:
    """The template with that day's date in place of today's."""

    def date(call: re.Match[str]) -> str:
        return repr(day.strftime(call[2]))

    return re.sub(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""", date, template)
