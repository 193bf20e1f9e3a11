"""Build the site: `python docs/build.py` (or `make docs`) gathers the pages and has Zensical build them strictly.

Some pages have their home elsewhere (the recipes' README, the list of losses, the changelog). They are taken from there
at build time, so no page exists twice. A link to a file that is a page becomes a link to that page; a link to another
file of the repository becomes its name; a link to nothing stops the build.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

ELSEWHERE = {
    "recipes.md": "recipes/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "benchmark.md": "tests/bench/README.md",
    "profile.md": "tests/bench/PROFILE.md",
    "losses.md": "conf/loss/README.md",
}
"""Page of the site -> file of the repository. The losses are generated; their file stands for links to them."""

_LINK = re.compile(r"(?<!!)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])+)\]\((?P<target>[^)\s]+)\)")
_CODE = re.compile(r"(^```[\s\S]*?^```$|^ {4}.*$)", re.MULTILINE)
_WIDE = "---\nhide:\n  - toc\n---\n\n"
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class BrokenLink(Exception):
    """A link of a page leads to no file."""


def gather(root: Path = ROOT) -> dict[str, str]:
    """Every page of the site: its name -> its Markdown, with links that hold on the site."""
    from alignment.losses.__main__ import page

    homes = {path.name: path.relative_to(root).as_posix() for path in sorted((root / "docs").glob("*.md"))} | ELSEWHERE
    names = {home: name for name, home in homes.items()}
    pages = {}
    for name, home in homes.items():
        text = _WIDE + page() if name == "losses.md" else (root / home).read_text(encoding="utf-8")
        pages[name] = linked(text, home, names, root)
    return pages


def linked(text: str, home: str, names: dict[str, str], root: Path) -> str:
    """The text of the file `home` with its links changed to those of the site; code blocks stay as they are.

    Raises:
        BrokenLink: one of them leads to no file.
    """

    def changed(match: re.Match[str]) -> str:
        target, _, anchor = match["target"].partition("#")
        if not target or re.match(r"[a-z]+:", target):
            return match[0]
        path = (root / home).parent.joinpath(target).resolve()
        if not path.exists() or not path.is_relative_to(root):
            raise BrokenLink(f"{home}: there is no {target}")
        found = path.relative_to(root).as_posix()
        if found in names:
            return f"[{match['text']}]({names[found]}{'#' * bool(anchor)}{anchor})"
        return match["text"]

    parts = _CODE.split(text)
    return "".join(part if i % 2 else _LINK.sub(changed, part) for i, part in enumerate(parts))


def in_navigation(nav: list[dict[str, object]]) -> set[str]:
    """The pages that a navigation leads to."""
    found: set[str] = set()
    for entry in nav:
        for value in entry.values():
            found |= in_navigation(value) if isinstance(value, list) else {str(value)}
    return found


def build(pages: dict[str, str], site: Path, root: Path = ROOT) -> int:
    """Build these pages into `site`, which is replaced only if all is well; returns the exit code."""
    settings = (root / "zensical.toml").read_text(encoding="utf-8")
    if differing := in_navigation(tomllib.loads(settings)["project"]["nav"]) ^ pages.keys():
        sys.stderr.write(f"Error: {', '.join(sorted(differing))}: only in the navigation or only among the pages.\n")
        return 1
    with tempfile.TemporaryDirectory() as scratch:
        staged = Path(scratch)
        (staged / "zensical.toml").write_text(settings, encoding="utf-8")
        for folder in ("stylesheets", "images"):
            shutil.copytree(root / "docs" / folder, staged / "docs" / folder)
        for name, text in pages.items():
            (staged / "docs" / name).write_text(text, encoding="utf-8")
        command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
        done = subprocess.run(command, cwd=staged, capture_output=True, text=True)
        if done.returncode != 0:
            # What follows the warnings is Zensical's own traceback, which says nothing of the pages.
            said = _COLOUR.sub("", done.stderr.partition("Traceback")[0])
            sys.stderr.write(f"{said}\nError: the site was not built.\n")
            return 1
        shutil.rmtree(site, ignore_errors=True)
        shutil.copytree(staged / "site", site)
    return 0


def main() -> int:
    """Run the command; returns the exit code."""
    try:
        pages = gather()
    except BrokenLink as broken:
        sys.stderr.write(f"Error: {broken}.\n")
        return 1
    if code := build(pages, ROOT / "site"):
        return code
    sys.stdout.write("The site is in site/: open site/index.html, or read it with search at localhost:8000 after\n")
    sys.stdout.write("python -m http.server -d site\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
