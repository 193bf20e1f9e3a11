"""The tasks `lm_eval:<task>`: benchmarks of the package lm-eval, on the policies as they are loaded here."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from pathlib import Path
from typing import Any

from alignment.assessment.entrants import Entrants
from alignment.assessment.task import Result
from alignment.comparison.tables import Table
from alignment.errors import UserError
from alignment.runs.text import format_value, is_number

log = logging.getLogger(__name__)

HARNESS = "lm_eval:"
"""What the name of such a task begins with."""


class HarnessTask:
    """A task of lm-eval: one that it knows by name, or a YAML file of your own.

    Raises:
        UserError: lm-eval is not installed, or knows no such task.
    """

    def __init__(self, task: str, field: Entrants) -> None:
        if importlib.util.find_spec("lm_eval") is None:
            raise UserError(
                f"tasks={HARNESS}{task} needs the package lm-eval, which is not installed: pip install "
                f"'alignment[lm-eval]' brings it."
            )
        tasks = importlib.import_module("lm_eval.tasks")  # of the extra `lm-eval`
        path = Path(task).expanduser()
        is_file = path.suffix in (".yaml", ".yml")
        if is_file and not path.is_file():
            raise UserError(f"tasks={HARNESS}{task}: there is no such file.")
        self._manager = tasks.TaskManager(include_path=str(path.parent) if is_file else None)
        self._task = path.stem if is_file else task
        self._field = field
        if not self._manager.match_tasks([self._task]):
            raise UserError(
                f"tasks={HARNESS}{task}: lm-eval knows no task {self._task}; `lm-eval ls tasks` lists what it knows."
            )

    def run(self) -> Result:
        """Every metric of every policy, with its standard error."""
        evaluate = importlib.import_module("lm_eval").simple_evaluate
        wrapper = importlib.import_module("lm_eval.models.huggingface").HFLM

        found: list[dict[str, Any]] = []
        for policy in self._field.policies:
            log.info("%s does %s of lm-eval ...", policy.name, self._task)
            batch = policy.questions.config.evaluation.batch_size
            model = wrapper(pretrained=policy.load().eval(), tokenizer=policy.questions.tokenizer, batch_size=batch)
            results = evaluate(model=model, tasks=[self._task], task_manager=self._manager, log_samples=False)
            assert results is not None
            found.append({"name": policy.name, "results": results["results"]})
        rows = [
            [row["name"], task, metric.replace(",none", ""), format_value(value), _error(own, metric)]
            for row in found
            for task, own in row["results"].items()
            for metric, value in own.items()
            if is_number(value) and "_stderr" not in metric and metric != "sample_len"
        ]
        note = "lm-eval's own metrics, with its standard errors."
        header = ["policy", "task", "metric", "value", "standard error"]
        return Result({"policies": found}, [Table(f"lm-eval: {self._task}", header, rows, note, is_numbers=True)])


def _error(own: dict[str, Any], metric: str) -> str:
    name, _, kind = metric.partition(",")
    return format_value(own.get(f"{name}_stderr,{kind}"))
