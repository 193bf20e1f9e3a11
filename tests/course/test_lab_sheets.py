"""The lab sheets: one for each notebook, a page long, and true of it."""

import math
import re
from pathlib import Path

import nbformat
import pytest

from alignment.config.compose import load
from alignment.course import lab

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PARTS = ["Goal", "Steps", "Questions", "What a good answer shows", "Hand in"]
LINES_OF_A_PAGE = 45
EACH = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
IN_WORDS = {5: "five", 6: "six", 7: "seven", 8: "eight", 13: "thirteen", 20: "twenty"}


def sheet(path: Path) -> str:
    return (ROOT / "docs" / f"lab-{path.name[0]}.md").read_text()


def part(text: str, title: str) -> str:
    return text.partition(f"## {title}\n")[2].partition("\n## ")[0].strip()


def numbered(text: str) -> list[str]:
    """The points of a numbered list, each in one line."""
    points = re.split(r"^(?=\d\. )", text, flags=re.MULTILINE)
    return [" ".join(point.split()) for point in points if point[:1].isdigit()]


def sources(path: Path) -> str:
    return "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells)


def test_there_is_one_for_each_notebook():
    assert sorted(path.name for path in (ROOT / "docs").glob("lab-*.md")) == [f"lab-{n}.md" for n in range(1, 6)]


@EACH
def test_they_have_one_shape_and_fit_a_page(path):
    text = sheet(path)
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == PARTS
    assert text.count("\n") <= LINES_OF_A_PAGE
    title = sources(path).partition("\n")[0].removeprefix(f"# {path.name[0]}. ")
    assert text.startswith(f"# Lab {path.name[0]}: {title}\n") and path.name in text
    assert "**time**" in text and "**needs**" in text


@EACH
def test_the_questions_are_those_of_the_notebook_and_each_has_its_answer(path):
    asked = numbered(
        sources(path).partition("## Questions")[2].replace(r"$\beta\,\sigma(-\beta m)$", "beta sigmoid(-beta m)")
    )
    text = sheet(path)
    assert numbered(part(text, "Questions")) == asked
    assert len(numbered(part(text, "What a good answer shows"))) == len(asked)


@EACH
def test_what_the_steps_name_is_in_the_notebook(path):
    """Headings in bold, code, and words in quotation marks."""
    notebook, steps = sources(path), part(sheet(path), "Steps")
    headings = re.findall(r"^#+ (.+)$", notebook, re.MULTILINE)
    named = re.findall(r"\*\*(.+?)\*\*", steps)
    assert named and [name for name in named if name not in headings] == []
    for code in re.findall(r"`([^`]+)`", steps):
        assert code in notebook, code


@EACH
def test_columns_that_a_good_answer_quotes_exist(path):
    """Rows of the table of notebooks 3 and 4 are keys of `lab.table`."""
    rows = lab.table({"run": lab.RunFiles(Path("there"))})[0]
    known = sources(path) + "".join(rows) + (ROOT / "README.md").read_text()
    for code in re.findall(r"`([^`]+)`", part(sheet(path), "What a good answer shows")):
        assert code in known or code.startswith("python -m alignment.plan"), code


@EACH
def test_times_are_those_of_the_notebook(path):
    """In words, in the notebook, on the sheet, in the table of the course, and in the README."""
    number, of_notebook = int(path.name[0]), sources(path).partition("\n\n")[2]
    if number < 3:
        assert "of which one computes" in sheet(path)
        return
    course = (ROOT / "docs" / "course.md").read_text()
    [row] = re.findall(r"^\| notebooks 3, 4, 5 \| (.+) \| (.+); before Ampere .+ \|$", course, re.MULTILINE)
    for column, where in zip(row, ("CPU cores", "GPU"), strict=True):
        minutes = int(re.findall(r"\d+", column)[number - 3])
        assert f"about {IN_WORDS[minutes]} minutes on {'two ' if where == 'CPU cores' else 'a '}{where}" in of_notebook
        assert re.search(
            rf"about {IN_WORDS[minutes]} compute on two cores|or {IN_WORDS[minutes]} on a GPU", sheet(path)
        )
        if where == "CPU cores":
            assert re.search(
                rf"^\| \[{number}\].*\| about {minutes} minutes \|$", (ROOT / "README.md").read_text(), re.M
            )


def test_numbers_that_no_seed_changes_are_right():
    """Lab 2: sigmoid(-beta m) = share. Lab 4: two shares, power 80%, two-sided 5%, in two sets of items."""
    text = sheet(NOTEBOOKS[1])
    for share, odds in ((0.1, 9), (0.05, 19)):
        for beta in (0.1, 0.3):
            margin = math.log(odds) / beta
            assert beta / (1 + math.exp(beta * margin)) == pytest.approx(share * beta)
            assert f"{margin:.1f}" in text
    items = (1.959964 + 0.841621) ** 2 * (0.9 * 0.1 + 0.92 * 0.08) / 0.02**2
    assert "about 3,200 pairs" in sheet(NOTEBOOKS[3]) and round(items, -2) == 3200


def test_the_course_says_what_both_recipes_are():
    text = (ROOT / "docs" / "course.md").read_text()
    here, there = (load(f"recipe={lab.RECIPES[where]}") for where in ("cpu", "gpu"))
    rows = {
        name: len((ROOT / f"alignment/data/bundled/quickstart_{name}.jsonl").read_text().splitlines())
        for name in ("sft", "train")
    }
    numbers = [(c.sft.data.limit or rows["sft"], c.data.limit or rows["train"]) for c in (here, there)]
    assert "| training | " + " | ".join(f"{sft} conversations, {pairs} pairs" for sft, pairs in numbers) + " |" in text
    assert there.model.name in text and there.quantization is not None and here.quantization is None
    assert here.data.source == there.data.source and here.data.eval_limit == there.data.eval_limit
    assert here.evaluation == there.evaluation and here.loss == there.loss and here.trainer == there.trainer
