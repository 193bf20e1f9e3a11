"""Test modules stand alone: what several of them need is in tests/helpers or in a conftest.py."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


def imported_tests(source: str) -> list[str]:
    """The test modules that a module imports."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return [name for name in found if name.startswith("tests.") and name.split(".")[-1].startswith("test_")]


def test_no_module_imports_a_test_module():
    found = {path.relative_to(TESTS).as_posix(): imported_tests(path.read_text()) for path in TESTS.rglob("*.py")}
    assert found and not {path: names for path, names in found.items() if names}


@pytest.mark.parametrize(
    "line",
    ["from tests.losses.test_dpo import helper", "from tests.losses import test_dpo", "import tests.losses.test_dpo"],
)
def test_such_an_import_is_found(line):
    assert imported_tests(f"def late():\n    {line}") == ["tests.losses.test_dpo"]


def test_ci_runs_every_test():
    """`make test` leaves the matrix out, `make test-matrix` runs nothing else, and CI runs both, by `make test-all`."""
    rules = dict(re.findall(r"^([\w-]+):.*\n\t(.*)$", (TESTS.parent / "Makefile").read_text(), re.MULTILINE))
    assert '-m "not matrix"' in rules["test"] and "-m matrix" in rules["test-matrix"]
    assert " -m pytest " in rules["test-all"] and " -m " not in rules["test-all"].partition("pytest")[2]
    assert "make test-all" in (TESTS.parent / ".ci" / "run").read_text().splitlines()
