"""The tasks of an evaluation, and the files that it leaves."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from alignment.assessment.entrants import Entrants, entrants, opened
from alignment.assessment.page import questions, to_html, win_rate_tables
from alignment.assessment.win_rates import Judged
from alignment.comparison.answers import Question
from alignment.comparison.tables import Table
from alignment.errors import UserError, did_you_mean
from alignment.evaluation.judges.base import Item, Judge
from alignment.evaluation.judges.human_labels import HumanLabels
from alignment.evaluation.judges.making import make_judge
from alignment.files import atomic_write_bytes, to_json, to_json_lines
from alignment.runs.folder import write_page
from alignment.runs.record import versions
from alignment.stages.finished import OpenedPolicy

log = logging.getLogger(__name__)

TASKS = ("win_rate",)


def require_tasks(tasks: Sequence[str]) -> None:
    """Refuse tasks that there are not.

    Raises:
        UserError: which, and what is accepted.
    """
    for task in tasks:
        if task not in TASKS:
            raise UserError(f"There is no task {task}{did_you_mean(task, TASKS)}; accepted are {', '.join(TASKS)}.")
    if not tasks:
        raise UserError(f"tasks names no task; accepted are {', '.join(TASKS)}.")


def assess(
    folders: Sequence[Path], tasks: Sequence[str], settings: Sequence[str], against: str | None, count: int, out: Path
) -> tuple[Path, list[Table]]:
    """Evaluate the policies of finished runs, and write evaluation.json, .html and the judged pairs.

    Args:
        folders: of runs, or of sweeps.
        settings: overrides of the settings that the runs had.
        against, count: see `entrants`.
        out: where the files go.

    Returns:
        The page, and its tables.

    Raises:
        UserError: runs that cannot be evaluated, or a judge that cannot judge them.
    """
    policies = opened(folders, settings)
    judge, humans = _judge(policies[0])
    field = entrants(policies, against, count)
    judged = Judged(field, judge)
    found: dict[str, Any] = {"settings": [*settings], "prompts": len(policies[0].questions.texts), "per_prompt": count}
    found["win_rate"] = judged.found(humans)
    cautions = list(_cautions(field, judge, found["win_rate"]))
    tables, asked = win_rate_tables(found["win_rate"]), questions(field, judged)
    found |= {"cautions": cautions, "versions": versions()}
    for caution in cautions:
        log.warning("%s", caution)
    return _write(out, found, tables, cautions, asked, judged.pairs()), tables


def _write(
    out: Path,
    found: Mapping[str, Any],
    tables: Sequence[Table],
    cautions: Sequence[str],
    asked: tuple[list[Question], str],
    pairs: Sequence[Mapping[str, Any]],
) -> Path:
    page = to_html(f"Evaluation: {out.resolve().name}", tables, cautions, *asked)
    try:
        atomic_write_bytes(out / "evaluation_pairs.jsonl", to_json_lines(pairs))
        atomic_write_bytes(out / "evaluation.json", to_json(found, 2))
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}.") from None
    write_page(out / "evaluation.html", page)
    return out / "evaluation.html"


def _judge(policy: OpenedPolicy) -> tuple[Judge, HumanLabels | None]:
    """The judge, which can judge the prompts, and the labels of people, if there are any."""
    asked = policy.questions
    config = asked.config.evaluation
    judge = make_judge(config, asked.cache, asked.device)
    if judge is None:
        raise UserError("tasks=win_rate needs a judge, and the run had none: set judge=rules, llm or another one.")
    judge.require([Item(text, (), row.meta, row.source) for row, text in zip(asked.rows, asked.texts, strict=True)])
    labels = config.human_labels
    return judge, None if labels is None else HumanLabels(Path(labels).expanduser())


def _cautions(field: Entrants, judge: Judge, found: Mapping[str, Any]) -> Iterator[str]:
    """What a careful reader would question."""
    trained = [
        policy.name for policy in field.policies if policy.run and judge.identity in _identities(policy.run.summary)
    ]
    if trained:
        yield (
            f"The judge is the one that made the training data of {', '.join(trained)}: a policy learns what its judge "
            f"likes, so judge it with another one."
        )
    card = found["judge"]
    if card["unreadable"] > 0.1 * max(1, card["verdicts"]):
        yield f"{card['unreadable']} of {card['verdicts']} verdicts could not be read, and count as ties."
    for match in found["matches"]:
        if abs(match["rate"] - match["length_controlled"]["rate"]) > 0.1:
            yield (
                f"Length explains part of the win rate of {match['first']} against {match['second']}: its answers are "
                f"{abs(match['longer_by']):.0f} characters {'longer' if match['longer_by'] > 0 else 'shorter'} in mean."
            )
    if len(field.policies) > 2 and not all("strength" in row for row in found["policies"]):
        yield (
            "The policies have no common scale, because not all of them met, not even by way of others: give them one "
            "opponent with against=."
        )
    if card.get("humans") and not any("humans" in match for match in found["matches"]):
        yield (
            "People's labels are of other pairs than these, so they tell how far the judge agrees, but mend no win "
            "rate: label a random part of evaluation_pairs.jsonl for that."
        )


def _identities(summary: Any) -> set[str]:
    """The judges that a run's summary names, but for that of its evaluation."""
    if not isinstance(summary, Mapping):
        return set()
    found = {summary["judge"].get("identity")} if isinstance(summary.get("judge"), Mapping) else set()
    inner = [_identities(value) for key, value in summary.items() if key != "evaluation"]
    return set().union(found - {None}, *inner)
