"""The least arithmetic that a preference step can do, to which its time is compared."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What of a model's size decides its arithmetic.

    Attributes:
        linear: weights of the linear layers in the decoder.
        adapter: weights that train.
        layers: decoder layers.
        attention: query heads times their size.
        hidden: width of the head's input.
        vocabulary: width of its output.
    """

    linear: int
    adapter: int
    layers: int
    attention: int
    hidden: int
    vocabulary: int

    def floor(self, prompt: int, chosen: int, rejected: int) -> int:
        """Floating-point operations of one pair: F = (4 N_l + 6 N_r) T + 3 A + 4 H V (C + R), with T = P + C + R.

        The prompt is run once, the reference is known, nothing is recomputed, and only answers reach the head, once.
        A frozen weight costs a product in each direction, one that trains a third for its own gradient. Causal
        attention scores half of a square per segment: A = 2 L d (P^2 + 2 P (C + R) + C^2 + R^2).
        """
        answers = chosen + rejected
        scored = prompt**2 + 2 * prompt * answers + chosen**2 + rejected**2
        return (
            (4 * self.linear + 6 * self.adapter) * (prompt + answers)
            + 3 * 2 * self.layers * self.attention * scored
            + 4 * self.hidden * self.vocabulary * answers
        )
