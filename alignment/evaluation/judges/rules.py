"""A judge of short answers by rules alone: is the answer right, and does it come straight to the point?

The rule, in one line: a wrong answer scores 0; a right one scores 0.7 plus 0.3 times its directness. Style earns
nothing where the substance is missing, so a policy cannot win by being briefly wrong.

*Right* means that the answer asserts one of the accepted answers, word for word after the normalisation of SQuAD (case,
accents, punctuation and articles; number words are digits: "Twenty-one" is "21"). A mention is no assertion if it is
negated ("not Paris", "Paris is wrong"), asked ("Paris?"), compared ("larger than 9"), one of several candidates ("Paris
or Rome", "Paris, Rome, Oslo") or beyond the first 60 words. A negated answer is wrong even if it is asserted elsewhere,
and so is a number beside a claim of another ("12. So the answer is 13"). In answers to yes/no questions the one word
must stand alone, and the other must not occur.

*Directness* is 1 up to 8 words and falls linearly to 0 at 24; it is 0 for an empty, hedged, chatty or repetitive
answer. It does not look at the accepted answers.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

from alignment.errors import UserError
from alignment.evaluation.judges.base import Item, Judge, Judgement

CORRECT_SHARE = 0.7
DIRECT_WORDS = 8
LONG_WORDS = 24
READ_WORDS = 60


@dataclass(frozen=True, slots=True)
class _Word:
    """A normalised word, with the numbers of its sentence and its clause, and whether the sentence is a question."""

    text: str
    sentence: int
    clause: int
    asked: bool = False


_UNITS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen"""
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_NUMBERS = dict(zip(_UNITS.split(), range(20), strict=True)) | dict(zip(_TENS.split(), range(20, 100, 10), strict=True))
_TWENTY_TO_NINETY = {str(value) for value in range(20, 100, 10)}
_ARTICLES = {"a", "an", "the"}
_NOT_RIVALS = _ARTICLES | {"yes", "no"}
_CLAIMS = {"is", "are", "equals", "makes", "gives", "="}

_SENTENCE_ENDS = set(".!?;\n")
_CLAUSE_ENDS = set(",:()—–|")
_TOKEN = re.compile(
    r"(?<![\w.,)-])-?\d+(?:\.\d+)?%?(?![^\W_])|\d+(?:\.\d+)?%?(?![^\W_])"  # numbers
    r"|[^\W_]+(?:'[^\W_]+)*|[=/&]|[.!?;\n,:()—–|]"  # words, signs, ends of sentences and clauses
)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?%?")
_NEGATION = (
    r"(?:not(?! (?:the )?(?:only|just|merely)\b)|never|neither|nor|cannot|without|except|wrong|incorrect|false|"
    r"rather than|instead of|anything but|\w+n't)\b"
)
_NEGATED_BEFORE = re.compile(rf"\b{_NEGATION}")
_NEGATED_AFTER = re.compile(rf"^(?:(?:is|was|are|were|be|would|the) )*{_NEGATION}")
_MENTIONED = re.compile(r"\b(?:than|before|after|near)(?: (?:a|an|the|number|letter))*$")
_ALTERNATIVE = re.compile(r"\b(?:and|or|nor)(?: (?:a|an|the))?$")
_OTHER_FOLLOWS = re.compile(r"^(?:or\b|and \S+$)")

_HEDGE = re.compile(
    r"\b(?:maybe|perhaps|possibly|probably|presumably|might|could be|may be|may have|i think|i believe|i guess|"
    r"i suppose|i assume|i'd say|i would say|it seems|seems to|appears to|unsure|uncertain|likely|"
    r"as far as i know|not (?:\w+ )?(?:sure|certain)|i'm not|i am not|don't know|do not know|can't|cannot|"
    r"hard to say|depends|no idea|more or less|sort of|kind of like|if i remember|i forget|unable to)\b"
)
_CHATTER = re.compile(
    r"\b(?:(?:great|good|nice|excellent|interesting|fun|lovely|simple) (?:question|one)|certainly|of course|"
    r"absolutely|happy to|glad|let me|let's|hope (?:this|that|it)|feel free|thank you|thanks|as an ai|"
    r"to answer your|your question|anything else|let us|you asked|here is|here's|here are|hello|worth noting|"
    r"important to|fun fact|as you may|in conclusion|in summary|i'd be|i would be|i'm here|sorry|i'm glad|"
    r"any other questions|any more questions|thinking about|to think about|simply put|as we all know|step by step|"
    r"you can look)\b|^(?:sure|well|ah|oh|okay|ok|hi|hey|so|hmm|yay)\b"
)


