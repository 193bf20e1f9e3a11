"""The chat in a browser, by gradio: columns, votes and heat lines. It serves this machine alone and calls nobody."""

from __future__ import annotations

import base64
import importlib
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from alignment.chat.heat import as_html
from alignment.chat.session import LETTERS, VOTES, Session, Settings, Stopped, Turn
from alignment.errors import UserError
from alignment.files import to_json

_EVERY = 0.1
"""Seconds between two looks at a growing answer."""
_ONE = "one at a time"
"""Group of the events that run a model, because the policies share a base, and of those that change a conversation."""
_STEPS = {"temperature": (0, 2, 0.05), "top_p": (0.05, 1, 0.05), "min_p": (0, 1, 0.05)}
"""Settings that have a slider."""


def require_gradio() -> None:
    """Refuse `--web` where its package is missing.

    Raises:
        UserError: it is.
    """
    if importlib.util.find_spec("gradio") is None:
        raise UserError(
            "--web needs the package gradio, which is not installed: pip install 'alignment[chat]' brings it, or chat "
            "in the terminal without --web."
        )


def serve(begun: Callable[[], Session], votes: Path, port: int | None) -> None:
    """Serve the page until Ctrl-C.

    Args:
        begun: makes the chat of one browser tab.
        votes: the file that votes are kept in.
        port: of this machine; None: a free one.

    Raises:
        UserError: the port is taken.
    """
    page = build(begun, votes)
    address = launch(page, port)
    sys.stdout.write(f"{address} (Ctrl-C ends it)\n")
    sys.stdout.flush()
    page.block_thread()


def launch(page: Any, port: int | None) -> str:
    """Begin to serve a page to this machine; returns its address.

    Raises:
        UserError: the port is taken.
    """
    gradio = _gradio()
    look = gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    try:
        _, address, _ = page.launch(
            server_name="127.0.0.1",
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=[],
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            theme=look,
            css_paths=[Path(__file__).with_name("chat.css")],
        )
    except OSError as error:
        raise UserError(f"The page cannot be served: {' '.join(str(error).split())}") from None
    return str(address)


def _gradio() -> Any:
    """The package, which asks these before it is imported whether it may call its makers."""
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return importlib.import_module("gradio")  # of the extra `chat`


@dataclass(slots=True)
class _Tab:
    """The chat of one browser tab.

    Attributes:
        texts: the answers that are being drawn.
        stop: somebody wants no more of the answer that is being drawn.
        is_gone: nor of the answers that come after it, because nobody looks any more.
    """

    session: Session
    texts: list[str] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)
    is_gone: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> _Tab:
        return self  # gradio copies what a page begins with

    def show(self, column: int, text: str) -> None:
        self.texts[column] = text.rstrip("\ufffd")
        if self.is_gone or self.stop.is_set():
            self.stop.clear()
            raise Stopped


def _said(role: str, text: str) -> dict[str, str]:
    """A message as gradio has it, which takes every text for HTML."""
    return {"role": role, "content": escape(text)}


def _messages(turns: Sequence[Turn], policy: int) -> list[dict[str, str]]:
    """A column."""
    found = []
    for turn in turns:
        reply = turn.replies[policy]
        found.append(_said("user", turn.question))
        found.append(_said("assistant", f"{reply.text}\n[{reply.cut}]" if reply.cut else reply.text))
    return found


