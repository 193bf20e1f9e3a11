"""`python -m alignment.losses [show KEY | docs]`: lists the losses, explains one, or writes the page of all of them.

All three read the same sources: the classes, the values and comments of `conf/loss/<key>.yaml`, and the table of
`alignment.losses.parity`.
"""

from __future__ import annotations

import inspect
import re
import shutil
import sys
import textwrap
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from alignment.errors import CommandParser, UserError, did_you_mean, ending_plainly
from alignment.files import asset_dir
from alignment.losses import LDDPO, LOSSES, OPD, Loss, Mixture, Quantity, SamPO, TrOPD, title
from alignment.losses.parity import CHECKS, Check, value_here

TOKEN_LEVEL = frozenset({LDDPO.name, SamPO.name, OPD.name, TrOPD.name})
"""These losses need single tokens; sums of log-probs and lengths are not enough."""

COLUMNS = ("loss", "title", "items", "reference", "reads", "state", "defaults", "purpose")

_GROUPS = {
    ("pair", True): "Pairs of a chosen and a rejected answer, against a reference",
    ("pair", False): "Pairs of a chosen and a rejected answer, without a reference",
    ("row", True): "Single answers labelled good or bad, against a reference",
    ("row", False): "Single answers labelled good or bad, without a reference",
    ("list", True): "Ranked lists of answers, against a reference",
    ("list", False): "Ranked lists of answers, without a reference",
}
_DRAWN = "Answers that the policy draws, against a teacher"
_MIXTURES = "Mixtures of these"


# ----------------------------------------------------------------------------------------------- options and settings


@dataclass(frozen=True, slots=True)
class Option:
    """One file of `conf/loss`: its values, and the source that its comments give for each value."""

    values: dict[str, Any]
    sources: dict[str, str]


def read_option(name: str) -> Option:
    """The option of that name. Comments read "key, key: source"; indented comment lines continue the one before."""
    text = _option_text(name)
    values = yaml.safe_load(text)
    values.pop("defaults", None)
    sources: dict[str, str] = {}
    keys: list[str] = []
    for line in (line[1:] for line in text.splitlines() if line.startswith("#")):
        named, _, source = line.partition(": ")
        if not line.startswith("  ") and {key.strip() for key in named.split(",")} <= values.keys():
            keys = [key.strip() for key in named.split(",")]
            sources |= dict.fromkeys(keys, source.strip())
        else:
            sources |= {key: f"{sources[key]} {line.strip()}" for key in keys}
    return Option(values, sources)


def mixtures() -> list[str]:
    """The options that are ready-made mixtures."""
    found = sorted(path.stem for path in (asset_dir("conf") / "loss").glob("*.yaml"))
    return [name for name in found if name not in {*LOSSES, "none"}]


def recommended(name: str) -> Loss:
    """The loss with the values of its option."""
    return LOSSES[name](**read_option(name).values)


def _option_text(name: str) -> str:
    return (asset_dir("conf") / "loss" / f"{name}.yaml").read_text(encoding="utf-8")


def _text(value: Any) -> str:
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Loss):
        return _settings({field.name: getattr(value, field.name) for field in fields(value)})
    if isinstance(value, dict):
        return "(" + _settings(value) + ")"
    if isinstance(value, float):
        return f"{value:g}"
    return {None: "null", True: "true", False: "false"}.get(value, str(value))


