"""Record what a terminal shows: `python docs/record.py` trains the quickstart, chats with its result, and draws both.

tmux (on Debian: apt install tmux) is the terminal, and the keys are typed into it. docs/images/dashboard.svg and
docs/images/chat.svg are what it showed, one screen after the other, faster than it was.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from rich.ansi import AnsiDecoder
from rich.cells import cell_len
from rich.console import Console
from rich.style import Style
from rich.terminal_theme import SVG_EXPORT_THEME as THEME
from rich.text import Text

IMAGES = Path(__file__).parent / "images"
COLUMNS, LINES = 104, 30
SETTINGS = "set -g default-terminal screen-256color\nset -g status off\n"
_SHELL = ("env", "PS1=$ ", "COLORTERM=truecolor", "CI=", "bash", "--norc")
_PROMPT = r"(\A|\n)\$\s*\Z"
_CHATS = r"(\A|\n)>\s*\Z"
_MOST = 24
"""Screens of a recording."""
_CELL, _LINE, _EDGE = 8.43, 18, 12
"""Pixels: the width of a sign, the height of a line, and around the screen."""

Frame = tuple[float, tuple[str, ...]]
"""Seconds for which a screen is shown, and its lines with their colours."""


@dataclass(slots=True)
class Terminal:
    """A shell in a terminal of its own."""

    folder: Path
    frames: list[Frame] = field(default_factory=list)

    def __enter__(self) -> Terminal:
        (self.folder / "tmux.conf").write_text(SETTINGS)
        self._tmux("-f", "tmux.conf", "new-session", "-d", "-x", str(COLUMNS), "-y", str(LINES), shlex.join(_SHELL))
        self.wait(_PROMPT, 10)
        return self

    def __exit__(self, *_: object) -> None:
        self._tmux("kill-server")

    def _tmux(self, *words: str) -> str:
        command = ["tmux", "-S", "socket", *words]
        return subprocess.run(command, cwd=self.folder, check=True, capture_output=True, text=True).stdout

    def type(self, text: str) -> None:
        """Type a line."""
        self._tmux("send-keys", "-l", text)
        self.frames.append((0.8, self.screen()))
        self._tmux("send-keys", "Enter")

    def screen(self) -> tuple[str, ...]:
        """What is shown, with its colours, and without the folder that is of this recording alone."""
        shown = self._tmux("capture-pane", "-p", "-e").replace(f"{self.folder}/", "")
        return tuple(shown.split("\n")[:LINES])

    def wait(self, pattern: str, seconds: float, every: float = 0.3, shown: float = 0.3, last: float = 2.5) -> None:
        """Record until the text on the screen is so."""
        until = time.monotonic() + seconds
        while True:
            time.sleep(every)
            now = self.screen()
            text = "\n".join(line.plain for line in lines_of(now)).rstrip()
            if not self.frames or now != self.frames[-1][1]:
                self.frames.append((shown, now))
            if re.search(pattern, text):
                self.frames.append((last, self.frames.pop()[1]))
                return
            if time.monotonic() > until:
                raise TimeoutError(f"{pattern} never came:\n{text}")


def lines_of(screen: Sequence[str]) -> list[Text]:
    """The lines of a screen; a colour goes on in the next one."""
    return list(AnsiDecoder().decode("\n".join(screen)))


def thinned(frames: Sequence[Frame]) -> list[Frame]:
    """At most `_MOST` screens: those that stand for longer, and of the others some that are evenly apart."""
    short = [k for k, (seconds, _) in enumerate(frames) if seconds < 0.5]
    room = max(2, _MOST - (len(frames) - len(short)))
    kept = {short[i * len(short) // room] for i in range(min(room, len(short)))}
    return [frame for k, frame in enumerate(frames) if k in kept or k not in short]


# Drawing


def _row(line: Text) -> str:
    """A line of the screen: what is behind its signs, and its signs."""
    behind, signs, place = [], [], 0.0
    for text, style, _ in line.render(Console(color_system="truecolor"), end=""):
        style, wide = style or Style(), round(cell_len(text) * _CELL, 1)
        if style.bgcolor and not style.bgcolor.is_default:
            colour = style.bgcolor.get_truecolor(THEME, foreground=False).hex
            behind.append(f'<rect x="{place:g}" width="{wide:g}" height="{_LINE}" fill="{colour}"/>')
        if text.strip():
            colour = style.color.get_truecolor(THEME).hex if style.color and not style.color.is_default else ""
            look = (
                f' fill="{colour}"' * bool(colour)
                + ' class="b"' * bool(style.bold)
                + ' opacity="0.6"' * bool(style.dim)
            )
            signs.append(f'<text x="{place:g}" y="13" textLength="{wide:g}"{look}>{escape(text)}</text>')
        place = round(place + wide, 1)
    return "".join(behind + signs)


def svg(frames: Sequence[Frame], title: str) -> str:
    """The recording as a picture: it moves where the reader has nothing against that, else it is the last screen."""
    rows: dict[str, int] = {}
    groups, moves, begun = [], [], 0.0
    whole = sum(seconds for seconds, _ in frames)
    for number, (seconds, screen) in enumerate(frames):
        used = [
            f'<use href="#r{rows.setdefault(line, len(rows))}" y="{k * _LINE}"/>'
            for k, line in enumerate(map(_row, lines_of(screen)))
            if line
        ]
        groups.append(f'<g class="f" id="f{number}">{"".join(used)}</g>')
        first, end = (f"{100 * at / whole:.2f}%" for at in (begun, begun + seconds))
        hidden = "0%{visibility:hidden}" if number else ""
        over = f"{end}{{visibility:hidden}}" if number + 1 < len(frames) else ""
        steps = f"{hidden}{first}{{visibility:visible}}{over}"
        moves.append(f"#f{number}{{animation-name:k{number}}}@keyframes k{number}{{{steps}}}")
        begun += seconds
    width, height = round(COLUMNS * _CELL + 2 * _EDGE), LINES * _LINE + 2 * _EDGE
    look = (
        "text{font:14px ui-monospace,'DejaVu Sans Mono',Menlo,Consolas,monospace;white-space:pre}"
        ".b{font-weight:bold}.f{visibility:hidden}.f:last-child{visibility:visible}"
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
            f"<title>{escape(title)}</title>",
            f"<style>{look}",
            f"@media (prefers-reduced-motion:no-preference){{.f{{animation:{whole:.1f}s step-end infinite}}",
            *moves,
            "}</style>",
            "<defs>",
            *(f'<g id="r{number}">{line}</g>' for line, number in rows.items()),
            "</defs>",
            f'<rect width="100%" height="100%" rx="8" fill="{THEME.background_color.hex}"/>',
            f'<g transform="translate({_EDGE} {_EDGE})" fill="{THEME.foreground_color.hex}">',
            *groups,
            "</g>",
            "</svg>",
            "",
        ]
    )


# What is recorded


def dashboard(terminal: Terminal) -> None:
    """The quickstart, from its first line to its last."""
    terminal.type("alignment run recipe=quickstart tracking=none hydra.run.dir=outputs/mine")
    terminal.wait(_PROMPT, 3600, every=2, last=4)


def chat(terminal: Terminal) -> None:
    """Two questions, a heat line and a vote."""
    terminal.type("alignment chat outputs/mine temperature=0 max_new_tokens=48")
    terminal.wait(_CHATS, 300)
    for line in ("What is 7 times 8?", "/heat", "/vote a", "Name three colours of the rainbow.", "/quit"):
        terminal.type(line)
        terminal.wait(_CHATS if line != "/quit" else _PROMPT, 300)


def record(name: str, what: Callable[[Terminal], None], folder: Path, title: str) -> None:
    """Record, and draw."""
    with Terminal(folder) as terminal:
        what(terminal)
    IMAGES.mkdir(exist_ok=True)
    path = IMAGES / f"{name}.svg"
    path.write_text(svg(thinned(terminal.frames), title), encoding="utf-8")
    sys.stdout.write(f"{path}: {path.stat().st_size / 1e3:.0f} kB\n")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="?", type=Path, help="a finished quickstart: its chat alone is recorded")
    run = parser.parse_args().run
    if shutil.which("tmux") is None:
        sys.exit("Error: tmux is not installed here (on Debian: apt install tmux).")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if run is None:
            record("dashboard", dashboard, folder, "The quickstart in a terminal, with its live view")
        else:
            shutil.copytree(run, folder / "outputs" / "mine")
        record("chat", chat, folder, "A chat with the quickstart's result beside its base, a heat line and a vote")


if __name__ == "__main__":
    main()
