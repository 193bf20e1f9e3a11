"""Prompts that the held-out set has too, by the words that they share.

A held-out prompt is in another prompt if at least half of its words stand in runs of eight that both have, the numbers
of OLMo 3 (arXiv 2512.13961). Words are those of `alignment.data.sources.decontamination`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from alignment.data.rows.row import Text
from alignment.data.sources.decontamination import contents_of, words_of

RUN = 8
"""Words in a row that two prompts share. A held-out prompt with fewer is in a prompt that has just the same words."""

TOO_MUCH = 0.5
"""Share of a held-out prompt's words from which on a prompt may not be trained on."""


class HeldOutPrompts:
    """The words of the held-out prompts.

    Args:
        prompts: texts or messages; system texts, which many prompts share, are not looked at.
    """

    def __init__(self, prompts: Iterable[Text]) -> None:
        self._sizes: list[int] = []
        self._whole: set[tuple[str, ...]] = set()
        self._runs: dict[tuple[str, ...], list[tuple[int, int]]] = defaultdict(list)  # the prompts and places of each
        for number, prompt in enumerate(prompts):
            words = _words(prompt)
            self._sizes.append(len(words))
            self._whole.add(tuple(words))
            for place, run in enumerate(_runs(words)):
                self._runs[run].append((number, place))

    def overlap(self, prompt: Text) -> float:
        """The largest share of a held-out prompt's words that this prompt has in common runs, in [0, 1]."""
        words = _words(prompt)
        if tuple(words) in self._whole:
            return 1.0
        shared: dict[int, set[int]] = defaultdict(set)
        for run in set(_runs(words)):
            for number, place in self._runs.get(run, ()):
                shared[number].update(range(place, place + RUN))
        return max((len(places) / self._sizes[number] for number, places in shared.items()), default=0.0)

    def has(self, prompt: Text) -> bool:
        """Whether this prompt may not be trained on."""
        return self.overlap(prompt) >= TOO_MUCH


def _words(prompt: Text) -> list[str]:
    """The words of all texts of a prompt, or its signs where it has no word."""
    texts = list(contents_of(prompt))
    return [word for text in texts for word in words_of(text)] or [text.strip() for text in texts]


def _runs(words: list[str]) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + RUN]) for start in range(len(words) - RUN + 1)]
