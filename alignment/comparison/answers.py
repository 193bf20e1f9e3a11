"""Held-out prompts with what every member answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from alignment.comparison.head_to_head import MAX_ENTRANTS
from alignment.comparison.measures import start_model, verdict
from alignment.comparison.members import rows_by_key
from alignment.comparison.ranking import Comparison
from alignment.evaluation.judge import Verdict
from alignment.runs.folder import MODEL_TITLES
from alignment.runs.text import DASH, MAX_SAMPLES, clip, format_value


@dataclass(frozen=True, slots=True)
class Answer:
    """What one model said to a prompt, or several said alike, and what the judge thought of it."""

    model: str
    text: str
    verdict: str


@dataclass(frozen=True, slots=True)
class Question:
    """A held-out prompt with the answers of the best of each loss, and below them those of all other members."""

    prompt: str
    answers: list[Answer]
    others: list[Answer]


@dataclass(frozen=True, slots=True)
class Questions:
    """Some of the prompts, and which."""

    shown: list[Question]
    note: str


def questions(found: Comparison) -> Questions:
    """Prompts that most members answered, first those on which the judge does not think the same of all."""
    by_prompt: dict[str, dict[str, dict[str, Any]]] = {}
    for member in found.members:
        for prompt, sample in rows_by_key(member.run.samples, "prompt").items():
            by_prompt.setdefault(prompt, {})[member.name] = sample
    most = max((len(samples) for samples in by_prompt.values()), default=0)
    asked = {prompt: samples for prompt, samples in by_prompt.items() if len(samples) == most}
    split = [prompt for prompt, samples in asked.items() if _is_split(samples)]
    alike = [prompt for prompt in asked if prompt not in split]
    picked = _spread(split, MAX_SAMPLES)
    picked += _spread(alike, MAX_SAMPLES - len(picked))
    note = f"{len(picked)} of {len(asked)} prompts."
    if split:
        which = "these come first" if len(split) <= len(picked) else "these are some of them"
        note += (
            f" On {len(split)} of the {len(asked)} the judge does not give all members the same score; {which}. So how "
            "often who is better is in the tables and not here."
        )
    return Questions([_question(found, asked[prompt]) for prompt in picked], note)


def _is_split(samples: dict[str, dict[str, Any]]) -> bool:
    return len({found.score for sample in samples.values() if (found := verdict(sample, "final"))}) > 1


def _spread(prompts: Sequence[str], most: int) -> list[str]:
    count = min(most, len(prompts))
    return [prompts[i * len(prompts) // count] for i in range(count)]


def _question(found: Comparison, samples: dict[str, dict[str, Any]]) -> Question:
    titles = found.titles
    best = [next((m for m in variant.members if m.name in samples), None) for variant in found.best[:MAX_ENTRANTS]]
    first = [member for member in best if member is not None]
    named = {member.name for member in first}
    rest = [member for member in found.members if member.name in samples and member.name not in named]
    before: dict[Answer, None] = {}  # members of one start all say the same
    for member in (*first, *rest):
        sample, name = samples[member.name], start_model(member)
        if sample.get(name) is not None:
            before[_answer(MODEL_TITLES[name], sample, name)] = None
    answers = [_answer(titles[member.name], samples[member.name], "final") for member in first]
    alike: dict[tuple[str, str], list[str]] = {}
    for member in rest:
        answer = _answer(titles[member.name], samples[member.name], "final")
        alike.setdefault((answer.text, answer.verdict), []).append(answer.model)
    others = [Answer("\n".join(models), *said) for said, models in alike.items()]
    return Question(_prompt(samples), [*before, *answers], others)


def _prompt(samples: dict[str, dict[str, Any]]) -> str:
    return clip(next(iter(samples.values())).get("prompt"))


def _answer(model: str, sample: dict[str, Any], name: str) -> Answer:
    return Answer(model, clip(sample.get(name)), _said(verdict(sample, name)))


def _said(found: Verdict | None) -> str:
    if found is None:
        return DASH
    return ", ".join(["right" if found.correct else "wrong", f"score {format_value(found.score)}", *found.reasons])
