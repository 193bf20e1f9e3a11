"""A judge of short answers by rules alone: is the answer right, and does it come straight to the point?

The rule, in one line: a wrong answer scores 0; a right one scores 0.7 plus 0.3 times its directness. Style earns
nothing where the substance is missing, so a policy cannot win by being briefly wrong.

*Right* means that one of the accepted answers is asserted, word for word after normalisation (case, accents,
punctuation, articles, number words: "Twenty-one" is "21"). A mention is no assertion where it is negated ("not Paris",
"Paris is wrong"), asked ("Paris?"), compared with ("larger than 9"), one of several candidates ("Paris, Rome, Oslo",
"Paris or Rome"), or comes after the first 60 words. A negated, retracted ("12. No, wait, 13.") or rivalled ("The answer
is 13. ... 12") answer is wrong. For yes/no questions the one word must stand alone, and the other must not occur.

*Directness* is 1 up to 8 words and falls linearly to 0 at 24; it is 0 for an empty, hedged, chatty or repetitive
answer. It does not look at the accepted answers.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from alignment.errors import UserError
from alignment.evaluation.intervals import win_interval

CORRECT_SHARE = 0.7
DIRECT_WORDS = 8
LONG_WORDS = 24
READ_WORDS = 60


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the judge thinks of one answer.

    Attributes:
        score: in [0, 1], rounded to 4 decimals.
        correct: an accepted answer is asserted.
        direct: at most `DIRECT_WORDS` words, without hedge, chatter or repetition; whether right or wrong.
        words: number of words.
        reasons: what was found, for people who read samples.
    """

    score: float
    correct: bool
    direct: bool
    words: int
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class WinRate:
    """Wins of the first over the second of each pair; `rate` counts a tie as one half, [`low`, `high`] is 95%."""

    wins: int
    ties: int
    losses: int
    rate: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class _Token:
    """A normalised word, and the raw text between it and the word before it."""

    text: str
    gap: str


_UNITS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen"""
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_NUMBERS = dict(zip(_UNITS.split(), range(20), strict=True)) | dict(zip(_TENS.split(), range(20, 100, 10), strict=True))
_SCALES = {"hundred": 100, "thousand": 1000}
_CONJUNCTIONS = {"or", "and", "nor"}
_ARTICLES = {"a", "an", "the"}
# "one" after these is a pronoun.
_PRONOMINAL = {"this", "that", "the", "which", "no", "any", "each", "every", "another", "other", "first", "last"}

_WORD = re.compile(
    r"""(?P<number>(?<![\w.,)-])-?\d+(?:,\d{3})*(?:\.\d+)?%?(?![^\W_]) | \d+(?:,\d{3})*(?:\.\d+)?%?(?![^\W_]))
      | (?P<word>[^\W_]+(?:'[^\W_]+)*)""",
    re.VERBOSE,
)
_BULLET = re.compile(r"^[ \t]*[-*•][ \t]+(?=\S)", re.MULTILINE)
_ENUMERATOR = re.compile(r"^[ \t]*\d+[.)][ \t]+(?=\S)", re.MULTILINE)
_SENTENCE_END = re.compile(r"[.!?;\n]")
_CLAUSE_END = re.compile(r"[.!?;:,\n()—–|/]|\s-\s")

_NEGATORS = (
    r"not(?! only| just| merely)|never|neither|nor|cannot|except|without|unlike|false|wrong|incorrect|untrue|"
    r"unlikely|i doubt|rather than|instead of|other than|anything but|far from|opposed to|\w+n't|isnt|arent|wasnt|"
    r"dont|doesnt|cant"
)
_NEGATED_BEFORE = re.compile(rf"(?:\b(?:{_NEGATORS})\b(?: \S+){{0,7}}|\bno)$")
_NEGATED_AFTER = re.compile(
    r"^(?:(?:is|was|are|were|be|would|can|could|seems|sounds|looks|as|an|the|answer|definitely|clearly|certainly) )*"
    r"(?:not(?! (?:the )?(?:only|just|merely))|never|wrong|incorrect|false|untrue|cannot|isn't|wasn't|aren't|can't|"
    r"wouldn't|isnt|wasnt|arent)\b"
)
_ONLY_MENTIONED = re.compile(r"\b(?:than|after|before|between|near|beside|versus|vs)(?: (?:a|an|the|number|letter))*$")
_RETRACTION = re.compile(
    r"^(?:no|wait|no wait|scratch that|my mistake|correction|i mean|just kidding|not|wrong|false|incorrect)$"
    r"|^(?:no wait|scratch that|my mistake|i mean|i meant|sorry i) "
)
_CLAIM = re.compile(
    r"(?<!word )(?<!question )(?<!number )(?<!letter )\b(?:is|are|was|were|equals|called) (\S+(?: \S+)?)$"
)
_ANSWER_CLAIM = re.compile(r"\b(?:answer|result|sum|total) (?:is|equals) (.+)$")
_NO_CLAIM = re.compile(
    r"\b(?:easy|simple|clear|correct|right|true|follows|this|that|it|question|interesting|fun|good|great|below|here)$"
)
_FILLERS = {"yes", "no", "sure", "well", "so", "ok", "okay", "it is", "of course", "indeed", "enjoy", "hi", "hello"}
# A clause without any of these is a bare list of words.
_FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        """
        is are was were be been am it its of in on at to for with by from as that this these which what who has have
        had do does did can will would say says said make makes i you he she they we my your his her their and or
        but so if than then there here not no yes called means becomes come comes a an the
        """,
    )
)

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


