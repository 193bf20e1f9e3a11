"""Tables give every object the keys of all others: what nobody wrote is left out, what somebody wrote stays."""

import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from alignment.data.sources.formats import read_file
from alignment.data.sources.hub import _written
from alignment.data.sources.tables import rows_of_table

CALLS = [{"name": "add", "arguments": {"x": 1}}, {"name": "look", "arguments": {"at": "me"}}]


def read(table, path):
    if path.suffix == ".parquet":
        parquet.write_table(table, path)
    else:
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    return [record for _, record in read_file(path)]


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow"])
def test_objects_of_a_table_have_their_own_keys_again(name, tmp_path):
    """Arguments of one call do not appear in the others; a null in JSON text stays; flat columns keep theirs."""
    rows = [
        {"prompt": "p", "calls": CALLS, "text": json.dumps({"x": None}), "note": None},
        {"prompt": None, "calls": [], "text": None, "note": "n"},
    ]
    table = pa.Table.from_pylist(rows)
    assert table.to_pylist()[0]["calls"][0]["arguments"] == {"x": 1, "at": None}, "this is what a table does"
    assert read(table, tmp_path / name) == rows


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow"])
def test_maps_have_the_keys_that_were_written(name, tmp_path):
    """Spark and DuckDB write arguments as maps, whose keys and nulls are their own."""
    kind = pa.list_(pa.struct({"name": pa.string(), "arguments": pa.map_(pa.string(), pa.int64())}))
    calls = [{"name": "add", "arguments": [("x", 1), ("y", None)]}, {"name": "no", "arguments": []}]
    table = pa.table({"calls": pa.array([calls], kind)})
    assert read(table, tmp_path / name) == [
        {"calls": [{"name": "add", "arguments": {"x": 1, "y": None}}, {"name": "no", "arguments": {}}]}
    ]


@pytest.mark.skipif(not hasattr(pa, "JsonType"), reason="this pyarrow has no type for JSON")
def test_columns_of_json_are_read_with_their_nulls(tmp_path):
    """The datasets library stores objects of mixed kinds as JSON."""
    storage = pa.array([json.dumps({"x": None, "y": [1, {"z": None}]}), None], pa.string())
    column = pa.ExtensionArray.from_storage(pa.json_(), storage)
    table = pa.table({"tools": column, "n": [1, 2]})
    expected = [{"tools": {"x": None, "y": [1, {"z": None}]}, "n": 1}, {"tools": None, "n": 2}]
    assert read(table, tmp_path / "rows.arrow") == expected
    schema = pa.schema({"tools": pa.list_(pa.json_())})
    assert list(rows_of_table([{"tools": ['{"a": null}', "{broken"]}], schema)) == [{"tools": [{"a": None}, "{broken"]}]


def test_rows_of_a_hub_set_are_those_of_its_table():
    """With the columns that it knows, and where it is streamed without them."""
    datasets = pytest.importorskip("datasets")
    rows = [{"calls": CALLS}]
    assert list(_written(datasets.Dataset.from_list(rows))) == rows
    assert list(_written([{"calls": [{"a": None, "b": [{"c": None, "d": 1}]}], "e": None}])) == [
        {"calls": [{"b": [{"d": 1}]}], "e": None}
    ]
    if hasattr(datasets, "Json"):
        features = datasets.Features({"calls": datasets.Json()})
        kept = [{"calls": {"x": None, "y": 1}}]
        assert list(_written(datasets.Dataset.from_list(kept, features=features))) == kept
