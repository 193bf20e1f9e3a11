"""Held-out prompts with what every member answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from alignment.comparison.measures import baseline
from alignment.comparison.members import Member
from alignment.comparison.ranking import Comparison
from alignment.run_folder import MODELS, NONE, SAMPLES, get, shown


@dataclass(frozen=True, slots=True)
class Answer:
    """What one model said to a prompt, and what the judge thought of it."""

    model: str
    text: str
    verdict: str


@dataclass(frozen=True, slots=True)
class Question:
    """A held-out prompt with the answers of all members."""

    prompt: str
    answers: list[Answer]


def questions(found: Comparison) -> list[Question]:
    """Prompts that most members answered, spread over all of them, with the answers side by side."""
    answered = [member for member in found.members if member.run.samples]
    by_prompt: dict[str, dict[str, dict[str, Any]]] = {}
    for member in answered:
        for sample in member.run.samples:
            by_prompt.setdefault(str(sample.get("prompt")), {}).setdefault(member.name, sample)
    most = max((len(samples) for samples in by_prompt.values()), default=0)
    prompts = [prompt for prompt, samples in by_prompt.items() if len(samples) == most]
    count = min(SAMPLES, len(prompts))
    picked = [prompts[i * len(prompts) // count] for i in range(count)]
    labels = {member.name: v.label for v in found.variants for member in v.members}
    return [Question(prompt, _answers(answered, by_prompt[prompt], labels)) for prompt in picked]


def _answers(members: Sequence[Member], samples: dict[str, dict[str, Any]], labels: dict[str, str]) -> list[Answer]:
    said: list[Answer] = []
    for member in members:
        if (sample := samples.get(member.name)) is None:
            continue
        before = baseline(member)
        if sample.get(before) is not None:  # members of one start all say the same
            first = Answer(MODELS[before], str(sample[before]), _verdict(get(sample, "verdicts", before)))
            if first not in said:
                said.append(first)
        name = f"{labels.get(member.name, member.loss or member.name)}, seed {shown(member.seed)}"
        said.append(Answer(name, str(sample.get("final", NONE)), _verdict(get(sample, "verdicts", "final"))))
    return sorted(said, key=lambda answer: answer.model not in MODELS.values())


def _verdict(verdict: Any) -> str:
    if not isinstance(verdict, dict):
        return NONE
    parts = ["right" if verdict.get("correct") is True else "wrong", f"score {shown(verdict.get('score'))}"]
    reasons = verdict.get("reasons")
    return ", ".join([*parts, *(map(str, reasons) if isinstance(reasons, list) else [])])