class _Page:
    """The components of the page, and what they do."""

    def __init__(self, begun: Callable[[], Session], votes: Path) -> None:
        self._gradio = gradio = _gradio()
        self._begun = begun
        self._votes = votes
        first = begun()
        names = " against ".join(speaker.name for speaker in first.guests.speakers)
        self.blocks = gradio.Blocks(title=f"Chat: {names}", analytics_enabled=False, fill_width=True)
        with self.blocks:
            self._lay_out(first, names)
            self._connect()

    def _lay_out(self, first: Session, names: str) -> None:
        gradio = self._gradio
        gradio.HTML(f"<h1>Chat: {escape(names)}</h1>", padding=False)
        self.tab = gradio.State()
        with gradio.Row(equal_height=True):
            self.columns = [
                gradio.Chatbot(
                    label=title,
                    elem_id=f"answers-{LETTERS[column].lower()}",
                    render_markdown=False,
                    height="min(24rem, 45dvh)",
                    min_width=280,
                    buttons=[],
                    feedback_options=None,
                    placeholder="No answers yet.",
                )
                for column, title in enumerate(first.titles)
            ]
        with gradio.Row():
            self.question = gradio.Textbox(
                placeholder="Ask",
                show_label=False,
                elem_id="question",
                scale=8,
                min_width=120,
                max_lines=8,
                autofocus=True,
            )
            self.send = gradio.Button("Send", variant="primary", elem_id="send", min_width=70)
            self.stop = gradio.Button("Stop", elem_id="stop", min_width=70)
        self.ballots = []
        if first.columns == 2:
            with gradio.Row():
                for vote, label in zip(VOTES, ("A is better", "B is better", "Tie"), strict=True):
                    self.ballots.append(
                        gradio.Button(label, elem_id=f"vote-{vote}", interactive=False, min_width=80, size="md")
                    )
        with gradio.Row():
            self.heat = gradio.Button("What did alignment change?", elem_id="heat", min_width=80, size="sm")
            self.retry = gradio.Button("Retry", elem_id="retry", min_width=80, size="sm")
            self.undo = gradio.Button("Undo", elem_id="undo", min_width=80, size="sm")
            self.reset = gradio.Button("New conversation", elem_id="reset", min_width=80, size="sm")
        self.notice = gradio.HTML(elem_id="notice", padding=False)
        self.lines = gradio.HTML(elem_id="lines", padding=False)
        with gradio.Accordion("System text and sampling", open=False, elem_id="settings"):
            self.system = gradio.Textbox(
                first.system or "", label="System text (another one begins a new conversation)", lines=2
            )
            with gradio.Row():
                self.sampling = [self._control(key, value) for key, value in asdict(first.settings).items()]

    def _control(self, key: str, value: float) -> Any:
        if key in _STEPS:
            low, high, step = _STEPS[key]
            return self._gradio.Slider(low, max(high, value), value, step=step, label=key, min_width=200)
        return self._gradio.Number(value, label=key, precision=0, min_width=120)

    def _connect(self) -> None:
        gradio = self._gradio
        shown = [*self.columns, self.question, *self.ballots, self.notice, self.lines]
        asked = [self.tab, self.question, self.system, *self.sampling]
        draws: dict[str, Any] = {"outputs": shown, "concurrency_id": _ONE, "concurrency_limit": 1}
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        self.blocks.load(lambda: _Tab(self._begun()), None, self.tab, **quiet)
        gradio.on([self.send.click, self.question.submit], self._ask, asked, **draws, **quiet)
        self.retry.click(self._retry, [self.tab, self.system, *self.sampling], **draws, **quiet)
        self.heat.click(self._heat, self.tab, **draws, **quiet)
        self.stop.click(lambda tab: tab.stop.set(), self.tab, None, queue=False, **quiet)
        self.undo.click(self._undo, self.tab, **draws, **quiet)
        gradio.on(
            [self.reset.click, *(column.clear for column in self.columns)], self._reset, self.tab, **draws, **quiet
        )
        for vote, button in zip(VOTES, self.ballots, strict=False):
            button.click(self._vote(vote), self.tab, **draws, **quiet)

    # What happens

    def _ask(self, tab: _Tab, question: str, system: str, *sampling: float) -> Iterator[dict[Any, Any]]:
        session = tab.session
        if not question.strip():
            yield self._view(tab, "Write a question first.")
            return
        if (problem := self._take_settings(session, system, sampling)) is not None:
            yield self._view(tab, problem)
            return
        session.renew()
        yield from self._drawn(tab, question, list(session.turns), lambda: session.ask(question, tab.show))

    def _retry(self, tab: _Tab, system: str, *sampling: float) -> Iterator[dict[Any, Any]]:
        session = tab.session
        if (problem := self._take_settings(session, system, sampling)) is not None:
            yield self._view(tab, problem)
        elif not session.turns:
            yield self._view(tab, "Nothing was asked yet.")
        else:
            yield from self._drawn(
                tab, session.last.question, session.turns[:-1], lambda: session.retry(tab.show), keeps=True
            )

    def _drawn(
        self, tab: _Tab, question: str, before: Sequence[Turn], draw: Callable[[], Any], keeps: bool = False
    ) -> Iterator[dict[Any, Any]]:
        """The page while answers are drawn in a thread of their own, and when they are there."""
        failed: list[BaseException] = []

        def work() -> None:
            try:
                draw()
            except BaseException as error:
                failed.append(error)

        tab.texts = [""] * tab.session.columns
        tab.stop.clear()
        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            while worker.is_alive():
                worker.join(_EVERY)
                asked = _said("user", question)
                growing = [
                    [*_messages(before, policy), asked, _said("assistant", text or "…")]
                    for policy, text in zip(tab.session.order, tab.texts, strict=True)
                ]
                yield {
                    **self._filled(tab.session, growing),
                    **({} if keeps else {self.question: ""}),
                    **{button: self._gradio.Button(interactive=False) for button in self.ballots},
                    self.lines: "",
                    self.notice: "",
                }
        finally:  # also where the tab was closed
            tab.is_gone = True
            worker.join()
            tab.is_gone = False
            tab.stop.clear()
        if failed and not isinstance(failed[0], UserError):
            raise failed[0]
        yield self._view(tab, str(failed[0]) if failed else "") | ({self.question: question} if failed else {})

    def _take_settings(self, session: Session, system: str, sampling: Sequence[float]) -> str | None:
        """Take what the page says; returns what is wrong with it."""
        settings = Settings()
        try:
            for key, value in zip(asdict(settings), sampling, strict=True):
                settings = settings.changed(key, str(value))
        except UserError as error:
            return str(error)
        session.settings = settings
        if (system.strip() or None) != session.system:
            session.set_system(system.strip() or None)
        return None

    def _vote(self, vote: str) -> Callable[[_Tab], dict[Any, Any]]:
        def voted(tab: _Tab) -> dict[Any, Any]:
            hid = tab.session.hides
            try:
                tab.session.vote(vote, self._votes)
            except UserError as error:
                return self._view(tab, str(error))
            named = f" {', '.join(tab.session.titles)}. The next question begins a new conversation." if hid else ""
            return self._view(tab, f"The vote is in {self._votes}.{named}")

        return voted

    def _undo(self, tab: _Tab) -> dict[Any, Any]:
        try:
            question = tab.session.undo()
        except UserError as error:
            return self._view(tab, str(error))
        return self._view(tab) | {self.question: question}

    def _reset(self, tab: _Tab) -> dict[Any, Any]:
        tab.session.reset()
        return self._view(tab)

    def _heat(self, tab: _Tab) -> dict[Any, Any]:
        try:
            found = [(title, tab.session.heat(column)) for column, title in enumerate(tab.session.titles)]
        except UserError as error:
            return self._view(tab, str(error))
        parts = [as_html(title, heat) for title, heat in found if heat is not None]
        return self._view(tab) | {self.lines: f'<div class="heats">{"".join(parts)}</div>'}

    def _view(self, tab: _Tab, notice: str = "") -> dict[Any, Any]:
        """The page as the chat is now."""
        session = tab.session
        votable = bool(session.turns) and session.last.winner is None
        return {
            **self._filled(session, [_messages(session.turns, policy) for policy in session.order]),
            **{button: self._gradio.Button(interactive=votable) for button in self.ballots},
            self.notice: f"<p>{escape(notice)} {_saved(session)}</p>",
            self.lines: "",
        }

    def _filled(self, session: Session, messages: Sequence[Sequence[dict[str, str]]]) -> dict[Any, Any]:
        """The columns with their titles."""
        parts = zip(self.columns, messages, session.titles, strict=True)
        return {column: self._gradio.Chatbot(list(some), label=title) for column, some, title in parts}


def _saved(session: Session) -> str:
    """A link that saves the conversation, which is in the link itself; none while names are hidden."""
    if not session.turns or session.hides:
        return ""
    content = base64.b64encode(to_json(session.saved(), indent=2)).decode()
    return f'<a download="chat.json" href="data:application/json;base64,{content}">Save as JSON</a>'


def build(begun: Callable[[], Session], votes: Path) -> Any:
    """The page, which `launch` serves; arguments as `serve` has them."""
    return _Page(begun, votes).blocks
