"""The notebook for a hosted GPU: its cells run here with a tiny model, and its own settings compose."""

import os
import shlex
import stat
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client import KernelManager
from nbclient import NotebookClient

from alignment.config.compose import load
from tests.helpers.commands import write_project
from tests.helpers.patience import patience

ROOT = Path(__file__).parents[2]
PATH = ROOT / "notebooks" / "colab" / "dpo_on_a_t4.ipynb"


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def settings() -> str:
    [source] = [c.source for c in code_cells(nbformat.read(PATH, as_version=4)) if c.source.startswith("SETTINGS")]
    names: dict[str, str] = {}
    exec(source, names)
    return names["SETTINGS"]


def test_it_is_kept_without_outputs_and_is_valid():
    notebook = nbformat.read(PATH, as_version=4)
    nbformat.validate(notebook)
    assert not [cell for cell in code_cells(notebook) if cell.outputs or cell.execution_count is not None]
    assert set(notebook.metadata) == {"kernelspec", "language_info"}


def test_its_settings_compose_and_are_small():
    config = load(*shlex.split(settings()))
    assert config.model.name == "Qwen/Qwen3-0.6B-Base" and config.quantization is not None and config.tracking is None
    assert config.data.limit == config.sft.data.limit == 400 and config.data.max_length == 1024
    assert config.model.dtype.name == "float16", "a T4 has no bfloat16, and is slow in float32"


@pytest.mark.matrix
def test_its_cells_run(tmp_path, tiny_model_folder, monkeypatch):
    """All but the installation, with the recipe `tiny` in place of its settings."""
    project = write_project(tmp_path / "project", tiny_model_folder)
    script = tmp_path / "bin" / "alignment"
    script.parent.mkdir()
    script.write_text(f"#!{sys.executable}\nimport sys\nfrom alignment.console import main\nsys.exit(main())\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    notebook = nbformat.read(PATH, as_version=4)
    for cell in code_cells(notebook):
        if cell.source.startswith("%pip"):
            cell.source = "pass"
        elif cell.source.startswith("SETTINGS"):
            cell.source = f"SETTINGS = '--config-dir {project} recipe=tiny'"
        elif cell.source.startswith("!"):
            cell.source += "\nassert _exit_code == 0, _exit_code"
    path = f"{script.parent}{os.pathsep}{os.environ['PATH']}"
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(
        cwd=str(tmp_path),
        env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "ALIGNMENT_CACHE": str(tmp_path / "cache")},
    )
    try:
        NotebookClient(notebook, km=manager, timeout=int(patience(300))).execute()
    finally:
        manager.shutdown_kernel(now=True)
    said = {
        cell.source.split("\n")[0]: "".join(output.get("text", "") for output in cell.outputs)
        for cell in code_cells(notebook)
    }
    assert "Nothing is lacking for runs on this machine's CPU" in said["!alignment doctor"]
    assert "What a step needs, in GiB" in said["!alignment plan {SETTINGS}"]
    assert "Nothing was sent" in said["!alignment push outputs/t4 me/my-model"]
    [shown] = [
        output.data["text/markdown"]
        for cell in code_cells(notebook)
        for output in cell.outputs
        if "text/markdown" in output.get("data", {})
    ]
    assert "## What ran" in shown
