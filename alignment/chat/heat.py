"""What alignment has changed: token by token, how much likelier an answer is to a policy than to what it began with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from rich.text import Text

from alignment.chat.speaker import Speaker
from alignment.data.inspection.report import visible
from alignment.data.inspection.token_view import pieces
from alignment.pages import page_templates

FULL = 3.0
"""Nats from which on a colour is at its strongest: a token that is twenty times likelier."""
_LIKELIER, _UNLIKELIER = (31, 111, 196), (217, 119, 0)
"""Blue and orange, which people with any kind of colour vision tell apart."""
_NAMED, _SEEN = 5, 0.005
"""So many tokens are named in each direction, if their two decimals are not 0."""
_TEMPLATES = page_templates(Path(__file__).parent)


@dataclass(frozen=True, eq=False)
class Heat:
    """The tokens of an answer under two policies.

    Attributes:
        names: of the policy, and of what it began with.
        texts: what each token adds to the text; a special one is written as it is.
        policy, base: (tokens,) log-probs in nats.
    """

    names: tuple[str, str]
    texts: list[str]
    policy: np.ndarray
    base: np.ndarray

    @cached_property
    def ratios(self) -> np.ndarray:
        """(tokens,) log-ratios in nats: above 0 where the policy finds the token likelier."""
        return self.policy - self.base

    @property
    def summary(self) -> str:
        """The sum, and the mean over tokens."""
        total, mean = self.ratios.sum(), self.ratios.mean()
        return (
            f"log p({self.names[0]}) - log p({self.names[1]}): {total:+.2f} nats in {len(self.ratios)} tokens, "
            f"{mean:+.3f} for each"
        )

    @property
    def strongest(self) -> str:
        """The tokens that changed most, in both directions."""
        order = np.argsort(self.ratios, kind="stable")
        up = [i for i in order[::-1][:_NAMED] if self.ratios[i] >= _SEEN]
        down = [i for i in order[:_NAMED] if self.ratios[i] <= -_SEEN]
        parts = [
            f"{word}: {', '.join(f'{self.mark(i)} {self.ratios[i]:+.2f}' for i in some)}"
            for word, some in (("likelier", up), ("less likely", down))
            if some
        ]
        return "; ".join(parts) or "no token changed"

    def mark(self, index: int) -> str:
        """A token by its text, in which white space can be seen."""
        return visible(self.texts[index])

    def tip(self, index: int) -> str:
        """A token's numbers in words."""
        policy, base = np.exp(self.policy[index]), np.exp(self.base[index])
        return f"{self.mark(index)}  {self.ratios[index]:+.2f} nats: {base:.3g} before, {policy:.3g} now"


def measure(policy: Speaker, base: Speaker, prompt: np.ndarray, tokens: np.ndarray) -> Heat:
    """Score an answer with a policy and with what it began with.

    Args:
        prompt, tokens: int32, the prompt and the answer as they were drawn.
    """
    texts = pieces(policy.questions.tokenizer, tokens.tolist())
    return Heat((policy.name, base.name), texts, policy.logps(prompt, tokens), base.logps(prompt, tokens))


def strength(ratio: float) -> float:
    """How strong a log-ratio's colour is: from 0 to 1, at `FULL` and beyond."""
    return min(abs(ratio) / FULL, 1.0)


# In a terminal


def as_text(heat: Heat) -> Text:
    """Tokens on their colours; line breaks are kept and can be seen."""
    line = Text()
    for index, ratio in enumerate(heat.ratios):
        token = visible(heat.texts[index], space=" ")
        line.append(token, _style(float(ratio)))
        line.append("\n" * heat.texts[index].count("\n"))
    return line


def legend() -> Text:
    """The scale."""
    line = Text(f"-{FULL:g} nats ")
    for step in range(-6, 7):
        line.append("  ", _style(step * FULL / 6))
    return line.append(f" +{FULL:g} nats")


def _style(ratio: float) -> str:
    """A colour between white and the full one, with black on it: it reads on a dark and on a light terminal."""
    full = _LIKELIER if ratio > 0 else _UNLIKELIER
    by = 0.75 * strength(ratio)
    mixed = ",".join(str(round(255 + (part - 255) * by)) for part in full)
    return f"black on rgb({mixed})"


# On a page


@dataclass(frozen=True, slots=True)
class _Cell:
    text: str
    side: str
    by: int
    tip: str
    breaks: bool


def _cells(heat: Heat) -> Iterator[_Cell]:
    for index, ratio in enumerate(heat.ratios):
        side = "more" if ratio > 0 else "less"
        text = visible(heat.texts[index], space=" ")
        yield _Cell(text, side, round(60 * strength(float(ratio))), heat.tip(index), "\n" in heat.texts[index])


def as_html(title: str, heat: Heat) -> str:
    """The same for a page: every text is escaped, and a token tells its numbers where the mouse is."""
    return _TEMPLATES.get_template("heat.html.j2").render(title=title, heat=heat, cells=list(_cells(heat)), full=FULL)
