"""Files as people have them: packed, wrapped, named in many ways, saved by other tools."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from alignment.config.places import is_on_hub
from alignment.data.rows.reasons import WORDS, first_rows, in_words
from alignment.data.rows.row import BadRow
from alignment.data.sources.formats import read_file
from alignment.data.sources.loading import load_rows
from alignment.errors import UserError

ROWS = [{"prompt": f"p{i}\u2028", "chosen": f"c{i}", "rejected": "a, \"b\" and 'c'"} for i in range(3)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
TSV = "prompt\tchosen\trejected\n" + "".join(
    "\t".join('"' + value.replace('"', '""') + '"' for value in row.values()) + "\n" for row in ROWS
)


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


PACKERS = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zst": zstd}
FILES = {
    "rows.ndjson": LINES,
    "ROWS.JSONL": LINES,
    "rows.tsv": TSV.encode(),
    "rows.CSV": TSV.replace("\t", ",").encode("utf-8-sig"),
    "array.jsonl": json.dumps(ROWS).encode("utf-8"),
    "pretty.jsonl": json.dumps(ROWS, indent=2).encode("utf-8-sig"),
    "pretty.json": b"\n\n" + json.dumps(ROWS, indent=2).encode("utf-8"),
    "wrapped.json": json.dumps({"data": ROWS}).encode(),
    "wrapped.jsonl": json.dumps({"rows": ROWS}, indent=4).encode(),
    "wrapped_twice.json": json.dumps({"data": {"train": ROWS}}).encode(),
    "crlf.jsonl": b"\r\n" + LINES.replace(b"\n", b"\r\n"),
    **{f"rows.jsonl{ending}": pack(LINES) for ending, pack in PACKERS.items()},
    "ROWS.TSV.GZ": gzip.compress(TSV.encode()),
    "pretty.json.zst": zstd(json.dumps(ROWS, indent=1).encode()),
}


@pytest.mark.parametrize("name", FILES)
def test_every_container_gives_the_same_rows(name, tmp_path):
    """Packed, in capitals, as an array, wrapped: the rows are the same."""
    path = tmp_path / name
    path.write_bytes(FILES[name])
    assert [record for _, record in read_file(path)] == ROWS


def test_arrow_as_a_stream_and_as_a_file(tmp_path):
    """Both forms of Arrow are read, batch after batch."""
    table = pa.Table.from_pylist(ROWS)
    for name, new in (("stream.arrow", pa.ipc.new_stream), ("file.arrow", pa.ipc.new_file)):
        with new(tmp_path / name, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
        assert list(read_file(tmp_path / name)) == list(enumerate(ROWS, 1))


REFUSED = [
    ("a.jsonl", LINES.decode().encode("utf-16"), ["UTF-16", "save it as UTF-8"]),
    ("a.csv", TSV.encode("utf-16-le"), ["UTF-16", "save it as UTF-8"]),
    ("a.json", json.dumps(ROWS).encode("utf-16-be"), ["UTF-16", "save it as UTF-8"]),
    ("a.jsonl.gz", gzip.compress(LINES)[:-9], [".gz file"]),
    ("a.jsonl.gz", LINES, [".gz file"]),
    ("a.jsonl.xz", LINES, [".xz file"]),
    ("a.jsonl.bz2", LINES, [".bz2 file"]),
    ("a.jsonl.zst", LINES, [".zst file"]),
    ("a.jsonl.zst", zstd(LINES)[:-9], [".zst file"]),
    ("a.gz", gzip.compress(LINES), ["no data file", ".ndjson", ".zst"]),
    ("a.parquet.gz", gzip.compress(LINES), ["no data file"]),
    ("a.arrow", b"nothing", ["not a readable Arrow file"]),
    ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", ["Git LFS", "git lfs pull"]),
    ("a.jsonl", json.dumps(ROWS, indent=1)[:-9].encode(), ["not valid JSON"]),
    ("a.jsonl", b"".join(json.dumps(row, indent=1).encode() + b"\n" for row in ROWS), ["over several lines", "jq -c"]),
    ("a.csv", TSV.encode(), ["one column", "tabs", ".tsv"]),
    ("a.csv", TSV.replace("\t", ";").encode(), ["one column", "semicolons"]),
    ("a.tsv", TSV.replace("\t", ",").encode(), ["one column", "commas"]),
    ("a.csv", b"prompt,chosen,chosen\np,a,b\n", ["several columns 'chosen'"]),
    (
        "a.json",
        json.dumps({"test": ROWS, "train": ROWS}).encode(),
        ["inside one object (test, train)", "jq -c '.train[]' a.json > train.jsonl", "data.source=train.jsonl"],
    ),
    (
        "a.json",
        json.dumps({"data": {"train": ROWS, "validation": ROWS}}).encode(),
        ["(data.train, data.validation)", "'.data.train[]' a.json > train.jsonl", "data.eval_source"],
    ),
    (
        "a.json",
        json.dumps({"version": "1", "data": {"train": ROWS, "info": "none"}}, indent=1).encode(),
        ["(data.train)", "'.data.train[]' a.json"],
    ),
    (
        "a.json",
        json.dumps({"data": {"train": ROWS * 40_000, "test": ROWS}}).encode(),
        ["(data.train, data.…)", "'.data.train[]' a.json"],
    ),
    (
        "a.json",
        b'[{"prompt": "p", "chosen": "c",\n "rejected": "r", "chosen": "d"}]',
        ["the key 'chosen' stands twice"],
    ),
]


@pytest.mark.parametrize(("name", "content", "said"), REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_read_is_named_in_one_sentence(name, content, said, tmp_path):
    """Another encoding, a damaged or a misnamed file: its name, and what to do."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(read_file(tmp_path / name))
    message = str(caught.value)
    assert message.startswith(str(tmp_path / name)) and message.endswith(".") and "\n" not in message
    assert all(part in message for part in said), message


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "c"}]},
        {"conversations": [{"from": "human", "value": "p"}]},
        ROWS[0],
    ],
    ids=["messages", "conversations", "pair"],
)
def test_one_row_alone_is_a_row(row, tmp_path):
    """A file of one object is one row, also where its only column is a list of messages."""
    for name, indent in (("a.jsonl", None), ("a.json", 1)):
        (tmp_path / name).write_text(json.dumps(row, indent=indent))
        assert list(read_file(tmp_path / name)) == [(1, row)]


