"""The recipe `tiny` through the command.

A module that imports the fixtures `project` and `tiny` can use them; it names them in `__all__`.
"""

from pathlib import Path

import pytest

from tests.helpers.commands import Ended, command, write_project


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_model_folder) -> Path:
    """The configuration folder with the recipe `tiny`."""
    return write_project(tmp_path_factory.mktemp("project"), tiny_model_folder)


@pytest.fixture
def tiny(project, tmp_path, tmp_path_factory):
    """Run the recipe `tiny` in an empty folder."""

    def run(*arguments: str, patch=None) -> Ended:
        arguments = ("--config-dir", str(project), "recipe=tiny", *arguments)
        return command(*arguments, cwd=tmp_path, cache=tmp_path_factory.mktemp("cache"), patch=patch)

    return run
