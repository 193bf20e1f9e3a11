"""The settings of compared runs: which of them matter, which differ, and names of variants by those that do."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from functools import cache
from typing import Any

from alignment.config.compose import defaults
from alignment.config.overrides import WITH_NONE
from alignment.config.renamed import flat, is_retired, name_now
from alignment.errors import UserError
from alignment.losses import title as loss_title
from alignment.runs.text import format_value

_IGNORED = {
    *("tracking", "dashboard", "resume", "export"),
    *("evaluation.every", "evaluation.every_prompts", "evaluation.batch_size"),
    *("trainer.log_every", "trainer.eval_every", "trainer.save_every", "trainer.keep_checkpoints"),
    *("reference.path", "reference.spot_checks"),
}
"""Sections and settings, of the SFT stage too, that do not change the result of a run."""

_ASKED = ("llm", "server")
_CALLS = {"auth_env", "timeout", "retries", "concurrency", "budget_calls", "budget_tokens", "price_in", "price_out"}
"""Settings of a model that is asked elsewhere: they say how, and do not change what it says."""

_JUDGES = ("llm", "reward_model", "implicit")
"""Judges with settings of their own, which have the judge's name and mean nothing to another judge."""

_PARTS = {"quantization": "nf4", "sft": "quickstart", "onpolicy": "rounds", "stopping": "asha"}
"""An option of each part that is off unless a run asks for it."""

_LONGEST_NAME = 60
"""Characters of what follows the loss in a variant's name, if fewer settings tell the variants apart, too."""

_LONGEST_VALUE = 40
"""Characters of a setting's value in a name."""


class Part(StrEnum):
    """Whether a run has a part that others do without, such as `sft`."""

    given = "with"
    none = "without"