def _settings(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {_text(value)}" for key, value in values.items())


# ----------------------------------------------------------------------------------------------- one loss


def rows() -> list[tuple[str, ...]]:
    """One row of `COLUMNS` per loss. A star after the key: something was not checked against the paper."""
    found: list[tuple[str, ...]] = []
    for name, kind in LOSSES.items():
        if kind is Mixture:
            found.append((name, kind.title, *["by its losses"] * 4, "-", kind.purpose))
            continue
        loss = recommended(name)
        needs = loss.requirements()
        reads = ["tokens"] if name in TOKEN_LEVEL else ["rewards of a head"] if needs.rewards else []
        reads += ["answers that it draws"] if needs.draws else []
        reads += ["scores"] if needs.scores else []
        reads += ["prompts"] if needs.prompts else []
        reads += [f"distributions ({', '.join(sorted(q.name for q in needs.quantities))})"] if needs.quantities else []
        reads += ["answers to other prompts"] if loss.mismatched(max(2, needs.min_items)) else []
        reads += ["the whole step"] if needs.whole_step else []
        reference = (
            "a teacher"
            if needs.draws
            else "live"
            if Quantity.divergence in needs.quantities
            else "yes"
            if needs.reference
            else "no"
        )
        found.append(
            (
                name + "*" * bool(kind.uncertain),
                kind.title,
                f"{needs.unit}s",
                reference,
                ", ".join(reads) or "-",
                ", ".join(loss.initial_state()) or "-",
                _settings(read_option(name).values),
                kind.purpose,
            )
        )
    return found


def explanation(name: str) -> tuple[str, list[str]]:
    """A loss's docstring, and one line per setting with its default and the source of that default."""
    option = read_option(name)
    lines = [
        f"{field.name} {_text(option.values[field.name])}: {option.sources[field.name]}"
        for field in fields(LOSSES[name])
    ]
    return inspect.getdoc(LOSSES[name]) or "", lines


def _weights(name: str) -> str:
    return _settings(read_option(name).values["weights"])


# ----------------------------------------------------------------------------------------------- the page


def _markdown_row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def _markdown_table(header: tuple[str, ...], body: list[tuple[str, ...]]) -> list[str]:
    return [_markdown_row(header), _markdown_row(("---",) * len(header)), *map(_markdown_row, body)]


def _table_row(row: tuple[str, ...]) -> tuple[str, ...]:
    key, star, _ = row[0].partition("*")
    return (f"[{key}](#{key})" + "\\*" * bool(star), *row[1:])


def _parity_row(check: Check) -> tuple[str, ...]:
    settings = {field.name: getattr(check.loss, field.name) for field in fields(check.loss)}
    theirs = "" if check.trl_value is None else f"{check.trl_value:.7g}"
    formula = f"{check.formula:.7g}"
    return (
        f"`{check.loss.name}` {_settings(settings)}",
        formula,
        f"{value_here(check.loss):.7g}",
        theirs if theirs in ("", formula) else f"**{theirs}**",
        check.trl or "absent",
        check.remark,
    )


def page() -> str:
    """The page of the losses, in Markdown: how to choose one, the table, a section per loss, and the parity table."""
    without = [kind.title for kind in LOSSES.values() if kind not in {type(check.loss) for check in CHECKS}]
    # How to read it
    lines = [
        "# Losses",
        "",
        "<!-- written by: python -m alignment.losses docs -->",
        "",
        "Choose a loss with `loss=<key>`, and change its settings with `loss.<setting>=<value>`:",
        "",
        "    python -m alignment.run recipe=dpo_qwen3 loss=simpo loss.beta=2.5",
        "",
        "In a terminal, `python -m alignment.losses` lists the losses and `python -m alignment.losses show simpo`"
        " explains one.",
        "",
        "The table below says what each loss reads and what it is for:",
        "",
        "- **items**: the data it is made for: pairs of a chosen and a rejected answer, single answers (rows) labelled"
        " good or bad, or ranked lists. Losses of rows and lists read pairs too.",
        "- **reference**: whether it compares your model with a reference. With `live`, the reference runs during"
        " training, because a cache cannot hold what the loss needs.",
        "- **reads**: what it needs beyond the summed or mean log-probs of the answers. With *the whole step*, the loss"
        " of an item depends on the other items of the optimizer step. Splitting a step into micro-batches never"
        " changes the result.",
        "- `bradley_terry` reads no log-probs at all: it trains a [reward model](../../docs/reward_models.md).",
        "- `opd` and `tropd` read prompts alone, and draw their answers: they"
        " [distil a teacher](../../docs/distillation.md).",
        "- **state**: numbers that it carries from step to step. Checkpoints keep them.",
        "- **defaults**: the settings that you get. Each section below gives the source of every value.",
        "- **\\***: something could not be checked against the paper. The list after the table says what.",
        "",
        "Sums, means, lengths and numbers per token are over the scored tokens of an answer. These are all its tokens,"
        " or the assistant's where an answer has several turns: what a user or a tool says in between is read and not"
        " scored, and it is no part of the prompt either.",
        "",
        # The table
        *_markdown_table(COLUMNS, [_table_row(row) for row in rows()]),
        "",
        *(
            f"`loss={name}` is a ready-made mixture, {title(name)}: {_weights(name)}. Change its weights with"
            " `loss.weights.<key>` and its parts with `loss.settings.<key>.<setting>`."
            for name in mixtures()
        ),
        "",
        "Not checked against the paper:",
        "",
        *(f"- {kind.title}: {kind.uncertain}" for kind in LOSSES.values() if kind.uncertain),
        "",
        "The [parity table](#parity) shows the value of each loss on one pair, here and in TRL.",
    ]
    # A section for each loss
    for name, kind in LOSSES.items():
        text, settings = explanation(name)
        lines += ["", f"## {name}", "", f"**{kind.title}**: {kind.purpose}.", "", text, ""]
        lines += [f"- `{line.replace(' ', '` ', 1)}" for line in settings]
    # Parity
    lines += [
        "",
        "## Parity",
        "",
        "Every value is the loss on one pair of answers with 4 and 6 tokens, to seven digits: worked out from the"
        " paper's formula, computed by this package, and computed by TRL 1.16. A bold number in TRL's column differs"
        " from the formula; the last column says where and why. The test suite recomputes both columns. TRL's beta is"
        " 0.1 unless named.",
        "",
        *_markdown_table(
            ("loss", "formula", "here", "TRL", "settings in TRL", "where and why they differ"),
            [_parity_row(check) for check in CHECKS],
        ),
        "",
        f"TRL has none of these: {', '.join(sorted(without, key=str.lower))}. Their tests derive the values by hand.",
    ]
    return "\n".join(lines) + "\n"


def page_path() -> Path:
    """The file of the page."""
    return asset_dir("conf") / "loss" / "README.md"


# ----------------------------------------------------------------------------------------------- the command


def _list() -> str:
    """One line of at most 80 columns per loss, grouped by what the losses read."""
    groups: dict[str, list[tuple[str, str]]] = {heading: [] for heading in (*_GROUPS.values(), _DRAWN, _MIXTURES)}
    for name, kind in LOSSES.items():
        needs = None if kind is Mixture else recommended(name).requirements()
        heading = _MIXTURES if needs is None else _DRAWN if needs.draws else _GROUPS[needs.unit, needs.reference]
        groups[heading].append((name + "*" * bool(kind.uncertain), kind.purpose))
    groups[_MIXTURES] += [(name, _weights(name)) for name in mixtures()]
    lines = ["Choose a loss with loss=KEY; `python -m alignment.losses show KEY` explains it."]
    for heading, entries in groups.items():
        lines += ["", heading, *(f"  {key:14} {purpose}" for key, purpose in entries)] if entries else []
    return "\n".join([*lines, "", "* Something could not be checked against the paper; `show` says what.", ""])


def _show(name: str) -> str:
    if name in mixtures():
        return re.sub(r"^defaults: .*\n", "", _option_text(name), flags=re.MULTILINE)
    kind = LOSSES[name]
    text, settings = explanation(name)
    paragraphs = [f"{kind.title} (loss={name}): {kind.purpose}.", *text.split("\n\n")]
    if kind.uncertain:
        paragraphs.append(f"Not checked against the paper: {kind.uncertain}.")
    width = min(shutil.get_terminal_size().columns, 100)
    filled = [textwrap.fill(paragraph, width, break_on_hyphens=False) for paragraph in paragraphs]
    lines = [textwrap.fill(f"loss.{line}", width, initial_indent="  ", subsequent_indent="    ") for line in settings]
    return "\n\n".join([*filled, "\n".join(["Settings, with their defaults and the sources of these:", *lines])]) + "\n"


def _named(name: str | None) -> str:
    known = [*LOSSES, *mixtures()]
    if name is not None and name in known:
        return name
    what = "show needs the key of a loss" if name is None else f"There is no loss '{name}'{did_you_mean(name, known)}"
    raise UserError(f"{what}; python -m alignment.losses lists all of them.")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; `ending_plainly` says how it ends."""
    parser = CommandParser(prog="python -m alignment.losses", description="List the losses that you can train with.")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", title="commands")
    show = commands.add_parser("show", help="explain one loss: formula, paper, gradient, settings")
    show.add_argument("key", metavar="KEY", nargs="?", help="as in the list, for example simpo")
    commands.add_parser("docs", help="write the page of all losses, conf/loss/README.md")
    with ending_plainly():
        given = parser.parse_args(arguments)
        if given.command == "docs":
            page_path().write_text(page(), encoding="utf-8")
            sys.stdout.write(f"Written: {page_path()}\n")
        else:
            sys.stdout.write(_list() if given.command is None else _show(_named(given.key)))


if __name__ == "__main__":
    main()
