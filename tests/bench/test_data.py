"""The benchmark of the preparation: its rows, its check of tokens, its table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bench.data import Measured, require_same, table, write_pairs


def test_generated_pairs_are_the_same_in_every_run_and_no_prompt_comes_twice(tmp_path: Path) -> None:
    """The same number of rows gives the same bytes; a prompt that came twice would be held out and trained on."""
    for name in ("a", "b"):
        write_pairs(tmp_path / name, 50)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "a").read_text().splitlines()]
    assert len({row["prompt"][0]["content"] for row in rows}) == 50


def test_tokens_of_both_sides_must_agree_up_to_what_follows_the_end_of_a_turn() -> None:
    """TRL's line break behind the last token of an answer is no difference; another token is one."""
    require_same([[[1, 2], [3], [4]]], [[[1, 2], [3, 9], [4, 9]]])
    with pytest.raises(AssertionError):
        require_same([[[1, 2], [3], [4]]], [[[1, 2], [3, 9], [5, 9]]])
    with pytest.raises(AssertionError):
        require_same([[[1, 2], [3], [4]]], [[[1], [3], [4]]])


def test_the_table_says_rows_a_second() -> None:
    """The rate is of wall time, sizes are in MiB."""
    assert table([Measured("ours", 2000, 4.0, 6.0, 2**20, 2**21, 0)]).splitlines()[-1] == (
        "| 2,000 | ours | 4.0 | 6.0 | 500 | 1 MiB | 2 MiB | 0 MiB |"
    )
