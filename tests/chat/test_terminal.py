"""The chat of lines: commands, streaming, Ctrl-C, and texts that cannot steer the terminal."""

import io
import json
import os
import signal
import sys

import pytest
from rich.console import Console

from alignment.chat.__main__ import main
from alignment.chat.terminal import HELP, Terminal, steady
from alignment.evaluation.sampling.local import LocalEngine
from tests.helpers.chats import chat, finished, write_adapter


@pytest.fixture(scope="module")
def adapters(tiny_model_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return [write_adapter(tiny_model_folder, root / name, seed) for seed, name in enumerate(("one", "two"), 1)]


@pytest.fixture
def talk(adapters, tmp_path, monkeypatch):
    """What a chat says to some lines."""
    monkeypatch.chdir(tmp_path)

    def said(*lines, session=None, width=1000, terminal=False):
        session = session or chat(*adapters)
        out = io.StringIO()
        console = Console(file=out, width=width, force_terminal=terminal, color_system=None, highlight=False)
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        Terminal(session, tmp_path / "votes.jsonl", console).run()
        return out.getvalue(), session

    return said


def test_lines_of_a_pipe(talk, tmp_path):
    out, session = talk(
        "/help", "", "First", "//Second", "/temperature 0", "/settings", "/retry", "/heat", "/vote tie", "/save s.json",
        "/save s.json", "/undo", "/system Be kind.", "/system", "/system none", "/quit", "never asked",
    )  # fmt: skip
    assert all(f"/{name} " in out for name in HELP)
    assert "> First\nA: one\n" in out and "\nB: two\n" in out and "(A: one: cut after 6 tokens)\n" in out
    assert "temperature=0.0 top_p=1.0" in out and "log p(one) - log p(one base): " in out
    assert "Vote 1 of this chat is in" in out and len((tmp_path / "votes.jsonl").read_text().splitlines()) == 1
    assert "Taken back: /Second\n" in out and "system='Be kind.'" in out and "system=none" in out.partition("kind")[2]
    assert "Error" not in out and "never asked" not in out
    saved = json.loads((tmp_path / "s.json").read_text())
    assert [turn["question"] for turn in saved["turns"]] == ["First", "/Second"]
    text = saved["turns"][0]["answers"][0]["text"]
    assert steady(text.rstrip("\ufffd")) in out
    assert session.turns == []


def test_mistakes_are_told_and_the_chat_goes_on(talk, tmp_path):
    (tmp_path / "there").write_text("mine")
    out, session = talk("/undo", "/vote a", "/nosuch", "/temperatures 1", "/top_p 2", "/save", "/save there", "First")
    for told in (
        "Error: Nothing was asked yet.",
        "Error: There is no command /nosuch; /help lists them.",
        "There is no command /temperatures (did you mean temperature?)",
        "Error: top_p must be in (0, 1], not 2.0.",
        "Error: /save needs the name of a file.",
        "there is there already: name another file.",
    ):
        assert told in out
    assert (tmp_path / "there").read_text() == "mine" and len(session.turns) == 1


def test_a_blind_vote_names_the_policies(talk, adapters):
    session = chat(*adapters, blind=True, chance=1)
    out, _ = talk("First", "/heat", "/vote tie", "/heat", "Second", session=session)
    before, _, after = out.partition("Vote 1 of this chat is in")
    assert "A: one" not in before and "\nA\n" in before and "would tell which policy is which: vote first" in before
    order = list(session.order)
    assert "A: one, B: two." in after or "A: two, B: one." in after
    assert "this question begins a new conversation" in after and order in ([0, 1], [1, 0])
    assert len(session.turns) == 1 and after.rstrip().endswith("(B: cut after 6 tokens)")


@pytest.mark.parametrize(("width", "beside"), [(140, True), (60, False)])
def test_two_answers_stand_side_by_side_where_there_is_room(talk, width, beside):
    out, session = talk("First", width=width, terminal=True)
    lines = out.splitlines()
    assert any("A: one" in line and "B: two" in line for line in lines) is beside
    for reply in session.last.replies:
        assert steady(reply.text.rstrip("\ufffd")).splitlines()[0] in out


def test_ctrl_c_ends_an_answer_and_not_the_chat(talk, monkeypatch):
    """Pressed while A is drawn: A ends there, B is drawn, and so is the next question."""
    own, pressed = LocalEngine.draw, []

    def draw(self, wanted, how):
        hear = self.hear

        def heard(rows, tokens):
            if not pressed:
                pressed.append(1)
                os.kill(os.getpid(), signal.SIGINT)
            hear(rows, tokens)

        self.hear = heard
        return own(self, wanted, how)

    monkeypatch.setattr(LocalEngine, "draw", draw)
    out, session = talk("First", "Second")
    assert "(A: one: stopped)" in out and "(B: two: cut after 6 tokens)" in out
    assert [len(reply.tokens) for reply in session.turns[0].replies] == [1, 6]
    assert len(session.turns) == 2 and not session.turns[1].replies[0].cut.startswith("stopped")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_twice_takes_the_question_back(talk, monkeypatch):
    own = LocalEngine.draw

    def draw(self, wanted, how):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return own(self, wanted, how)

    monkeypatch.setattr(LocalEngine, "draw", draw)
    out, session = talk("First", "/settings")
    assert "Error: The question was taken back." in out and session.turns == []


def test_nothing_in_an_answer_steers_the_terminal():
    text = "a\x1b[31mb\x07\r\u202ec\tд\n日本 é\xa0🧑\u200d🚀"
    assert steady(text) == "a\\x1b[31mb\\x07\\r\\u202ec\tд\n日本 é\xa0🧑\u200d🚀"


# The command


def test_the_command_chats(adapters, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("First\n/vote tie\n"))
    main([str(adapters[0]), "device=cpu", "temperature=1", "max_new_tokens=3", "votes=mine.jsonl", "system=Be."])
    out = capsys.readouterr().out
    assert "one against base. /help lists the commands.\n" in out and "max_new_tokens=3" in out and "'Be.'" in out
    [row] = [json.loads(line) for line in (tmp_path / "mine.jsonl").read_text().splitlines()]
    assert row["winner"] == "tie" and row["model_b"] == "base" and row["conversation_a"][0]["content"] == "Be."


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["votes=a.jsonl"], "Name one or two policies, not 0"),
        (["a", "b", "c"], "Name one or two policies, not 3"),
        (["a", "temperatures=1"], r"There is no setting temperatures .did you mean temperature.."),
        (["a", "b", "against=sft"], "against= says whom a single run meets"),
        (["a", "against=you"], "against must be one of start, sft, none, not 'you'"),
        (["a", "top_k=half"], "top_k must be an integer, not 'half'"),
        (["a", "--port", "1"], "--port is the address of --web"),
        (["a", "--web", "--port", "70000"], "--port must be from 1 to 65535, not 70000"),
        (["a", "votes=votes.json"], "must end in .jsonl"),
        (["./nowhere"], "There is no folder ./nowhere"),
    ],
)
def test_what_the_command_refuses(words, told):
    with pytest.raises(SystemExit, match=f"Error: .*{told}"):
        main(words)


def test_the_browser_needs_gradio(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"Error: --web needs the package gradio.*pip install 'alignment\[chat\]'"):
        main(["a", "--web"])


def test_a_voted_answer_is_a_whole_one(talk, adapters):
    session = chat(*adapters)
    session.ask("First", lambda column, text: None)
    finished(session)
    out, _ = talk("/vote A", session=session)
    assert "Vote 1" in out and session.last.winner == 0
