"""A chat in a terminal, or of lines from a pipe: answers appear as they are drawn, commands begin with a slash."""

from __future__ import annotations

import signal
import sys
import termios
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from alignment.chat.heat import as_text, legend
from alignment.chat.session import Session, Settings, Show, Stopped
from alignment.errors import UserError, did_you_mean, require
from alignment.files import atomic_write_bytes, to_json

_WIDE = 100
"""Columns of a terminal from which on two answers stand side by side."""
_TITLES = ("bold cyan", "bold magenta")
_JOINER = "\u200d"
"""Of emoji, which are one sign only with it."""

HELP = {
    "help": ("", "this list"),
    "system": ("[TEXT | none]", "the system text; another one begins a new conversation"),
    "settings": ("", "how answers are drawn"),
    **dict.fromkeys(asdict(Settings()), ("[VALUE]", "one of the settings")),
    "retry": ("", "other answers to the last question"),
    "undo": ("", "take the last question back"),
    "reset": ("", "a new conversation"),
    "vote": ("a | b | tie", "whose answers are better; kept in the file of votes"),
    "heat": ("", "what alignment has changed in the last answers, token by token"),
    "save": ("FILE", "the conversation as JSON"),
    "quit": ("", "end the chat, as Ctrl-D does"),
}


def steady(text: str) -> str:
    """A policy's text, in which nothing can steer a terminal or turn the direction of what follows."""
    return "".join(
        sign.encode("unicode_escape").decode()
        if unicodedata.category(sign) in ("Cc", "Cf", "Cs", "Co", "Cn") and sign not in ("\n", "\t", _JOINER)
        else sign
        for sign in text
    )


@contextmanager
def _silent_keys() -> Iterator[None]:
    """What is typed while answers are drawn is not shown: it would shift them. It is read afterwards."""
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    silent = [*before]
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


@dataclass(slots=True)
class _Answers:
    """The answers of one question on the screen as they grow."""

    console: Console
    titles: list[str]
    texts: list[str] = field(init=False)
    _live: Live | None = field(init=False, default=None)
    _at: int = field(init=False, default=-1)

    def __post_init__(self) -> None:
        self.texts = [""] * len(self.titles)

    def __enter__(self) -> _Answers:
        if self.console.is_terminal and len(self.titles) == 2 and self.console.width >= _WIDE:
            self._live = Live(self._table(), console=self.console, refresh_per_second=12)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
            self._live.stop()
        elif self._at >= 0:
            self.console.print()

    def show(self, column: int, text: str) -> None:
        """The text of a column as far as it is known."""
        before, self.texts[column] = self.texts[column], steady(text.rstrip("\ufffd"))
        if self._live is not None:
            self._live.update(self._table())
            return
        if column != self._at:
            if self._at >= 0:
                self.console.print()
            if len(self.titles) > 1:
                self.console.print(Text(self.titles[column], _TITLES[column]))
            self._at = column
        now = self.texts[column]
        # A few tokenizers write the text before a token otherwise once it is there
        grown = now[len(before) :] if now.startswith(before) else f"\n{now}"
        self.console.print(Text(grown), end="", soft_wrap=True)

    def _table(self) -> Table:
        table = Table(expand=True, box=None, padding=(0, 2, 0, 0))
        for title, style in zip(self.titles, _TITLES, strict=True):
            table.add_column(Text(title, style), ratio=1, overflow="fold")
        table.add_row(*map(Text, self.texts))
        return table