def _read(text: str) -> list[_Word]:
    """The normalised words of a text, in order."""
    text = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", text).replace("’", "'").replace("−", "-"))
    text = "".join(c for c in text if not unicodedata.combining(c)).casefold()
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    words: list[_Word] = []
    sentence = clause = 0
    for token in _TOKEN.findall(text):
        if token in _SENTENCE_ENDS:
            if token == "?":
                words = [replace(word, asked=True) if word.sentence == sentence else word for word in words]
            sentence, clause = sentence + 1, clause + 1
        elif token in _CLAUSE_ENDS:
            clause += 1
        else:
            if token in ("but", "so", "because") and not (words and words[-1].text == "anything"):
                clause += 1
            word = {"/": "or", "&": "and"}.get(token, token.removesuffix("'s"))
            if "." in word:
                word = re.sub(r"\.?0+(?=%|$)", "", word)
            if word in _NUMBERS:
                value, previous = _NUMBERS[word], words[-1].text if words and words[-1].clause == clause else ""
                if 0 < value < 10 and previous in _TWENTY_TO_NINETY:
                    value += int(words.pop().text)
                word = str(value)
            words.append(_Word(word, sentence, clause))
    return words


@cache
def _accepted_words(accepted: str) -> tuple[str, ...]:
    words = tuple(word.text for word in _read(accepted))
    return tuple(w for w in words if w not in _ARTICLES and (w != "and" or len(words) == 1)) or words


def _occurrences(words: Sequence[_Word], wanted: tuple[str, ...]) -> list[tuple[int, int]]:
    """Spans within a sentence at which the wanted words stand, articles (and "and" inside a list) aside."""
    keep = [i for i, w in enumerate(words) if (w.text not in _ARTICLES and w.text != "and") or w.text in wanted]
    spans = [keep[k : k + len(wanted)] for k in range(len(keep) - len(wanted) + 1)]
    return [
        (span[0], span[-1] + 1)
        for span in spans
        if tuple(words[i].text for i in span) == wanted and words[span[0]].sentence == words[span[-1]].sentence
    ]


def _around(words: Sequence[_Word], start: int, stop: int) -> tuple[str, str]:
    """The text of the clause before and after the words at [start, stop)."""
    before = [word.text for word in words[:start] if word.clause == words[start].clause]
    after = [word.text for word in words[stop:] if word.clause == words[stop - 1].clause]
    return " ".join(before), " ".join(after)


def _polar(words: Sequence[_Word], wanted: str) -> tuple[bool, str]:
    """Yes/no questions: the wanted word stands alone, the other one does not occur."""
    if any(word.text in ("yes", "no") and word.text != wanted for word in words):
        return False, "both yes and no"
    for i, word in enumerate(words):
        before, after = _around(words, i, i + 1)
        alone = not after or (i == 0 and after.split()[0] in ("it", "they", "that", "there", "he", "she", "you", "we"))
        if word.text == wanted and alone and not word.asked and not _NEGATED_BEFORE.search(before):
            return True, f"says {wanted}"
    return False, "no accepted answer"


