"""Files of other tools as recipes that a run would take."""

from __future__ import annotations

from pathlib import Path

import yaml

from alignment.config.compose import load
from alignment.config.schema import RunConfig
from alignment.migration.draft import Circumstances, Draft
from alignment.migration.tools import TOOLS, recognised, translate
from alignment.migration.writing import recipe_text


def drafted(text: str, tool: str | None = None, **around: object) -> tuple[Draft, str]:
    """The settings of a file, and its recipe; the tool is recognised if it is not said."""
    given, path = yaml.safe_load(text), Path("file.yaml")
    draft, method = translate(given, path, TOOLS[tool or recognised(given, path)], Circumstances(**around))
    return draft, recipe_text(draft, path.name, method)


def migrated(folder: Path, text: str, tool: str | None = None, **around: object) -> tuple[RunConfig, Draft]:
    """The run that a file's recipe describes, composed as a run composes it, and the draft of the recipe.

    Every key of the file must be accounted for once.
    """
    draft, recipe = drafted(text, tool, **around)
    place = folder / "recipe" / "made.yaml"
    place.parent.mkdir(exist_ok=True)
    place.write_text(recipe, encoding="utf-8")
    given = set(draft.given)
    placed = {key for keys in draft.origins.values() for key in keys if key in given}
    parts = [placed, set(draft.notes) & given, set(draft.same), set(draft.unknown)]
    assert set.union(*parts) == given
    assert not parts[2] & (parts[0] | parts[1]) and not parts[3] & (parts[0] | parts[1] | parts[2])
    assert all(len(line) <= 200 for line in recipe.splitlines())
    return load("recipe=made", config_dir=folder), draft
