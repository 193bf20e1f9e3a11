"""From sampled answers and their scores to groups of token ids. Nothing here draws, judges or tokenises.

    drawn = Drawn(prompt=ids, answers=answers, texts=texts, scores=[0.2, None, 0.9], question=row.prompt)
    built = build([drawn], config, seed=1, held_out=HeldOutPrompts(prompts))
    built.groups, built.logps, built.counts.metrics()

A judge that compares gives `wins=win_matrix(K, preferences)` in place of scores; `win_shares` makes scores of them.
`config` is a `PairsConfig`: its choice says which answers make a pair, a row or a list, and what needs a judge.

What holds for every choice:
- Completions are the sampler's own ids. A text only says whether an answer is empty.
- The answers' order, the other prompts and their order change nothing; answers with equal scores are taken in an order
  that a hash of their tokens gives, whole ones first. `seed` and the prompt's ids draw the answer of `best_vs_random`.
- For a teacher (`answers`) every answer is a row as it was drawn, and only held-out prompts are dropped.
- A tie is no pair, and neither are two answers with the same ids. A cut answer is never chosen. A score that cannot be
  read ranks nowhere; a pair whose own verdict cannot be read is no pair.
- The best answer is the best of all that can be read. If it was cut or is empty, its pairs are dropped; the second best
  does not take its place.
- A list leaves out answers that are cut, empty, unreadable or there already, and needs two others, not all equal.
- Everything that is dropped is counted once, by the first reason of `alignment.onpolicy.counts.REASONS` that holds.
- Pairs and lists of a judged choice carry their scores. Rows carry labels. `gold_vs_sample` and `sample_vs_weak` have
  neither.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from alignment.config.data import ListPairs
from alignment.config.onpolicy import DropCut, PairChoice, PairsConfig
from alignment.data.rows.row import Text
from alignment.data.tokens.units import index_pairs
from alignment.errors import UserError
from alignment.evaluation.judges.base import Preference
from alignment.evaluation.sampling.answer import Answer, Finish
from alignment.onpolicy.counts import REASONS, Counts, sides
from alignment.onpolicy.held_out import HeldOutPrompts
from alignment.types import Group


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Drawn:
    """A prompt with K answers of one policy and what a judge says of them.

    Attributes:
        prompt: (P,) int32 token ids.
        answers: K >= 1 answers as the sampler gave them.
        texts: their K texts, without stop tokens.
        scores: K scores, None where the judge's verdict cannot be read; None without a judge, or with `wins`.
        wins: (K, K) float64 from `win_matrix`: how far the row's answer wins over the column's; NaN: unreadable.
        gold: (G,) int32, the data's own answer with its end of turn, for `gold_vs_sample`.
        weak: as many answers of a weaker model to the same prompt, for `sample_vs_weak`.
        question: text or messages of the prompt, which must not be among the held-out prompts.
        source, dataset: of the groups; `source` names the prompt in messages.

    Raises:
        ValueError: another number of texts, scores or wins than answers; scores and wins; wins that do not add up; weak
            answers to another prompt.
    """

    prompt: np.ndarray
    answers: Sequence[Answer]
    texts: Sequence[str]
    scores: Sequence[float | None] | None = None
    wins: np.ndarray | None = None
    gold: np.ndarray | None = None
    weak: Drawn | None = None
    question: Text = ""
    source: str = ""
    dataset: str = ""

    def __post_init__(self) -> None:
        for name, values in (("texts", self.texts), ("scores", self.scores), ("rows of wins", self.wins)):
            if values is not None and len(values) != len(self.answers):
                raise ValueError(f"{len(self.answers)} answers cannot have {len(values)} {name}.")
        if self.scores is not None and self.wins is not None:
            raise ValueError("Answers have scores or wins, not both: wins are made scores here.")
        if self.weak is not None and not np.array_equal(self.weak.prompt, self.prompt):
            raise ValueError("The weak answers must be to the same prompt.")


@dataclass(frozen=True, slots=True, eq=False)
class Built:
    """Preference data of sampled answers.

    Attributes:
        groups: pairs, lists or labelled rows, as `PairsConfig.unit` says, prompt by prompt in the order given.
        logps: (tokens,) fp32 for each completion in `groups` that the policy has drawn, by `Group.key`: its log-probs
            under the policy that drew it. Answers of the data and of a weaker model have none.
        counts: what was kept and dropped.
    """

    groups: list[Group] = field(default_factory=list)
    logps: dict[bytes, np.ndarray] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts)


def build(
    drawn: Iterable[Drawn], config: PairsConfig, *, seed: int = 0, held_out: HeldOutPrompts | None = None
) -> Built:
    """The preference data of many prompts, which are looked at one by one.

    Args:
        drawn: prompts with their answers; a prompt that comes twice makes its data twice.
        config: choice and filters.
        seed: of `best_vs_random`, at least 0.
        held_out: prompts that must not be trained on; None checks nothing.

    Raises:
        UserError: too few answers for the choice, or a prompt without the gold or weak answers that it needs.
        ValueError: a judged choice without scores.
    """
    groups: list[Group] = []
    logps: dict[bytes, np.ndarray] = {}
    counts = Counts()
    for one in drawn:
        config.check_answers(len(one.answers))
        if held_out is not None and held_out.has(one.question):
            number = _number(config.choice, len(one.answers))
            counts += Counts(prompts=1, drawn=number, contaminated=number)
            continue
        answers = _answers(one)
        made, dropped = _MAKERS.get(config.choice, _judged_pairs)(one, answers, config, seed)
        own = {answer.key: answer.logps for answer in answers if answer.logps is not None}
        logps |= {key: own[key] for group in made for key in group.keys() if key in own}  # noqa: SIM118
        groups += made
        counts += _counts(answers, made, dropped)
    return Built(groups, logps, counts)


# Verdicts on two answers as scores


def win_matrix(answers: int, preferences: Sequence[Preference]) -> np.ndarray:
    """(K, K) float64: 1 where the row's answer wins in both orders, 0 where the column's does, else 0.5.

    NaN where one of the two verdicts cannot be read, and on the diagonal.

    Args:
        preferences: of the answers (0, 1), (0, 2), ..., (1, 2), ...: all K (K - 1) / 2 pairs.
    """
    wins = np.full((answers, answers), np.nan)
    for (i, j), preference in zip(combinations(range(answers), 2), preferences, strict=True):
        if not preference.unreadable:
            wins[i, j] = (1 + preference.outcome) / 2
            wins[j, i] = 1 - wins[i, j]
    return wins


def win_shares(wins: np.ndarray) -> list[float | None]:
    """The K scores that verdicts make: the mean share of the win over the K - 1 other answers.

    A verdict that cannot be read counts one half, as in `Preference.share`; an answer without a readable one has no
    score.

    Raises:
        ValueError: not K x K, shares outside [0, 1], or two of a pair that do not add up to 1.
    """
    size = len(wins)
    if wins.shape != (size, size):
        raise ValueError(f"Wins must be K x K, not {wins.shape}.")
    found: list[float | None] = []
    for i in range(size):
        won, lost = np.delete(wins[i], i), np.delete(wins[:, i], i)
        unreadable = np.isnan(won)
        if not np.all(np.where(unreadable, np.isnan(lost), (won >= 0) & (won <= 1) & (abs(won + lost - 1) < 1e-6))):
            raise ValueError("Shares of a win must be in [0, 1], and the two of a pair must add up to 1.")
        share = math.fsum(np.where(unreadable, 0.5, won)) / max(1, len(won))
        found.append(None if unreadable.all() else share)
    return found


# One prompt


@dataclass(frozen=True, slots=True, eq=False)
class _One:
    """A completion: `key` is its `Group.key`; one that no judge has scored, or not readably, has no score."""

    tokens: np.ndarray
    key: bytes
    empty: bool = False
    cut: bool = False
    score: float | None = None
    logps: np.ndarray | None = None


def _answers(drawn: Drawn) -> list[_One]:
    """The answers, in an order that only their content gives."""
    scores = drawn.scores if drawn.wins is None else win_shares(drawn.wins)
    found = []
    for k, (answer, text) in enumerate(zip(drawn.answers, drawn.texts, strict=True)):
        score = None if scores is None else scores[k]
        found.append(
            _One(
                answer.tokens,
                _key(drawn.prompt, answer.tokens),
                empty=not text.strip(),
                cut=answer.finish is Finish.length,
                score=None if score is None or not math.isfinite(score) else float(score),
                logps=answer.logps,
            )
        )
    return sorted(found, key=lambda one: (one.key, one.score is None, one.score or 0.0))


def _key(prompt: np.ndarray, tokens: np.ndarray) -> bytes:
    return Group(prompt, (tokens,)).key(0)


def _number(choice: PairChoice, answers: int) -> int:
    """How many pairs, rows or lists a choice makes of so many answers, if nothing is dropped."""
    if choice in (PairChoice.kto, PairChoice.gold_vs_sample, PairChoice.sample_vs_weak, PairChoice.answers):
        return answers
    if choice in (PairChoice.best_vs_rest, PairChoice.all_pairs):
        return len(index_pairs(answers, ListPairs[choice.name]))
    return 1


def _ranked(answers: Sequence[_One]) -> list[_One]:
    """Those with a score, best first; of equal ones first those that are whole."""
    scored = [one for one in answers if one.score is not None]
    return sorted(scored, key=lambda one: (-_score(one), one.cut or one.empty))


def _score(one: _One) -> float:
    assert one.score is not None
    return one.score


def _places(ranked: Sequence[_One], prompt: np.ndarray, config: PairsConfig, seed: int) -> list[tuple[int, int]]:
    """The places of the better and the worse answer of each pair, in a ranked list."""
    if len(ranked) < config.least_answers:
        return []
    scores = np.array([_score(one) for one in ranked])
    if config.choice is PairChoice.best_vs_worst:
        return [(0, 1 + int(scores[1:].argmin()))]  # the first of the equally bad, for a whole one
    if config.choice is PairChoice.best_vs_random:
        digest = hashlib.blake2b(prompt.astype("<i4").tobytes(), digest_size=8).digest()
        random = np.random.default_rng([seed, int.from_bytes(digest, "little")])
        return [(0, 1 + int(random.integers(len(ranked) - 1)))]
    if config.choice is PairChoice.mu_minus_2sigma:
        away = np.abs(scores - (scores.mean() - 2 * scores.std()))
        return [(0, 1 + int(away[1:].argmin()))]
    return index_pairs(len(ranked), ListPairs[config.choice.name])


def _judged_pairs(
    drawn: Drawn, answers: Sequence[_One], config: PairsConfig, seed: int
) -> tuple[list[Group], Counter[str]]:
    _need_scores(drawn, config)
    unreadable: set[tuple[bytes, bytes]] = set()
    if drawn.wins is not None:
        keys = [_key(drawn.prompt, answer.tokens) for answer in drawn.answers]
        unreadable = {(keys[i], keys[j]) for i, j in np.argwhere(np.isnan(drawn.wins)) if i != j}
    ranked = _ranked(answers)
    places = _places(ranked, drawn.prompt, config, seed)
    dropped = Counter({"unreadable": _number(config.choice, len(answers)) - len(places)})
    pairs = []
    for i, j in places:
        if (ranked[i].key, ranked[j].key) in unreadable:
            dropped["unreadable"] += 1
        else:
            pairs.append((ranked[i], ranked[j]))
    return _kept(drawn, pairs, config, dropped)


def _gold_pairs(
    drawn: Drawn, answers: Sequence[_One], config: PairsConfig, seed: int
) -> tuple[list[Group], Counter[str]]:
    if drawn.gold is None:
        raise UserError(
            f"onpolicy.pairs.choice=gold_vs_sample needs an answer of the data to each prompt, and "
            f"{drawn.source or 'one'} has none: leave it out, or set another choice."
        )
    gold = _One(drawn.gold, _key(drawn.prompt, drawn.gold))
    return _kept(drawn, [(gold, one) for one in answers], config, Counter())


def _weak_pairs(
    drawn: Drawn, answers: Sequence[_One], config: PairsConfig, seed: int
) -> tuple[list[Group], Counter[str]]:
    found = 0 if drawn.weak is None else len(drawn.weak.answers)
    if drawn.weak is None or found != len(answers):
        raise UserError(
            f"onpolicy.pairs.choice=sample_vs_weak needs as many answers of the weaker model as of the policy, and "
            f"{drawn.source or 'a prompt'} has {found} and {len(answers)}: draw the same number of both."
        )
    return _kept(drawn, list(zip(answers, _answers(drawn.weak), strict=True)), config, Counter())


def _rows(drawn: Drawn, answers: Sequence[_One], config: PairsConfig, seed: int) -> tuple[list[Group], Counter[str]]:
    _need_scores(drawn, config)
    assert config.threshold is not None
    made: dict[bytes, Group] = {}
    dropped: Counter[str] = Counter()
    for one in answers:
        reason = "unreadable"
        if one.score is not None:
            label = one.score > config.threshold
            cut = one.cut and (label or config.drop_cut is DropCut.both)
            reason = _too_close(abs(one.score - config.threshold), config)
            reason = reason or _first(empty=one.empty, cut=cut, repeated=one.key in made)
        if reason:
            dropped[reason] += 1
        else:
            made[one.key] = _group(drawn, [one], labels=(label,))
    return list(made.values()), dropped


def _as_drawn(
    drawn: Drawn, answers: Sequence[_One], config: PairsConfig, seed: int
) -> tuple[list[Group], Counter[str]]:
    """Each answer, one that was drawn twice twice: otherwise likely ones would count for less than they are likely."""
    return [_group(drawn, [one], labels=(True,)) for one in answers], Counter()


def _list(drawn: Drawn, answers: Sequence[_One], config: PairsConfig, seed: int) -> tuple[list[Group], Counter[str]]:
    _need_scores(drawn, config)
    first = {one.key: one for one in reversed(_ranked(answers))}  # the best of those with the same tokens
    whole = _ranked([one for one in first.values() if not one.empty and not one.cut])
    if len(whole) < 2:
        reason = _first(
            unreadable=any(one.score is None for one in answers),
            identical=len(first) < 2,
            empty=any(one.empty for one in answers),
            cut=True,
        )
    else:
        lengths = [len(one.tokens) for one in whole]
        gap = config.max_length_gap
        reason = _too_close(_score(whole[0]) - _score(whole[-1]), config)
        reason = reason or _first(length=gap is not None and max(lengths) - min(lengths) > gap)
    if reason:
        return [], Counter({reason: 1})
    return [_group(drawn, whole, scores=tuple(_score(one) for one in whole))], Counter()


_MAKERS = {
    PairChoice.gold_vs_sample: _gold_pairs,
    PairChoice.sample_vs_weak: _weak_pairs,
    PairChoice.kto: _rows,
    PairChoice.list: _list,
    PairChoice.answers: _as_drawn,
}


# Filters


def _need_scores(drawn: Drawn, config: PairsConfig) -> None:
    if drawn.scores is None and drawn.wins is None:
        raise ValueError(f"The choice {config.choice.name} needs a judge's scores or wins.")


def _first(**reasons: bool) -> str:
    """The first reason that holds, in the order of `REASONS`; empty if none does."""
    return next((reason for reason in REASONS if reasons.get(reason)), "")


def _too_close(margin: float, config: PairsConfig) -> str:
    return _first(tie=margin <= 0, margin=margin < config.min_margin)


def _why_not(chosen: _One, rejected: _One, config: PairsConfig) -> str:
    """Why two answers make no pair; empty if they do."""
    if chosen.key == rejected.key:
        return "identical"
    close = _too_close(_score(chosen) - _score(rejected), config) if config.is_judged else ""
    gap = abs(len(chosen.tokens) - len(rejected.tokens))
    return close or _first(
        empty=chosen.empty or rejected.empty,
        cut=chosen.cut or (rejected.cut and config.drop_cut is DropCut.both),
        length=config.max_length_gap is not None and gap > config.max_length_gap,
    )


def _kept(
    drawn: Drawn, pairs: Sequence[tuple[_One, _One]], config: PairsConfig, dropped: Counter[str]
) -> tuple[list[Group], Counter[str]]:
    """The groups of the pairs that no filter drops, with what was dropped before and now."""
    made: dict[tuple[bytes, bytes], Group] = {}
    for chosen, rejected in pairs:
        place = chosen.key, rejected.key
        if reason := _why_not(chosen, rejected, config) or _first(repeated=place in made):
            dropped[reason] += 1
        else:
            scores = (_score(chosen), _score(rejected)) if config.is_judged else None
            made[place] = _group(drawn, [chosen, rejected], scores=scores)
    return list(made.values()), dropped


def _group(
    drawn: Drawn,
    completions: Sequence[_One],
    scores: tuple[float, ...] | None = None,
    labels: tuple[bool, ...] | None = None,
) -> Group:
    return Group(
        drawn.prompt,
        tuple(one.tokens for one in completions),
        labels=labels,
        scores=scores,
        source=drawn.source,
        dataset=drawn.dataset,
    )


def _counts(answers: Sequence[_One], made: Sequence[Group], dropped: Counter[str]) -> Counts:
    scores = [_score(one) for one in _ranked(answers)]
    return Counts(
        drawn=len(made) + dropped.total(),
        kept=len(made),
        **dropped,
        prompts=1,
        informative=int(bool(made)),
        answers=len(answers),
        distinct=len({one.key for one in answers}),
        cut_answers=sum(one.cut for one in answers),
        tokens=sum(len(one.tokens) for one in answers),
        scored=len(scores),
        score_sum=math.fsum(scores),
        judged=int(bool(scores)),
        best_sum=scores[0] if scores else 0.0,
        **sides(made),
    )
