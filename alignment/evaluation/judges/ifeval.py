"""Verifiable instructions: did the answer do what the prompt asked of its form?

The kinds and their settings are those of IFEval (Zhou et al. 2023, arXiv 2311.07911, table 1), read as its authors
check them, so that shares of followed instructions compare. Those that would need a tokenizer of sentences or a
detector of languages are left out; 387 of IFEval's 541 prompts have none of these.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from alignment.errors import UserError, did_you_mean
from alignment.evaluation.judges.base import Item, Judge, Judgement

WITHOUT_CHECK = (
    "change_case:capital_word_frequency",
    "change_case:english_capital",
    "change_case:english_lowercase",
    "language:response_language",
    "length_constraints:number_sentences",
)
"""IFEval's kinds that need NLTK or langdetect."""

CONSTRAINED = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def _compares(number: int, relation: str, bound: int) -> bool:
    return number >= bound if relation == "at least" else number < bound


# Words and letters


def _has_keywords(answer: str, keywords: Sequence[str]) -> bool:
    return all(word.lower() in answer.lower() for word in keywords)


def _keyword_frequency(answer: str, keyword: str, frequency: int, relation: str) -> bool:
    return _compares(answer.lower().count(keyword.lower()), relation, frequency)


def _has_no_forbidden(answer: str, forbidden_words: Sequence[str]) -> bool:
    return not any(re.search(rf"\b{re.escape(word)}\b", answer, re.IGNORECASE) for word in forbidden_words)


