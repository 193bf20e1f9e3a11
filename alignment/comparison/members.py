"""The runs that are compared, what differs between them, and what was measured of each."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from alignment.errors import UserError
from alignment.run_folder import (
    RUN_FILES,
    Run,
    change,
    eval_pairs,
    get,
    is_number,
    loss_name,
    read_rows,
    read_run,
    section,
    shown,
)

_SILENT = ("tracking", "resume")
"""Settings that change where a run reports to, and nothing of its result."""


@dataclass(slots=True)
class Member:
    """One run of a comparison.

    Attributes:
        settings: its configuration by dotted keys, without seeds; empty where that is lost.
        pairs: the held-out pairs' values after training by pair; empty where they were not kept.
    """

    name: str
    run: Run
    settings: dict[str, Any] = field(default_factory=dict)
    seed: Any = None
    loss: str = ""
    pairs: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(slots=True)
class Variant:
    """The members that differ by their seed alone."""

    loss: str
    settings: dict[str, Any]
    members: list[Member]

    @property
    def label(self) -> str:
        """The loss with the settings that tell it from the others."""
        parts = [f"{key.removeprefix('loss.')} {shown(value)}" for key, value in self.settings.items()]
        return ", ".join([self.loss.upper(), *parts])

    @property
    def seeds(self) -> list[Any]:
        """Of its members."""
        return [member.seed for member in self.members]


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _numbered(rows: Iterable[dict[str, Any]], key: str) -> dict[str, dict[str, Any]]:
    """Rows by a key; the second of a key is another item than the first."""
    seen: Counter[str] = Counter()
    found = {}
    for row in rows:
        name = str(row.get(key))
        found[f"{name} #{seen[name]}"] = row
        seen[name] += 1
    return found


def _read_pairs(run: Run) -> dict[str, dict[str, Any]]:
    path = run.folder / "held_out.jsonl"
    if not path.exists():
        return {}
    try:
        rows = [row for row in read_rows(path) if row.get("moment") == "final"]
    except (OSError, ValueError, RecursionError) as error:
        run.problems.append(f"held_out.jsonl cannot be read: {' '.join(str(error).split())}.")
        return {}
    return _numbered(rows, "key")


def read_member(folder: Path, name: str) -> Member:
    """Read a run folder; what is missing or broken is named in `run.problems`.

    Raises:
        UserError: it is no run folder.
    """
    run = read_run(folder) if any((folder / file).is_file() for file in RUN_FILES) else Run(folder)
    if run.summary and run.summary.get("status") != "finished":
        run.problems.append(f"it is not finished: its status is {shown(run.summary.get('status'))}.")
    failed = folder / "failed.json"
    if failed.exists():
        try:
            run.problems.append(f"it failed: {_sentence(json.loads(failed.read_text('utf-8')))}")
        except (OSError, ValueError, RecursionError):
            run.problems.append("it failed, and failed.json cannot be read.")
    settings, seed = {}, run.summary.get("seed", run.config.get("seed"))
    for key, value in _flat(run.config):
        if key.split(".")[0] not in _SILENT and key.split(".")[-1] != "seed":
            settings[key] = value if isinstance(value, Hashable) else json.dumps(value, default=str)
    seed = seed if isinstance(seed, int | str) else None
    return Member(name, run, settings, seed, _loss(run), _read_pairs(run))


def _loss(run: Run) -> str:
    """The name of the preference loss; empty for a run without one."""
    if get(run.summary, "stages", "preference"):
        return loss_name(run.summary)
    if not run.config.get("loss"):
        return ""
    try:  # a run that did not end: what was asked for
        asked = yaml.safe_load((run.folder / ".hydra" / "hydra.yaml").read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        asked = None
    return str(get(asked, "hydra", "runtime", "choices", "loss") or "unknown loss")


def _sentence(value: Any) -> str:
    found = (
        next((text for _, text in _flat(value) if isinstance(text, str)), None) if isinstance(value, dict) else value
    )
    return " ".join(str(found).split()) or "no reason was kept."


def run_folders(folders: Sequence[Path]) -> list[Path]:
    """The run folders among and directly inside of the given ones, sweeps in the order of their members' numbers.

    Raises:
        UserError: one of them neither is nor holds a run folder.
    """
    found: list[Path] = []
    for folder in folders:
        inside = [folder]
        if not is_run(folder):
            inside = sorted((path for path in _folders(folder) if is_run(path)), key=_number)
        if not inside:
            raise UserError(f"{folder} is no run folder and holds none: in neither is any of {', '.join(RUN_FILES)}.")
        found += inside
    return list(dict.fromkeys(path.resolve() for path in found))


def is_run(folder: Path) -> bool:
    """It holds a file of a run, if only the one that says why it failed."""
    return any((folder / name).is_file() for name in (*RUN_FILES, "failed.json"))


def _folders(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []


def _number(folder: Path) -> tuple[bool, int, str]:
    number = folder.name.split("-")[0]
    return (not number.isdecimal(), int(number) if number.isdecimal() else 0, folder.name)


def names(folders: Sequence[Path]) -> list[str]:
    """What tells the folders apart: their paths below the folder that they share."""
    base = os.path.commonpath([folder.parent for folder in folders])
    return [str(folder.relative_to(base)) for folder in folders]


def differing(members: Sequence[Member]) -> list[str]:
    """Settings with more than one value; those of a loss, among the members with that loss."""
    keys = {key for loss in {member.loss for member in members} for key in _varying(members, loss)}
    return [key for key in dict.fromkeys(key for member in members for key in member.settings) if key in keys]


def _varying(members: Sequence[Member], loss: str) -> set[str]:
    """What tells members with this loss from others: their own settings where those vary, and all else that does."""
    whole = [member for member in members if member.settings]
    own = [member for member in whole if member.loss == loss]
    return {
        key
        for key in {key for member in own for key in member.settings}
        if len({_comparable(m.settings.get(key)) for m in (own if key.startswith("loss.") else whole)}) > 1
    }


def _comparable(value: Any) -> Hashable:
    return (type(value).__name__ if isinstance(value, bool) else "", value)


def variants(members: Sequence[Member]) -> list[Variant]:
    """Members that trained a preference, by loss and differing settings, in the order of losses and of settings."""
    trained = [member for member in members if member.loss]
    keys = differing(trained)
    found: dict[tuple[Any, ...], Variant] = {}
    varying = {loss: _varying(trained, loss) for loss in {member.loss for member in trained}}
    for member in trained:
        settings = {key: member.settings[key] for key in keys if key in member.settings.keys() & varying[member.loss]}
        variant = found.setdefault((member.loss, *settings.items()), Variant(member.loss, settings, []))
        variant.members.append(member)
    order = list(dict.fromkeys(variant.loss for variant in found.values()))

    def place(variant: Variant) -> tuple[Any, ...]:
        values = (variant.settings.get(key) for key in keys)
        return (order.index(variant.loss), *((0, v, "") if is_number(v) else (1, 0, str(v)) for v in values))

    return sorted(found.values(), key=place)


@dataclass(frozen=True, slots=True)
class Measure:
    """Something that was measured of every member after training.

    Attributes:
        axis: what it is, with its unit, for tables and axes.
        value: of a member; None where it is not known.
        share: it is a share of items, of which `count` says how many, so that it has an interval.
        items: the same by item, of which it is the mean; empty where those are not known.
    """

    name: str
    axis: str
    value: Callable[[Member], float | None]
    share: bool = False
    count: Callable[[Member], int] = lambda member: 0
    items: Callable[[Member], Mapping[str, float]] = lambda member: {}

    def mean(self, variant: Variant) -> float | None:
        """Over the members that have it."""
        values = self.values(variant)
        return sum(values) / len(values) if values else None

    def values(self, variant: Variant) -> list[float]:
        """Of the members that have it."""
        return [value for member in variant.members if (value := self.value(member)) is not None]

    def by_item(self, variant: Variant) -> dict[str, float]:
        """Means over the members of the items that all of them have."""
        each = [self.items(member) for member in variant.members if self.value(member) is not None]
        shared = set.intersection(*(set(items) for items in each)) if each else set()
        return {item: sum(items[item] for items in each) / len(each) for item in shared}

    def num_items(self, variant: Variant) -> int:
        """The least of the members': another seed asks the same items once more, which gives no new ones."""
        return min((self.count(member) for member in variant.members if self.value(member) is not None), default=0)


