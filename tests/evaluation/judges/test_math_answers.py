"""math-verify in a process of its own: with the package where it is installed, and with one that misbehaves."""

from __future__ import annotations

import importlib.util
import os

import pytest

from alignment.errors import UserError
from alignment.evaluation.judges import math_answers
from alignment.evaluation.judges.base import Item
from alignment.evaluation.judges.math_answers import MathJudge

STUB = """
import os, sys, time
print("libraries may print")

def parse(text):
    if text == "hang":
        time.sleep(60)
    if text == "die":
        os._exit(1)
    if text == "break":
        raise RuntimeError("odd")
    return [] if "words" in text else [text.strip("$ ")]

def verify(gold, answer):
    return gold == answer
"""


def items(*cases):
    return [Item("How much?", (answer,), {"answer": gold}) for answer, gold in cases]


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """A package of that name, for this process and for the one that it starts."""
    (tmp_path / "math_verify.py").write_text(STUB)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr(math_answers, "_PATIENCE", 0.5)


@pytest.mark.slow
def test_an_answer_that_hangs_kills_or_breaks_stops_no_other(stub):
    """It has no score, and the next is judged as if nothing had been."""
    cases = items(("1", "1"), ("hang", "1"), ("2", ["1", 2]), ("die", "1"), ("break", "1"), ("3", "words"), ("4", "5"))
    found = MathJudge().score(cases)
    assert [one.score for one in found] == [1.0, None, 1.0, None, None, None, 0.0]
    assert [one.correct for one in found] == [True, None, True, None, None, None, False]
    assert found[1].reasons == ("no verdict in time",) and "RuntimeError" in found[4].reasons[0]
    assert found[5].reasons == ("the solution is no mathematical expression",)


def test_without_the_package_one_sentence_names_the_extra(monkeypatch):
    """Before the run, as for a prompt without a solution."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'alignment\[math\]'"):
        MathJudge()
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(UserError, match="the data has none"):
        MathJudge().require([Item("How much?", ("1",))])


EQUAL = [
    ("The answer is $\\frac{1}{2}$.", "0.5", True),
    ("So \\boxed{\\frac{2}{4}}", "\\frac{1}{2}", True),
    ("It is 0.25.", "1/2", False),
    ("$x^2 + 2x + 1$", "$(x+1)^2$", True),
    ("\\boxed{\\{1, 2\\}}", "\\{2, 1\\}", True),
    ("I do not know.", "3", False),
]


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="NO math-verify: the real one was not asked"
)
def test_expressions_are_equal_by_value():
    """Fractions, polynomials and sets; words are no answer."""
    found = MathJudge().score(items(*((answer, gold) for answer, gold, _ in EQUAL)))
    assert [one.correct for one in found] == [right for _, _, right in EQUAL]