def test_broken_lines_stay_bad_rows(tmp_path):
    """A broken line, also the first or the only one, is a bad row with its number, and the others are read."""
    for broken in (b'{"prompt": \n', b"text\n", b'{"a": 1} {"b": 2}\n'):
        for before, after in ((b"", LINES), (b"", b""), (LINES, b"")):
            (tmp_path / "a.jsonl").write_bytes(before + broken + after)
            found = list(read_file(tmp_path / "a.jsonl"))
            assert [row for _, row in found if not isinstance(row, BadRow)] == (ROWS if before or after else [])
            [bad] = [row for _, row in found if isinstance(row, BadRow)]
            assert bad.row == (4 if before else 1) and "not valid JSON" in bad.message


@given(st.lists(st.sampled_from(["prompt", "chosen", "rejected", "weight"]), min_size=1, max_size=5), st.booleans())
def test_a_key_that_stands_twice_is_no_value_lost(tmp_path_factory, names, nested):
    """In a row, or in a message inside it: Python would keep the last value without a word."""
    text = "{" + ", ".join(f'"{name}": "{place}"' for place, name in enumerate(names)) + "}"
    path = tmp_path_factory.mktemp("twice") / "a.jsonl"
    path.write_text(
        f'{json.dumps(ROWS[0])}\n{{"prompt": [{text}]}}\n' if nested else f"{json.dumps(ROWS[0])}\n{text}\n"
    )
    _, (number, found) = read_file(path)
    assert number == 2 and isinstance(found, BadRow) == (len(set(names)) < len(names))
    if isinstance(found, BadRow):
        assert f"the key '{next(name for name in names if names.count(name) > 1)}' stands twice" in found.message


@given(
    st.lists(st.dictionaries(st.sampled_from(["prompt", "chosen", "x"]), st.text(), min_size=1), min_size=1),
    st.sampled_from([None, 1, "\t"]),
    st.sampled_from(["lines", "array", "wrapped"]),
    st.sampled_from(["", *PACKERS]),
    st.booleans(),
)
def test_any_rows_in_any_container(tmp_path_factory, rows, indent, form, packed, marked):
    """Whatever the rows hold, and however they are wrapped, indented, marked and packed, they are read as they were."""
    if form == "lines":
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).replace("\n", "\r\n" if marked else "\n")
    else:
        text = json.dumps(rows if form == "array" else {"train": rows}, indent=indent)
    content = text.encode("utf-8", "surrogatepass")
    content = (b"\xef\xbb\xbf" if marked else b"") + content
    path = tmp_path_factory.getbasetemp() / f"any.jsonl{packed}"
    path.write_bytes(PACKERS[packed](content) if packed else content)
    assert [record for _, record in read_file(path)] == rows


# Folders