def _number_of(value: Any) -> float | None:
    return float(value) if is_number(value) else None


def evaluated(name: str) -> Callable[[Member], float | None]:
    """A metric of the last evaluation on the held-out preference data."""
    return lambda member: _number_of(get(member.run.summary, "stages", "preference", "metrics", f"eval/{name}"))


def _pair_items(name: str) -> Callable[[Member], dict[str, float]]:
    return lambda member: {key: float(row[name]) for key, row in member.pairs.items() if is_number(row.get(name))}


def _answers(key: str) -> Callable[[Member], float | None]:
    return lambda member: _number_of(get(member.run.summary, "evaluation", "answers", "final", key))


def _num_answers(member: Member) -> int:
    count = get(member.run.summary, "evaluation", "answers", "final", "n")
    return count if isinstance(count, int) else 0


def _num_pairs(member: Member) -> int:
    return eval_pairs(member.run.summary)


def baseline(member: Member) -> str:
    """The model that a preference stage started from, under its name in the evaluation."""
    return "sft" if section(member.run.summary, "stages", "sft") else "start"


def _win_rate(member: Member) -> float | None:
    return _number_of(get(member.run.summary, "evaluation", "win_rate", f"final_vs_{baseline(member)}", "rate"))


def _wins(member: Member) -> dict[str, float]:
    """1, one half or 0 by prompt, as the judge's scores say."""
    found = {}
    for prompt, sample in _numbered(member.run.samples, "prompt").items():
        final, other = (get(sample, "verdicts", name, "score") for name in ("final", baseline(member)))
        if is_number(final) and is_number(other):
            found[prompt] = 0.5 + ((final > other) - (final < other)) / 2
    return found


