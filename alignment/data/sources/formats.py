"""How the data files of each format are read: one numbered record after another, whatever they are packed in."""

from __future__ import annotations

import csv
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from alignment.config.places import ACCEPTED_FILES, ending_of
from alignment.data.layouts.recognition import OUR_COLUMNS
from alignment.data.rows.row import BadRow
from alignment.data.rows.twins import parse
from alignment.data.sources.folders import SPLIT_WORDS
from alignment.data.sources.json_stream import JSONStream
from alignment.data.sources.remote import File
from alignment.data.sources.tables import rows_of_table
from alignment.errors import UserError

Numbered = Iterator[tuple[int, Any]]
"""(row number from 1, record); a `BadRow` in place of a record that cannot be read."""

_HEAD = 4096
"""Bytes at the beginning of a file that show what it holds."""

_DOCUMENT = 1 << 22
"""Bytes of a JSON document that are looked at as a whole: longer than any row, and little memory."""

_PACKED = {b"\x1f\x8b": ".gz", b"(\xb5/\xfd": ".zst", b"\xfd7zXZ": ".xz", b"BZh": ".bz2", b"PK\x03\x04": ".zip"}
"""How packed files begin."""

_WRAPPERS = ("data", "rows", "train", "examples", "instances", "records", "items", "samples")
"""Keys under which an object holds its rows, whatever it holds besides."""

_NESTED_ROWS = re.compile(r'\{\s*"([^"\\]*)"\s*:\s*\{\s*"([^"\\]*)"\s*:\s*\[\s*\{')
"""The beginning of an object of lists of rows inside another object."""

_BOM = b"\xef\xbb\xbf"


def read_file(path: File) -> Numbered:
    """The records of a file.

    Raises:
        UserError: the file has another ending, another encoding than UTF-8, or is damaged as a whole.
    """
    ending, packed = ending_of(path.name)
    if ending not in _READERS or (packed and ending in _BINARY):
        raise UserError(f"{path} is no data file: accepted are {ACCEPTED_FILES}.")
    try:
        with path.open("rb") as file:
            if file.read(_HEAD).startswith(b"version https://git-lfs."):
                raise UserError(f"{path} is a pointer of Git LFS and holds no rows: run git lfs pull in its folder.")
        if ending not in _BINARY:
            _refuse_encodings(path)
        yield from _READERS[ending](path)
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        cause = " ".join(str(error).split()).rstrip(".")
        kind = f" as a {packed} file" if packed else ""
        raise UserError(f"{path} cannot be read{kind}: {cause}.") from None


@contextmanager
def _open(path: File) -> Iterator[Any]:
    """The file's bytes, unpacked, as an open file."""
    packed = ending_of(path.name)[1]
    with path.open("rb") as raw:
        if not packed:
            yield raw
        elif packed == ".zst":
            import pyarrow as pa

            yield io.BufferedReader(pa.input_stream(raw, compression="zstd"))
        else:
            module = import_module({".gz": "gzip", ".xz": "lzma", ".bz2": "bz2"}[packed])
            with module.open(raw) as file:
                yield file


def _refuse_encodings(path: File) -> None:
    """Refuse what is packed though its name does not say so, and text in 16 or 32 bits: by the mark at its beginning,
    or by the zeros that ASCII has there."""
    with _open(path) as file:
        head = file.read(_HEAD)
    if packing := next((ending for mark, ending in _PACKED.items() if head.startswith(mark)), None):
        raise UserError(f"{path} is a {packing} file by its content: name it so if that is accepted, or unpack it.")
    if head.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")) or b"\0" in head:
        raise UserError(f"{path} is no UTF-8 text (it looks like UTF-16): save it as UTF-8.")


# JSON