def _substance(words: Sequence[_Word], accepted: Sequence[str]) -> tuple[bool, str]:
    """Whether an accepted answer is asserted, and the reason."""
    candidates = {_accepted_words(answer) for answer in accepted} - {()}
    if not candidates:
        raise UserError(f"The judge needs at least one accepted answer with a letter or digit in it, not {accepted!r}.")
    for polar in ("yes", "no"):
        if (polar,) in candidates:
            return _polar(words, polar)

    # Each occurrence: asserted, or merely there?
    spans = sorted({span for wanted in candidates for span in _occurrences(words, wanted)})
    own = {i for start, stop in spans for i in range(start, stop)}
    is_number = all(_NUMBER.fullmatch(word) for wanted in candidates for word in wanted)
    said, reason = "", "no accepted answer"
    for start, stop in spans:
        before, after = _around(words, start, stop)
        beside = {start - 1, stop} & set(range(len(words))) - own
        others = any(_NUMBER.fullmatch(words[i].text) and words[i].sentence == words[start].sentence for i in beside)
        if _NEGATED_BEFORE.search(before) or _NEGATED_AFTER.search(after):
            return False, "negated"
        if stop == start + 1 and words[start].text in ("a", "i") and after:
            continue  # the word, not the letter
        if words[start].asked:
            reason = "asked, not said"
        elif start >= READ_WORDS:
            reason = "too late"
        elif _MENTIONED.search(before):
            reason = "only mentioned"
        elif _ALTERNATIVE.search(before) or _OTHER_FOLLOWS.search(after) or (is_number and others):
            reason = "one of several candidates"
        else:
            said = said or " ".join(word.text for word in words[start:stop])
    if not said:
        return False, reason

    # The rest of the answer: other candidates in a list, or a claim of another number.
    clauses: dict[int, list[int]] = {}
    for i, word in enumerate(words):
        if word.text not in _NOT_RIVALS or i in own:
            clauses.setdefault(word.clause, []).append(i)
    bare = [clause for clause in clauses.values() if len(clause) <= 2]
    if any(own & set(clause) for clause in bare) and sum(not own & set(clause) for clause in bare) >= 2:
        return False, "one of several candidates"
    for i in (i for i, word in enumerate(words) if is_number and i not in own and _NUMBER.fullmatch(word.text)):
        before, after = _around(words, i, i + 1)
        if before.split(" ")[-1] in _CLAIMS and not after:
            return False, "another answer is claimed"
    return True, f"says {said}"


def _repeats(words: Sequence[str]) -> bool:
    triples = [tuple(words[i : i + 3]) for i in range(len(words) - 2)]
    return (
        any(len(set(t)) == 1 for t in triples)
        or len(set(triples)) < len(triples)
        or (len(words) >= 12 and 2 * len(set(words)) < len(words))
    )


def judge(answer: str, accepted: Sequence[str]) -> Judgement:
    """Score any string, however odd, against the accepted answers; see the module for the rule."""
    read = _read(answer)
    texts = [word.text for word in read if word.text != "="]
    words = len(texts)
    if not words:
        return Judgement(0.0, False, False, 0, ("empty",))
    correct, why = _substance(read, accepted)
    reasons = [why]
    said = " ".join(texts)
    for label, pattern in (("hedge", _HEDGE), ("chatter", _CHATTER)):
        if found := pattern.search(said):
            reasons.append(f"{label}: {found[0]}")
    if _repeats(texts):
        reasons.append("repetition")
    directness = min(max((LONG_WORDS - words) / (LONG_WORDS - DIRECT_WORDS), 0.0), 1.0) if len(reasons) == 1 else 0.0
    if words > DIRECT_WORDS:
        reasons.append(f"long: {words} words")
    score = CORRECT_SHARE + (1 - CORRECT_SHARE) * directness if correct else 0.0
    return Judgement(round(score, 4), correct, directness == 1.0, words, tuple(reasons))


class RuleJudge(Judge):
    """The rules, with the accepted answers of each prompt's column `answer`."""

    kind: ClassVar[str] = "rules"

    def description(self) -> dict[str, Any]:
        """The rules have no settings."""
        return {"version": 1}

    def require(self, items: Sequence[Item]) -> None:
        """Refuse prompts without accepted answers."""
        for item in items:
            if not accepted_answers(item.meta):
                raise UserError(
                    f"evaluation.judge=rules needs a column `answer` with the accepted answers, and {item.source} "
                    f"has none; add it or set evaluation.judge=none."
                )

    def score(self, items: Sequence[Item]) -> list[Judgement]:
        """The rule's score of each answer."""
        return [judge(item.answers[0], accepted_answers(item.meta)) for item in items]


def accepted_answers(meta: Mapping[str, Any]) -> list[str]:
    """The accepted answers in a row's column `answer`: one, or a list. Nulls and empty texts are none."""
    value = meta.get("answer")
    found = value if isinstance(value, list) else [value]
    return [str(one) for one in found if one is not None and str(one).strip()]
