"""The files for docker, as far as they can be checked without one."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from alignment.console import COMMANDS

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def stages() -> list[str]:
    return re.findall(r"^FROM \S+ AS (\w+)$", DOCKERFILE, re.MULTILINE)


def test_hadolint_finds_nothing():
    tool = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:/usr/bin:/usr/local/bin")
    if tool is None:
        pytest.skip("NO HADOLINT: it is not installed here, so the Dockerfile was not looked at")
    done = subprocess.run([tool, "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_stages_are_those_that_are_named():
    assert stages() == ["cpu", "cuda", "wheel", "run"]
    machines = {"cpu", "cuda"}
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())
    assert {service["build"]["args"]["MACHINE"] for service in compose["services"].values()} == machines
    assert {service["image"] for service in compose["services"].values()} == {f"alignment:{m}" for m in machines}
    assert compose["volumes"].keys() == {"cache"}
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    assert container["build"]["target"] in stages()
    assert (ROOT / ".devcontainer" / container["build"]["dockerfile"]).resolve() == ROOT / "Dockerfile"
    assert container["postCreateCommand"] == "make .venv/.installed-dev"


def test_what_is_copied_is_there_and_what_is_needed_is_not_ignored():
    for source in re.findall(r"^COPY (?!--from)(\S+) ", DOCKERFILE, re.MULTILINE):
        assert (ROOT / source).exists(), source
    ignored = (ROOT / ".dockerignore").read_text().split()
    project = {"alignment", "conf", "recipes", "release", "pyproject.toml", "constraints.txt", "README.md", ".git"}
    assert ignored and not project & set(ignored)


def test_no_secret_and_no_host_is_in_the_files():
    files = ["Dockerfile", "compose.yaml", ".devcontainer/devcontainer.json"]
    text = "".join((ROOT / name).read_text() for name in files)
    assert "://" not in text
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())
    for service in compose["services"].values():
        assert set(service["environment"].values()) == {None}


def test_the_lines_of_the_page_name_commands():
    page = (ROOT / "docs" / "containers.md").read_text()
    named = re.findall(r"^docker .* (?:alignment|cuda|alignment:\w+) (\w+)", page, re.MULTILINE)
    assert named and set(named) <= set(COMMANDS)