def saved(folder: Path, rows: list[dict], split: str | None = None) -> None:
    """What `Dataset.save_to_disk` writes, in two files."""
    folder.mkdir(parents=True)
    names = [f"data-0000{number}-of-00002.arrow" for number in range(2)]
    for name, part in zip(names, (rows[:1], rows[1:]), strict=True):
        table = pa.Table.from_pylist(part)
        with pa.ipc.new_stream(folder / name, table.schema) as writer:
            writer.write_table(table)
    state = {"_data_files": [{"filename": name} for name in names], "_split": split}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")


def prompts(rows) -> list[str]:
    return [row.prompt for row in rows]


def test_a_folder_that_datasets_saved(tmp_path, config):
    """One split is read whole; of several, the one that is asked for; a missing one is named."""
    saved(tmp_path / "one", ROWS)
    data = load_rows(config(tmp_path / "one"), stage="preference")
    assert prompts(data.train) == [row["prompt"] for row in ROWS]
    for split, rows in (("train", ROWS[:2]), ("test", ROWS[2:])):
        saved(tmp_path / "several" / split, rows)
    (tmp_path / "several" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    data = load_rows(config(tmp_path / "several", eval_split="test"), stage="preference")
    assert (prompts(data.train), prompts(data.eval)) == ([r["prompt"] for r in ROWS[:2]], [ROWS[2]["prompt"]])
    with pytest.raises(UserError, match="holds the splits test, train and none named 'train_prefs'"):
        load_rows(config(tmp_path / "several", split="train_prefs"), stage="preference")


@pytest.mark.parametrize("content", ["{", "[]", '{"_data_files": null}', "{}"])
def test_a_saved_folder_that_lost_its_list_of_files(content, tmp_path, config):
    """It is named in one sentence."""
    saved(tmp_path / "one", ROWS)
    (tmp_path / "one" / "state.json").write_text(content)
    with pytest.raises(UserError, match=r"state\.json does not name the data files"):
        load_rows(config(tmp_path / "one"), stage="preference")


@pytest.mark.parametrize("place", ["data/{split}-00000-of-00001", "{split}/0000", "default/{split}/0000", "{split}"])
def test_a_clone_of_a_hub_set(tmp_path, config, place):
    """Wherever a clone keeps the files of a split, they are found; its other files are no data."""
    for split, rows in (("train", ROWS[:2]), ("test", ROWS[2:])):
        path = tmp_path / f"{place.format(split=split)}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pa.Table.from_pylist(rows), path)
    for name in ("README.md", ".gitattributes", "dataset_infos.json", ".git/x.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    data = load_rows(config(tmp_path, eval_split="test"), stage="preference")
    assert (len(data.train), prompts(data.eval)) == (2, [ROWS[2]["prompt"]])
    with pytest.raises(UserError, match=r"'validation'|would be"):
        load_rows(config(tmp_path, eval_split="validation"), stage="preference")


def test_a_clone_with_several_configurations(tmp_path, config):
    """`data.name` chooses the folder, as it chooses the configuration on the hub."""
    for number, name in enumerate(("easy", "hard")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl.gz").write_bytes(gzip.compress(json.dumps(ROWS[number]).encode()))
    data = load_rows(config(tmp_path, name="hard"), stage="preference")
    assert prompts(data.train) == [ROWS[1]["prompt"]]
    with pytest.raises(UserError, match=r"data files in easy, hard, .*data\.name"):
        load_rows(config(tmp_path), stage="preference")


# What a source is, and what is said of bad rows


@pytest.mark.parametrize(
    ("source", "on_hub"),
    [
        *(("org/set", True), ("set", True), ("bundled:quickstart", False), ("~/set", False), ("./set", False)),
        *((f"data{ending}", False) for ending in (".NDJSON", ".jsonl.zst", ".tsv", ".CSV.GZ", ".arrow")),
        *(("a b", False), ("größe/satz", True)),
    ],
)
def test_what_the_hub_is_asked_for(source, on_hub):
    """Everything with the ending of a data file is a file, so that a misspelt one is not looked for on the hub."""
    assert is_on_hub(source) is on_hub


def test_bad_rows_are_said_in_words():
    """The first five with what is wrong, alike ones together; counts have no code in them."""
    bad = [BadRow("bad_roles", f"a {role} turn is out of order.", "f", n) for n, role in enumerate("ababcx", 1)]
    assert first_rows(bad, "f") == (
        "rows 1 and 3: a a turn is out of order; rows 2 and 4: a b turn is out of order; "
        "row 5: a c turn is out of order; and 1 more"
    )
    assert first_rows(bad[:1], "folder") == "f row 1: a a turn is out of order"
    assert in_words({"bad_roles": 2, "of_its_own": 1}) == "2 with roles out of order, 1 of its own"
    assert not any("_" in words.replace("max_length", "") for words in WORDS.values())
