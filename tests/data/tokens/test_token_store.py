"""Tokens in files: every field of a group comes back, of whatever kind it is."""

from __future__ import annotations

import sys
from dataclasses import fields, make_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest

from alignment.data.rows.row import Row
from alignment.data.rows.sequences import RowList, as_line, from_line
from alignment.data.tokens.token_store import CONVERSATIONS, GROUPS, Column, Kind, Stored, StoreWriter
from alignment.types import Group


def same(a: Any, b: Any) -> bool:
    """Whether two fields are equal, arrays in their types as well."""
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and bool(np.array_equal(a, b))
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, dtype=np.int32)


FULL: dict[str, Any] = {
    "prompt": ids(1, 2, 3),
    "completions": (ids(4), ids(5, 6)),
    "labels": (True, False),
    "scores": (0.1, -2.5),
    "weight": 1 / 3,
    "source": "dätä:7",
    "dataset": "a mixture's",
    "scored": (np.array([True]), np.array([False, True])),
    "drawn": (np.array([-0.5], dtype=np.float32), np.array([-1.25, -0.1], dtype=np.float32)),
}
"""A value for every field that is not its default; a new field of a group needs one here."""


def test_every_field_of_a_group_comes_back(tmp_path: Path) -> None:
    """Each with a value and, where it may be None, without; in every order of the two."""
    bare = {name: FULL[name] for name in ("prompt", "completions")}
    groups = [Group(**made) for made in (FULL, bare, FULL, bare)]
    defaults = {f.name: getattr(groups[1], f.name) for f in fields(Group) if f.name not in bare}
    assert not [name for name, value in defaults.items() if same(value, FULL.get(name, value))], "give FULL the field"
    writer = StoreWriter(tmp_path / "groups", GROUPS)
    for part in (groups[1:2], groups[:1], [], groups[2:]):
        writer.add(part)
    stored = Stored(tmp_path / "groups", GROUPS, writer.close())
    expected = [groups[1], groups[0], *groups[2:]]
    for found in (list(stored), [stored[i] for i in range(4)], stored[:], [stored[i - 4] for i in range(4)]):
        for group, written in zip(found, expected, strict=True):
            assert all(same(getattr(group, f.name), getattr(written, f.name)) for f in fields(Group))


def test_fields_of_every_kind_have_a_column(tmp_path: Path) -> None:
    """Numbers, texts and arrays, in tuples or not, optional or not; any other type is refused when it is declared."""
    values: dict[Any, Any] = {int: 7, float: -0.5, bool: True, str: "é", np.ndarray: ids(1, 2)}
    hints = {}
    for base in values:
        hints |= {base.__name__: base, f"{base.__name__}s": tuple[base, ...]}  # type: ignore[valid-type]
    hints |= {f"some_{name}": hint | None for name, hint in hints.items()}
    made = make_dataclass("Made", list(hints))
    kind: Kind[Any] = Kind(
        {name: Column.of(hint) for name, hint in hints.items()}, lambda item: vars(item), lambda **found: made(**found)
    )

    def value(hint: Any) -> Any:
        base = next(base for base in values if base.__name__ in str(hint).replace("numpy.", ""))
        return (values[base],) * 2 if "tuple" in str(hint) else values[base]

    whole = made(**{name: value(hint) for name, hint in hints.items()})
    bare = made(**{name: None if name.startswith("some_") else value(hint) for name, hint in hints.items()})
    writer = StoreWriter(tmp_path / "made", kind)
    writer.add([whole, bare, whole])
    for found, expected in zip(Stored(tmp_path / "made", kind, writer.close()), (whole, bare, whole), strict=True):
        assert all(same(vars(found)[name], vars(expected)[name]) for name in hints)
    for hint in (dict, list[int], tuple[int, int], int | str):
        with pytest.raises(TypeError, match="No column holds"):
            Column.of(hint)


def test_arrays_of_another_type_are_refused(tmp_path: Path) -> None:
    """They would be read as the type of the first ones."""
    writer = StoreWriter(tmp_path / "x", CONVERSATIONS)
    writer.add_packed(CONVERSATIONS.pack([{"input_ids": [1], "completion_mask": [1]}]), 1)
    other = CONVERSATIONS.pack([{"input_ids": [1], "completion_mask": [1]}])
    with pytest.raises(ValueError, match="of the types <i4 and <i8"):
        writer.add_packed(other | {"input_ids.values": np.array([1])}, 1)


def test_what_is_read_may_be_written_to(tmp_path: Path) -> None:
    """Torch shares memory with arrays: what a training does to them must not reach the files."""
    writer = StoreWriter(tmp_path / "g", GROUPS)
    writer.add([Group(**FULL)])
    stored = Stored(tmp_path / "g", GROUPS, writer.close())
    stored[0].prompt[:] = 0
    assert stored[0].prompt.tolist() == [1, 2, 3]


def test_rows_come_back_from_a_line() -> None:
    """Every field of a row, with text that is half a character, numbers that are none and dates, which become text."""
    row = Row(
        prompt=[{"role": "user", "content": "half \ud83d", "more": {"b": 1, "a": [None, 2.5]}}],
        completions=([{"role": "assistant", "content": "x"}], [{"role": "assistant", "content": "y"}]),
        labels=(True, False),
        scores=(float("inf"), 0.1),
        meta={"z": 1, "a": None},
        source="f:1",
        weight=0.3,
        steps="so",
        variables={"tools": [{"name": "t", "a": 1}]},
    )
    found = from_line(as_line(row))
    assert {f.name for f in fields(Row) if getattr(row, f.name) == getattr(Row("", ("",)), f.name)} == set()
    assert found == row
    assert list(found.variables["tools"][0]) == ["name", "a"]  # templates write keys in their order


def test_rows_in_a_file_are_those_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By index, slice and iteration, and nothing is left in the folder when the process ends."""
    monkeypatch.setattr(sys.modules["alignment.data.rows.sequences"], "KEPT_ROWS", 3)
    rows = [Row(f"é{i}", ("a", "b"), source=f"f:{i}") for i in range(10)]
    kept = RowList(tmp_path)
    for i, row in enumerate(rows):
        kept.append(row)
        assert kept[-1] == row
        assert list(kept) == rows[: i + 1]
    assert kept.in_file
    assert kept[2:7:2] == rows[2:7:2]
    assert not list(tmp_path.iterdir())


def test_the_hints_of_a_group_are_what_the_columns_are_made_of() -> None:
    """A field is carried because it is declared."""
    assert list(GROUPS.columns) == list(get_type_hints(Group)) == [f.name for f in fields(Group)]


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says of a process's maps")
def test_what_was_read_does_not_stay_in_memory(tmp_path: Path) -> None:
    """Pages of the files are left to the system again and again: at no time are many of them this process's."""
    tokens = np.arange(2000, dtype=np.int32)
    writer = StoreWriter(tmp_path / "groups", GROUPS)
    for _ in range(4):
        writer.add([Group(tokens, (tokens, tokens))] * 500)
    stored = Stored(tmp_path / "groups", GROUPS, writer.close())

    def mapped() -> int:
        lines = Path("/proc/self/smaps").read_text().splitlines()
        starts = [i for i, line in enumerate(lines) if str(tmp_path) in line]
        return sum(int(next(x for x in lines[i:] if x.startswith("Rss:")).split()[1]) for i in starts)

    most = 0
    for number, _ in enumerate(stored):
        most = max(most, mapped() if number % 500 == 0 else 0)
    whole = sum(path.stat().st_size for path in (tmp_path / "groups").iterdir()) // 1024
    assert whole > 40_000 and most < whole / 10
