"""The course's notebooks: stripped of outputs, without logic of their own, and right where they are executed."""

from __future__ import annotations

import ast
import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml
from jupyter_client import KernelManager
from nbclient import NotebookClient

from alignment.course import lab as lab_module
from tests.helpers.commands import command
from tests.helpers.patience import patience

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
FIGURES = ("histograms(", "curves(", "metric_curves(", "planes(")


def cells(path: Path) -> list[Any]:
    """The code cells."""
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Path:
    """Where all notebooks of this module run, so that what one has trained the next finds."""
    return tmp_path_factory.mktemp("lab")


@pytest.fixture(scope="module")
def kernel(lab) -> Iterator[KernelManager]:
    """One kernel for all notebooks, which forgets before each what another has defined: it imports libraries once."""
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(cwd=str(lab), env=os.environ | {"ALIGNMENT_FAST": "1", "ALIGNMENT_CACHE": str(lab / "cache")})
    yield manager
    manager.shutdown_kernel(now=True)


def notebook_of(number: int) -> Any:
    [path] = FOLDER.glob(f"{number}_*.ipynb")
    return nbformat.read(path, as_version=4)


def train_beforehand(number: int, lab: Path, monkeypatch: pytest.MonkeyPatch, hardware: str = "auto") -> None:
    """Run the notebook's cell that trains here, and its command in a forked process; the notebook finds the runs."""

    def forked(module: str, *arguments: str) -> None:
        assert module == "alignment.run"
        ended = command(*arguments, cwd=lab, cache=lab / "cache")
        assert ended.code == 0, ended.err

    code = [cell.source for cell in notebook_of(number).cells if cell.cell_type == "code"]
    [training] = [source for source in code if "lab.train(" in source]
    monkeypatch.setattr(lab_module, "_command", forked)
    monkeypatch.setenv("ALIGNMENT_FAST", "1")
    monkeypatch.chdir(lab)
    exec(training, {"lab": lab_module, "RECIPE": lab_module.choose(hardware)})


def execute(number: int, kernel: KernelManager, asked: str, **replaced: str) -> Any:
    """Execute a notebook in fast mode; returns the value of an expression at its end, by way of JSON.

    Args:
        replaced: new right-hand sides of assignments by the name that is assigned to.
    """
    notebook = notebook_of(number)
    for name, value in replaced.items():
        [cell] = [cell for cell in notebook.cells if cell.source.startswith(f"{name} = ")]
        cell.source = f"{name} = {value}"
    notebook.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))
    notebook.cells.append(nbformat.v4.new_code_cell(f"import json\nprint(json.dumps({asked}))"))
    NotebookClient(notebook, km=kernel, timeout=int(patience(300))).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code" and cell.source.split("\n")[-1].startswith(FIGURES):
            assert any("image/png" in output.get("data", {}) for output in cell.outputs), cell.source
    return json.loads("".join(output.text for output in notebook.cells[-1].outputs if output.get("name") == "stdout"))


