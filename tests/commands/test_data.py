"""The command `python -m alignment.data`: what it prints, its page, and the status with which it ends."""

import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from alignment.data.__main__ import main
from alignment.data.inspection.report import plain, visible
from tests.helpers.commands import pair, write_lines, write_project
from tests.helpers.endings import refusal_of

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\x1b[2J\u202e\"'&"


@pytest.fixture
def project(tmp_path, tiny_model_folder):
    return write_project(tmp_path / "project", tiny_model_folder)


@pytest.fixture
def run(tiny_model_folder, capsys, monkeypatch):
    """The status, the output and the errors for some arguments, with the tiny model."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments, model=True):
        named = [f"model.name={tiny_model_folder}"] if model else []
        status, said = 0, ""
        try:
            main([*map(str, arguments), *named])
        except SystemExit as end:
            status, said = 1, f"{end.code}\n"  # as Python does with a sentence
        out, err = capsys.readouterr()
        return status, out, err + said

    return run


def test_a_file_alone_is_shown_as_it_is(run, tmp_path):
    """No system text, no limit, no held-out file of the quickstart; at most 80 columns, no colours in a pipe."""
    file = tmp_path / "pairs.jsonl"
    write_lines(file, [pair(number) for number in range(1, 11)])
    status, out, err = run(file, "--rows", 1)
    assert (status, err) == (0, "")
    assert "10 training and 0 held-out rows, layout pairs" in out and "Likely mistakes: none found." in out
    assert "Answer the question" not in out and "\x1b" not in out
    assert re.search(r"scored +8 \. *\n +scored +template +<\|im_end\|>", out)
    tables = out[out.index("Lengths before any cut") :]
    assert max(len(line) for line in tables.splitlines() if "Overlap" not in line and "Row " not in line) <= 80


def test_a_recipe_shows_both_stages(run, project):
    """SFT first, as the run has them; overrides are those of a run."""
    status, out, _ = run("recipe=tiny", "--config-dir", project, "data.max_length=40", "data.max_prompt_length=30")
    assert status == 0
    assert out.index("SFT data: ") < out.index("Preferences: ")
    assert "sft.data.max_length=" in out and "data.max_length=40" in out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("record", "names"),
    [
        ({"prompt": "x", "completion": "y", "label": True}, "desirable"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}, "conversation"),
    ],
)
def test_a_file_gets_the_stage_and_loss_that_its_layout_wants(run, tmp_path, record, names):
    """Labelled rows get a loss of rows; conversations are for SFT, whose settings may be given as the data's."""
    file = tmp_path / "rows.jsonl"
    write_lines(file, [record] * 3)
    status, out, err = run(file, "data.max_length=100", "data.max_prompt_length=50")
    assert (status, err) == (0, "") and f"  {names}: " in out
    assert "data.max_length=100" in out


def test_it_ends_with_the_sentence_of_a_run(run, tmp_path):
    """Bad rows: all is shown, then the sentence. Nothing usable: the reasons, then the sentence."""
    file = tmp_path / "pairs.jsonl"
    write_lines(file, [pair(1), pair(2) | {"rejected": ""}])
    status, out, err = run(file)
    assert status == 1 and "A run would stop: " in out and "with an empty answer" in out
    assert (
        err.startswith(f"Error: {file} has 1 bad row, and data.max_bad_rows allows 0: row 2: ") and err.count("\n") == 1
    )
    write_lines(file, [pair(2) | {"rejected": ""}])
    status, out, err = run(file)
    assert status == 1 and "Rows left out" in out and err.startswith("Error: ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere.jsonl"], "There is no file or folder 'nowhere.jsonl'"),
        (["data.max_lenght=3"], "max_lenght"),
        (["x.jsonl", "--rows", "-1"], "--rows must be at least 0, not -1."),
        (["x.jsonl", "--rows", "many"], "--rows: invalid int value: 'many'"),
        (["x.jsonl", "--htm", "y"], "did you mean --html?"),
        ([], "the following arguments are required"),
    ],
)
def test_wrong_arguments_end_in_one_sentence(tmp_path, tiny_model_folder, monkeypatch, arguments, sentence):
    """No file, no such setting, options that there are not."""
    monkeypatch.chdir(tmp_path)
    said = refusal_of(main, [*arguments, f"model.name={tiny_model_folder}"] if arguments else [])
    assert said.startswith("Error: ") and sentence.lower() in said.lower()


class Page(HTMLParser):
    """The elements and attributes of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)


def test_hostile_text_stays_text_in_the_page_and_the_terminal(run, tmp_path):
    """In prompts, answers, names of files and what a sentence quotes: no script, no handler, no control character."""
    folder = tmp_path / "a<b>&'"
    folder.mkdir()
    file, html = folder / "pairs.jsonl", tmp_path / "page.html"
    rows = [{"prompt": f"{n} {HOSTILE}", "chosen": f"Assistant: {HOSTILE}", "rejected": HOSTILE} for n in range(3)]
    write_lines(file, rows)
    status, out, err = run(file, "--html", html)
    assert status == 1 and "begins with the name of a role" in err
    assert "\x1b" not in out and "\u202e" not in out and "\\x1b" in out
    text = html.read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "img", "b"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "srcset")]
    assert "\x1b" not in text and "\u202e" not in text
    shown = "".join(page.text)
    assert "<script>alert(1)</script>" in shown.replace("\n", "") and "A run would stop" in shown
    assert "default-src 'none'" in text and "http" not in text.replace("http-equiv", "")


def test_every_token_is_on_the_page_and_long_runs_are_short_in_a_terminal(run, tmp_path):
    """A prompt of 200 signs: the page has them all, the terminal the first 48 and the last 16."""
    file, html = tmp_path / "pairs.jsonl", tmp_path / "page.html"
    write_lines(file, [{"prompt": "z" * 200, "chosen": "yes", "rejected": "no"}] * 2)
    status, out, _ = run(file, "--html", html, "--rows", 1, "data.max_length=300", "data.max_prompt_length=250")
    assert status == 0 and "[... 136 tokens ...]" in out.replace("\n", " ").replace("  ", "")
    assert html.read_text(encoding="utf-8").count(">z</span>") == 200


def test_signs_that_cannot_be_seen_are_written_out():
    """Spaces, line breaks, controls and a token inside a character."""
    assert visible(" a\n\t\x07") == "·a⏎⇥\\x07" and visible("") == "▫"
    assert plain("a b\u200fc\n") == "a b\\u200fc\\n"


def test_the_words_say_what_the_colours_say(run, tmp_path, monkeypatch):
    """In a terminal the same words have colours."""
    file = tmp_path / "pairs.jsonl"
    write_lines(file, [pair(number) for number in range(1, 4)])
    _, piped, _ = run(file)
    monkeypatch.setattr(
        "alignment.data.__main__.Console", lambda width: Console(width=80, force_terminal=True, color_system="standard")
    )
    _, coloured, _ = run(file)
    assert "\x1b[32m" in coloured and re.sub(r"\x1b\[[0-9;]*m", "", coloured) == piped
