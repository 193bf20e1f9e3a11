"""Pack what a GPU machine without network lacks: `python -m tests.gpu.bundle`, or `make gpu-bundle`.

The machine has Python 3.12, torch with CUDA 13, transformers, accelerate and the usual numeric packages. The rest goes
into one git-ignored folder, unpacked, at the versions of constraints.txt: there `PYTHONPATH=.gpu-bundle` is the whole
installation. The model of the quickstart stays behind: its wheel holds 94 MiB that do not compress.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from alignment.errors import UserError

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".gpu-bundle"
MEBIBYTES = 64
"""As much as may travel to the machine at once: the bundle and the checkout."""

FROM_WHEELS = (
    "trl", "peft", "datasets", "dill", "multiprocess", "hydra-core", "omegaconf", "greenlet", "bitsandbytes",
    "liger-kernel",
)  # fmt: skip
FROM_SOURCE = "antlr4-python3-runtime"
"""Hydra's parser, published without a wheel. It is pure Python, so a wheel built anywhere serves."""

_MANYLINUX = (17, 24, 26, 27, 28, 31, 34)
"""Versions of glibc that wheels are named after and the machine is newer than; pip compares the names literally."""

_UNREAD = (
    "bin", "**/__pycache__", "**/tests", "**/test", "**/docs", "**/*.pyc", "**/*.pyx", "**/*.c", "**/*.cpp", "**/*.h",
    "**/*.hpp", "*.dist-info/RECORD", "*.dist-info/licenses",
)  # fmt: skip
"""What a run never reads. Versions and entry points in *.dist-info stay: libraries ask for them."""

_BITSANDBYTES_LIBRARIES = ("libbitsandbytes_cuda130.so", "libbitsandbytes_cpu.so")


def prune(folder: Path) -> None:
    """Remove what a run on the machine never reads.

    Raises:
        UserError: a library of bitsandbytes that the machine needs is not there.
    """
    libraries = folder / "bitsandbytes"
    for name in _BITSANDBYTES_LIBRARIES:
        if not (libraries / name).is_file():
            raise UserError(f"This release of bitsandbytes has no {name}, which the GPU machine needs: pin another.")
    for library in libraries.glob("*.so"):
        if library.name not in _BITSANDBYTES_LIBRARIES:
            library.unlink()
    for pattern in _UNREAD:
        for path in sorted(folder.glob(pattern)):
            if path.is_dir():
                shutil.rmtree(path)
            elif path.exists():
                path.unlink()


def sizes(folder: Path) -> dict[str, float]:
    """MiB of each entry of a folder, the largest first."""
    found = {
        entry.name: sum(file.stat().st_size for file in (entry, *entry.rglob("*")) if file.is_file()) / 2**20
        for entry in folder.iterdir()
    }
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def checkout_size() -> float:
    """MiB of the files that travel beside the bundle: tracked ones, and untracked ones that git does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    files = {ROOT / name for name in listed.stdout.split("\0") if name}
    return sum(file.stat().st_size for file in files if file.is_file()) / 2**20


def check_size(bundle: float, checkout: float) -> None:
    """Raises `UserError` where the bundle and the checkout, in MiB, are more than may travel."""
    if bundle + checkout > MEBIBYTES:
        raise UserError(
            f"The bundle has {bundle:.1f} MiB and the checkout {checkout:.1f} MiB, and {MEBIBYTES} MiB may travel "
            f"together: leave a package out of tests/gpu/bundle.py, or prune more of it there."
        )


def _pip(*arguments: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments], cwd=ROOT, check=True
    )


def install(packages: Sequence[str], folder: Path) -> None:
    """Unpack packages for the machine's Python and processor into a folder, without what they depend on."""
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in _MANYLINUX]
    _pip(
        "install", "--no-deps", "--no-compile", "--target", str(folder), "--only-binary=:all:", "--python-version=3.12",
        "--implementation=cp", "--platform=manylinux2014_x86_64", *platforms, *packages,
    )  # fmt: skip


def pack(folder: Path = FOLDER) -> None:
    """Make the bundle anew and print what it holds.

    Raises:
        UserError: it is too large to travel, or a package is not as expected. The earlier bundle is then still there.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".gpu-bundle-") as name:
        partial, wheels = Path(name, "site"), Path(name, "wheels")
        _pip("wheel", "--no-deps", "--constraint", "constraints.txt", "--wheel-dir", str(wheels), FROM_SOURCE)
        built = [str(wheel) for wheel in wheels.glob("*.whl")]
        install(["--constraint", "constraints.txt", *FROM_WHEELS, *built], partial)
        prune(partial)
        shutil.rmtree(wheels)
        held = sizes(partial)
        check_size(sum(held.values()), checkout_size())
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    for entry, size in held.items():
        if size >= 0.05:
            print(f"{size:6.1f} MiB  {entry}")
    print(f"{sum(held.values()):6.1f} MiB  in {folder}, beside a checkout of {checkout_size():.1f} MiB")


if __name__ == "__main__":
    try:
        pack(*(Path(argument).resolve() for argument in sys.argv[1:2]))
    except UserError as error:
        sys.exit(f"Error: {error}")
