"""The merged policy of several runs, evaluated like the policy of any run and left as one.

It goes the way of a run whose earlier stages are done and whose last stage is given its final weights instead of
training them: so it meets the same checks and the same held-out data as its parents, and after a preference stage the
same reference, prompts and judge.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from alignment.config.resume import finished_run
from alignment.config.schema import RunConfig
from alignment.errors import UserError
from alignment.files import atomic_write_bytes, atomic_write_text, cache_dir, to_json, write_sealed
from alignment.policy.load import load_base, resolve_device
from alignment.policy.model_merging import METHODS, MergeFacts, MergeSettings, merge_adapters, merge_models, put_adapter
from alignment.policy.source import model_source
from alignment.runs.folder import RUN_FILES, RunFiles, dig, holds_any, read_rows
from alignment.stages.chain import Chain

log = logging.getLogger(__name__)

RECIPE = "merge"
"""Name of the recipe in the files of a merged policy."""
_BEGUN = "merge.json"


@dataclass(frozen=True, slots=True)
class Parent:
    """A finished run whose policy is merged with others.

    Attributes:
        folder: of the run.
        config: that it ran with, and `resolved` the same as plain values.
        summary: that it has left.
    """

    folder: Path
    config: RunConfig
    resolved: dict[str, Any]
    summary: dict[str, Any]

    @property
    def name(self) -> str:
        """As people call it."""
        return str(self.folder)

    @property
    def policy(self) -> Path:
        """Folder of its final policy."""
        return self.folder / ("adapter" if self.config.adapter is not None else "model")

    @property
    def start(self) -> str | None:
        """Identity of the policy that its preference stage began with, which is its reference; None after SFT alone."""
        return dig(self.summary, "stages", "preference", "start", "identity") if self.config.loss is not None else None

    @property
    def base(self) -> tuple[Any, ...]:
        """What must be the same in runs that are merged: the base, as it was loaded, and what is trained of it."""
        digest = dig(self.summary, "model", "base") if self.config.adapter is not None else None
        model = self.config.model
        return model.name, model.revision, self.config.quantization, self.config.adapter is None, digest


def read_parents(folders: Sequence[Path]) -> list[Parent]:
    """The runs, checked to be mergeable.

    Raises:
        UserError: fewer than two, one that is not finished, or another base.
    """
    if len(folders) < 2:
        raise UserError("A merge needs the folders of at least two runs.")
    twice = next((f for i, f in enumerate(folders) if f.resolve() in [other.resolve() for other in folders[:i]]), None)
    if twice is not None:
        raise UserError(f"{twice} is given twice: name every run once, and give it more weight with weights.")
    parents = [_read_parent(folder) for folder in folders]
    first = parents[0]
    for other in parents[1:]:
        if other.base != first.base:
            raise UserError(
                f"{other.name} and {first.name} cannot be merged, because they were trained from other bases: "
                f"{_base_in_words(other)} and {_base_in_words(first)}."
            )
    return parents


def _read_parent(folder: Path) -> Parent:
    if not holds_any(folder, RUN_FILES):
        raise UserError(f"{folder} is no run folder: give folders of finished runs.")
    path = folder / "summary.json"
    summary = json.loads(path.read_bytes()) if path.is_file() else {}
    if summary.get("status") != "finished":
        how = "was stopped early" if summary.get("status") == "stopped" else "is not finished"
        raise UserError(
            f"{folder} cannot be merged, because it {how}: a merge needs policies at the end of their runs."
        )
    if summary.get("recipe") == RECIPE:
        raise UserError(f"{folder} cannot be merged, because it is a merge itself: give its parents and the others.")
    config, resolved = finished_run(folder)
    parent = Parent(folder, config, resolved, summary)
    if not parent.policy.is_dir():
        raise UserError(f"{folder} cannot be merged, because its policy {parent.policy} is gone.")
    return parent


def _base_in_words(parent: Parent) -> str:
    config = parent.config
    revision = f" at {config.model.revision}" if config.model.revision is not None else ""
    packed = " in NF4" if config.quantization is not None else ""
    whole = ", trained as a whole" if config.adapter is None else ""
    return f"{config.model.name}{revision}{packed}{whole}"


def by_data(parents: Sequence[Parent]) -> list[list[Parent]]:
    """The parents by what they were evaluated on, in their order: held-out pairs, and how prompts were answered; after
    SFT alone the data."""
    groups: dict[bytes, list[Parent]] = {}
    for parent in parents:
        if parent.config.loss is None:
            assert parent.config.sft is not None
            asked = [dig(parent.summary, "data", "sft", "fingerprint"), str(parent.config.sft.data)]
        else:
            rows = read_rows(RunFiles(parent.folder), "held_out.jsonl")
            pairs = sorted(str(row.get("key")) for row in rows if row.get("moment") == "final")
            asked = [pairs, str(parent.config.evaluation), parent.config.loss.requirements().unit]
        groups.setdefault(to_json(asked), []).append(parent)
    return list(groups.values())


def merge_runs(parents: Sequence[Parent], settings: MergeSettings, out: Path) -> list[tuple[Path, list[Parent]]]:
    """Merge the final policies of runs, and evaluate the result on the held-out data of each parent.

    Args:
        parents: from `read_parents`.
        settings: as given.
        out: folder of the merged policy's run. Where parents have other held-out data, it gets a folder for each.

    Returns:
        Each folder of a run of the merged policy, with the parents that have its data.

    Raises:
        UserError: the settings do not fit, or the folder holds something else.
    """
    settings = settings.of(len(parents))
    _require_free(out)
    groups = by_data(parents)
    folders = [out] if len(groups) == 1 else [out / f"{i}-{group[0].folder.name}" for i, group in enumerate(groups)]
    device = resolve_device(parents[0].config.device)
    log.info("Merging %d policies by %s: %s ...", len(parents), settings.method, METHODS[settings.method])
    put, facts = _merged(parents, settings, device)
    for folder, group in zip(folders, groups, strict=True):
        _evaluate(group[0], parents, settings, put, facts, folder)
    return list(zip(folders, groups, strict=True))


def _require_free(out: Path) -> None:
    """Refuse a folder with something else in it; what an interrupted merge has left is removed."""
    if out.exists() and not out.is_dir():
        raise UserError(f"out={out}: that is a file, and the merged policy needs a folder; choose another.")
    if not out.exists() or not any(out.iterdir()):
        return
    if not (out / _BEGUN).is_file() or (out / "summary.json").exists():
        raise UserError(f"out={out}: the folder is not empty; choose another.")
    shutil.rmtree(out)


def _merged(parents: Sequence[Parent], settings: MergeSettings, device: torch.device) -> tuple[Any, MergeFacts]:
    """What puts the merged weights into a policy that was loaded from the base, and what the merge found."""
    config = parents[0].config
    if config.adapter is not None:
        updates, facts = merge_adapters({p.name: p.policy for p in parents}, settings, device)
        log.info("Its adapter has rank %d and leaves out %.2g of the merged update.", facts.rank, facts.error)
        return partial(put_adapter, updates=updates), facts
    source = model_source(config.model, cache_dir(config.reference.path))
    load = partial(load_base, config.model, None, device=torch.device("cpu"))
    base = load(source.base)
    facts = merge_models(base, [load(str(parent.policy)) for parent in parents], settings)
    weights = base.state_dict()

    def put(model: nn.Module) -> None:
        model.load_state_dict(weights)

    return put, facts


def _evaluate(
    like: Parent, parents: Sequence[Parent], settings: MergeSettings, put: Any, facts: MergeFacts, folder: Path
) -> None:
    """Make the run folder of the merged policy, evaluated as the run `like` was."""
    described = {
        "method": settings.method,
        "computes": METHODS[settings.method],
        "weights": list(settings.weights),
        "density": settings.density,
        "seed": settings.seed if settings.method == "dare_ties" else None,
        "parents": [str(parent.folder.resolve()) for parent in parents],
        **facts.to_dict(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_sealed(folder / _BEGUN, described, indent=2)
    _copy_start(like.folder, folder)
    config = replace(like.config, tracking=None, stopping=None, resume=None)
    # What tells it from its parents, and from other merges, in a comparison
    told = {"method": settings.method, "density": settings.density, "of": " + ".join(p.folder.name for p in parents)}
    resolved = {**like.resolved, "tracking": None, "stopping": None, RECIPE: told}
    if others := [p.name for p in parents if None not in (p.start, like.start) and p.start != like.start]:
        log.warning(
            "%s began their preference stage at another policy than %s: the merged policy is measured against that of "
            "the latter.",
            ", ".join(others),
            like.name,
        )
    chain = Chain(config, folder, RECIPE, resolved, given=put, described={RECIPE: described})
    atomic_write_text(folder / "config.yaml", yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True))
    chain.run()


def _copy_start(run: Path, folder: Path) -> None:
    """What the last stage of a run began with: the day, the data, the stage before, its metrics, earlier answers."""
    (folder / "stages").mkdir(exist_ok=True)
    for name in ("beginning.json", "answers_start.json", "answers_sft.json"):
        if (run / "stages" / name).is_file():
            shutil.copy(run / "stages" / name, folder / "stages")
    if (run / "stages" / "sft").is_dir() and (run / "stages" / "preference").is_dir():
        shutil.copytree(run / "stages" / "sft", folder / "stages" / "sft")
        rows = [line for line in (run / "metrics.jsonl").read_bytes().splitlines(True) if b'"stage": "sft"' in line]
        atomic_write_bytes(folder / "metrics.jsonl", b"".join(rows))