def _correct(member: Member) -> dict[str, float]:
    samples = _numbered(member.run.samples, "prompt").items()
    return {
        prompt: float(right)
        for prompt, sample in samples
        if isinstance(right := get(sample, "verdicts", "final", "correct"), bool)
    }


def chosen_drift(member: Member) -> float | None:
    """By how much the log-prob of held-out chosen completions changed."""
    found = change(member.run, "logps/chosen")
    return found[1] - found[0] if found else None


WIN_RATE = Measure(
    "win rate", "win rate against the model before the preference stage", _win_rate, True, _num_answers, _wins
)
CORRECT = Measure("correct answers", "share of correct answers", _answers("correct"), True, _num_answers, _correct)
ACCURACY = Measure(
    "reward accuracy",
    "share of held-out pairs with the higher log-ratio on the chosen completion",
    evaluated("nats/accuracies"),
    True,
    _num_pairs,
    _pair_items("nats/accuracies"),
)
OWN_ACCURACY = Measure(
    "accuracy of the loss's own reward",
    "share of held-out pairs with the higher reward of the loss on the chosen completion",
    evaluated("rewards/accuracies"),
    True,
    _num_pairs,
    _pair_items("rewards/accuracies"),
)
RANKING = Measure(
    "ranking accuracy",
    "share of held-out pairs with the higher log-prob on the chosen completion",
    evaluated("ranking/accuracies"),
    True,
    _num_pairs,
    _pair_items("ranking/accuracies"),
)
RANKING_PER_TOKEN = Measure(
    "ranking accuracy per token",
    "share of held-out pairs with the higher log-prob per token on the chosen completion",
    evaluated("ranking/accuracies_per_token"),
    True,
    _num_pairs,
    _pair_items("ranking/accuracies_per_token"),
)
MARGIN = Measure("margin, nats", "margin against the reference, nats", evaluated("nats/margins"))
DRIFT = Measure("drift of chosen, nats", "change of the chosen completions' log-prob, nats", chosen_drift)
WORDS = Measure("answer length, words", "mean length of answers, words", _answers("words"))

CRITERIA = (WIN_RATE, CORRECT, ACCURACY, OWN_ACCURACY, RANKING)
"""What variants may be ranked by: the first that every one of them has."""


def criterion(found: Sequence[Variant]) -> Measure | None:
    """What to rank by; where none is known of all variants, the one that most have."""
    if not found:
        return None
    best = max(CRITERIA, key=lambda measure: sum(bool(measure.values(variant)) for variant in found))
    return best if any(best.values(variant) for variant in found) else None


def _sampled_kl(member: Member) -> float | None:
    return _number_of(get(member.run.summary, "evaluation", "kl/sampled", "mean"))


def _offline_nats(member: Member) -> float | None:
    """The mean log-ratio of held-out completions; of runs without that metric, of as many chosen as rejected ones."""
    chosen, rejected = (evaluated(f"nats/{side}")(member) for side in ("chosen", "rejected"))
    mean = (chosen + rejected) / 2 if chosen is not None and rejected is not None else None
    return found if (found := evaluated("kl/offline")(member)) is not None else mean


KLS = (
    Measure(
        "sampled KL, nats", "KL to the reference, nats per answer, from answers sampled of the policy", _sampled_kl
    ),
    Measure(
        "offline log-ratio, nats",
        "mean log-ratio to the reference on held-out completions, nats (a biased stand-in for the KL)",
        _offline_nats,
    ),
)


def kl_error(member: Member) -> float:
    """The standard error of the KL from samples; 0 where it is not known."""
    return _number_of(get(member.run.summary, "evaluation", "kl/sampled", "se")) or 0.0


def kl(members: Sequence[Member]) -> Measure | None:
    """How far policies are from their reference, by the best estimate that all have which have any."""
    asked = [member for member in members if any(measure.value(member) is not None for measure in KLS)]
    return next((measure for measure in KLS if asked and all(measure.value(m) is not None for m in asked)), None)