def test_there_are_five_in_their_order():
    assert [path.name[:2] for path in NOTEBOOKS] == ["1_", "2_", "3_", "4_", "5_"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_they_are_kept_without_outputs_and_are_valid(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert [cell for cell in cells(path) if cell.outputs or cell.execution_count is not None] == []
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_they_hold_no_logic_of_their_own(path):
    logic = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.For, ast.While, ast.If, ast.Try)
    for cell in cells(path):
        source = "\n".join(line for line in cell.source.split("\n") if not line.startswith("%"))
        assert [node for node in ast.walk(ast.parse(source)) if isinstance(node, logic)] == [], source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_they_begin_with_an_aim_and_end_with_questions(path):
    notebook = nbformat.read(path, as_version=4)
    first, last = notebook.cells[0].source, notebook.cells[-1].source
    assert first.startswith(f"# {path.name[0]}. ")
    assert "**Aim.**" in first
    assert last.startswith("## Questions")


@pytest.mark.matrix
def test_data_of_ones_own_are_explored(lab, kernel):
    """Four pairs by hand: the chosen one is longer in three; one comparison is judged in both directions."""
    pairs = [
        ("What is twice 7?", "It is 14.", "15"),
        ("What is twice 8?", "It is 16.", "17"),
        ("Name a colour", "red or blue", "red"),
        ("Name a colour", "red", "red or blue"),
    ]
    path = lab / "own data.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("prompt", "chosen", "rejected"), *pairs])
    asked = (
        "[lengths, groups.to_dict('records'), agreements.to_dict('index'), overlaps,"
        " [[d.first, d.second, d.similarity] for d in within], len(leaks)]"
    )
    lengths, groups, agreements, overlaps, within, leaks = execute(1, kernel, asked, SOURCE=repr(str(path)))
    assert lengths == {"prompt": [4, 4, 3, 3], "chosen": [3, 3, 3, 1], "rejected": [1, 1, 1, 3]}
    assert groups == [{"low": 2, "high": 2, "n": 4, "chosen_longer": 0.75}]
    assert agreements == {
        "repeats": {"n": 1, "ties": 0, "share": 0.0},
        "longer": {"n": 4, "ties": 0, "share": 0.75},
    }
    assert overlaps == pytest.approx([0, 0, 1 / 3, 1 / 3])
    assert within == [[2, 3, 1.0], [0, 1, 0.5]]
    assert leaks == 0


@pytest.mark.slow
def test_the_bundled_data_favour_short_answers(kernel):
    asked = "[len(rows), len(held_out), agreements.to_dict('index'), groups.chosen_longer.max()]"
    train, held_out, agreements, longer = execute(1, kernel, asked)
    assert (train, held_out) == (629, 133)
    assert agreements["rules"] == {"n": 629, "ties": 0, "share": 1.0}
    assert agreements["longer"]["share"] < 0.25
    assert longer < 0.5


@pytest.mark.slow
def test_the_gradient_is_what_the_text_says(kernel):
    asked = "[{name: f.push_up.tolist() for name, f in found.items()}, at_start.to_dict(), by_length.T.to_dict()]"
    push, start, by_length = execute(2, kernel, asked)
    margins = [m / 2 for m in range(-80, 81)]
    zero, far_left, far_right = margins.index(0), 0, -1
    # DPO: beta S(-beta m).
    assert [push["dpo"][i] for i in (far_left, zero, far_right)] == pytest.approx(
        [0.0982014, 0.05, 0.0017986], abs=1e-6
    )
    # IPO turns around at 1 / (2 tau) = 1 nat a token, 20 in all; the hinge stops at 1 / beta = 10.
    assert push["ipo"][margins.index(20)] == pytest.approx(0, abs=1e-9)
    assert push["ipo"][margins.index(21)] < 0 < push["ipo"][margins.index(19)]
    assert push["hinge"][margins.index(9)] == pytest.approx(0.1)
    assert push["hinge"][margins.index(11)] == 0
    # KTO: each of the two gained half; beta S(2) S(-2) at the ends.
    assert [push["kto"][i] for i in (far_left, zero, far_right)] == pytest.approx(
        [0.0104994, 0.025, 0.0104994], abs=1e-6
    )
    for name in ("dpo", "ipo", "kto", "hinge"):
        assert start["right"][name] == pytest.approx(start["even"][name]) == pytest.approx(start["wrong"][name])
    for name in ("simpo", "orpo"):
        assert start["right"][name] < start["even"][name] < start["wrong"][name]
    assert by_length["dpo"]["chosen (10 tokens)"] == pytest.approx(by_length["dpo"]["rejected (40 tokens)"])
    assert by_length["simpo"]["chosen (10 tokens)"] == pytest.approx(4 * by_length["simpo"]["rejected (40 tokens)"])


GPU = 'lab.choose("gpu")'
RUNS = "{name: [str(run.folder), run.summary['status']] for name, run in runs.items()}"


def final(lab: Path, folder: str, name: str) -> float:
    """A metric of the last evaluation, read without the package."""
    rows = [json.loads(line) for line in (lab / folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["stage"] == "preference" and row["split"] == "eval"][-1][name]


@pytest.mark.matrix
def test_two_losses_are_trained_and_their_metrics_read(lab, kernel):
    """By the command as a process of the notebook's own."""
    runs, table, samples = execute(3, kernel, f"[{RUNS}, table.to_dict('index'), len(samples)]")
    assert list(runs) == list(table) == ["loss=dpo", "loss=simpo"]
    for name, (folder, status) in runs.items():
        assert status == "finished"
        config = (lab / folder / "config.yaml").read_text()
        assert ("gamma_beta_ratio" in config) == (name == "loss=simpo")
        row = table[name]
        assert row["margin (nats)"] == final(lab, folder, "nats/margins") > 0
        assert row["margin (own units)"] == final(lab, folder, "rewards/margins")
        assert 0.5 < row["reward accuracy"] <= 1
        assert row["from"] < row["reward accuracy"] < row["to"]
    # DPO's own units are beta times nats.
    assert table["loss=dpo"]["margin (own units)"] == pytest.approx(0.1 * table["loss=dpo"]["margin (nats)"], rel=1e-5)
    assert samples == 8


@pytest.mark.matrix
@pytest.mark.parametrize("number", [3, 4, 5])
def test_all_cells_run_on_the_way_of_a_gpu(number, lab, kernel, monkeypatch):
    """The same cells with the switch on the GPU: a tiny Qwen3 in NF4, on the processor."""
    train_beforehand(number, lab, monkeypatch, "gpu")
    runs, table = execute(
        number,
        kernel,
        f"[{RUNS}, [len(table.columns), len(table)]]"
        if number < 5
        else f"[{RUNS}, [len(table.header), len(table.rows)]]",
        RECIPE=GPU,
    )
    assert len(runs) == {3: 2, 4: 3, 5: 6}[number] and 0 not in table
    for folder, status in runs.values():
        config, summary = (
            yaml.safe_load((lab / folder / name).read_text()) for name in ("config.yaml", "summary.json")
        )
        assert status == "finished" and summary["recipe"] == "lab_qwen3"
        assert config["quantization"] is not None and summary["model"]["quantization"] == "nf4"
        assert summary["model"]["model_type"] == "qwen3"


@pytest.mark.matrix
def test_beta_is_swept_and_the_curves_are_of_it(lab, kernel, monkeypatch):
    train_beforehand(4, lab, monkeypatch)
    runs, table, lines = execute(
        4, kernel, f"[{RUNS}, table.to_dict('index'), {{k: [x, list(y)] for k, (x, y) in lines.items()}}]"
    )
    betas = [0.03, 0.1, 0.3]
    assert list(runs) == [f"loss.beta={beta}" for beta in betas]
    for beta, (name, (folder, _)) in zip(betas, runs.items(), strict=True):
        assert table[name]["margin (nats)"] == final(lab, folder, "nats/margins")
        assert table[name]["margin (own units)"] == pytest.approx(beta * table[name]["margin (nats)"], rel=1e-5)
    assert len({row["margin (nats)"] for row in table.values()}) == 3
    assert lines["reward accuracy"] == [betas, [row["reward accuracy"] for row in table.values()]]


@pytest.mark.matrix
def test_a_comparison_is_made_and_read(lab, kernel, monkeypatch):
    train_beforehand(5, lab, monkeypatch)
    asked = (
        f"[{RUNS}, str(page), numbers.to_dict('records'), table.header, table.rows, noise.rows, headline(found),"
        " [title for title, _ in warned]]"
    )
    runs, page, numbers, header, rows, noise, said, warned = execute(5, kernel, asked)
    assert list(runs) == [f"loss={loss}, seed={seed}" for loss in ("dpo", "simpo", "ipo") for seed in (0, 1)]
    assert "<table" in (lab / page).read_text()
    assert [(row["loss"], row["seed"]) for row in numbers] == [
        (loss, seed) for loss in ("dpo", "simpo", "ipo") for seed in (0, 1)
    ]
    for row, (folder, _) in zip(numbers, runs.values(), strict=True):
        assert row["margin, nats"] == pytest.approx(final(lab, folder, "nats/margins"))
        assert row["n_pairs"] == 32
    assert {row[0] for row in rows} == {"DPO", "SimPO", "IPO"}
    assert all(len(row) == len(header) for row in rows)
    assert len(noise) == 3, "the first, and each other one behind it"
    assert rows[0][0] in said[0] and "3 variants" in said[0]
    # Four answers of a random model: nobody can win.
    assert any("There is no clear winner" in line for line in said)
    assert "A win rate could be a draw" in warned
