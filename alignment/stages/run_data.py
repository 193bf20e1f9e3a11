"""The data of a run: read once for all its stages, with the rows that were left out in its folder."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from alignment.config.schema import RunConfig
from alignment.data.preparation.prepare import (
    PreferenceData,
    SFTData,
    fit_preferences,
    load_conversations,
    read_preferences,
    sample_sequences,
)
from alignment.data.rows.reasons import UnusableRows
from alignment.data.rows.row import BadRow, write_rejected
from alignment.errors import UserError
from alignment.stages.stage import Workspace

log = logging.getLogger(__name__)

_PROMPTS = 4


class RunData:
    """The data of each stage of a run.

    Args:
        config: with the texts of its templates.
        day: the date that a chat template writes.

    Attributes:
        conversations: of the SFT stage; None without one.
        preferences: of the preference stage, as its loss takes them; None without one.

    Raises:
        UserError: the data cannot be used, and where the bad rows are.
    """

    def __init__(self, config: RunConfig, work: Workspace, day: datetime.date) -> None:
        self._config, self._work, self._day = config, work, day
        self._bad: list[BadRow] = []
        self.conversations: SFTData | None = None if config.sft is None else self._read_conversations()
        self.preferences: PreferenceData | None = None if config.loss is None else self._read_preferences()

    @property
    def infos(self) -> dict[str, dict[str, Any]]:
        """What the summary says of the data of each stage."""
        parts = (("sft", self.conversations), ("preference", self.preferences))
        return {name: data.info for name, data in parts if data is not None}

    def prompts(self) -> list[np.ndarray]:
        """A few prompts that the merged model and the policy must continue alike."""
        if self.preferences is not None:
            return [group.prompt for group in (self.preferences.eval or self.preferences.train)[:_PROMPTS]]
        assert self.conversations is not None
        some = self.conversations.train[:_PROMPTS]
        return [np.array(e["input_ids"][: e["completion_mask"].index(1)]) for e in some]

    def sample(self) -> Sequence[np.ndarray]:
        """Sequences of the first stage, for an adapter that reads data before it trains."""
        return sample_sequences(self.conversations, self.preferences)

    def write_rejected(self) -> None:
        """Write the rows that were left out, or remove the file of a start that was refused."""
        if self._bad:
            write_rejected(self._bad, self._rejected)
            log.info("%d rows were left out; %s says which and why.", len(self._bad), self._rejected.name)
        else:
            self._rejected.unlink(missing_ok=True)

    @property
    def _rejected(self) -> Path:
        return self._work.run_dir / "rejected_rows.jsonl"

    @contextmanager
    def _keeping_bad_rows(self) -> Iterator[None]:
        """Data that are refused leave their bad rows in the folder of the run.

        Raises:
            UserError: what was wrong, and where the rows are.
        """
        try:
            yield
        except UnusableRows as error:
            write_rejected([*self._bad, *error.rows], self._rejected)
            raise UserError(f"{str(error).rstrip('.')}; all of them are in {self._rejected}.") from error

    def _read_conversations(self) -> SFTData:
        assert self._config.sft is not None
        data_config, work = self._config.sft.data, self._work
        load = partial(load_conversations, data_config, work.tokenizer, day=self._day, cache=work.cache)
        with self._keeping_bad_rows():
            data, rows = work.once(f"conversations of {self._day}", load)
        self._bad += rows
        return data

    def _read_preferences(self) -> PreferenceData:
        assert self._config.data is not None
        work, drawn = self._work, self._config.onpolicy is not None
        load = partial(read_preferences, self._config.data, work.tokenizer, day=self._day, cache=work.cache)
        with self._keeping_bad_rows():
            name = f"preferences of {self._day}{' with prompts' * drawn}"
            read = work.once(name, partial(load, with_prompts=drawn))
        data, rows = fit_preferences(read, self._config.data, self._config.loss)
        self._bad += rows
        return data
