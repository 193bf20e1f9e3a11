"""The wheel holds what a run reads, works away from the checkout, and declares and pins what the code imports."""

import ast
import os
import re
import runpy
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.helpers.patience import patience

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def canonical(requirement: str) -> str:
    """The normalised name of a distribution from a requirement line."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel, built from the archive of sources."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=patience(300))
    built, sources = sorted(folder.iterdir())
    version = runpy.run_path(str(ROOT / "release" / "version.py"))["__version__"]
    assert built.name == f"alignment-{version}-py3-none-any.whl" and sources.name == f"alignment-{version}.tar.gz"
    return zipfile.ZipFile(built)


@pytest.mark.slow
def test_the_wheel_holds_code_configuration_recipes_and_data(wheel):
    """Every file under the package, `conf` and `recipes`, byte by byte, and no file of anything else."""
    expected = {}
    assets = "alignment/_assets/"
    for folder, prefix in (("alignment", ""), ("conf", assets), ("recipes", assets)):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                expected[f"{prefix}{path.relative_to(ROOT).as_posix()}"] = path
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == set(expected)
    assert all(wheel.read(name) == path.read_bytes() for name, path in expected.items())
    for name in (
        "alignment/_assets/conf/config.yaml",
        "alignment/_assets/conf/loss/README.md",
        "alignment/_assets/recipes/quickstart.yaml",
        "alignment/data/bundled/quickstart_train.jsonl",
        "alignment/py.typed",
    ):
        assert name in names
    [entry] = [name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt")]
    assert wheel.read(entry).decode().split() == ["[console_scripts]", "alignment", "=", "alignment.console:main"]


@pytest.mark.slow
def test_the_wheel_holds_the_license_of_all_that_is_in_it(wheel):
    """Code, templates, style, recipes and the bundled rows are this project's own, so there is one license."""
    [name] = [name for name in wheel.namelist() if ".dist-info/licenses/" in name]
    assert wheel.read(name) == (ROOT / "LICENSE").read_bytes()
    kinds = {name.rpartition(".")[2] for name in wheel.namelist() if ".dist-info/" not in name}
    assert kinds == {"py", "yaml", "md", "jsonl", "j2", "css", "typed"}, "say whose the new kind of file is"


@pytest.mark.slow
def test_the_wheel_works_away_from_the_checkout(wheel, tmp_path):
    """It composes from its own copies and reads its own bundled rows."""
    wheel.extractall(tmp_path / "site")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    code = (
        "import alignment.config.compose as c, alignment.data.sources.loading as s, alignment.losses.__main__ as m\n"
        "config = c.load()\n"
        "print(c.asset_dir('conf'))\n"
        "print(c.asset_dir('recipes'))\n"
        "print(s.__file__)\n"
        "print(c.load('recipe=dpo_qwen3').loss.beta)\n"
        "print(len(s.load_rows(config.data, stage='preference').train) > 100)\n"
        "print(m.page_path().read_text() == m.page())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=elsewhere,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        timeout=patience(300),
    )
    assert done.returncode == 0, done.stderr
    package = tmp_path / "site" / "alignment"
    assert done.stdout.split() == [
        str(package / "_assets" / "conf"),
        str(package / "_assets" / "recipes"),
        str(package / "data" / "sources" / "loading.py"),
        "0.01",
        "True",
        "True",
    ]


@pytest.mark.slow
def test_every_imported_package_is_declared():
    """A package that only came along with another one would be gone one day."""
    declared = {canonical(line) for line in PROJECT["dependencies"]}
    for tracker in ("tensorboard", "mlflow", "trackio"):  # each is imported where `tracking.to` names it
        declared |= {tracker, *(canonical(line) for line in PROJECT["optional-dependencies"][tracker])}
    declared.add("triton")  # comes with torch where torch has CUDA, and only there it is imported
    found = packages_distributions()
    missing = set()
    for path in (ROOT / "alignment").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module]
            for top in {module.partition(".")[0] for module in modules} - sys.stdlib_module_names - {"alignment"}:
                if not {canonical(name) for name in found.get(top, [top])} & declared:
                    missing.add(f"{path.name}: {top}")
    assert missing == set()


def test_everything_declared_is_pinned_within_what_is_declared():
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"
    )
    pinned = {canonical(name): tuple(map(int, version.split("."))) for name, version in pins.items()}
    for line in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]:
        assert canonical(line) in pinned, line
        for operator, bound in re.findall(r"(>=|<)([\d.]+)", line):
            within = pinned[canonical(line)] >= tuple(map(int, bound.split(".")))
            assert within == (operator == ">="), line
