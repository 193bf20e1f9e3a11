"""Held-out prompts with the answers of every run side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from alignment.comparison.head_to_head import MAX_ENTRANTS
from alignment.comparison.measures import start_model, verdict
from alignment.comparison.members import rows_by_key
from alignment.comparison.ranking import Comparison
from alignment.runs.folder import MODEL_TITLES
from alignment.runs.text import DASH, MAX_SAMPLES, clip


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer of one model, or the same answer of several, with the judge's verdict."""

    model: str
    text: str
    verdict: str


@dataclass(frozen=True, slots=True)
class Question:
    """A held-out prompt. `answers` are those of the best variant of each loss, `others` those of all other runs."""

    prompt: str
    answers: list[Answer]
    others: list[Answer]


@dataclass(frozen=True, slots=True)
class Questions:
    """A selection of the prompts, and a note about the selection."""

    shown: list[Question]
    note: str


def questions(found: Comparison) -> Questions:
    """Prompts that most runs answered; those on which the judge's scores differ come first."""
    by_prompt: dict[str, dict[str, dict[str, Any]]] = {}
    for member in found.members:
        for prompt, sample in rows_by_key(member.run.samples, "prompt").items():
            by_prompt.setdefault(prompt, {})[member.name] = sample
    most = max((len(samples) for samples in by_prompt.values()), default=0)
    asked = {prompt: samples for prompt, samples in by_prompt.items() if len(samples) == most}
    split = [prompt for prompt, samples in asked.items() if _is_split(samples)]
    alike = [prompt for prompt in asked if prompt not in split]
    picked = _pick(split, MAX_SAMPLES)
    picked += _pick(alike, MAX_SAMPLES - len(picked))
    note = f"{len(picked)} of {len(asked)} prompts."
    if split:
        which = "they come first" if len(split) <= len(picked) else "you see some of them"
        note += (
            f" On {len(split)} of the {len(asked)} prompts the judge's scores differ between members; {which}. So do "
            "not count wins here: the tables have them for all prompts."
        )
    return Questions([_question(found, asked[prompt]) for prompt in picked], note)


def _is_split(samples: dict[str, dict[str, Any]]) -> bool:
    return len({found.score for sample in samples.values() if (found := verdict(sample, "final"))}) > 1


def _pick(prompts: Sequence[str], most: int) -> list[str]:
    """At most so many prompts, at equal distances."""
    number = min(most, len(prompts))
    return [prompts[i * len(prompts) // number] for i in range(number)]


def _question(found: Comparison, samples: dict[str, dict[str, Any]]) -> Question:
    titles = found.titles
    best = [next((m for m in variant.members if m.name in samples), None) for variant in found.best[:MAX_ENTRANTS]]
    first = [member for member in best if member is not None]
    named = {member.name for member in first}
    rest = [member for member in found.members if member.name in samples and member.name not in named]
    before: dict[Answer, None] = {}  # runs with the same start give the same answer, which is shown once
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
    return Question(clip(next(iter(samples.values())).get("prompt")), [*before, *answers], others)


def _answer(model: str, sample: dict[str, Any], name: str) -> Answer:
    found = verdict(sample, name)
    return Answer(model, clip(sample.get(name)), DASH if found is None else str(found))