@dataclass(slots=True)
class Terminal:
    """The loop of a chat.

    Attributes:
        votes: the file that votes are kept in.
        console: where it is shown.
    """

    session: Session
    votes: Path
    console: Console
    _stops: bool = field(init=False, default=False)
    _saved: set[Path] = field(init=False, default_factory=set)
    _kept: int = field(init=False, default=0)

    def run(self) -> None:
        """Until /quit, or the end of the lines."""
        self._say(f"{' against '.join(s.name for s in self.session.guests.speakers)}. /help lists the commands.")
        self._settings("")
        for line in self._lines():
            text = line.strip()
            if text in ("/quit", "/exit"):
                return
            try:
                if text.startswith("/") and not text.startswith("//"):
                    self._command(*text[1:].partition(" ")[::2])
                elif text:
                    self._ask(text.removeprefix("/"))
            except UserError as error:
                self._say(f"Error: {error}", "red")

    def _lines(self) -> Iterator[str]:
        if not sys.stdin.isatty():
            for line in sys.stdin:
                self._say(f"> {line.rstrip()}", "dim")
                yield line
            return
        with suppress(ImportError):
            import readline  # noqa: F401 - arrows and history in `input`
        while True:
            try:
                yield input("> ")
            except EOFError:
                self.console.print()
                return
            except KeyboardInterrupt:
                self._say("\n/quit or Ctrl-D ends the chat.", "dim")

    def _say(self, text: str, style: str = "") -> None:
        self.console.print(Text(steady(text), style), soft_wrap=True)

    # Questions

    def _ask(self, question: str) -> None:
        if self.session.renew():
            self._say("The names are known, so this question begins a new conversation.", "dim")
        self._answered(lambda show: self.session.ask(question, show))

    def _answered(self, draw: Callable[[Show], None]) -> None:
        titles = self.session.titles
        with self._interrupts(), _Answers(self.console, titles) as answers:

            def show(column: int, text: str) -> None:
                answers.show(column, text)
                if self._stops:
                    self._stops = False
                    raise Stopped

            draw(show)
        for column in range(self.session.columns):
            if cut := self.session.reply(column).cut:
                name = f"{titles[column]}: " if self.session.columns > 1 else ""
                self._say(f"({name}{cut})", "dim")

    @contextmanager
    def _interrupts(self) -> Iterator[None]:
        """Ctrl-C ends an answer at its next token; pressed again before that, it ends the question."""

        def pressed(*_: object) -> None:
            if self._stops:
                raise KeyboardInterrupt
            self._stops = True

        before = signal.signal(signal.SIGINT, pressed)
        try:
            with _silent_keys():
                yield
        except KeyboardInterrupt:
            raise UserError("The question was taken back.") from None
        finally:
            self._stops = False
            signal.signal(signal.SIGINT, before)

    # Commands

    def _command(self, name: str, rest: str) -> None:
        rest = rest.strip()
        require(name in HELP, f"There is no command /{name}{did_you_mean(name, HELP)}; /help lists them.")
        if name in asdict(Settings()):
            if rest:
                self.session.settings = self.session.settings.changed(name, rest)
            self._say(f"{name}={getattr(self.session.settings, name)}", "dim")
        else:
            getattr(self, f"_{name}")(rest)

    def _help(self, _: str) -> None:
        table = Table(box=None, show_header=False, pad_edge=False)
        for name, (arguments, what) in HELP.items():
            table.add_row(Text(f"/{name} {arguments}"), Text(what))
        self.console.print(table)
        self._say("Anything else is a question; // begins one that starts with a slash. Ctrl-C ends an answer.", "dim")
        if self.session.columns > 1:
            self._say("Both policies are asked the same, and each goes on from its own answers.", "dim")

    def _settings(self, _: str) -> None:
        system = self.session.system
        self._say(f"{self.session.settings} system={'none' if system is None else repr(system)}", "dim")

    def _system(self, text: str) -> None:
        if text:
            self.session.set_system(None if text == "none" else text)
            self._say("A new conversation begins.", "dim")
        self._settings("")

    def _reset(self, _: str) -> None:
        self.session.reset()
        self._say("A new conversation begins.", "dim")

    def _undo(self, _: str) -> None:
        self._say(f"Taken back: {self.session.undo()}", "dim")

    def _retry(self, _: str) -> None:
        self._say(f"> {self.session.last.question}", "dim")
        self._answered(self.session.retry)

    def _vote(self, vote: str) -> None:
        hid = self.session.hides
        self.session.vote(vote.lower(), self.votes)
        self._kept += 1
        named = f" {', '.join(self.session.titles)}." if hid else ""
        self._say(f"Vote {self._kept} of this chat is in {self.votes}.{named}", "green")

    def _heat(self, _: str) -> None:
        for column, title in enumerate(self.session.titles):
            heat = self.session.heat(column)
            if self.session.columns > 1:
                self.console.print(Text(title, _TITLES[column]))
            if heat is None:
                self._say("An empty answer has no tokens.", "dim")
                continue
            self.console.print(as_text(heat))
            self.console.print(Text(steady(f"{heat.summary}; {heat.strongest}")))
        self.console.print(legend())

    def _save(self, name: str) -> None:
        require(bool(name), "/save needs the name of a file.")
        path = Path(name).expanduser()
        require(path in self._saved or not path.exists(), f"{path} is there already: name another file.")
        try:
            atomic_write_bytes(path, to_json(self.session.saved(), indent=2) + b"\n")
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}.") from None
        self._saved.add(path)
        self._say(f"The conversation is in {path}.", "dim")
