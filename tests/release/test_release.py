"""The version by git's tags, the bill of materials, and the audit with and without its service."""

import json
import re
import runpy
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.version import Version

RELEASE = Path(__file__).parents[2] / "release"
version = runpy.run_path(str(RELEASE / "version.py"))["version"]


@pytest.fixture
def commit(tmp_path):
    """Make a commit in a repository of its own, with a tag if one is named."""

    def git(*words: str) -> None:
        own = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false", "-c", "tag.gpgsign=false")
        subprocess.run(["git", *own, *words], cwd=tmp_path, check=True, capture_output=True)

    def one(tag: str | None = None) -> Path:
        if not (tmp_path / ".git").exists():
            git("init", "-q")
        git("commit", "-q", "--allow-empty", "-m", "x")
        if tag is not None:
            git("tag", "-a", tag, "-m", tag)
        return tmp_path

    return one


def test_the_version_is_that_of_the_tag(commit):
    assert re.fullmatch(r"0\.1\.0\.dev1\+g[0-9a-f]+", version(commit()))
    assert version(commit("v0.1.0")) == "0.1.0"
    after = version(commit())
    assert re.fullmatch(r"0\.1\.0\.post1\+g[0-9a-f]+", after)
    assert version(commit("v0.2.0rc1")) == "0.2.0rc1"
    candidate = version(commit())
    assert version(commit("v0.2.0")) == "0.2.0"
    assert version(commit("other")).startswith("0.2.0.post1+g")
    order = ["0.1.0.dev1", "0.1.0", after, "0.2.0rc1", candidate, "0.2.0"]
    assert sorted(order, key=Version) == order


def test_without_git_there_is_a_version_too(tmp_path, commit, monkeypatch):
    inner = commit("v3.0") / "unpacked"
    inner.mkdir()
    assert version(inner) == "0.1.0.dev0"  # of an archive inside another project's checkout
    monkeypatch.setenv("PATH", "")
    assert version(tmp_path) == "0.1.0.dev0"


def test_the_bill_of_materials_is_whole(tmp_path):
    """What is needed directly or not, each with its license; every reference leads to a component."""
    command = [sys.executable, str(RELEASE / "sbom.py"), str(tmp_path / "dist" / "bill.json")]
    subprocess.run(command, check=True, capture_output=True)
    bill = json.loads((tmp_path / "dist" / "bill.json").read_text())
    assert bill["bomFormat"] == "CycloneDX" and bill["metadata"]["component"]["name"] == "alignment"
    by_name = {component["name"].lower(): component for component in bill["components"]}
    assert {"torch", "transformers", "hydra-core", "mpmath"} <= by_name.keys() and "pytest" not in by_name
    assert by_name["torch"]["version"] == metadata.version("torch")
    assert all(component["licenses"] for component in by_name.values())
    refs = {component["bom-ref"] for component in bill["components"]} | {bill["metadata"]["component"]["bom-ref"]}
    assert len(refs) == len(by_name) + 1
    needs = {entry["ref"]: entry["dependsOn"] for entry in bill["dependencies"]}
    assert needs.keys() == refs and all(set(inner) <= refs for inner in needs.values())
    assert by_name["torch"]["bom-ref"] in needs[bill["metadata"]["component"]["bom-ref"]]


KNOWN = {"name": "idna", "version": "1", "vulns": []}
UNKNOWN = {"name": "idna", "skip_reason": "not found"}
BROKEN = {"name": "torch", "version": "1", "vulns": [{"id": "CVE-1", "fix_versions": ["2"]}]}


@pytest.mark.parametrize(
    ("answer", "status", "said"),
    [
        ([KNOWN, KNOWN], 0, ["2 packages, 0 known vulnerabilities."]),
        ([KNOWN, UNKNOWN], 0, ["1 packages, 1 unknown to the service, 0 known vulnerabilities."]),
        ([UNKNOWN], 0, ["NOT AUDITED: the vulnerability service knows none of 1 packages."]),
        ([BROKEN, KNOWN], 1, ["torch 1: CVE-1, fixed in 2", "2 packages, 1 known vulnerabilities."]),
        (None, 0, ["NOT AUDITED: the vulnerability service cannot be asked (no route to host)."]),
    ],
)
def test_the_audit_fails_for_a_vulnerability_alone(answer, status, said, tmp_path):
    """By a pip-audit of the test's own: the real one asks a service that is not there."""
    printed = "" if answer is None else f"print({json.dumps(json.dumps({'dependencies': answer}))})\n"
    (tmp_path / "pip_audit.py").write_text(f"import sys\n{printed}print('no route to host', file=sys.stderr)\n")
    done = subprocess.run(
        [sys.executable, str(RELEASE / "audit.py")],
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == said and done.returncode == status, done.stderr