def _letter_frequency(answer: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _compares(answer.lower().count(letter.lower()), let_relation, let_frequency)


def _number_words(answer: str, num_words: int, relation: str) -> bool:
    return _compares(len(re.findall(r"\w+", answer)), relation, num_words)


def _no_comma(answer: str) -> bool:
    return "," not in answer


# Parts of the answer


def _parts(pieces: Sequence[str]) -> list[str] | None:
    """Pieces between dividers: the first and the last may be empty and do not count; None if another one is empty."""
    kept = [piece for place, piece in enumerate(pieces) if piece.strip() or 0 < place < len(pieces) - 1]
    return None if any(not piece.strip() for piece in kept) else kept


def _number_paragraphs(answer: str, num_paragraphs: int) -> bool:
    parts = _parts(answer.split("***"))
    return parts is not None and len(parts) == num_paragraphs


def _nth_paragraph_first_word(answer: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    paragraphs = answer.split("\n\n")
    if sum(bool(one.strip()) for one in paragraphs) != num_paragraphs or not 1 <= nth_paragraph <= len(paragraphs):
        return False
    words = paragraphs[nth_paragraph - 1].split()
    if not words:
        return False
    found = re.match(r"[^.,?!'\"]*", words[0].lstrip("'").lstrip('"'))
    return found is not None and found[0].lower() == first_word.lower()


def _multiple_sections(answer: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"{re.escape(section_spliter)}\s?\d", answer)) >= num_sections


def _two_responses(answer: str) -> bool:
    parts = _parts(answer.split("******"))
    return parts is not None and len(parts) == 2 and parts[0].strip() != parts[1].strip()


def _repeats_prompt(answer: str, prompt_to_repeat: str) -> bool:
    return answer.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _has_postscript(answer: str, postscript_marker: str) -> bool:
    """Spaces may follow the points of a marker such as P.P.S."""
    marker = r"\.\s?".join(re.escape(part) for part in postscript_marker.strip().split("."))
    return re.search(marker, answer, re.IGNORECASE) is not None


def _ends_with(answer: str, end_phrase: str) -> bool:
    return answer.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _is_quoted(answer: str) -> bool:
    text = answer.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


# Marks in the answer


def _number_placeholders(answer: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", answer)) >= num_placeholders


def _number_bullets(answer: str, num_bullets: int) -> bool:
    """Lines that begin with one asterisk, or with a hyphen."""
    return len(re.findall(r"^\s*(?:\*[^*]|-)", answer, re.MULTILINE)) == num_bullets


def _number_highlights(answer: str, num_highlights: int) -> bool:
    """Text between single or double asterisks, within a line."""
    marked = re.findall(r"\*[^\n*]*\*", answer) + re.findall(r"\*\*[^\n*]*\*\*", answer)
    return sum(bool(text.strip("*").strip()) for text in marked) >= num_highlights


def _has_title(answer: str) -> bool:
    return any(text.strip("<>").strip() for text in re.findall(r"<<[^\n]+>>", answer))


def _is_json(answer: str) -> bool:
    """The whole answer is one JSON value, perhaps in a fence."""
    text = re.sub(r"^```(?:json)?|```$", "", answer.strip(), flags=re.IGNORECASE)
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _is_constrained(answer: str) -> bool:
    return any(option in answer for option in CONSTRAINED)


CHECKS: dict[str, Callable[..., bool]] = {
    "combination:repeat_prompt": _repeats_prompt,
    "combination:two_responses": _two_responses,
    "detectable_content:number_placeholders": _number_placeholders,
    "detectable_content:postscript": _has_postscript,
    "detectable_format:constrained_response": _is_constrained,
    "detectable_format:json_format": _is_json,
    "detectable_format:multiple_sections": _multiple_sections,
    "detectable_format:number_bullet_lists": _number_bullets,
    "detectable_format:number_highlighted_sections": _number_highlights,
    "detectable_format:title": _has_title,
    "keywords:existence": _has_keywords,
    "keywords:forbidden_words": _has_no_forbidden,
    "keywords:frequency": _keyword_frequency,
    "keywords:letter_frequency": _letter_frequency,
    "length_constraints:nth_paragraph_first_word": _nth_paragraph_first_word,
    "length_constraints:number_paragraphs": _number_paragraphs,
    "length_constraints:number_words": _number_words,
    "punctuation:no_comma": _no_comma,
    "startend:end_checker": _ends_with,
    "startend:quotation": _is_quoted,
}
"""The check of each kind of instruction; its arguments after the answer are the instruction's settings."""

_SETTINGS = {kind: list(inspect.signature(check).parameters)[1:] for kind, check in CHECKS.items()}


def is_followed(kind: str, answer: str, settings: Mapping[str, Any]) -> bool:
    """Whether an answer follows an instruction. An empty answer follows none.

    Args:
        settings: as in IFEval's `kwargs`; those of other kinds may stand there as null.
    """
    return bool(answer.strip()) and CHECKS[kind](answer, **{name: settings[name] for name in _SETTINGS[kind]})


class InstructionJudge(Judge):
    """The share of a prompt's instructions that an answer follows; the answer is correct if it follows all.

    A row has IFEval's columns: `instruction_id_list`, names of kinds, and `kwargs`, a mapping of settings for each.
    """

    kind: ClassVar[str] = "ifeval"

    def description(self) -> dict[str, Any]:
        """The checks have no settings."""
        return {"version": 1}

    def require(self, items: Sequence[Item]) -> None:
        """Refuse prompts without instructions, or with one that cannot be checked."""
        for item in items:
            if (problem := problem_of(item.meta)) is not None:
                raise UserError(f"evaluation.judge=ifeval cannot judge {item.source}: {problem}.")

    def score(self, items: Sequence[Item]) -> list[Judgement]:
        """The share of followed instructions, in [0, 1]; the reasons are those that are not followed."""
        return [_judged(item) for item in items]


def _judged(item: Item) -> Judgement:
    kinds = item.meta["instruction_id_list"]
    asked = zip(kinds, item.meta["kwargs"], strict=True)
    broken = [kind for kind, settings in asked if not is_followed(kind, item.answers[0], settings or {})]
    return Judgement(
        score=1 - len(broken) / len(kinds),
        correct=not broken,
        reasons=tuple(f"does not follow {kind}" for kind in broken),
    )


def problem_of(meta: Mapping[str, Any]) -> str | None:
    """Why a row's instructions cannot be checked, as the rest of a sentence; None if they can."""
    kinds, settings = meta.get("instruction_id_list"), meta.get("kwargs")
    if not (isinstance(kinds, list) and kinds and isinstance(settings, list) and len(settings) == len(kinds)):
        return (
            "it needs a list `instruction_id_list` with the kinds of its instructions, and a list `kwargs` with a "
            "mapping of settings for each"
        )
    for kind, given in zip(kinds, settings, strict=True):
        if kind in WITHOUT_CHECK:
            return f"instruction {kind} needs a tokenizer or a detector of languages, so leave such prompts out"
        if kind not in CHECKS:
            return f"there is no instruction {kind}{did_you_mean(str(kind), CHECKS)}"
        lacking = [name for name in _SETTINGS[kind] if (given or {}).get(name) is None]
        if lacking:
            return f"instruction {kind} lacks {' and '.join(lacking)} in `kwargs`"
    return None
