"""The chat in a real browser: two growing columns, votes, heat lines, on a desk and on a phone, and no call outside."""

import importlib.util
import json
import sys
import threading

import pytest

from tests.helpers.browser import CHROMIUM, browser
from tests.helpers.chats import SHORT, chat, write_adapter
from tests.helpers.patience import patience

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("gradio") is None, reason="NO GRADIO: nobody looked at the chat in a browser"
    ),
    pytest.mark.skipif(CHROMIUM is None, reason="NO BROWSER: nobody looked at the chat in a browser"),
]
CALLS: list[str] = []
"""Addresses that this process has connected to, besides its own machine."""


def hear(event: str, arguments: tuple) -> None:
    if event == "socket.connect" and isinstance(arguments[1], tuple) and arguments[1][0] not in ("127.0.0.1", "::1"):
        CALLS.append(str(arguments[1]))
    if event == "socket.getaddrinfo" and arguments[0] not in ("127.0.0.1", "localhost", None):
        CALLS.append(str(arguments[0]))


@pytest.fixture(scope="module")
def adapters(tiny_model_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return [write_adapter(tiny_model_folder, root / name, seed) for seed, name in enumerate(("one", "<b>two"), 1)]


class Served:
    """A page of a chat, and the browser that looks at it."""

    def __init__(self, page, sessions, votes):
        self.page = page
        self.sessions = sessions
        self.votes = votes

    @property
    def session(self):
        return self.sessions[-1]

    def ask(self, text):
        self.page.type("#question textarea", text)
        self.click("send")
        self.page.wait("!document.querySelector('#vote-a').disabled")

    def click(self, name):
        self.page.run(f"document.querySelector('#{name}').click()")

    def column(self, letter):
        return self.page.run(f"document.querySelector('#answers-{letter}').innerText")


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    """One browser for all tests, each of which opens a page of its own."""
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture
def served(adapters, window, tmp_path):
    """Serve a chat, blind where it is asked for."""
    from alignment.chat.web import build, launch

    sys.addaudithook(hear)
    open_pages = []

    def serve(**changed):
        sessions = []

        def begun():
            sessions.append(chat(*adapters, **changed))
            return sessions[-1]

        page = build(begun, tmp_path / "votes.jsonl")
        address = launch(page, None)
        open_pages.append(page)
        window.open(address)
        window.resize(1280, 900)
        window.wait("!!document.querySelector('#question textarea')")
        window.wait("!!document.querySelector('#send')")
        until = threading.Event()
        while len(sessions) < 2:  # the second is the tab's
            until.wait(0.1)
        return Served(window, sessions, tmp_path / "votes.jsonl")

    yield serve
    for page in open_pages:
        page.close()


def test_a_chat_in_the_browser(served, tmp_path):
    """What is shown is what was drawn; a vote is kept; the heat line has every token; nobody else is asked anything."""
    CALLS.clear()
    shown = served(settings=SHORT.changed("max_new_tokens", "9"))
    page = shown.page
    shown.ask("Add 3 & <i>4</i>")
    [turn] = shown.session.turns
    assert turn.question == "Add 3 & <i>4</i>", "what was typed is what was asked"
    for letter, reply in zip("ab", turn.replies, strict=True):
        seen = "".join(shown.column(letter).split())
        assert "Add3&<i>4</i>" in seen and "[cutafter9tokens]" in seen
        assert "".join(reply.text.replace("\r", "").split())[:3] in seen
    assert "A: one" in shown.column("a") and "B: <b>two" in shown.column("b")
    assert page.run("document.querySelector('#question textarea').value") == ""

    # The heat line
    shown.click("heat")
    page.wait("document.querySelectorAll('.heat-line').length == 2")
    tokens = page.run(
        "[...document.querySelectorAll('.heat-line')].map((line) => line.querySelectorAll('span').length)"
    )
    assert tokens == [len(reply.tokens) for reply in turn.replies]
    colours = page.run(
        "[...document.querySelectorAll('.heat-line span')].map((s) => getComputedStyle(s).backgroundColor)"
    )
    assert any("31, 111, 196" in colour for colour in colours) and any("217, 119, 0" in colour for colour in colours)
    heats = [shown.session.heat(column).summary for column in (0, 1)]
    assert all(heat in page.run("document.querySelector('#lines').innerText") for heat in heats)

    # Votes
    shown.click("vote-a")
    page.wait("document.querySelector('#notice').innerText.includes('An answer of A was cut')")
    assert not shown.votes.exists()
    shown.click("vote-tie")
    page.wait("document.querySelector('#notice').innerText.includes('The vote is in')")
    [row] = [json.loads(line) for line in shown.votes.read_text().splitlines()]
    assert row["winner"] == "tie" and row["conversation_a"][-1]["content"] == turn.replies[0].text
    assert page.run("document.querySelector('#vote-b').disabled"), "one vote for these answers"

    # What was said can be saved, taken back and begun anew
    saved = page.run("atob(document.querySelector('#notice a').href.split('base64,')[1])")
    assert json.loads(saved)["turns"][0]["winner"] == "tie"
    first = [reply.text for reply in turn.replies]
    shown.click("retry")
    page.wait("!document.querySelector('#vote-a').disabled")
    assert shown.session.last.attempt == 1 and [reply.text for reply in shown.session.last.replies] != first
    shown.click("undo")
    page.wait("document.querySelector('#question textarea').value == 'Add 3 & <i>4</i>'")
    assert shown.session.turns == []

    # On a phone, and in the dark
    shown.click("send")
    page.wait("!document.querySelector('#vote-a').disabled")
    page.resize(400, 850, dark=True)
    assert page.run("document.documentElement.scrollWidth <= innerWidth"), "nothing is wider than a phone"
    page.picture(tmp_path / "phone.png")
    outside = [a for a in page.addresses if not a.startswith(("http://127.0.0.1:", "data:", "blob:"))]
    assert (outside, page.complaints, CALLS) == ([], [], [])


def test_an_answer_grows_and_can_be_stopped(served, monkeypatch):
    """The text is on the page while it is drawn, and Stop ends the column that grows."""
    from alignment.chat import web
    from alignment.evaluation.sampling.local import LocalEngine

    own, step = LocalEngine.draw, threading.Semaphore(0)

    def draw(self, wanted, how):
        hear = self.hear

        def slowly(rows, tokens):
            assert step.acquire(timeout=patience(20))
            hear(rows, tokens)

        self.hear = slowly
        return own(self, wanted, how)

    monkeypatch.setattr(LocalEngine, "draw", draw)
    tabs, tab = [], web._Tab
    monkeypatch.setattr(web, "_Tab", lambda session: tabs.append(tab(session)) or tabs[-1])
    shown = served(settings=SHORT.changed("max_new_tokens", "20"))
    page = shown.page
    page.type("#question textarea", "Grow")
    shown.click("send")
    page.wait("document.querySelector('#answers-a').innerText.includes('…')")
    step.release(3)
    page.wait("!document.querySelector('#answers-a').innerText.includes('…')")
    assert shown.session.turns == [] and "…" in shown.column("b")
    shown.click("stop")
    assert tabs[-1].stop.wait(patience(20))
    step.release(100)
    page.wait("!document.querySelector('#vote-a').disabled")
    stopped, whole = shown.session.last.replies
    assert stopped.cut == "stopped" and len(stopped.tokens) == 4 and len(whole.tokens) > 4 and whole.finish is not None
    assert "[stopped]" in shown.column("a")


def test_a_blind_chat_in_the_browser(served):
    """Letters until the vote, then names; the next question begins a new conversation with letters."""
    shown = served(blind=True, chance=2)
    page = shown.page
    shown.ask("First")
    assert "one" not in shown.column("a").lower().replace("none", "")
    shown.click("heat")
    page.wait("document.querySelector('#notice').innerText.includes('vote first')")
    assert not page.run("!!document.querySelector('#notice a')"), "what is saved has the names"
    shown.click("vote-tie")
    page.wait("document.querySelector('#notice').innerText.includes('begins a new conversation')")
    assert page.run("!!document.querySelector('#notice a')")
    names = [title.partition(": ")[2] for title in shown.session.titles]
    assert names[0] in shown.column("a") and names[1] in shown.column("b")
    shown.ask("Second")
    assert "First" not in shown.column("a") and names[0] not in shown.column("a").splitlines()[0]
    assert len(shown.votes.read_text().splitlines()) == 1


def test_a_port_that_is_taken(adapters, tmp_path):
    from alignment.chat.web import build, launch
    from alignment.errors import UserError

    first, second = (build(lambda: chat(*adapters), tmp_path / "votes.jsonl") for _ in range(2))
    try:
        port = int(launch(first, None).rstrip("/").rpartition(":")[2])
        with pytest.raises(UserError, match="The page cannot be served"):
            launch(second, port)
    finally:
        first.close()