def _tokens(text: str) -> list[_Token]:
    """Normalised words of `text`: no case, accents or possessive 's; number words as digits."""
    text = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", text).replace("’", "'").replace("−", "-"))
    text = "".join(c for c in text if not unicodedata.combining(c)).casefold()
    text = _BULLET.sub("\n", text)
    if len(_ENUMERATOR.findall(text)) > 1:  # a single "12. " may be the answer itself
        text = _ENUMERATOR.sub("\n", text)
    raw, end = [], 0
    for match in _WORD.finditer(text):
        word = match.group()
        if match["number"] is not None:
            word = word.replace(",", "")
            if "." in word:
                word = re.sub(r"\.?0+(?=%|$)", "", word)
        elif word.endswith("'s"):
            word = word[:-2]
        raw.append(_Token(word, text[end : match.start()]))
        end = match.end()
    tokens, at = [], 0
    while at < len(raw):
        value, length = _number(raw, at)
        tokens.append(_Token(str(value), raw[at].gap) if length else raw[at])
        at += max(length, 1)
    return [*tokens, _Token("", text[end:])]


def _number(tokens: Sequence[_Token], at: int) -> tuple[int, int]:
    """Value and length of the number in words that starts at `at`; length 0 where there is none."""

    def word(i: int) -> str:
        joined = i < len(tokens) and (i == at or not _CLAUSE_END.search(tokens[i].gap))
        return tokens[i].text if joined else ""

    def below_hundred(i: int) -> tuple[int, int]:
        value = _NUMBERS.get(word(i))
        if value is None:
            return 0, 0
        unit = _NUMBERS.get(word(i + 1), 0)
        return (value + unit, 2) if value >= 20 and 1 <= unit <= 9 else (value, 1)

    if word(at) == "one" and at and tokens[at - 1].text in _PRONOMINAL:
        return 0, 0
    total, length = below_hundred(at)
    if not length:
        return 0, 0
    for scale in ("thousand", "hundred") if word(at + length) == "thousand" else ("hundred",):
        if word(at + length) != scale:
            continue
        total, length = total * _SCALES[scale], length + 1
        skip = length + (word(at + length) == "and")
        rest, used = below_hundred(at + skip)
        if used and scale == "thousand" and word(at + skip + used) == "hundred":
            rest, used = rest * 100, used + 1
        if used:
            total, length = total + rest, skip + used
    return total, length


@cache
def _accepted_words(accepted: str) -> tuple[str, ...]:
    words = tuple(t.text for t in _tokens(accepted) if t.text)
    content = tuple(w for w in words if w not in _ARTICLES and (w != "and" or len(words) == 1))
    return content or words


def _is_number(word: str) -> bool:
    return bool(re.fullmatch(r"-?\d+(?:\.\d+)?%?", word))


