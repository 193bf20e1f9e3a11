"""What holds for every choice and filter: order changes nothing, counts add up, no tie and no cut answer is chosen."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from alignment.config.onpolicy import DropCut, PairChoice
from alignment.onpolicy.counts import REASONS
from alignment.onpolicy.pairs import Drawn, build
from tests.helpers.drawn import answer, ids, pairs_config

SCORES = st.sampled_from([0.0, 0.25, 0.5, 1.0, None])
TEXTS = st.sampled_from(["Z", "aZ", "bZ", "abZ", "abcZ", "a", "abcd", "bcdeZ"])


@st.composite
def settings(draw):
    # `answers` leaves nothing out: tests/stages/test_distillation.py
    choice = draw(st.sampled_from([choice for choice in PairChoice if choice is not PairChoice.answers]))
    judged = choice not in (PairChoice.gold_vs_sample, PairChoice.sample_vs_weak)
    return pairs_config(
        choice.name,
        min_margin=draw(st.sampled_from([0.0, 0.5])) if judged else 0.0,
        max_length_gap=None if choice is PairChoice.kto else draw(st.sampled_from([None, 1])),
        drop_cut=draw(st.sampled_from(DropCut)),
        threshold=0.5 if choice is PairChoice.kto else None,
    )


def prompt_of(name, texts, scores, weak, judge):
    """A prompt; `judge` gives its answers scores, wins that scores of 0 and 1 make of them, or nothing."""
    wins = None
    if judge == "wins":
        values = np.array([np.nan if score is None else score for score in scores])
        wins = 0.5 + np.sign(values[:, None] - values) / 2
    return Drawn(
        prompt=ids(name),
        answers=[answer(text) for text in texts],
        texts=[text.removesuffix("Z") for text in texts],
        scores=scores if judge == "scores" else None,
        wins=wins,
        gold=ids("abZ"),
        weak=None if weak is None else prompt_of(name, weak, None, None, ""),
    )


def said(built):
    """The groups, whatever their order."""
    return sorted(
        (
            group.prompt.tolist(),
            [tokens.tolist() for tokens in group.completions],
            group.scores or (),
            group.labels or (),
        )
        for group in built.groups
    )


@given(settings(), st.lists(st.tuples(TEXTS, SCORES, TEXTS), min_size=16, max_size=18), st.randoms(), st.booleans())
def test_order_and_company_change_nothing(config, rows, random, wins):
    judge = "wins" if wins else "scores"
    shuffled = random.sample(rows, len(rows))
    one, other = (prompt_of("p", *map(list, zip(*order, strict=True)), judge) for order in (rows, shuffled))
    beside = prompt_of("q", *map(list, zip(*rows, strict=True)), judge)
    built = build([one], config, seed=3)
    assert said(built) == said(build([other], config, seed=3))
    both = build([beside, other], config, seed=3)
    assert both.counts == build([beside], config, seed=3).counts + built.counts
    assert said(both) == sorted(said(built) + said(build([beside], config, seed=3)))


@given(settings(), st.lists(st.tuples(TEXTS, SCORES, TEXTS), min_size=16, max_size=18))
def test_what_is_kept(config, rows):
    texts, scores, weak = map(list, zip(*rows, strict=True))
    one = prompt_of("p", texts, scores, weak, "scores")
    built = build([one], config)
    counts = built.counts
    assert counts.drawn == counts.kept + sum(getattr(counts, reason) for reason in REASONS)
    assert counts.kept == len(built.groups) and counts.answers == len(texts)
    own = {found.tokens.tobytes(): found for found in (*one.answers, *one.weak.answers)}
    cut = {tokens for tokens, found in own.items() if found.finish.name == "length"}
    for group in built.groups:
        completions = [tokens.tobytes() for tokens in group.completions]
        assert all(tokens in own or tokens == one.gold.tobytes() for tokens in completions)
        assert ids("Z").tobytes() not in completions and len(set(completions)) == len(completions)
        chosen = completions[:-1] if group.labels is None else completions * group.labels[0]
        assert cut.isdisjoint(chosen)
        if config.drop_cut is DropCut.both:
            assert cut.isdisjoint(completions)
        if config.unit != "row" and config.is_judged:
            assert group.scores[0] - group.scores[-1] >= max(config.min_margin, 1e-9)
            assert list(group.scores) == sorted(group.scores, reverse=True)
        if config.unit == "pair" and config.max_length_gap is not None:
            assert abs(len(group.completions[0]) - len(group.completions[1])) <= config.max_length_gap