def _read_json(path: File) -> Numbered:
    """JSON Lines, one array of rows, or one object around such an array, whatever the ending says.

    Which of them it is shows in its beginning; the rows of an array are then read one by one.
    """
    with _open(path) as file:
        head = file.read(_DOCUMENT)
        is_whole = len(head) < _DOCUMENT
    text = head.removeprefix(_BOM).decode("utf-8", "replace").strip()
    first = _first_value(text)
    has_more = not is_whole or len(first) < len(text)
    if not text or (first and has_more and "\n" not in first):
        return _read_lines(path)
    if text.startswith("["):
        return _read_array(path)
    if not first and not is_whole and (nested := _NESTED_ROWS.match(text)) is not None:
        raise _several(path, [f"{nested[1]}.{nested[2]}", f"{nested[1]}.…"])
    if not first and not is_whole and _begins_with_rows(text):
        return _read_array(path, wrapped=True)

    # One document, or lines of which the first is broken
    if first and has_more:
        raise UserError(
            f"{path} holds objects that are broken over several lines: write each on a line of its own (jq -c . "
            f"does so), or put them into one array."
        )
    if not is_whole:
        return _read_lines(path)
    try:
        document = parse(head.removeprefix(_BOM).decode())
    except (ValueError, RecursionError) as error:
        if text.split("\n", 1)[0].strip() == "{":
            raise UserError(f"{path} is not {_fault(error)}.") from None
        return _read_lines(path)
    rows = _unwrapped(document, path)
    if rows is None:
        raise UserError(f"{path} must hold a JSON array of rows or JSON Lines, not {type(document).__name__}.")
    return enumerate(rows, 1)


def _read_array(path: File, wrapped: bool = False) -> Numbered:
    """The rows of one array, or of the array under the only key of one object."""
    try:
        with _open(path) as file:
            stream = JSONStream(file)
            if wrapped:
                stream.take("{")
                key = stream.value()
                stream.take(":")
            yield from enumerate(stream.elements(), 1)
            if wrapped and stream.peek() == ",":
                raise _more_than(path, key)
            if wrapped:
                stream.take("}")
            stream.end()
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not {_fault(error)}.") from None


def _fault(error: Exception) -> str:
    """What a text is not, and why."""
    if isinstance(error, UnicodeDecodeError):
        return f"UTF-8 (byte {error.start})"
    if isinstance(error, json.JSONDecodeError):
        comma = "" if error.msg.endswith(" at") else ","
        return f"valid JSON ({error.msg}{comma} line {error.lineno} column {error.colno})"
    return f"valid JSON ({error})"


def _first_value(text: str) -> str:
    """The text of the JSON value at the beginning; empty if there is none."""
    try:
        return text[: json.JSONDecoder().raw_decode(text)[1]]
    except (ValueError, RecursionError):
        return ""


def _begins_with_rows(text: str) -> bool:
    """Whether an object begins with a list of objects under a key that no column of ours has."""
    found = re.match(r'\{\s*"([^"\\]*)"\s*:\s*\[\s*\{', text)
    return found is not None and found[1] not in OUR_COLUMNS


def _unwrapped(document: Any, path: File) -> list[Any] | None:
    """The rows of one object: those of the array under its only key, or itself, which is a row."""
    if not isinstance(document, dict):
        return None
    if nested := _nested_rows(document):
        if len(nested) == len(document) == 1 and len(*document.values()) == 1:
            return next(iter(nested.values()))
        raise _several(path, list(nested))
    lists = [key for key, value in document.items() if key not in OUR_COLUMNS and _are_rows(value)]
    if len(document) == 1 and lists:
        return document[lists[0]]
    if len(document) > 1 and len(lists) == len(document):
        raise _several(path, lists)
    wrapped = [key for key in lists if key in _WRAPPERS and document[key]]
    if wrapped and not any(key in OUR_COLUMNS for key in document):
        raise _more_than(path, wrapped[0])
    if _holds_columns(document):
        raise UserError(
            f"{path} holds a table by columns or by row numbers, not rows: write one object for each row "
            f"(pandas: to_json(orient='records', lines=True))."
        )
    return [document]


def _nested_rows(document: dict[str, Any]) -> dict[str, list[Any]]:
    """Lists of rows inside an object of the object, as {"data": {"train": [...], "test": [...]}} has them."""
    return {
        f"{outer}.{key}": rows
        for outer, inner in document.items()
        if outer not in OUR_COLUMNS and isinstance(inner, dict)
        for key, rows in inner.items()
        if key in (*SPLIT_WORDS, *_WRAPPERS) and rows and _are_rows(rows)
    }


def _several(path: File, lists: list[str]) -> UserError:
    first = next((name for name in lists if name.rpartition(".")[2] == "train"), lists[0])
    name = first.rpartition(".")[2]
    return UserError(
        f"{path} holds lists of rows inside one object ({', '.join(lists)}): write each to a file of its own, named "
        f"after its split (jq -c '.{first}[]' {path.name} > {name}.jsonl does so), and set data.source={name}.jsonl "
        f"and data.eval_source to the held-out rows."
    )


def _more_than(path: File, key: str) -> UserError:
    return UserError(
        f"{path} holds more in its object than the list of rows under '{key}': write the rows alone, as one array or "
        f"each on a line of its own."
    )


