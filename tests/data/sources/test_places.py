"""Where data come from: lists of files, patterns, folders of several kinds, addresses and hubs; and no row too many."""

import gzip
import json
import sys
import types

import fsspec
import pyarrow as pa
import pytest
from pyarrow import parquet

from alignment.config.places import is_on_hub
from alignment.data.sources import loading, opening
from alignment.data.sources.formats import read_file
from alignment.data.sources.loading import load_rows
from alignment.errors import UserError
from tests.helpers.commands import write_lines


def pair(i, **fields):
    return {"prompt": f"p{i}", "chosen": f"c{i}", "rejected": f"r{i}"} | fields


def prompts(rows):
    return [row.prompt for row in rows]


def load(config, stage="preference"):
    return load_rows(config, stage=stage)


def lines(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_lists_and_patterns(tmp_path, config, monkeypatch):
    """Several files are one set, in the order given or, of a pattern, in that of their names; `~` is your folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "deep").mkdir()
    write_lines(tmp_path / "b.jsonl", [pair(2)])
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines([pair(1)])))
    write_lines(tmp_path / "deep" / "c.jsonl", [pair(3)])
    (tmp_path / "a.txt").write_text("no data")
    for source, found in (
        (f"{tmp_path}/*.jsonl*", ["p1", "p2"]),
        ("~/**/*", ["p1", "p2", "p3"]),
        (["~/b.jsonl", f"{tmp_path}/a*"], ["p2", "p1"]),
    ):
        data = load(config(source))
        assert prompts(data.train) == found
    assert data.description.startswith(f"~/b.jsonl, {tmp_path}/a*: 2 training")
    for pattern in ("*.csv", "*.txt"):
        with pytest.raises(UserError, match=r"No data file matches '.*' \(\.json, "):
            load(config(f"{tmp_path}/{pattern}"))
    with pytest.raises(UserError, match="would be the training rows"):
        load(config(["~/b.jsonl", "~/deep/c.jsonl"], eval_source="~/deep/c.jsonl"))
    with pytest.raises(UserError, match=r"data\.source=\[\] names nothing"):
        config([])


def test_a_folder_of_several_kinds(tmp_path, config):
    """All its data files are read, or those of the split."""
    write_lines(tmp_path / "b.jsonl", [pair(2)])
    parquet.write_table(pa.Table.from_pylist([pair(1)]), tmp_path / "a.parquet")
    assert prompts(load(config(tmp_path)).train) == ["p1", "p2"]
    write_lines(tmp_path / "train-b.jsonl", [pair(4)])
    parquet.write_table(pa.Table.from_pylist([pair(3)]), tmp_path / "a_train.parquet")
    write_lines(tmp_path / "test.json", [pair(5)])
    data = load(config(tmp_path, eval_split="test"))
    assert (prompts(data.train), prompts(data.eval)) == (["p3"], ["p5"])


@pytest.fixture
def memory():
    """fsspec's file system in memory, with a folder of packed rows, parquet and arrow."""
    fs = fsspec.filesystem("memory")
    fs.pipe("/set/data/train-0.jsonl.gz", gzip.compress(lines([pair(1), pair(2)])))
    fs.pipe("/set/data/test.json", json.dumps([pair(9)], indent=1).encode())
    fs.pipe("/set/README.md", b"no data")
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_pylist([pair(3)]), sink)
    fs.pipe("/set/data/train-1.parquet", sink.getvalue().to_pybytes())
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist([pair(4)])
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    fs.pipe("/set/one.arrow", sink.getvalue().to_pybytes())
    yield fs
    fs.rm("/set", recursive=True)


def test_addresses(memory, config):
    """A file, a pattern and a folder with splits at an address give what they give on this machine."""
    for source, found in (
        ("memory://set/data/train-0.jsonl.gz", ["p1", "p2"]),
        ("memory://set/data/train-*", ["p1", "p2", "p3"]),
        (["memory://set/one.arrow", "memory://set/data/train-1.parquet"], ["p4", "p3"]),
    ):
        data = load(config(source))
        assert prompts(data.train) == found
    assert data.train[0].source == "memory://set/one.arrow:1"
    memory.rm("/set/one.arrow")
    data = load(config("memory://set", eval_split="test"))
    assert (prompts(data.train), prompts(data.eval)) == (["p1", "p2", "p3"], ["p9"])
    with pytest.raises(UserError, match="would be the training rows"):
        load(config("memory://set/data/train-1.parquet", eval_split="test"))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("memory://set/none.jsonl", r"memory://set/none\.jsonl cannot be read .*check the address"),
        ("memory://nowhere", "There is nothing at memory://nowhere: check the address"),
        ("memory://set/*.csv", r"There is nothing at memory://set/\*\.csv"),
        ("memory://set/data/*.md", "There is nothing at|No data file matches"),
        ("nonsense://x", r"nonsense://x cannot be read \(Protocol not known: nonsense\): "),
        ("s3://bucket/rows.jsonl", r"s3://bucket/rows\.jsonl cannot be read \(Install s3fs .*\): install that package"),
        ("gs://bucket/*.jsonl", r"gs://bucket/\*\.jsonl cannot be read \(.*gcsfs.*\): install that package"),
    ],
)
def test_addresses_that_cannot_be_read(source, said, memory, config, monkeypatch):
    """A missing file, package or file system: one sentence that says what to do."""
    for package in ("s3fs", "gcsfs"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=said) as caught:
        load(config(source))
    assert str(caught.value).count(".\n") == 0 and str(caught.value).endswith(".")


