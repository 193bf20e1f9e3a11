"""Rows of tables as they were written: Arrow gives every object in a column the keys of all others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from alignment.data.rows.twins import parse


def rows_of_table(rows: Iterable[dict[str, Any]], schema: Any) -> Iterator[dict[str, Any]]:
    """The rows, with the keys that their objects had, and with what stands in columns of JSON and of maps.

    A table cannot tell a null from a key that is not there, and most are not there: each call of a tool would have the
    arguments of all tools. So a key of an object that holds nothing is left out. Values of JSON and of maps have keys
    of their own, and keep every null.

    Args:
        rows: as Arrow gives them, or with the JSON in them read.
        schema: pyarrow's of the table; None where it is not known.
    """
    kinds = {} if schema is None else {field.name: field.type for field in schema}
    flat = {name for name, kind in kinds.items() if _is_flat(kind)}
    for row in rows:
        written = {name: _written(value, kinds.get(name)) for name, value in row.items() if name not in flat}
        yield row | written if written else row


def _is_flat(kind: Any) -> bool:
    import pyarrow as pa

    return not pa.types.is_nested(kind) and not isinstance(kind, pa.BaseExtensionType)


def _written(value: Any, kind: Any) -> Any:
    import pyarrow as pa

    if isinstance(kind, getattr(pa, "JsonType", ())):
        return _read(value)
    if isinstance(value, dict):
        fields = {} if kind is None else {field.name: field.type for field in kind}
        return {key: _written(kept, fields.get(key)) for key, kept in value.items() if kept is not None}
    if isinstance(value, list) and kind is not None and pa.types.is_map(kind):
        return {key: _written(kept, kind.item_type) for key, kept in value}
    if isinstance(value, list):
        return [_written(kept, None if kind is None else kind.value_type) for kept in value]
    return value


def _read(value: Any) -> Any:
    """What a text of JSON says; a library may have read it before."""
    try:
        return parse(value) if isinstance(value, str) else value
    except ValueError:
        return value
