"""The evaluation that you can read: held-out prompts answered before, between and after the stages, and judged."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import nn

from alignment.config.schema import Judge, RunConfig
from alignment.data.conversations.trajectories import readable
from alignment.data.preparation.prepare import PreferenceData
from alignment.data.tokens.units import spread_prompts
from alignment.errors import UserError
from alignment.evaluation.generate import as_text, presets, presets_in_words, sample
from alignment.evaluation.judge import Verdict, compare, judge, win_rate
from alignment.files import read_sealed, write_sealed
from alignment.runs.record import RunRecord
from alignment.stages.stage import Workspace
from alignment.stages.store import StageStore, answers_key

log = logging.getLogger(__name__)


class HeldOutAnswers:
    """Answers of the policy to the same held-out prompts at several moments.

    Args:
        data: the prompts are spread over all held-out groups.
        store: keeps the answers for all runs, so that no policy is asked the same prompts twice.
        stops: the tokens that end an answer.

    Raises:
        UserError: the judge is asked for and a row has no accepted answers.
    """

    def __init__(
        self, config: RunConfig, data: PreferenceData, work: Workspace, store: StageStore, stops: Sequence[int]
    ) -> None:
        groups, rows = data.eval, data.eval_rows
        picked = spread_prompts(groups, config.evaluation.prompts)
        self.rows = [rows[i] for i in picked]
        if config.evaluation.judge is Judge.rules:
            for row in self.rows:
                if "answer" not in row.meta:
                    raise UserError(
                        f"evaluation.judge=rules needs a column `answer` with the accepted answers, and {row.source} "
                        f"has none; add it or set evaluation.judge=none."
                    )
        self._prompts = [groups[i].prompt for i in picked]
        self._config = config.evaluation
        self._seed = config.seed
        self._work = work
        self._store = store
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
        tokens = self._answered(name, model)
        self.answers[name] = [as_text(self._work.tokenizer, answer, self._stops) for answer in tokens]
        write_sealed(path, self.answers[name])

    def _answered(self, name: str, model: Any) -> list[list[int]]:
        """The tokens of every answer; read from the store if this policy has answered these prompts before."""
        settings: dict[str, Any] = {
            "temperature": self._config.temperature,
            "max_new_tokens": self._config.max_new_tokens,
            "batch_size": self._config.batch_size,
        }
        drawn = {"seed": self._seed} if self._config.temperature > 0 else {}
        others = {"stops": self._stops, "presets": presets(model), **drawn}
        key = answers_key(model, self._prompts, settings | others)
        with self._store.locked(key):
            kept = self._store.take(key)
            if kept is not None:
                log.info("The held-out prompts (%s) were answered before (%s).", name, key[:12])
                return kept["answers"]
            log.info("Answering %d held-out prompts (%s) ...", len(self._prompts), name)
            sampled = sample(
                model,
                self._prompts,
                self._stops,
                **settings,
                device=self._work.device,
                seed=self._seed,
                team=self._work.team,
            )
            answers = [tokens.tolist() for tokens in sampled]
            described = {"stage": "answers", "model": model.config.name_or_path}
            self._store.put(key, None, {"description": described, "answers": answers})
        return answers

    def judged(self, record: RunRecord) -> dict[str, Any]:
        """Write the samples; lengths of the answers and, with the judge, scores and win rates of the last policy."""
        if not self._prompts:
            return {}
        verdicts: dict[str, list[Verdict]] = {}
        if self._config.judge is Judge.rules:
            accepted = [_accepted(row.meta["answer"]) for row in self.rows]
            verdicts = {
                name: [judge(text, right) for text, right in zip(texts, accepted, strict=True)]
                for name, texts in self.answers.items()
            }
        record.write_samples([self._sample(i, verdicts) for i in range(len(self.rows))])
        result: dict[str, Any] = {"prompts": len(self.rows), "answers": {}}
        for name, texts in self.answers.items():
            entry: dict[str, Any] = {"n": len(texts), "words": sum(len(text.split()) for text in texts) / len(texts)}
            if verdicts:
                entry["judge_score"] = sum(v.score for v in verdicts[name]) / len(texts)
                entry["correct"] = sum(v.correct for v in verdicts[name]) / len(texts)
                entry["direct"] = sum(v.direct for v in verdicts[name]) / len(texts)
            result["answers"][name] = entry
        if verdicts:
            result["win_rate"] = {
                f"final_vs_{other}": asdict(win_rate(zip(verdicts["final"], verdicts[other], strict=True)))
                for other in verdicts
                if other != "final"
            }
        return result

    def _sample(self, index: int, verdicts: dict[str, list[Verdict]]) -> dict[str, Any]:
        row = self.rows[index]
        sample: dict[str, Any] = {"prompt": readable(row.prompt)}
        sample |= {name: texts[index] for name, texts in self.answers.items()}
        if "kind" in row.meta:
            sample["kind"] = row.meta["kind"]
        if verdicts:
            sample["verdicts"] = {name: asdict(v[index]) for name, v in verdicts.items()}
            order = compare(verdicts["final"][index], verdicts["start"][index])
            sample["winner"] = {1: "final", 0: "tie", -1: "start"}[order]
        return sample


def _accepted(value: Any) -> list[str]:
    return [str(v) for v in value] if isinstance(value, list) else [str(value)]