def test_what_the_hub_is_not_asked_for():
    """Addresses, patterns and ModelScope's names are no ids of the hub."""
    for source in ("s3://a/b", "hf://datasets/a/b", "modelscope:a/b", "dir/*", "a?", "https://x.y/z"):
        assert not is_on_hub(source)


# Hubs


@pytest.fixture
def asked(monkeypatch):
    """What `datasets.load_dataset` and ModelScope were asked for; their sets count the rows that are taken."""
    import datasets

    found = types.SimpleNamespace(calls=[], rows=0)

    def rows():
        for number in range(100):
            found.rows += 1
            yield pair(number)

    def load_dataset(*names, **settings):
        found.calls.append((*names, settings))
        return rows()

    class MsDataset:
        load = staticmethod(load_dataset)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setitem(sys.modules, "modelscope", types.ModuleType("modelscope"))
    module = types.ModuleType("modelscope.msdatasets")
    module.MsDataset = MsDataset
    monkeypatch.setitem(sys.modules, "modelscope.msdatasets", module)
    return found


def test_a_hub_set_is_asked_for_as_the_settings_say(asked, config):
    """Configuration, split, revision and streaming; with a limit no more rows are taken than are looked at at once."""
    data = load(config("org/set", name="sub", split="train", revision="v2", streaming=True, limit=40))
    assert asked.calls == [("org/set", "sub", {"split": "train", "revision": "v2", "streaming": True})]
    assert len(data.train) == 40 and asked.rows == 40
    load(config("org/set"))
    assert asked.calls[1:] == [("org/set", None, {"split": "train"})] and asked.rows == 140


def test_modelscope(asked, config, monkeypatch):
    """The same from its package; without the package, one sentence."""
    data = load(config("modelscope:org/set", name="sub", revision="v2", limit=3))
    expected = {"use_streaming": False, "subset_name": "sub", "split": "train", "version": "v2"}
    assert asked.calls == [("org/set", expected)]
    assert data.train[2].source == "modelscope:org/set[train]:3"
    monkeypatch.setitem(sys.modules, "modelscope.msdatasets", None)
    with pytest.raises(UserError, match=r"modelscope:org/set needs the package modelscope, .*: install it"):
        load(config("modelscope:org/set"))


# No more than is needed


def counted(monkeypatch):
    taken = []

    def reading(path):
        for number, record in read_file(path):
            taken.append(record)
            yield number, record

    monkeypatch.setattr(opening, "read_file", reading)
    return taken


@pytest.mark.parametrize(
    ("settings", "read"),
    [
        ({"limit": 50}, 50),
        ({"limit": 2}, 32),  # the layout is recognised by this many
        ({"limit": 50, "eval_size": 10}, 200),
        ({"limit": 50, "train_where": {"kind": "even"}}, 200),
        ({}, 200),
    ],
)
def test_a_limit_reads_no_more_rows_than_it_must(settings, read, jsonl, config, monkeypatch):
    """All rows are read only where the held-out rows are chosen among them, or rows are left out by a column."""
    path = jsonl([pair(i, kind="odd" if i % 2 else "even") for i in range(200)])
    taken = counted(monkeypatch)
    data = load(config(path, **settings))
    assert len(taken) == read and len(data.train) == settings.get("limit", 200)


def test_a_limit_counts_usable_rows(jsonl, config, monkeypatch):
    """Bad rows, and those that SFT does not learn, are read over."""
    rows = [pair(i, chosen="" if i % 2 else "c") for i in range(200)]
    taken = counted(monkeypatch)
    data = load(config(jsonl(rows), limit=50, max_bad_rows=100))
    assert (len(data.train), len(data.bad), len(taken)) == (50, 49, 99)
    taken.clear()
    labelled = [{"prompt": f"p{i}", "completion": "c", "label": i % 2 == 0} for i in range(200)]
    assert prompts(load(config(jsonl(labelled), limit=50), "sft").train)[-1] == "p98"
    assert len(taken) == 99


def test_the_layout_is_recognised_by_the_first_records(jsonl, config, monkeypatch):
    """Later ones are not held to it: those of another layout are bad rows."""
    monkeypatch.setattr(loading, "_RECOGNISED", 3)
    rows = [pair(0), pair(1), pair(2), *({"messages": []} for _ in range(9))]
    data = load(config(jsonl(rows), max_bad_rows=9))
    assert (data.layout, len(data.train), len(data.bad)) == ("pairs", 3, 9)
