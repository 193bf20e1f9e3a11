"""The Modelfile of Ollama, whose templates are Go's, not Jinja's.

A chat template is translated where it frames each message in the same way; the frames are tried on conversations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from alignment.errors import UserError

_MARKS = tuple(f"Aa{number}aA" for number in range(4))
_PARAMETERS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_NAMES = {"repetition_penalty": "repeat_penalty"}


@dataclass(frozen=True, slots=True)
class Frames:
    """What a chat template writes around the messages.

    Attributes:
        begin: before all messages where there is no system message.
        system: before and after a system message, which comes first; None where the template takes none.
        user, assistant: before and after such a message.
        generation: before the answer.
    """

    begin: str
    system: tuple[str, str] | None
    user: tuple[str, str]
    assistant: tuple[str, str]
    generation: str

    @property
    def is_plain(self) -> bool:
        """Whether no part of it means something to Ollama."""
        parts = [self.begin, *(self.system or ()), *self.user, *self.assistant, self.generation]
        return not any(sign in part for sign in ("{{", "}}", '"""') for part in parts)

    def render(self, turns: Sequence[Mapping[str, str]]) -> str:
        """The text of a conversation that asks for an answer."""
        text = "" if turns[0]["role"] == "system" else self.begin
        for turn in turns:
            before, after = getattr(self, turn["role"])
            text += before + turn["content"] + after
        return text + self.generation

    def to_go(self) -> str:
        """The same for Ollama."""
        begin = self.begin
        if self.system is not None:
            before, after = self.system
            other = f"{{{{ else }}}}{begin}" if begin else ""
            begin = f"{{{{ if .System }}}}{before}{{{{ .System }}}}{after}{other}{{{{ end }}}}"
        (u, after_u), (a, after_a) = self.user, self.assistant
        return (
            f'{begin}{{{{ range .Messages }}}}{{{{ if eq .Role "user" }}}}{u}{{{{ .Content }}}}{after_u}'
            f'{{{{ else if eq .Role "assistant" }}}}{a}{{{{ .Content }}}}{after_a}{{{{ end }}}}{{{{ end }}}}'
            f"{self.generation}"
        )


def frames_of(tokenizer: Any) -> Frames | None:
    """How a tokenizer's chat template frames messages; None where it has none, or does more than that."""
    if tokenizer.chat_template is None:
        return None
    try:
        found = _frames(tokenizer)
        conversations = _conversations(found.system is not None)
        if found.is_plain and all(found.render(turns) == _render(tokenizer, turns) for turns in conversations):
            return _without_bos(found, tokenizer)
    except Exception:  # a template may raise anything, and demand what is not here
        return None
    return None


def _render(tokenizer: Any, turns: Sequence[Mapping[str, str]], asks: bool = True) -> str:
    return tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=asks)


def _turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """A conversation, the user's turn first."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def _conversations(system: bool) -> list[list[dict[str, str]]]:
    texts = ["Which day is it?", "A {good}\n day.", "Why?", "<b>", "é"]
    found = [_turns(*texts[:1]), _turns(*texts[:3]), _turns(*texts)]
    return found + [_turns(*texts[:n], system="Be kind.") for n in (1, 3, 5) if system]


def _frames(tokenizer: Any) -> Frames:
    """As far as the template frames every message in the same way."""
    one, two, three, four = _MARKS
    start, rest = _render(tokenizer, _turns(one, two, three)).split(one)
    middle, rest = rest.split(two)
    again, end = rest.split(three)
    after_user, after_assistant = (
        _render(tokenizer, _turns(*marks), asks=False).split(marks[-1])[1] for marks in (_MARKS[:1], _MARKS[:2])
    )
    before_user, before_assistant = again.removeprefix(after_assistant), middle.removeprefix(after_user)
    user, assistant = (before_user, after_user), (before_assistant, after_assistant)
    begin, generation = start.removesuffix(before_user), end.removeprefix(after_user)
    system = None
    try:
        told = _render(tokenizer, _turns(one, system=four))
    except TemplateError:  # how a template refuses a role
        told = ""
    if told.count(four) == 1:
        before, rest = told.split(four)
        system = before, rest.split(one)[0].removesuffix(before_user)
    return Frames(begin, system, user, assistant, generation)


def _without_bos(found: Frames, tokenizer: Any) -> Frames:
    """Without the token that Ollama puts at the beginning by itself."""
    bos = tokenizer.bos_token
    if bos is None or tokenizer("a")["input_ids"][:1] != [tokenizer.bos_token_id]:
        return found
    system = None if found.system is None else (found.system[0].removeprefix(bos), found.system[1])
    return Frames(found.begin.removeprefix(bos), system, found.user, found.assistant, found.generation)


def modelfile(file: Path, tokenizer: Any, stops: Sequence[int], generation: Mapping[str, Any]) -> str:
    """The Modelfile beside a GGUF file.

    Args:
        file: the GGUF file.
        tokenizer: of the policy.
        stops: the tokens that end an answer.
        generation: settings of the policy's generation.

    Raises:
        UserError: a chat template that is no frame around messages.
    """
    lines = [f"FROM ./{file.name}"]
    if tokenizer.chat_template is not None:
        found = frames_of(tokenizer)
        if found is None:
            raise UserError(
                f"to=ollama: the chat template does more than to frame each message, so it is not translated into "
                f"Ollama's: serve {file.name} by llama-server --jinja, which reads the template in the file, or write "
                f"a Modelfile of your own."
            )
        lines.append(f'TEMPLATE """{found.to_go()}"""')
    names = (tokenizer.convert_ids_to_tokens(stop) for stop in stops)
    lines += [f'PARAMETER stop "{name}"' for name in names]
    lines += [
        f"PARAMETER {_NAMES.get(key, key)} {generation[key]}" for key in _PARAMETERS if generation.get(key) is not None
    ]
    return "\n".join(lines) + "\n"