class _Answer:
    """The answer as tokens, cut into sentences, clauses and listed segments."""

    def __init__(self, text: str) -> None:
        self.tokens = _tokens(text)
        self.words = [t.text for t in self.tokens[:-1]]

    def cut(self, at: int, boundary: re.Pattern[str]) -> bool:
        """Whether a boundary lies before token `at`; both ends of the answer are boundaries."""
        if at <= 0 or at >= len(self.words):
            return True
        minus = self.tokens[at].gap == " - " and _is_number(self.words[at - 1]) and _is_number(self.words[at])
        return not minus and bool(boundary.search(self.tokens[at].gap))

    def clause_before(self, start: int) -> str:
        first = start
        while not self.cut(first, _CLAUSE_END):
            if self.words[first - 1] in ("but", "so", "because") and self.words[first - 2 : first - 1] != ["anything"]:
                break
            first -= 1
        return " ".join(self.words[first:start])

    def clause_after(self, stop: int) -> str:
        last = stop
        while not self.cut(last, _CLAUSE_END):
            last += 1
        return " ".join(self.words[stop:last])

    def sentences(self) -> list[tuple[int, int]]:
        """(first, past-the-last) word of each sentence."""
        starts = [i for i in range(len(self.words)) if self.cut(i, _SENTENCE_END)]
        return list(zip(starts, [*starts[1:], len(self.words)], strict=True))

    def segments(self) -> list[tuple[int, int, bool]]:
        """Clauses, cut at "and", "or", "nor", "&" and "/" too; the flag tells that such a conjunction comes before."""
        found, first, joined = [], 0, False
        for i in range(len(self.words) + 1):
            conjunction = i < len(self.words) and self.words[i] in _CONJUNCTIONS
            symbol = i < len(self.words) and bool(re.search(r"[&/]", self.tokens[i].gap))
            if conjunction or self.cut(i, _CLAUSE_END) or symbol:
                if first < i:
                    found.append((first, i, joined))
                    joined = False
                joined = joined or conjunction or symbol
                first = i + 1 if conjunction else i
        return found

    def occurrences(self, words: tuple[str, ...]) -> list[tuple[int, int]]:
        """Spans at which `words` stand, articles (and "and" inside a list) aside."""
        keep = [i for i, w in enumerate(self.words) if (w not in _ARTICLES and w != "and") or w in words]
        found = []
        for k in range(len(keep) - len(words) + 1):
            span = keep[k : k + len(words)]
            whole = not any(_SENTENCE_END.search(self.tokens[i].gap) for i in span[1:])
            if whole and tuple(self.words[i] for i in span) == words:
                found.append((span[0], span[-1] + 1))
        return found


def _listed(answer: _Answer, start: int, stop: int, accepted: set[tuple[str, ...]]) -> bool:
    """Whether the words at [start, stop) are one of several candidates."""
    segments = answer.segments()
    inside = [k for k, (a, b, _) in enumerate(segments) if a < stop and b > start]
    own = [w for w in answer.words[segments[inside[0]][0] : segments[inside[-1]][1]] if w not in _ARTICLES]
    extra = set(own) - set(answer.words[start:stop])
    number = all(_is_number(w) for w in answer.words[start:stop])
    equation = any(c in answer.tokens[i].gap for i in (start, stop) for c in "=→")
    row = len(extra) >= 3 and not any(w in _FUNCTION_WORDS for w in own)
    if not equation and (row or (number and extra and all(_is_number(w) for w in own))):
        return True
    # "It is Rome or Paris": the word before the conjunction ends the list's head.
    joint = start - 1
    while joint > 0 and answer.words[joint] in _ARTICLES:
        joint -= 1
    if joint > 0 and answer.words[joint] in _CONJUNCTIONS and not answer.cut(joint, _SENTENCE_END):
        head = answer.words[joint - 1]
        if head not in _FUNCTION_WORDS and (head,) not in accepted:
            return True
    # Neighbours of one or two words could be answers too: two of them, or one behind a conjunction or among numbers.
    # Across the end of a sentence only bare sentences are compared: "London. Paris. Rome."
    rivals = 0
    for step, edge in ((-1, inside[0]), (1, inside[-1])):
        for k in range(edge + step, len(segments) if step > 0 else -1, step):
            (first, last, _), (near_first, near_last, _) = segments[k], segments[k - step]
            later, _, joined = segments[max(k, k - step)]
            words = tuple(w for w in answer.words[first:last] if w not in _ARTICLES)
            filler = " ".join(answer.words[first:last]) in _FILLERS or words in accepted
            bare = all(answer.cut(i, _SENTENCE_END) for i in (first, last, near_first, near_last))
            if filler or not 1 <= len(words) <= 2 or (answer.cut(later, _SENTENCE_END) and not joined and not bare):
                break
            rivals += 2 if joined or (number and all(_is_number(w) for w in words)) else 1
    return rivals >= 2


def _polar(answer: _Answer, wanted: str) -> tuple[bool, str]:
    """Yes/no questions: the wanted word stands alone, the other one does not occur."""
    other = "no" if wanted == "yes" else "yes"
    follow = {"it", "they", "that", "there", "he", "she", "you", "we"}

    def alone(word: str) -> bool:
        return any(
            w == word and (answer.cut(i + 1, _CLAUSE_END) or (i == 0 and answer.words[1] in follow))
            for i, w in enumerate(answer.words)
            if not answer.clause_before(i).endswith(("not", "n't", "never"))
        )

    asked = bool(answer.words) and "?" in answer.tokens[-1].gap
    if other in answer.words:
        return False, "both yes and no"
    if asked or not alone(wanted):
        return False, "no accepted answer"
    return True, f"says {wanted}"


