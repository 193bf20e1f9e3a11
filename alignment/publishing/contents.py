"""What of a run goes up: by a list of what may, so that nothing else does."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from alignment.errors import UserError
from alignment.files import redact, to_json
from alignment.publishing.paths import is_local, values_without_paths, without_paths
from alignment.publishing.secrets import findings
from alignment.runs.folder import RunFiles, dig, read_run

ADAPTER_FILE = "adapter_config.json"
WEIGHTS = "*.safetensors"
MERGED = "merged"
"""The folder of the merged model, in the run and on the hub."""

_OF_A_POLICY = (
    WEIGHTS,
    "model.safetensors.index.json",
    ADAPTER_FILE,
    "adapter_start.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
"""Weights are safetensors: no file that can hold code goes up."""
CARD, REPORT, RECIPE = "README.md", "report.md", "recipe.yaml"

_NAMES = ("base_model_name_or_path", "_name_or_path", "name_or_path")
"""Keys under which libraries keep where a model was loaded from."""

_OWN_BUSINESS = (("tracking",), ("resume",), ("reference", "path"), ("evaluation", "llm", "address"))
"""Settings that a recipe for others has without a value."""


@dataclass(frozen=True, slots=True)
class Upload:
    """A file of the repository.

    Attributes:
        name: its path there.
        content: a file of the run, or the bytes of one that was made for the hub.
    """

    name: str
    content: Path | bytes

    @property
    def size(self) -> int:
        """In bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    def text(self) -> str:
        """What a reader of the file sees; of weights, what their header says."""
        if not fnmatch(self.name, WEIGHTS):
            data = self.content if isinstance(self.content, bytes) else self.content.read_bytes()
            return data.decode("utf-8", "replace")
        assert isinstance(self.content, Path)
        with self.content.open("rb") as file:
            return file.read(int.from_bytes(file.read(8), "little")).decode("utf-8", "replace")


def open_finished(folder: Path) -> RunFiles:
    """The files of a finished run, whole.

    Raises:
        UserError: the run is not finished, or a file is not as the run left it.
    """
    run = read_run(folder)
    if run.summary.get("status") != "finished":
        how = "was stopped early" if run.summary.get("status") == "stopped" else "is not finished"
        raise UserError(f"{folder} cannot be pushed, because it {how}.")
    if run.problems:
        raise UserError(f"{folder} cannot be pushed: {run.problems[0]} A card would tell of another run than yours.")
    return run


def policy_folder(run: RunFiles) -> Path:
    """The folder of the final policy.

    Raises:
        UserError: it is gone, or its weights are not safetensors.
    """
    folder = run.folder / ("model" if run.config.get("adapter") is None else "adapter")
    if not folder.is_dir():
        raise UserError(f"{run.folder} cannot be pushed, because its policy {folder} is gone.")
    if not any(folder.glob(WEIGHTS)):
        raise UserError(
            f"{folder} holds no *.safetensors, and other weights are not pushed: loading them can run code."
        )
    return folder


def may_go(name: str) -> bool:
    """Whether a file of a repository is one that a push writes, and so one that a later push may remove."""
    own = (CARD, REPORT, RECIPE)
    in_folder = name.removeprefix(f"{MERGED}/")
    return name in own or fnmatch(name, "plots/*.png") or any(fnmatch(in_folder, kind) for kind in _OF_A_POLICY)


def of_policy(folder: Path, base: str | None, into: str = "") -> list[Upload]:
    """The files of a policy's folder, with the name of the base where libraries have written its path.

    Args:
        base: the hub id of the base; None if it has none.
        into: folder of the repository.

    Raises:
        UserError: a file is damaged.
    """
    found = []
    for path in sorted(folder.iterdir()):
        is_plain = path.is_file() and not path.is_symlink()
        if is_plain and any(fnmatch(path.name, kind) for kind in _OF_A_POLICY):
            if fnmatch(path.name, WEIGHTS):
                _require_whole(path)
            found.append(Upload(f"{into}{path.name}", _with_base(path, base) or path))
    return found


