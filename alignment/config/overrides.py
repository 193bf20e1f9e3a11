"""Settings as you type them, `key=value`: parsed, and refused where they have no effect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from antlr4 import CommonTokenStream, InputStream
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Sweep
from hydra.errors import HydraException
from hydra.grammar.gen.OverrideLexer import OverrideLexer
from hydra.grammar.gen.OverrideParser import OverrideParser

from alignment.config import schema
from alignment.config.renamed import refuse_renamed
from alignment.errors import UserError
from alignment.files import asset_dir

WITH_NONE = ("quantization", "adapter", "sft", "loss", "onpolicy", "stopping", "tracking")
"""Groups whose option `none` sets the whole group to null."""

UNSET_OF_FILES = {"split": "train", "eval_split": None, "name": None, "revision": None, "streaming": False}
"""Settings that mean something for folders, addresses and sets of a hub only, and their values without a meaning."""


def parse_overrides(overrides: Sequence[str]) -> list[Override]:
    """Each setting, parsed.

    Raises:
        UserError: text that is no setting, or a setting under its old name.
    """
    parser = OverridesParser.create()
    parsed: list[Override] = []
    for text in overrides:
        try:
            [override] = parser.parse_overrides([text])
        except HydraException as error:
            raise UserError(f"'{text}' is no setting of the form key=value.") from error
        if not override.key_or_group:
            raise UserError(f"'{text}' is no setting of the form key=value: it has no key.")
        if (twice := _key_twice(text)) is not None:
            raise UserError(f"{text}: the key '{twice}' stands twice in one mapping: leave one of them out.")
        parsed.append(override)
    refuse_renamed(override.key_or_group for override in parsed)
    return parsed


def _key_twice(text: str) -> str | None:
    """A key that a mapping in a setting has twice, of which Hydra keeps the last value; None without one."""
    if "{" not in text:
        return None
    pending: list[Any] = [OverrideParser(CommonTokenStream(OverrideLexer(InputStream(text)))).override()]
    while pending:
        part = pending.pop()
        if isinstance(part, OverrideParser.DictContainerContext):
            keys = [entry.dictKey().getText().strip() for entry in part.dictKeyValuePair()]
            if twice := [key for key in keys if keys.count(key) > 1]:
                return str(twice[0])
        pending += getattr(part, "children", None) or ()
    return None


def refuse_groups_without_option(parsed: Sequence[Override]) -> None:
    """Refuse a group that is given anything but the name of an option, such as null, a number or a mapping."""
    groups = {"recipe", *(path.name for path in asset_dir("conf").iterdir() if path.is_dir())}
    for override in parsed:
        key = override.key_or_group
        value = override.value()
        if key in groups and not isinstance(value, str | Sweep):
            off = f", or {key}=none to leave it out" if key in WITH_NONE else ""
            raise UserError(
                f"{override.input_line}: {key} takes the name of an option, one alone{off}; --help lists them."
            )


def refuse_settings_of_none(parsed: Sequence[Override], choices: Mapping[str, Any]) -> None:
    """Refuse a value for a group that the option `none` switches off."""
    for override in parsed:
        group, dot, _ = override.key_or_group.partition(".")
        if dot and group in WITH_NONE and choices.get(group) == "none":
            raise UserError(
                f"{override.key_or_group} has no effect with {group}=none: leave it out, or choose another {group}."
            )


def refuse_without_effect(overrides: Sequence[str], config: schema.RunConfig) -> None:
    """Refuse settings of the command line that this run would never read; those of recipes and files may stay.

    Raises:
        UserError: the setting, and why it has no effect.
    """
    for override in parse_overrides(overrides):
        key = override.key_or_group
        reason = _why_without_effect(key, config)
        if reason is not None:
            raise UserError(f"{key} has no effect: {reason}.")


def _why_without_effect(key: str, config: schema.RunConfig) -> str | None:
    section, _, name = key.rpartition(".") if "." in key else (key, "", "")
    if key in ("trainer.devices", "trainer.shard"):
        return None  # of the whole run
    data = config.sft.data if section == "sft.data" and config.sft is not None else config.data
    if section in ("data", "sft.data") and data is not None and name in UNSET_OF_FILES:
        files = [Path(source) for source in data.named if Path(source).expanduser().is_file()]
        if files and len(files) == len(data.named) and getattr(data, name) != UNSET_OF_FILES[name]:
            return f"{files[0]} is a file, and only folders and data sets have a {name}"
    if config.loss is None:
        if section in ("data", "optim", "trainer", "reference"):
            sft = f"; the SFT stage has sft.{key}" if section != "reference" else ""
            return f"with loss=none there is no preference stage{sft}"
    elif section == "reference":
        live = config.reference.mode is schema.ReferenceMode.live
        unused = not config.loss.requirements().reference and not config.reference.for_metrics
        if unused and (name == "spot_checks" or (live and name in ("", "mode"))):
            return f"loss {config.loss.name} has no reference, and reference.for_metrics=false asks for none"
        if live and name == "spot_checks":
            return "a live reference is computed anew, so that there is nothing stored to check"
    if section == "distill" and (config.loss is None or not config.loss.requirements().draws):
        return "only a loss that draws answers, such as opd, has a teacher"
    stage = config.sft if section.startswith("sft.") else config
    if name == "epochs" and section.endswith("trainer") and stage is not None and stage.trainer.max_steps is not None:
        return f"{section}.max_steps={stage.trainer.max_steps} decides; set it to null to train for epochs"
    if key in ("sft.trainer.devices", "sft.trainer.shard"):
        return f"the SFT stage has the ranks of the run: set {key.removeprefix('sft.')}"
    if key == "sft.trainer.cohort":
        return "the SFT stage is done once for all members of a sweep that have the same"
    if key == "evaluation.kl_prompts" and config.loss is None:
        return "with loss=none there is no preference stage"
    if key in ("evaluation.max_new_tokens", "evaluation.temperature", "evaluation.batch_size"):
        # The answers for the KL have a temperature of their own, and so have those of rounds.
        others = 0 if name == "temperature" else config.evaluation.kl_prompts + (config.onpolicy is not None)
        return "evaluation.prompts=0 samples no answers" if config.evaluation.prompts == others == 0 else None
    if key == "export.dtype" and not config.export.merge:
        return "it is the dtype of the merged model, and export.merge is false"
    return None
