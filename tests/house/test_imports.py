"""Imports point one way: the contract in pyproject.toml holds, fails where it should, and heavy libraries stay home."""

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "alignment"

ONLY_IN = {
    "hydra": {"run", "config"},
    "omegaconf": {"run", "config", "stages.cohorts"},
    "wandb": {"runs.trackers.wandb", "runs.rank_tracking"},
    "tensorboard": {"runs.trackers.tensorboard"},
    "mlflow": {"runs.trackers.mlflow"},
    "trackio": {"runs.trackers.trackio"},
    "trl": {"stages.sft", "policy.chat_templates"},
    "matplotlib": {"runs.plots", "runs.style", "runs.trackers.tensorboard", "course.figures"},
    "plotly": {"comparison.charts", "comparison.curves", "comparison.drawing", "comparison.tracked"},
    "sqlite3": {"reference.keyed_store"},
    "greenlet": {"training.cohort"},
    "gguf": {"export", "policy.wheel_model"},
    "bitsandbytes": {"policy", "kernels.calibrated", "kernels.eight_bit", "kernels.nf4", "config.gpu"},
}
"""Wings and modules that may import a heavy library, so that replacing one touches little."""


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(source: str) -> Iterator[str]:
    """The names of the modules that a module imports, inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_heavy_libraries_stay_where_they_belong():
    strayed = []
    for path in PACKAGE.rglob("*.py"):
        own = name_of(path)
        for name in imported(path.read_text()):
            homes = ONLY_IN.get(name.split(".")[0])
            if homes is not None and not any(own == home or own.startswith(f"{home}.") for home in homes):
                strayed.append(f"{name} in {own}")
    assert strayed == []


def lint_imports(checkout: Path) -> subprocess.CompletedProcess:
    tool = Path(sys.executable).with_name("lint-imports")
    return subprocess.run([tool, "--no-cache"], cwd=checkout, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "line"),
    [
        (None, ""),
        ("losses/dpo.py", "from alignment.training.trainer import PreferenceTrainer"),
        ("kernels/matmul.py", "from alignment.scoring.head import score_hidden"),
        ("stages/chain.py", "def late():\n    from alignment.comparison import write_comparison"),
        ("attic/__init__.py", ""),
        ("data/layouts/columns.py", "from alignment.data.sources.hub import read_hub"),
    ],
)
def test_the_contract_fails_on_a_planted_upward_import(module, line, tmp_path):
    """An import at the top, one inside a function, one between rooms, a wing without a place; unplanted it holds."""
    shutil.copytree(PACKAGE, tmp_path / "alignment", ignore=shutil.ignore_patterns("__pycache__", "bundled"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    if module is not None:
        planted = tmp_path / "alignment" / module
        planted.parent.mkdir(exist_ok=True)
        with planted.open("a") as file:
            file.write(f"\n{line}\n")
    done = lint_imports(tmp_path)
    assert (done.returncode == 0) == (module is None), done.stdout + done.stderr


def test_no_file_is_too_long_to_be_read():
    """450 lines are the limit of CONTRIBUTING.md."""
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    long = {path.name: count for path in files if (count := len(path.read_text().splitlines())) > 450}
    assert len(files) > 300 and not long
