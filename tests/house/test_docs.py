"""Names, files, commands and settings in the documents exist, and the site builds with every link whole."""

import importlib
import importlib.util
import re
import shlex
import tomllib
from functools import cache
from pathlib import Path

import pytest

from alignment.assessment.exports import FORMS
from alignment.config.compose import as_plain, compose_node, load, register
from alignment.losses import LOSSES

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "recipes/README.md", "conf/loss/README.md")),
    *(ROOT / "tests" / "bench" / name for name in ("README.md", "PROFILE.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
"""CHANGELOG.md is none of them: it names what no longer is."""
OUR_OWN = re.compile(r"--config-dir|recipe=(mine|tickets|<name>|bench_sweep)|data\.source=\S*(pairs|tickets)")
"""Commands on files that the reader makes first, or that the benchmark brings."""


@cache
def builder():
    spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def pages() -> dict[str, str]:
    return builder().gather()


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def layers(container: str) -> list[set[str]]:
    """The order of the wings, or of the rooms of one, in its contract, from the top; a layer may have several."""
    contracts = tomllib.loads(text_of(ROOT / "pyproject.toml"))["tool"]["importlinter"]["contracts"]
    [contract] = [contract for contract in contracts if contract["containers"] == [container]]
    return [set(re.split(r"\W+", layer)) for layer in contract["layers"]]


each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())


def exists(dotted: str) -> bool:
    """Whether a module, or a name in one, exists."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for name in parts[end:]:
            if not hasattr(found, name):
                return False
            found = getattr(found, name)
        return True
    return False


@each_document
def test_modules_and_files_exist(path):
    text = text_of(path)
    for dotted in set(re.findall(r"\b((?:alignment|tests)(?:\.[A-Za-z_]\w*)+)(?![\w/]|\.[a-z])", text)):
        assert exists(dotted), dotted
    for file in set(re.findall(r"\b((?:alignment|conf|recipes|tests|docs|notebooks)/[\w./-]*\w\.\w+)\b", text)):
        assert (ROOT / file).exists() or (path.parent / file).exists(), file


@each_document
def test_make_targets_exist(path):
    targets = set(re.findall(r"^([a-z-]+):", text_of(ROOT / "Makefile"), re.MULTILINE))
    assert set(re.findall(r"(?:`|^ *)make ([a-z-]+)", text_of(path), re.MULTILINE)) <= targets


def commands(text: str) -> list[list[str]]:
    """The arguments of every `python -m alignment.run` in a text, without comments."""
    lines = re.findall(r"python -m alignment\.run((?:\\\n|[^\n`])*)", text)
    return [shlex.split(line.replace("\\\n", " "), comments=True) for line in lines]


@cache
def composes(*words: str) -> None:
    load(*words)


def values(word: str) -> list[str]:
    """A word of the command line once for each recipe or loss it names, and with the first of other swept values."""
    key, _, value = word.partition("=")
    if value[:1] in ("{", "["):
        return [word]
    found = value.split(",")
    return [f"{key}={one}" for one in (found if key in ("recipe", "loss") else found[:1])]


@pytest.mark.slow
@each_document
def test_commands_compose(path):
    for words in commands(text_of(path)):
        line = " ".join(words)
        if not words or OUR_OWN.search(line):
            continue
        kept = [w for w in words if "=" in w and not re.match(r"hydra|resume=", w) and "(" not in w]
        variants = [[]]
        for word in kept:
            variants = [[*variant, one] for variant in variants for one in values(word)]
        for variant in variants:
            composes(*variant)


@cache
def known_keys() -> set[str]:
    """Every setting of every group, dotted; those of losses by the fields of their classes."""
    found = {f"loss.{field}" for kind in LOSSES.values() for field in kind.__dataclass_fields__}

    def add(node, prefix):
        for key, value in node.items():
            found.add(prefix + key)
            if isinstance(value, dict):
                add(value, f"{prefix}{key}.")

    register()
    for words in (["stopping=asha", "tracking=wandb", "onpolicy=rounds"], ["recipe=dpo_qwen3"]):
        add(as_plain(compose_node(words)), "")
    return found


@each_document
def test_settings_exist(path):
    """Every `key.subkey=value` in code is a setting, and every `group=option` an option."""
    code = " ".join(code_of(text_of(path)))
    for key in set(re.findall(r"(?<![\w./-])([a-z_]+(?:\.[a-z_]+)+)=", code)):
        if key.startswith(("hydra.", "glibc.", "loss.settings.", "loss.weights.")):
            continue
        assert key in known_keys(), key
    groups = {folder.name for folder in (ROOT / "conf").iterdir() if folder.is_dir()}
    for group, option in set(re.findall(r"(?<![\w./-])([a-z_]+)=([a-z][\w/]*)", code)):
        if group in groups and option not in ("margin_dpo", *FORMS):
            assert (ROOT / "conf" / group / f"{option}.yaml").exists(), f"{group}={option}"


def code_of(text: str) -> list[str]:
    """Inline code, fenced blocks and indented blocks."""
    fenced = re.findall(r"^```[a-z]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [*fenced, *re.findall(r"`([^`\n]+)`", rest), *re.findall(r"^    (.+)$", rest, re.MULTILINE)]


# The order of the wings, where it is told


def test_the_order_of_the_wings_is_told_as_it_is_held():
    order = layers("alignment")
    told = re.search(r"stands below it:\n\n((?:    .*\n)+)", text_of(ROOT / "CONTRIBUTING.md"))[1]
    assert [set(re.findall(r"[a-z]+", re.split(r"  +", line.strip())[0])) for line in told.splitlines()] == order
    floors = re.findall(r"<li><b>([a-z ]+)</b> <span>", text_of(ROOT / "docs" / "architecture.md"))
    wings = [name for layer in order[1:-2] for name in layer]
    assert floors == ["commands", *wings, "ground files"]
    tree = re.findall(r"^  ([a-z]+)/ ", text_of(ROOT / "README.md"), re.MULTILINE)
    assert [name for name in tree if name in wings] == wings


def test_the_order_of_the_rooms_of_data_is_told_as_it_is_held():
    """By the table of docs/architecture.md, from the top."""
    place = {name: k for k, layer in enumerate(layers("alignment.data")[1:]) for name in layer}
    table = text_of(ROOT / "docs" / "architecture.md").partition("| room |")[2].partition("\n\n")[0]
    rooms = re.findall(r"^\| `([a-z]+)` \|", table, re.MULTILINE)
    assert set(rooms) == place.keys() and rooms == sorted(rooms, key=place.__getitem__)


# The site


def test_links_of_the_readme_lead_somewhere():
    """README.md is no page of the site, so its files and anchors are checked here."""
    text = text_of(ROOT / "README.md")
    builder().linked(text, "README.md", {}, ROOT)
    for file, anchor in re.findall(r"\]\(([^)#\s:]*)#([^)\s]+)\)", text):
        headings = re.findall(r"^#+ (.+)$", text_of(ROOT / (file or "README.md")), re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, anchor


def test_a_link_to_no_file_stops_the_build(tmp_path):
    with pytest.raises(builder().BrokenLink, match=r"docs/x.md: there is no nowhere.py"):
        builder().linked("[a](nowhere.py)", "docs/x.md", {}, ROOT)
    kept = "[a](../Makefile), [b](https://example.org)\n\n    [c](nowhere.py)\n"
    assert builder().linked(kept, "docs/x.md", {}, ROOT) == kept.replace("[a](../Makefile)", "a")
    assert builder().linked("[a](../CHANGELOG.md#x)", "docs/x.md", {"CHANGELOG.md": "c.md"}, ROOT) == "[a](c.md#x)"


def test_a_page_outside_the_navigation_stops_the_build(tmp_path, capsys):
    assert builder().build({**pages(), "attic.md": "# Attic"}, tmp_path / "site") == 1
    assert "attic.md" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("zensical") is None, reason="NO SITE: zensical is not installed here")
def test_the_site_builds_and_broken_links_fail_it(tmp_path, capsys):
    site = tmp_path / "site"
    assert builder().build(pages(), site) == 0, capsys.readouterr().err
    for page in site.glob("*.html"):
        loaded = re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=[\"']?(https?:)?//", page.read_text())
        assert loaded == [], page.name
    assert 'id="mallows_po"' in (site / "losses.html").read_text()

    # A page that there is not, and a heading that a page has not.
    broken = {**pages(), "index.md": f"{pages()['index.md']}\n[a](nowhere.md) and [b](data.md#nothing)\n"}
    assert builder().build(broken, tmp_path / "broken") != 0
    assert not (tmp_path / "broken").exists()
    said = capsys.readouterr().err
    assert "page does not exist" in said and "anchor does not exist" in said
