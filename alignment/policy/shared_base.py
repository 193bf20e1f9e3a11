"""One base in memory for several policies: their adapters take turns on it, and without any it is the base."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from alignment.policy.adapter import add_adapter
from alignment.policy.residual_start import START_FILE
from alignment.policy.saved_adapter import read_adapter


class SharedBase:
    """A frozen base and the saved adapters of policies on it, of which one acts at a time, or none.

    Args:
        base: with every weight frozen; in eval mode from now on.
    """

    def __init__(self, base: nn.Module) -> None:
        self._model: Any = base.eval()
        self._names: dict[Path, str] = {}

    def takes(self, folder: Path) -> bool:
        """Whether the adapter in this folder can act here beside those that are here already.

        peft keeps adapters of one kind on a model, and one alone on weights that are no module of their own.
        """
        if folder in self._names or not self._names:
            return True
        kinds = [read_adapter(one).settings for one in (folder, *self._names)]
        alone = any(getattr(kind, "target_parameters", None) for kind in kinds)
        return not alone and len({kind.peft_type for kind in kinds}) == 1

    @contextmanager
    def acting(self, folder: Path | None) -> Iterator[nn.Module]:
        """The policy with the adapter in this folder, loaded where it is not yet; None: the base alone.

        Raises:
            UserError: the adapter cannot be read.
        """
        if folder is not None and folder not in self._names:
            name = f"policy{len(self._names)}"
            self._model = add_adapter(self._model, folder, name).eval()
            self._names[folder] = name
        if folder is not None:
            self._model.set_adapter(self._names[folder], inference_mode=True)
            yield self._model
        elif self._names:
            with self._model.disable_adapter():
                yield self._model
        else:
            yield self._model


def edits_its_base(folder: Path) -> bool:
    """Whether a saved adapter has begun with a part of its base: on 4 bits it needs a base of its own."""
    return (folder / START_FILE).exists()
