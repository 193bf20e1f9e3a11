"""What a run began with: the day, the data as they train, the base and the adapter. Resumed, it must have the same."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import nn

from alignment.config.schema import RunConfig
from alignment.errors import UserError
from alignment.files import damaged, read_sealed, to_json, write_sealed
from alignment.policy.adapter import has_adapter
from alignment.policy.chat_templates import MODEL, templates_of
from alignment.policy.identity import policy_identity, trained_digest


@dataclass(frozen=True, slots=True)
class Beginning:
    """What decides a run's results besides its settings.

    Attributes:
        day: which a chat template that writes the date goes on writing.
        template: digest of the tokenizer's chat template, to say what changed where the tokens did.
        tokenizer: the same for the vocabulary.
        rows: fingerprint of each stage's data, to say the same.
        tokens: digest of each stage's data as they train.
        base: digest of the base's weights; None where the policy that was loaded has no base in it.
        adapter: digest of the adapter that training started from; None without one, and once a stage is done.
        templates: the text of each chat template by its place in the settings, for a run whose files are gone.
    """

    day: str
    template: str
    tokenizer: str
    rows: dict[str, str]
    tokens: dict[str, str]
    base: str | None
    adapter: str | None
    templates: dict[str, str] = field(default_factory=dict)


def first_day(path: Path) -> datetime.date:
    """The day on which the run of this record began; today if there is none.

    Raises:
        UserError: the record is damaged, or none of this version's.
    """
    return datetime.date.today() if not path.exists() else datetime.date.fromisoformat(_read(path).day)


def first_templates(path: Path) -> dict[str, str]:
    """The chat templates that the run of this record began with; empty if there is none.

    Raises:
        UserError: as `first_day`.
    """
    return _read(path).templates if path.exists() else {}


def begin(
    path: Path,
    day: datetime.date,
    config: RunConfig,
    tokenizer: Any,
    infos: Mapping[str, Mapping[str, Any]],
    model: nn.Module,
    fresh: bool,
) -> None:
    """Write what the run begins with to `path`; a resumed run, which finds the file, must have the same.

    Args:
        config: with the texts of its templates.
        infos: of each stage's data.
        model: the policy as it was loaded.
        fresh: whether no stage is done, so that the policy is the one that the run starts from.

    Raises:
        UserError: something has changed since the run began; says what.
    """
    now = Beginning(
        day=day.isoformat(),
        template=_digest([tokenizer.chat_template]),
        tokenizer=_digest(sorted(tokenizer.get_vocab().items())),
        rows={name: info["fingerprint"] for name, info in infos.items()},
        tokens={name: info["tokens_digest"] for name, info in infos.items()},
        base=policy_identity(model)[1]["base"] if fresh or has_adapter(model) else None,
        adapter=trained_digest(model) if fresh and has_adapter(model) else None,
        templates=templates_of(config, tokenizer),
    )
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_sealed(path, asdict(now))
    elif (changed := _changed(_read(path), now)) is not None:
        raise UserError(
            f"A resumed run keeps its data and its policy, but {changed} since {path.parents[1]} began: bring back "
            f"what it was, or start a new run."
        )


def _changed(before: Beginning, now: Beginning) -> str | None:
    """What differs, in words; None where nothing does that decides results."""
    names = [f"{name} data" for name in now.tokens if before.tokens.get(name) != now.tokens[name]]
    if names:
        stages = " and the ".join(names)
        if any(before.rows.get(name) != now.rows[name] for name in now.rows):
            return f"the rows of the {stages} have changed"
        known = before.templates.keys() & now.templates.keys() - {MODEL}
        others = sorted(place for place in known if before.templates[place] != now.templates[place])
        if others:
            return f"the chat template of {' and '.join(others)}, and with it the tokens of the {stages}, has changed"
        if before.template != now.template:
            return f"the chat template, and with it the tokens of the {stages}, has changed"
        if before.tokenizer != now.tokenizer:
            return f"the tokenizer, and with it the tokens of the {stages}, has changed"
        return f"the tokens of the {stages}, though not their rows, have changed"
    if None not in (before.base, now.base) and before.base != now.base:
        return "the base's weights, or its configuration, have changed"
    if None not in (before.adapter, now.adapter) and before.adapter != now.adapter:
        return "the adapter that training starts from has changed"
    return None


def _read(path: Path) -> Beginning:
    found = read_sealed(path)
    if not isinstance(found, dict) or {"templates", *found} != {own.name for own in fields(Beginning)}:
        raise damaged(path)
    return Beginning(**found)


def _digest(value: Any) -> str:
    return hashlib.blake2b(to_json(value), digest_size=16).hexdigest()
