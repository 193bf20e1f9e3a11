"""Everything that a push sends, gathered."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from alignment.config.places import is_on_hub
from alignment.publishing.card import Licenses, model_card, trained_on
from alignment.publishing.contents import (
    ADAPTER_FILE,
    MERGED,
    Upload,
    of_policy,
    open_finished,
    policy_folder,
    read_settings,
    recipe_file,
    report_files,
)
from alignment.publishing.hub import license_of
from alignment.runs.folder import RunFiles, dig
from alignment.runs.record import SEAL


@dataclass(frozen=True, slots=True)
class Gathered:
    """What goes up.

    Attributes:
        run: that it is of.
        policy: the folder of its policy.
        uploads: the card first.
        hints: what you may want to say before you send it.
    """

    run: RunFiles
    policy: Path
    uploads: list[Upload]
    hints: list[str]


def gathered(folder: Path, repo: str, base: str | None, license: str | None) -> Gathered:
    """What of a run goes up.

    Args:
        repo: where to.
        base: hub id of the base model, where the run has it from elsewhere.
        license: of what goes up; None: that of the base.

    Raises:
        UserError: the run is not finished, not whole, or has no policy that may go.
    """
    run = open_finished(folder)
    policy = policy_folder(run)
    is_adapter = (policy / ADAPTER_FILE).is_file()
    base = base or _base_on_hub(run, policy)
    uploads = of_policy(policy, base)
    if (run.folder / MERGED).is_dir():
        uploads += of_policy(run.folder / MERGED, base, f"{MERGED}/")
    uploads += [*report_files(run), recipe_file(run)]
    of_base = license_of(base, "model") if base else None
    sets = {name for names in trained_on(run).values() for name in names if is_on_hub(name)}
    licenses = Licenses(license or of_base, of_base, {name: license_of(name, "dataset") for name in sorted(sets)})
    hints = []
    if not (run.folder / SEAL).exists():
        hints.append(f"The run has no {SEAL}: nobody knows whether its files have changed since it ended.")
    if base is None:
        name = dig(run.config, "model", "name")
        hints.append(f"The hub does not know the base {name}: --base <hub id> names it, if it is there.")
    if licenses.own is None:
        hints.append("The card states no license: --license <name> does.")
    return Gathered(run, policy, [model_card(run, repo, base, uploads, licenses, is_adapter), *uploads], hints)


def _base_on_hub(run: RunFiles, policy: Path) -> str | None:
    """The hub id of the base: what the adapter says, or the run's model; None if that is a path or of a package."""
    name = dig(run.config, "model", "name")
    if (policy / ADAPTER_FILE).is_file():  # the run may have begun with an adapter, whose base is another
        name = read_settings(policy / ADAPTER_FILE).get("base_model_name_or_path")
    return name if isinstance(name, str) and "/" in name and is_on_hub(name) else None
