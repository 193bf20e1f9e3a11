"""`python -m alignment.losses`: every loss is listed, and explained by its docstring."""

import inspect

import pytest

from alignment.losses import LOSSES
from alignment.losses.__main__ import main


def test_lists_every_loss(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, loss in LOSSES.items():
        (row,) = [line for line in lines if line.startswith(f"│ {name} ")]
        assert ("needed" in row) == loss.needs_reference
        assert f"{loss.unit}s" in row
        assert "L = " in row


@pytest.mark.parametrize("name", LOSSES)
def test_explains_one(name, capsys):
    assert main(["show", name]) == 0
    shown = capsys.readouterr().out
    assert inspect.getdoc(LOSSES[name]) in shown
    assert "arXiv" in shown or name in ("repo", "nll")


@pytest.mark.parametrize(
    ("arguments", "said"), [(["show", "sipmo"], "Did you mean simpo?"), (["show"], "needs the name")]
)
def test_an_unknown_name_gets_one_sentence(arguments, said, capsys):
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("Error: ") and said in error and error.count("\n") == 1
