"""`python -m alignment.data SOURCE... | recipe=<name> [key=value ...]`: shows what a run makes of its data."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from alignment.config.compose import load, load_loss
from alignment.config.schema import RunConfig
from alignment.config.typed_text import quoted
from alignment.data.inspection.inspection import UNLIMITED, Inspection, inspect, left_out
from alignment.data.inspection.report import left_out_table, print_inspection, print_table, to_html
from alignment.data.layouts.recognition import NotPreferences
from alignment.data.rows.findings import FINDINGS
from alignment.data.rows.reasons import UnusableRows
from alignment.data.sources.loading import load_rows
from alignment.errors import CommandParser, UserError, ending_plainly
from alignment.files import atomic_write_text, cache_dir
from alignment.policy.chat_templates import with_templates
from alignment.policy.load import load_tokenizer
from alignment.policy.source import tokenizer_source

_WHOLE = ("eval_source=null", "system=null", "limit=null", "eval_limit=null")
"""What a source alone means: all of its rows, as they are."""


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="python -m alignment.data",
        description="Show what a run makes of its data: layout, rows left out, lengths, cuts, likely mistakes, and "
        "some rows token by token. Give sources (files, folders, patterns, addresses, hub ids), or a recipe. No "
        "weights are loaded. It ends with status 1 if a run would stop.",
        epilog="Examples: python -m alignment.data pairs.jsonl data.max_length=512; "
        "python -m alignment.data recipe=dpo_qwen3 --html data.html",
    )
    parser.add_argument("given", nargs="+", metavar="SOURCE | key=value", help="data, or settings as for a run")
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="rows to show token by token (3)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page for a browser, with every token")
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help="your own recipes, as for a run")
    return parser


def _compose(given: Sequence[str], config_dir: Path | None) -> RunConfig:
    """The run that the sources or the recipe mean; a source alone gets the loss that its layout wants."""
    sources = [one for one in given if "=" not in one or Path(one).expanduser().exists()]
    settings = [one for one in given if one not in sources]
    if not sources:
        return load(*settings, config_dir=config_dir)
    whole = (f"source=[{','.join(map(quoted, sources))}]", *_WHOLE)
    config = load("sft=none", *(f"data.{one}" for one in whole), *settings, config_dir=config_dir)
    if config.data is None or any(one.startswith(("loss=", "sft=", "recipe=")) for one in settings):
        return config
    try:
        probe = replace(config.data, limit=1, eval_size=0, train_where={}, max_bad_rows=UNLIMITED, allow=list(FINDINGS))
        if load_rows(probe, stage="preference").family == "labelled":
            return replace(config, loss=load_loss("kto"))
    except NotPreferences:
        of_sft = [re.sub(r"^(\+*)data\.", r"\1sft.data.", one) for one in settings]
        whole_sft = (f"sft.data.{one}" for one in whole)
        return load("sft=quickstart", "loss=none", *whole_sft, *of_sft, config_dir=config_dir)
    except UserError:  # the run says it in its own words
        pass
    return config


def _inspect(config: RunConfig, rows: int) -> list[Inspection]:
    tokenizer = load_tokenizer(config.model, tokenizer_source(config.model, cache_dir(config.reference.path)))
    config = with_templates(config, tokenizer, {})
    found: list[Inspection] = []
    if config.sft is not None:
        found += inspect(config.sft.data, tokenizer, None, views=rows)
    if config.loss is not None and config.data is not None:
        found += inspect(config.data, tokenizer, config.loss, views=rows)
    return found


def run(arguments: Sequence[str] | None) -> None:
    """What the command does.

    Raises:
        UserError: what a run would stop with.
    """
    options = _parser().parse_intermixed_args(arguments)
    if options.rows < 0:
        raise UserError(f"--rows must be at least 0, not {options.rows}.")
    console = Console(width=None if sys.stdout.isatty() else 80)
    try:
        found = _inspect(_compose(options.given, options.config_dir), options.rows)
    except UnusableRows as error:
        print_table(left_out_table(left_out(error.rows)), console)
        raise
    for inspection in found:
        print_inspection(inspection, console)
    if options.html is not None:
        atomic_write_text(options.html.expanduser(), to_html(found))
        sys.stdout.write(f"{options.html}\n")
    for inspection in found:
        if inspection.refusal is not None:
            raise UserError(inspection.refusal)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; `ending_plainly` says how it ends."""
    with ending_plainly():
        run(arguments)


if __name__ == "__main__":
    main()
