"""The evaluation that you can read: held-out prompts answered before, between and after the stages, and judged."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn

from alignment.config.schema import RunConfig
from alignment.data.conversations.trajectories import readable
from alignment.data.preparation.prepare import PreferenceData
from alignment.data.tokens.units import spread_prompts
from alignment.errors import require
from alignment.evaluation.sampling.answer import Answer, Sampling, as_text
from alignment.evaluation.sampling.draw import draw
from alignment.evaluation.sampling.local import LocalEngine
from alignment.evaluation.sampling.presets import presets_in_words
from alignment.evaluation.sampling.store import AnswerStore
from alignment.files import read_sealed, write_sealed
from alignment.runs.record import RunRecord
from alignment.stages.judging import AnswersJudge
from alignment.stages.stage import Workspace

log = logging.getLogger(__name__)


class HeldOutAnswers:
    """Answers of the policy to the same held-out prompts at several moments.

    Args:
        data: the prompts are spread over all held-out groups.
        stops: the tokens that end an answer.

    Attributes:
        rows: that are asked.
        answers: to them, by their moment: start, sft or final.
        few: the places of the rows that are asked on the way, too.
        judge: of the answers.

    Raises:
        UserError: the judge lacks something, or cannot judge a row; or no prompts are held out to ask on the way.
    """

    def __init__(self, config: RunConfig, data: PreferenceData, work: Workspace, stops: Sequence[int]) -> None:
        groups, rows = data.eval, data.eval_rows
        picked = spread_prompts(groups, config.evaluation.prompts)
        require(
            bool(picked) or config.evaluation.every is None,
            f"evaluation.every={config.evaluation.every} asks held-out prompts, but none are held out: set "
            f"data.eval_size, or evaluation.every=null.",
        )
        self.rows = [rows[i] for i in picked]
        self.few = spread_prompts([groups[i] for i in picked], config.evaluation.every_prompts)
        self.judge = AnswersJudge(config.evaluation, self.rows, work.cache, work.device)
        self._prompts = [groups[i].prompt for i in picked]
        self._config = config.evaluation
        self._seed = config.seed
        self._work = work
        self._stops = list(stops)
        self.answers: dict[str, list[str]] = {}

    def collect(self, name: str, model: nn.Module) -> None:
        """Answer all prompts with the model as it is now; `name` is the moment: start, sft or final."""
        if not self._prompts:
            return
        path = self._work.run_dir / "stages" / f"answers_{name}.json"
        if path.exists():
            self.answers[name] = read_sealed(path)
            return
        if not self.answers and (sentence := presets_in_words(model, self._config.temperature)) is not None:
            log.info("%s", sentence)
        self.answers[name] = self.texts(self.drawn(name, model, range(len(self._prompts))))
        write_sealed(path, self.answers[name])

    def texts(self, answers: Sequence[Answer]) -> list[str]:
        """As people and judges read them."""
        return [as_text(self._work.tokenizer, answer.tokens.tolist(), self._stops) for answer in answers]

    def drawn(self, name: str, model: Any, places: Sequence[int]) -> list[Answer]:
        """The model's answers to some of the prompts; from the store if this policy has answered these before.

        The random numbers of an answer are the same at every moment.

        Args:
            name: of the moment, for the log.
        """
        how = Sampling(
            stops=tuple(self._stops),
            max_new_tokens=self._config.max_new_tokens,
            temperature=self._config.temperature,
            seed=self._seed,
            presets=True,
        )
        engine = LocalEngine(model, self._work.device, self._config.batch_size, self._work.team)
        log.info("Answering %d held-out prompts (%s) ...", len(places), name)
        with AnswerStore(self._work.cache, engine) as store:
            answers = [answer for (answer,) in draw(store, [self._prompts[i] for i in places], 1, how)]
            log.info(
                "%d answers of %d tokens were drawn, %d were there before.", store.drawn, store.tokens, store.found
            )
        return answers

    @property
    def samples(self) -> list[dict[str, str]]:
        """Each prompt with its answers so far."""
        return [
            {"prompt": readable(row.prompt)} | {name: texts[i] for name, texts in self.answers.items()}
            for i, row in enumerate(self.rows)
        ]

    def judged(self, record: RunRecord) -> dict[str, Any]:
        """Write the samples; lengths of the answers and, with a judge, scores and win rates of the last policy."""
        return self.judge(self.answers, record) if self._prompts else {}