def _require_whole(path: Path) -> None:
    """Refuse weights that are cut; no weights are read."""
    try:
        with safe_open(path, "np"):
            pass
    except SafetensorError as error:
        raise UserError(f"{path} cannot be pushed, because it is damaged: {' '.join(str(error).split())}.") from None


def read_settings(path: Path) -> dict[str, Any]:
    """The content of a configuration file of a policy.

    Raises:
        UserError: it is damaged.
    """
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} cannot be pushed, because it is damaged: {error}.") from None
    return found if isinstance(found, dict) else {}


def left_out(folder: Path) -> list[str]:
    """The names in a policy's folder that stay here."""
    going = {upload.name for upload in of_policy(folder, None)}
    return sorted(path.name for path in folder.iterdir() if path.name not in {*going, CARD})


def _with_base(path: Path, base: str | None) -> bytes | None:
    """The file with the base's name in place of its path; None if it holds none."""
    if path.suffix != ".json" or not path.name.endswith("config.json"):
        return None
    content = read_settings(path)
    names = {key: content[key] for key in _NAMES if isinstance(content.get(key), str)}
    named_base = path.name == ADAPTER_FILE and base is not None and content.get(_NAMES[0]) != base
    if not named_base and not any(map(is_local, names.values())):
        return None
    new = {key: base if key == _NAMES[0] or is_local(value) else value for key, value in names.items()}
    if path.name == ADAPTER_FILE and is_local(names.get(_NAMES[0], "")):
        new["revision"] = None  # of the base: of what was here
    return to_json({**content, **new}, indent=2) + b"\n"


def recipe_file(run: RunFiles) -> Upload:
    """All settings of the run, without secrets and paths."""
    settings = values_without_paths(redact(run.config))
    for *groups, key in _OWN_BUSINESS:
        place: Any = dig(settings, *groups) if groups else settings
        if isinstance(place, dict) and key in place:
            place[key] = None
    head = f"# All settings of this run of recipe {_one_line(run.summary.get('recipe'))}. Paths are left out.\n"
    return Upload(RECIPE, (head + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)).encode())


def report_files(run: RunFiles) -> list[Upload]:
    """The run's report with its plots, without paths, and without the samples, which quote the held-out data.

    Raises:
        UserError: the run has no report.
    """
    path = run.folder / REPORT
    if not path.is_file():
        raise UserError(f"{path} is missing: python -m alignment.report {run.folder} writes it.")
    text = re.sub(r"^## Samples\n.*?(?=^## |\Z)", "", path.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    text = without_paths(text, run.folder.resolve(), Path.cwd())
    plots = [Upload(f"plots/{plot.name}", plot) for plot in sorted((run.folder / "plots").glob("*.png"))]
    return [Upload(REPORT, text.rstrip().encode() + b"\n"), *plots]


def refuse_secrets(uploads: list[Upload]) -> None:
    """Look into every file that goes up.

    Raises:
        UserError: it holds what nobody else should read.
    """
    for upload in uploads:
        if not fnmatch(upload.name, "*.png"):
            for finding in findings(upload.text()):
                raise UserError(
                    f"{upload.name} would publish {finding}, so nothing was sent: take it out of the files of the run."
                )


def _one_line(value: Any) -> str:
    return " ".join(str(value).split())


def sources_of(data: Mapping[str, Any] | None) -> list[str]:
    """The names of the training data among the settings of a stage: each once, in their order."""
    given: list[Any] = [dig(dict(data or {}), "source")]
    for source in (dig(dict(data or {}), "sources") or {}).values():
        given.append(source.get("source") if isinstance(source, Mapping) else source)
    names = [name for one in given for name in (one if isinstance(one, list) else [one]) if name is not None]
    return list(dict.fromkeys(map(str, names)))