def _substance(answer: _Answer, accepted: Sequence[str]) -> tuple[bool, str]:
    """Whether an accepted answer is asserted, and the reason."""
    candidates = {_accepted_words(a) for a in accepted} - {()}
    if not candidates:
        raise UserError(f"The judge needs at least one accepted answer with a letter or digit in it, not {accepted!r}.")
    for polar in ("yes", "no"):
        if (polar,) in candidates:
            return _polar(answer, polar)
    spans = sorted({span for words in candidates for span in answer.occurrences(words)})
    asserted: list[tuple[int, int]] = []
    reason = "no accepted answer"
    for start, stop in spans:
        before, after = answer.clause_before(start), answer.clause_after(stop)
        end = next(b for a, b in answer.sentences() if start < b)
        if _NEGATED_BEFORE.search(before) or _NEGATED_AFTER.search(after):
            return False, "negated"
        if answer.words[start:stop] in (["a"], ["i"], ["an"], ["the"]) and not answer.cut(stop, _CLAUSE_END):
            continue  # the word, not the letter
        if "?" in answer.tokens[end].gap:
            reason = "asked, not said"
        elif start >= READ_WORDS:
            reason = "too late"
        elif _ONLY_MENTIONED.search(before):
            reason = "only mentioned"
        elif _listed(answer, start, stop, candidates):
            reason = "one of several candidates"
        else:
            asserted.append((start, stop))
    if not asserted:
        return False, reason
    number = all(_is_number(w) for words in candidates for w in words)
    rest = [(a, b) for a, b, _ in answer.segments() if a >= asserted[-1][1]]
    if any(_RETRACTION.search(" ".join(answer.words[a:b])) for a, b in rest):
        return False, "retracted"
    for first, last in answer.sentences():
        said = " ".join(answer.words[first:last])
        holds = any(first < b and a < last for a, b in spans)
        earlier = last <= asserted[0][0]
        claim = (_CLAIM if earlier else _ANSWER_CLAIM).search(said)
        if claim and not holds and not _NO_CLAIM.search(claim[1]) and "?" not in answer.tokens[last].gap:
            return False, "another answer is claimed"
    for i, word in enumerate(answer.words if number else ()):
        claimed = i and (
            "=" in answer.tokens[i].gap or answer.words[i - 1] in ("is", "are", "equals", "makes", "gives")
        )
        own = any(a <= i < b for a, b in spans)
        if claimed and not own and _is_number(word) and answer.cut(i + 1, _CLAUSE_END):
            return False, "another answer is claimed"
    start, stop = asserted[0]
    return True, f"says {' '.join(answer.words[start:stop])}"


def _repeats(words: Sequence[str]) -> bool:
    triples = [tuple(words[i : i + 3]) for i in range(len(words) - 2)]
    return (
        any(len(set(t)) == 1 for t in triples)
        or len(set(triples)) < len(triples)
        or (len(words) >= 12 and 2 * len(set(words)) < len(words))
    )


def judge(answer: str, accepted: Sequence[str]) -> Verdict:
    """Score any string, however odd, against the accepted answers; see the module for the rule."""
    parsed = _Answer(answer)
    words = len(parsed.words)
    if not words:
        return Verdict(0.0, False, False, 0, ("empty",))
    correct, why = _substance(parsed, accepted)
    reasons = [why]
    said = " ".join(parsed.words)
    for label, pattern in (("hedge", _HEDGE), ("chatter", _CHATTER)):
        if found := pattern.search(said):
            reasons.append(f"{label}: {found[0]}")
    if _repeats(parsed.words):
        reasons.append("repetition")
    directness = min(max((LONG_WORDS - words) / (LONG_WORDS - DIRECT_WORDS), 0.0), 1.0) if len(reasons) == 1 else 0.0
    if words > DIRECT_WORDS:
        reasons.append(f"long: {words} words")
    score = CORRECT_SHARE + (1 - CORRECT_SHARE) * directness if correct else 0.0
    return Verdict(round(score, 4), correct, directness == 1.0, words, tuple(reasons))


def compare(a: Verdict, b: Verdict) -> int:
    """1 if `a` scores higher, -1 if `b` does, 0 for a tie; compare(a, b) == -compare(b, a)."""
    return (a.score > b.score) - (a.score < b.score)


def win_rate(pairs: Iterable[tuple[Verdict, Verdict]]) -> WinRate:
    """How often the first verdict of a pair beats the second."""
    outcomes = [compare(a, b) for a, b in pairs]
    if not outcomes:
        raise UserError("A win rate needs at least one pair of answers; evaluation.prompts must be at least 1.")
    n, wins, ties = len(outcomes), outcomes.count(1), outcomes.count(0)
    rate = (wins + ties / 2) / n
    return WinRate(wins, ties, n - wins - ties, rate, *win_interval(rate, ties / n, n))