def settings_that_matter(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run by dotted key, under the names of now, without seeds and what cannot change its result.

    A mapping without entries is None, as is a part that is off.
    """
    settings = _plain(config)
    return {key: value for key, value in settings.items() if _has_meaning(key, settings)}


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration by dotted key, with values that can be compared."""
    settings = {}
    for key, value in flat(config).items():
        is_ignored = bool({key.removeprefix("sft."), key.split(".")[0]} & _IGNORED) or key.split(".")[-1] == "seed"
        if key not in ("", "loss") and not is_ignored and not is_retired(key):
            kept = value if isinstance(value, Hashable) else json.dumps(value, default=str)
            settings[name_now(key)] = None if value == {} else kept
    return settings


def _has_meaning(key: str, settings: Mapping[str, Any]) -> bool:
    """Whether a setting means something to a run: no part above it is off, and it is no other judge's."""
    if any(above in settings for above in _above(key)):
        return False
    section, name, last = [*key.split("."), "", ""][:3]
    if section not in ("evaluation", "onpolicy"):
        return True
    if name in _ASKED and last in _CALLS:
        return False
    return name not in _JUDGES or settings.get(f"{section}.judge", name) == name


def _above(key: str) -> Iterator[str]:
    """The keys of the mappings that a setting is in."""
    parts = key.split(".")
    return (".".join(parts[:end]) for end in range(1, len(parts)))


def side_by_side(runs: Sequence[tuple[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The settings of runs, perhaps of several versions, so that each has a value for all that mean something to it.

    A part that some do without becomes a `Part`. What a run of an earlier version lacks has its default, or None.

    Args:
        runs: the loss of each run, and its settings that matter: perhaps those of the loss alone.
    """
    groups = {key.split(".")[0] for _, settings in runs for key in settings} & set(WITH_NONE) - {"loss"}
    found = []
    for _, settings in runs:
        sections = {key.split(".")[0] for key in settings}
        off = groups - sections if sections - {"loss"} else set()  # such as rounds, before there were any
        found.append({**settings, **dict.fromkeys(off)})
    keys = _in_order(found)
    parts = set(keys) & {above for key in keys for above in _above(key)}
    of_loss = {loss: {key for other, settings in runs if other == loss for key in settings} for loss, _ in runs}
    for (loss, own), settings in zip(runs, found, strict=True):
        is_whole = any(not key.startswith("loss.") for key in own)
        for key in keys:
            is_asked = key in of_loss[loss] if key.startswith("loss.") else is_whole
            if is_asked and key not in settings and key not in parts and _has_meaning(key, settings):
                settings[key] = _default(key, loss, settings)
        for part in parts:
            if settings.get(part) is None and part in settings:
                settings[part] = Part.none
            elif any(key.startswith(f"{part}.") for key in settings):
                settings[part] = Part.given
    keys = _in_order(found)
    return [{key: settings[key] for key in keys if key in settings} for settings in found]


def _default(key: str, loss: str, settings: Mapping[str, Any]) -> Any:
    """The default of a setting in a run with these settings, from which it may be taken; None if it has none."""
    value = _defaults(loss).get(key)
    if not (taken := re.fullmatch(r"\$\{(\.?)([\w.]+)\}", str(value))):
        return value
    other = f"{key.rpartition('.')[0]}.{taken[2]}" if taken[1] else taken[2]
    return settings[other] if other in settings else _default(other, loss, settings)


@cache
def _defaults(loss: str) -> Mapping[str, Any]:
    """The defaults of all settings by dotted key; those of a loss only if it comes with the package.

    One that another setting gives is the name of that, in ${}.
    """
    parts = [f"{part}={option}" for part, option in _PARTS.items()]
    try:
        return _plain(defaults(f"loss={loss}", *parts, resolve=False))
    except UserError:
        return {
            key: value for key, value in _plain(defaults(*parts, resolve=False)).items() if not key.startswith("loss.")
        }


def _in_order(each: Iterable[Mapping[str, Any]]) -> list[str]:
    """All keys, those of a section together, and a part before what is in it."""
    keys = list(dict.fromkeys(key for settings in each for key in settings))
    sections = {key.split(".")[0]: place for place, key in reversed(list(enumerate(keys)))}
    return sorted(keys, key=lambda key: (sections[key.split(".")[0]], "." in key))


def told(value: Any) -> Hashable:
    """A value that is the same for equal settings; true is not 1."""
    return isinstance(value, bool), value


def differing(each: Sequence[Mapping[str, Any]]) -> list[str]:
    """The settings with more than one value among those that have them.

    How often answers are drawn goes with `onpolicy`, because it says what kind of training that is.
    """
    keys = _in_order(each)
    found = {key for key in keys if len({told(settings[key]) for settings in each if key in settings}) > 1}
    if "onpolicy" in found:
        found.add("onpolicy.every")
    return [key for key in keys if key in found]


def names(variants: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """A name for each variant, no two of them alike: its loss, with the settings that tell it from others of this loss.

    If that is long, only as many settings are named as tell the variants apart.
    """
    found = [loss_title(loss) for loss, _ in variants]
    for loss in dict.fromkeys(loss for loss, _ in variants):
        own = [number for number, (other, _) in enumerate(variants) if other == loss]
        each = [variants[number][1] for number in own]
        for number, words in zip(own, _said(each, named(each)), strict=True):
            found[number] = ", ".join([found[number], *words])
    taken: set[str] = set()
    for number, name in enumerate(found):
        again = 1
        while found[number] in taken:  # texts with commas may read alike
            again += 1
            found[number] = f"{name} ({again})"
        taken.add(found[number])
    return found


def named(each: Sequence[Mapping[str, Any]]) -> list[str]:
    """The settings in the names of variants of one loss: those that differ, or as many as tell the variants apart."""
    keys = _without_copies(differing(each), each)
    if max((len(", ".join(words)) for words in _said(each, keys)), default=0) <= _LONGEST_NAME:
        return keys

    def number_told(chosen: Sequence[str]) -> int:
        return len(set(map(tuple, _said(each, chosen))))

    chosen: list[str] = []
    while number_told(chosen) < number_told(keys):
        chosen.append(max((key for key in keys if key not in chosen), key=lambda key: number_told([*chosen, key])))
    return [key for key in keys if key in chosen]


def _without_copies(keys: Sequence[str], each: Sequence[Mapping[str, Any]]) -> list[str]:
    """The settings but for those that take their value from another one of that name, as rounds from the evaluation."""
    kept: list[str] = []
    for key in sorted(keys, key=lambda key: key.startswith(("sft.", "onpolicy."))):
        having = [settings for settings in each if key in settings]
        if not any(
            key.split(".")[-1] == other.split(".")[-1]
            and all(other in settings and told(settings[key]) == told(settings[other]) for settings in having)
            for other in kept
        ):
            kept.append(key)
    return [key for key in keys if key in kept]


def _said(each: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[list[str]]:
    """Words for those of the settings that each variant has."""
    shown = {key: _shown([settings[key] for settings in each if key in settings]) for key in keys}
    return [
        [word for key in keys if key in settings for word in _word(key, settings, keys, shown)] for settings in each
    ]


def _word(
    key: str, settings: Mapping[str, Any], keys: Sequence[str], shown: Mapping[str, Mapping[Hashable, str]]
) -> list[str]:
    """The words for a setting; none for a part that is there, if a setting in it is named."""
    value, here = settings[key], [key for key in keys if key in settings]
    if key == "onpolicy" and isinstance(value, Part):
        return ["on-policy" if value is Part.given else "offline"]
    if isinstance(value, Part):
        is_said = value is Part.given and any(other.startswith(f"{key}.") for other in here)
        return [] if is_said else [f"{value} {key}"]
    if key == "onpolicy.every" and value is None:
        return ["one draw"]
    name = key.removeprefix("loss.")
    return [f"{name.removeprefix('onpolicy.') if 'onpolicy' in here else name} {shown[key][told(value)]}"]


def _shown(values: Iterable[Any]) -> dict[Hashable, str]:
    """A text for each value, no two alike: a long one by its beginning, or by where it parts from the others."""
    by_value = {told(value): value for value in values}
    texts = {key: format_value(value) for key, value in by_value.items()}
    if len(set(texts.values())) < len(texts):  # numbers that are alike to four digits
        texts = {key: repr(value) for key, value in by_value.items()}
    clipped = {key: _clipped(text, texts.values()) for key, text in texts.items()}
    return clipped if len(set(clipped.values())) == len(texts) else texts


def _clipped(text: str, others: Iterable[str]) -> str:
    if len(text) <= _LONGEST_VALUE:
        return text
    shared = max((_shared(text, other) for other in others if other != text), default=0)
    start = max(text.rfind("/", 0, shared) + 1, shared - _LONGEST_VALUE // 4) if shared >= _LONGEST_VALUE - 1 else 0
    rest = f"{'…' if start else ''}{text[start:]}"
    return rest if len(rest) <= _LONGEST_VALUE else f"{rest[: _LONGEST_VALUE - 1]}…"


def _shared(text: str, other: str) -> int:
    """The number of characters that both begin with."""
    return next((n for n, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
