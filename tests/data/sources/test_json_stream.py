"""JSON documents of any size: the same values as `json` reads, a piece at a time, and faults named by their place."""

import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.data.sources import formats, json_stream
from alignment.data.sources.formats import read_file
from alignment.data.sources.json_stream import JSONStream
from alignment.errors import UserError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@settings(max_examples=40)
@given(st.lists(VALUES), st.sampled_from([None, 0, 3]), st.booleans(), st.integers(1, 40))
def test_any_array_is_read_as_json_reads_it(values, indent, ascii_only, piece):
    """Wherever the pieces end: inside a number, a character of several bytes, an escape or white space."""
    content = json.dumps(values, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    try:
        content.decode()
    except UnicodeDecodeError:
        return
    before, json_stream.PIECE = json_stream.PIECE, piece
    try:
        stream = JSONStream(io.BytesIO(content))
        assert list(stream.elements()) == values
        stream.end()
    finally:
        json_stream.PIECE = before


class Counted(io.BytesIO):
    """Bytes that know how far they were read."""

    def read(self, size: int | None = -1) -> bytes:
        assert size is not None and 0 < size <= 4 * json_stream.PIECE
        return super().read(size)


def test_no_more_than_a_piece_is_held(monkeypatch):
    """The first rows come before the rest is read, and a long row is tried a few times only."""
    monkeypatch.setattr(json_stream, "PIECE", 1000)
    rows = [{"text": "x" * 100}] * 1000
    file = Counted(json.dumps(rows).encode())
    stream = JSONStream(file)
    elements = stream.elements()
    assert next(elements) == rows[0] and file.tell() == 1000
    assert sum(1 for _ in elements) == 999 and len(stream._text) <= 2000


def faults(tmp_path, content: bytes) -> str:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(read_file(tmp_path / "a.json"))
    return str(caught.value)


@pytest.mark.parametrize("piece", [7, 1 << 20])
def test_faults_are_named_by_their_place_in_the_whole_document(piece, tmp_path, monkeypatch):
    """Line and column, or the byte, however much of the document was let go before."""
    monkeypatch.setattr(json_stream, "PIECE", piece)
    row = '{"a": "größe"}'
    for text, said in (
        (f"[{row},\n {row},\n {row} {row}]", "Expecting ',' delimiter, line 3 column 17"),
        (f"[{row},\n {row},\n {{'a': 1}}]", "Expecting property name enclosed in double quotes, line 3 column 3"),
        (f"[{row},\n {row}", "Expecting ',' delimiter, line 2 column 16"),
        (f"[{row},\n{row}]\n\n]", "Extra data, line 4 column 1"),
        (f'[{row},\n\n {{"a": 1, "a": 2}}]', "the key 'a' stands twice"),
    ):
        assert faults(tmp_path, text.encode()) == f"{tmp_path}/a.json is not valid JSON ({said})."
    broken = f"[{row},\n ".encode()
    assert faults(tmp_path, broken + b'"\xff"]') == f"{tmp_path}/a.json is not UTF-8 (byte {len(broken) + 1})."


def test_a_fault_far_from_the_end_ends_the_reading(monkeypatch):
    """A broken row is not taken for one that goes on to the end of the file."""
    monkeypatch.setattr(json_stream, "PIECE", 1000)
    file = Counted(b'[{"a": 1}, {"a": nothing}, ' + b'{"a": 1}, ' * 10_000)
    with pytest.raises(json.JSONDecodeError, match="Expecting value"):
        list(JSONStream(file).elements())
    assert file.tell() <= 2000


LONG = [{"prompt": f"p{i}", "chosen": "c" * 50, "rejected": "r"} for i in range(40)]


@pytest.fixture
def short_head(monkeypatch):
    """Files longer than a few rows count as long."""
    monkeypatch.setattr(formats, "_DOCUMENT", 200)
    monkeypatch.setattr(json_stream, "PIECE", 64)


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("form", ["array", "wrapped", "lines"])
def test_long_files_of_every_form(form, indent, tmp_path, short_head):
    """What a file holds shows in its beginning."""
    path = tmp_path / "a.jsonl"
    if form == "lines":
        path.write_text("".join(json.dumps(row) + "\n" for row in LONG))
    else:
        path.write_text(json.dumps(LONG if form == "array" else {"data": LONG}, indent=indent))
    assert list(read_file(path)) == list(enumerate(LONG, 1))


def test_what_long_files_may_not_be(tmp_path, short_head):
    """Several lists, objects over several lines; a long first row is a row."""
    two = json.dumps({"train": LONG, "test": LONG}).encode()
    assert "holds more in its object than the list of rows under 'train'" in faults(tmp_path, two)
    pretty = "\n".join(json.dumps(row, indent=1) for row in LONG).encode()
    assert "over several lines" in faults(tmp_path, pretty)
    rows = [{"messages": [{"role": "user", "content": "x" * 900}]}, LONG[0]]
    (tmp_path / "a.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row for _, row in read_file(tmp_path / "a.json")] == rows