def _holds_columns(document: dict[str, Any]) -> bool:
    """Whether an object is a table in one of the other forms that pandas writes, or has a list of texts per column."""
    values = list(document.values())
    if document.keys() == {"columns", "index", "data"}:
        return True
    if values and all(isinstance(value, dict) for value in values):
        keys = [set(value) for value in values]
        numbered = any(names and all(map(str.isdigit, names)) for names in (keys[0], document))
        return numbered and all(same == keys[0] for same in keys)
    lengths = {len(value) if isinstance(value, list) else None for value in values}
    texts = (item for value in values if isinstance(value, list) for item in value)
    return len(document) > 1 and len(lengths) == 1 and None not in lengths and all(isinstance(t, str) for t in texts)


def _are_rows(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(row, dict) for row in value)


def _read_lines(path: File) -> Numbered:
    with _open(path) as lines:  # split at "\n" only: text may hold U+2028 and its like
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    yield number, parse(text)
            except UnicodeDecodeError as error:
                yield number, BadRow("not_utf8", f"the line is not {_fault(error)}", str(path), number)
            except (ValueError, RecursionError) as error:
                fault = _fault(error).replace("line 1 column", "column")
                yield number, BadRow("broken_json", f"the line is not {fault}", str(path), number)


# Tables


def _read_csv(path: File) -> Numbered:
    csv.field_size_limit(sys.maxsize)  # the module's 128 KiB are less than a long answer
    tab = ending_of(path.name)[0] == ".tsv"
    with _open(path) as raw:
        text = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.DictReader(text, strict=True, delimiter="\t" if tab else ",")
        try:
            _check_header(path, list(reader.fieldnames or []))
            for number, record in enumerate(reader, 1):
                yield number, _checked_cells(record, str(path), number)
        except csv.Error as error:
            raise UserError(f"{path} is not valid CSV after line {reader.line_num}: {error}.") from None


def _check_header(path: File, names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{path} has several columns '{twice[0]}': give each column a name of its own.")
    for sign, called in ((";", "semicolons"), ("\t", "tabs"), (",", "commas")):
        if len(names) == 1 and sign in names[0]:
            raise UserError(
                f"{path} has the one column '{names[0]}', which looks like several with {called} between them: "
                f"separate the columns of a .csv file by commas, those of a .tsv file by tabs."
            )


def _checked_cells(record: dict[Any, Any], file: str, number: int) -> Any:
    if None in record:
        return BadRow("too_many_cells", f"it has {len(record[None])} cells more than the header", file, number)
    for name, cell in record.items():
        try:
            (cell or "").encode("utf-8")
        except UnicodeEncodeError as error:
            return BadRow("not_utf8", f"character {error.start} of column '{name}' is not UTF-8", file, number)
    return record


def _read_parquet(path: File) -> Numbered:
    from pyarrow import parquet

    def batches() -> Iterator[Any]:
        with _at_hand(path) as source:
            yield from parquet.ParquetFile(source).iter_batches()

    return _read_batches(path, "Parquet", batches)


def _read_arrow(path: File) -> Numbered:
    """Arrow as the datasets library saves it: a stream of batches, or a file of them."""
    import pyarrow as pa

    def batches() -> Iterator[Any]:
        with _at_hand(path) as source:
            if source.read(6) == b"ARROW1":
                file = pa.ipc.open_file(source)
                yield from (file.get_batch(number) for number in range(file.num_record_batches))
            else:
                source.seek(0)
                yield from pa.ipc.open_stream(source)

    return _read_batches(path, "Arrow", batches)


def _at_hand(path: File) -> Any:
    """The file for reading at any place: in memory as it is needed, or through its own file system."""
    import pyarrow as pa

    return pa.memory_map(str(path)) if isinstance(path, Path) else path.open("rb")


def _read_batches(path: File, kind: str, batches: Callable[[], Iterator[Any]]) -> Numbered:
    import pyarrow as pa

    number = 0
    try:
        for batch in batches():
            for record in rows_of_table(batch.to_pylist(), batch.schema):
                number += 1
                yield number, record
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} is not a readable {kind} file: {str(error).splitlines()[0].rstrip('.')}.") from None


_READERS: dict[str, Callable[[File], Numbered]] = {
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), _read_json),
    **dict.fromkeys((".csv", ".tsv"), _read_csv),
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
_BINARY = (".parquet", ".arrow")
"""Formats that are packed inside, so that no file of theirs is packed again."""
