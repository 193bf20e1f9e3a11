"""The bundle for a GPU machine: what is pruned, what is counted, and when it is too large to travel."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from alignment.errors import UserError
from tests.gpu import bundle

CONSTRAINTS = (bundle.ROOT / "constraints.txt").read_text()


def unpacked(folder: Path) -> Path:
    """A folder as pip leaves it."""
    for name in (
        "bitsandbytes/__init__.py", "bitsandbytes/libbitsandbytes_cpu.so", "bitsandbytes/libbitsandbytes_cuda130.so",
        "bitsandbytes/libbitsandbytes_cuda126.so", "trl/__init__.py", "trl/tests/test_it.py", "trl/old.pyc",
        "trl-1.16.0.dist-info/METADATA", "trl-1.16.0.dist-info/RECORD", "greenlet/_greenlet.so",
        "greenlet/greenlet.cpp", "bin/trl",
    ):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"0" * 2**18)
    return folder


def test_pruning_keeps_what_a_run_reads(tmp_path):
    folder = unpacked(tmp_path / "site")
    bundle.prune(folder)
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == {
        "bitsandbytes/__init__.py", "bitsandbytes/libbitsandbytes_cpu.so", "bitsandbytes/libbitsandbytes_cuda130.so",
        "trl/__init__.py", "trl-1.16.0.dist-info/METADATA", "greenlet/_greenlet.so",
    }  # fmt: skip
    assert bundle.sizes(folder) == {"bitsandbytes": 0.75, "trl": 0.25, "trl-1.16.0.dist-info": 0.25, "greenlet": 0.25}


def test_a_release_of_bitsandbytes_without_the_library_is_refused(tmp_path):
    folder = unpacked(tmp_path / "site")
    (folder / "bitsandbytes" / "libbitsandbytes_cuda130.so").unlink()
    with pytest.raises(UserError, match=r"no libbitsandbytes_cuda130\.so"):
        bundle.prune(folder)


def test_a_bundle_that_cannot_travel_is_refused_in_one_sentence():
    bundle.check_size(bundle.MEBIBYTES - 3, 3)
    with pytest.raises(UserError, match=r"62\.0 MiB and the checkout 3\.0 MiB"):
        bundle.check_size(62, 3)


def test_the_checkout_itself_is_small():
    if (
        shutil.which("git") is None
        or subprocess.run(["git", "-C", bundle.ROOT, "ls-files"], capture_output=True).returncode
    ):
        pytest.skip("git cannot say what travels here")
    assert 1 < bundle.checkout_size() < bundle.MEBIBYTES / 4


@pytest.mark.parametrize("package", [*bundle.FROM_WHEELS, bundle.FROM_SOURCE])
def test_every_package_is_pinned(package):
    assert re.search(rf"^{package}==", CONSTRAINTS, re.MULTILINE), f"{package} has no line in constraints.txt"
