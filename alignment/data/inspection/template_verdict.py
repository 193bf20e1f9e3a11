"""What a chat template does with beginnings, ends, thoughts, earlier turns and the system text: asked, not read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from alignment.config.data import DataConfig, TemplateText
from alignment.data.conversations.dialect import Dialect
from alignment.data.conversations.ends import end_of_turn
from alignment.data.conversations.writer import Writer
from alignment.data.rows.row import Message, Rejected

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_QUESTION, _ANSWER, _SYSTEM, _THOUGHT = "Qq0qQ", "Aa1aA", "Ss2sS", "Tt3tT"
_USER: Message = {"role": "user", "content": _QUESTION}
_SAID: Message = {"role": "assistant", "content": _ANSWER}


@dataclass(frozen=True, slots=True)
class Trait:
    """One finding about the template.

    Attributes:
        name: what was asked.
        verdict: what the template does.
        suspect: it deserves a second look.
    """

    name: str
    verdict: str
    suspect: bool = False


def template_verdict(tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> list[Trait]:
    """The traits of the template that writes the data, or of plain text where there is none."""
    writer = Writer(tokenizer, config)

    def render(*messages: Message, generation: bool = False, **variables: Any) -> str | None:
        """The text of a conversation; None where the template refuses it."""
        try:
            return writer.render(list(messages), generation, variables)
        except Rejected:
            return None

    if not writer.chat:
        return [
            Trait("template", "none: prompt and answer are written one after the other, as they are"),
            _bos_of_plain_text(tokenizer),
            Trait("EOS", f"{tokenizer.eos_token} is added to each answer", tokenizer.eos_token is None),
        ]
    own = config.chat_template
    named = [Trait("template", f"{own.name}, in place of the model's")] if isinstance(own, TemplateText) else []
    return [
        *named,
        _bos(tokenizer, render),
        _eos(tokenizer, config),
        _generation_prompt(render),
        _prefix(render),
        _thinking(render),
        _system(render),
        _tools(writer),
    ]


Render = Callable[..., str | None]


def _bos(tokenizer: PreTrainedTokenizerBase, render: Render) -> Trait:
    text = render(_USER, _SAID) or ""
    bos = tokenizer.bos_token
    if not bos:
        return Trait("BOS", "the tokenizer has none, and none is written")
    after = text.removeprefix(bos)
    if after == text:
        added = tokenizer("a", verbose=False)["input_ids"][:1] == [tokenizer.bos_token_id]
        adds = ", though the tokenizer adds it to plain text" if added else ""
        return Trait("BOS", f"the template writes no {bos}{adds}", added)
    twice = after.startswith(bos)
    return Trait("BOS", f"the template writes {bos} {'twice' if twice else 'once'}", twice)


def _bos_of_plain_text(tokenizer: PreTrainedTokenizerBase) -> Trait:
    added = tokenizer("a", verbose=False)["input_ids"][:1] == [tokenizer.bos_token_id]
    return Trait("BOS", f"the tokenizer adds {tokenizer.bos_token}" if added else "the tokenizer adds none")


def _eos(tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> Trait:
    eos, end = tokenizer.eos_token, end_of_turn(tokenizer, config)
    if end is None:
        added = f"{eos} is added to each answer" if eos else "and the tokenizer has no EOS to add"
        return Trait("EOS", f"the template ends answers with no special token, {added}", True)
    ends = str(tokenizer.convert_ids_to_tokens(end))
    if end == tokenizer.eos_token_id:
        return Trait("EOS", f"answers end with {ends}, the tokenizer's EOS")
    return Trait("EOS", f"answers end with {ends}, and the tokenizer's EOS is {eos}")


def _generation_prompt(render: Render) -> Trait:
    name = "generation prompt"
    bare, asked, whole = render(_USER), render(_USER, generation=True), render(_USER, _SAID)
    if bare is None or asked is None or whole is None:
        return Trait(name, "the template refuses a question with its answer", True)
    header = whole[len(bare) : whole.find(_ANSWER)] if whole.startswith(bare) else ""
    if asked == bare:
        ignored = f"the template writes none, and {_shown(header)} before an answer"
        return Trait(name, ignored if header.strip() else "none, and none is needed", bool(header.strip()))
    added = asked.removeprefix(bare)
    if whole.startswith(asked):
        return Trait(name, f"{_shown(added)}, and a given answer follows it as it is")
    return Trait(name, f"{_shown(added)}, and a given answer follows {_shown(header)}")


def _prefix(render: Render) -> Trait:
    name = "earlier turns"
    again = (_USER, _SAID, _USER)
    first, longer = render(*again[:2]), render(*again)
    if first is None or longer is None:
        return Trait(name, "the template refuses a second question", True)
    # What closes a whole conversation, such as a line break or EOS, is no part of the turn.
    end = first.rfind(_ANSWER) + len(_ANSWER)
    if longer.startswith(first):
        return Trait(name, "stay as they are when turns follow (prefix-preserving)")
    if longer.startswith(first[:end]):
        return Trait(name, f"lose {_shown(first[end:])} at their end when turns follow", True)
    return Trait(name, "are written otherwise once turns follow: answers of several turns may be left out", True)


def _thinking(render: Render) -> Trait:
    asked = [render(_USER, generation=True, enable_thinking=on) for on in (True, False)]
    said = [_SWITCHES[asked[0] != asked[1]]]
    thought = {**_SAID, "reasoning_content": _THOUGHT}
    once, again = render(_USER, thought), render(_USER, thought, _USER, _SAID)
    if once is None or _THOUGHT not in once:
        inline = {**_SAID, "content": f"<think>\n{_THOUGHT}\n</think>\n\n{_ANSWER}"}
        again = render(_USER, inline, _USER, _SAID)
        said.append("reasoning_content is not written")
    else:
        said.append("reasoning_content is written")
    if again is not None:
        said.append(f"thoughts of earlier answers are {'kept' if _THOUGHT in again else 'left out'}")
    answered = render(_USER, _SAID) or ""
    if "<think>" in answered and "<think>" not in (render(_USER, generation=True) or ""):
        said.append("an answer without a thought gets an empty one")
    return Trait("thinking", "; ".join(said))


_SWITCHES: Mapping[bool, str] = {True: "enable_thinking switches it", False: "no switch enable_thinking"}


def _system(render: Render) -> Trait:
    name = "system turn"
    bare, whole = render(_USER), render({"role": "system", "content": _SYSTEM}, _USER)
    if whole is None:
        return Trait(name, "refused: rows with a system text are left out", True)
    if _SYSTEM not in whole:
        return Trait(name, "not written: a system text is lost", True)
    before, _, after = whole.partition(_SYSTEM)
    if after.strip().startswith(_QUESTION):
        return Trait(name, "written into the user's turn")
    if bare is not None and before.strip() and bare.startswith(before):
        default = bare[len(before) : bare.find(_QUESTION)].partition("<")[0]
        return Trait(name, f"written; without one the template writes its own: {_shown(default)}")
    return Trait(name, "written; without one there is none")


def _tools(writer: Writer) -> Trait:
    tool = {"type": "function", "function": {"name": "Ff4fF", "description": "", "parameters": {"type": "object"}}}
    try:
        offered = "Ff4fF" in writer.render([_USER], False, {"tools": [tool]})
    except Rejected:
        offered = False
    calls = Dialect.of(writer.template or "", lambda messages: writer.render(messages, False, {})).calls
    return Trait("tools", f"{'offered' if offered else 'not written'}; calls are {'' if calls else 'not '}written")


def _shown(text: str) -> str:
    """A short text in quotes, its line breaks as \\n."""
    flat = text.replace("\n", "\\n")
    return f"'{flat[:60]}{'...' if len(flat) > 60 else ''}'"
