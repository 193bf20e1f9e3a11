"""A reference that is another model: the teacher of the policy."""

from __future__ import annotations

from typing import Any, ClassVar

from alignment.reference.cached import CachedReference, Scorer


class Teacher(CachedReference):
    """Log-probs of a frozen teacher, from the store; those of new answers are computed once and added.

    They are found by the teacher's identity and the tokens. So a resumed run, and a second run on the same answers,
    asks the teacher for none again.
    """

    telling: ClassVar[bool] = False
    _scorer: Scorer = "teacher"

    def is_policy(self, step: int) -> bool:
        """Never."""
        return False

    def _why_not_finite(self) -> str:
        return (
            "The teacher gives log-probs that are not finite: its weights are damaged or overflow in this dtype "
            "(distill.teacher, distill.dtype)."
        )

    def summary(self) -> dict[str, Any]:
        """As of any cached reference."""
        return super().summary() | {"mode": "teacher", "model": self._description["model"]}
