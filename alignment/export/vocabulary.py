"""The tokenizer's part of a GGUF file: tokens, merges, how text is cut before merging, special tokens, chat template.

llama.cpp knows ways of cutting by their names. Here a name is chosen by what the tokenizer does, not by which model it
is of, so that a tokenizer of your own is understood as well.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gguf import GGUFWriter

log = logging.getLogger(__name__)

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_BYTES_ALONE = _BYTES | {"use_regex": False}


def _by_pattern(digits: str) -> list[dict[str, Any]]:
    pattern = {"Regex": f"{_WORDS}|{digits}{_REST}"}
    return [{"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}, _BYTES_ALONE]


_CUTS: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "gpt-2": ([_BYTES], False),
    "smollm": ([{"type": "Digits", "individual_digits": True}, _BYTES], False),
    "qwen2": (_by_pattern(r"\p{N}"), False),
    "llama-bpe": (_by_pattern(r"\p{N}{1,3}"), True),
}
"""llama.cpp's name: how text is cut, and whether a whole word that is a token is taken without merging."""


def _spec(tokenizer: Any) -> dict[str, Any]:
    return json.loads(tokenizer.backend_tokenizer.to_str())


def _cut(spec: dict[str, Any]) -> str | None:
    """The name of the way in which a tokenizer cuts text; None where it has none."""
    outer = spec["pre_tokenizer"] or {}
    parts = outer["pretokenizers"] if outer.get("type") == "Sequence" else [outer]
    parts = [{key: value for key, value in part.items() if key != "trim_offsets"} for part in parts]
    found = parts, bool(spec["model"].get("ignore_merges"))
    return next((name for name, wanted in _CUTS.items() if wanted == found), None)


def unknown_tokenizer(tokenizer: Any) -> str | None:
    """What of a tokenizer the files made here cannot say, in words; None if nothing."""
    if not tokenizer.is_fast:
        return f"its tokenizer is a {type(tokenizer).__name__}, without a tokenizer.json"
    spec = _spec(tokenizer)
    if spec["model"]["type"] != "BPE" or spec["model"].get("byte_fallback"):
        return "its tokenizer is none of byte-level BPE"
    if (spec["normalizer"] or {"type": "NFC"})["type"] != "NFC":
        return f"its tokenizer normalises text by {spec['normalizer']['type']}"
    if _cut(spec) is None:
        return "its tokenizer cuts text in a way of its own before it merges"
    return None


def add_vocabulary(writer: GGUFWriter, tokenizer: Any, size: int, stops: Sequence[int]) -> None:
    """Write a tokenizer of byte-level BPE.

    Args:
        writer: of the file.
        tokenizer: one that `unknown_tokenizer` has nothing against.
        size: tokens of the model; ids that the tokenizer lacks get names of their own.
        stops: the tokens that end an answer.
    """
    from gguf import TokenType

    spec = _spec(tokenizer)
    cut = _cut(spec)
    assert cut is not None
    names = {i: token for token, i in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    kinds = [
        TokenType.UNUSED
        if i not in names
        else TokenType.NORMAL
        if i not in added
        else TokenType.CONTROL
        if added[i].special
        else TokenType.USER_DEFINED
        for i in range(size)
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut)
    writer.add_token_list([names.get(i, f"[PAD{i}]") for i in range(size)])
    writer.add_token_types(kinds)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in spec["model"]["merges"]])

    for name in ("bos", "eos", "unk", "pad"):
        token = getattr(tokenizer, f"{name}_token_id")
        if token is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    _add_ends(writer, [stop for stop in stops if stop != tokenizer.eos_token_id])
    ids, alone = (tokenizer("a", add_special_tokens=adds)["input_ids"] for adds in (True, False))
    writer.add_add_bos_token(len(ids) > len(alone) and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(len(ids) > len(alone) and ids[-1] == tokenizer.eos_token_id)
    writer.add_add_space_prefix(False)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


def _add_ends(writer: GGUFWriter, ends: Sequence[int]) -> None:
    """Tokens that end an answer beside EOS: llama.cpp knows an end of turn and an end of message."""
    for add, token in zip((writer.add_eot_token_id, writer.add_eom_token_id), ends, strict=False):
        add(token)
    if ends[2:]:
        log.warning("GGUF has no room for %d of the tokens that end an answer: %s.", len(ends[2:]), ends[2:])
