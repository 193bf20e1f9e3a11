"""Files, folders, the hub: what is read, what is named as bad, what is held out."""

import json
import random

import pytest

from alignment.data.rows.row import BadRow, Row, fingerprint, require_pairs, require_scores, write_rejected
from alignment.data.sources import opening
from alignment.data.sources.loading import load_rows
from alignment.errors import UserError


def pair(i, **fields):
    return {"prompt": f"p{i}", "chosen": f"c{i}", "rejected": f"r{i}"} | fields


def load(config, stage="preference"):
    return load_rows(config, stage=stage)


def prompts(rows):
    return [row.prompt for row in rows]


def write_csv(path, records):
    path.write_text("prompt,chosen,rejected\n" + "".join(",".join(r.values()) + "\n" for r in records))


def write_parquet(path, records):
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(records), path)


WRITERS = {
    "data.jsonl": lambda path, records: path.write_text("\n".join(map(json.dumps, records))),
    "lines.json": lambda path, records: path.write_text("\n".join(map(json.dumps, records))),
    "array.json": lambda path, records: path.write_text(json.dumps(records, indent=1), encoding="utf-8-sig"),
    "data.csv": write_csv,
    "data.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_file_format_gives_the_same_rows(tmp_path, config, name):
    path = tmp_path / name
    WRITERS[name](path, [pair(1), pair(2)])
    data = load(config(path))
    assert data.train == [Row(f"p{i}", (f"c{i}", f"r{i}"), source=f"{path}:{i}") for i in (1, 2)]
    assert (data.eval, data.layout, data.bad) == ([], "pairs", [])
    assert data.fingerprint == fingerprint(data.train, [])
    assert "2 training and 0 held-out rows, layout pairs" in data.description


def test_broken_lines_are_named_by_their_line(tmp_path, config):
    path = tmp_path / "data.jsonl"
    good = json.dumps(pair(1) | {"chosen": "two\u2028lines"}, ensure_ascii=False).encode()
    lines = [
        b"\xef\xbb\xbf" + good,
        b"",
        b'{"prompt": ',
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800", "chosen": "c", "rejected": "r"}',
        b"[1]",
        good,
    ]
    path.write_bytes(b"\n".join(lines))
    data = load(config(path, max_bad_rows=4))
    assert [(b.reason, b.row) for b in data.bad] == [
        *(("broken_json", 3), ("not_utf8", 4), ("lone_surrogate", 5), ("wrong_type", 6)),
    ]
    assert [row.source for row in data.train] == [f"{path}:1", f"{path}:7"]
    assert data.train[0].completions[0] == "two\u2028lines"
    assert "4 bad rows left out: 1 that are no valid JSON, 1 that are not UTF-8" in data.description
    with pytest.raises(UserError) as error:
        load(config(path, max_bad_rows=3))
    assert str(error.value) == (
        f"{path} has 4 bad rows, and data.max_bad_rows allows 3: "
        "row 3: the line is not valid JSON (Expecting value, column 11); "
        "row 4: the line is not UTF-8 (byte 12); row 5: character 0 is half of a surrogate pair; "
        "row 6: the row is a list, not an object."
    )
    assert error.value.rows == data.bad


def test_local_files_allow_no_bad_row_by_default_and_the_first_five_are_named(jsonl, config):
    path = jsonl([pair(0), *(pair(i, chosen="") for i in range(1, 8))])
    with pytest.raises(
        UserError, match=r"7 bad rows, .*allows 0: rows 2, 3, 4, 5 and 6: the answer is empty; and 2 more\.$"
    ):
        load(config(path))
    assert len(load(config(path, max_bad_rows=7)).bad) == 7


def test_csv_rows_that_do_not_fit(tmp_path, config):
    path = tmp_path / "data.csv"
    path.write_bytes(b'prompt,chosen,rejected\n"p\n1",c,r\np2,c,r,x\np3,c\np4,\xff,r\n')
    data = load(config(path, max_bad_rows=3))
    assert prompts(data.train) == ["p\n1"]
    assert [(b.reason, b.row) for b in data.bad] == [("too_many_cells", 2), ("missing_field", 3), ("not_utf8", 4)]
    path.write_text('prompt,chosen,rejected\np,"c,r\n')
    with pytest.raises(UserError, match="not valid CSV after line 1: unexpected end of data"):
        load(config(path))


def test_long_cells_are_read(tmp_path, config):
    write_csv(tmp_path / "data.csv", [pair(1, chosen="c" * 200_000)])
    assert len(load(config(tmp_path / "data.csv")).train[0].completions[0]) == 200_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"[1,", "not valid JSON"),
        ("a.json", b'["\xff"]', "not UTF-8 .byte 2"),
        ("a.json", b'"text"', "JSON array"),
        ("a.json", b"[]", "no usable row"),
        ("a.jsonl", b"", "no usable row"),
        ("a.parquet", b"PAR1", "not a readable Parquet file"),
        ("a.txt", b"p", "no data file: accepted are .json, .jsonl, .ndjson, .csv"),
    ],
)
def test_unreadable_files(tmp_path, config, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load(config(tmp_path / name))


@pytest.mark.parametrize("source", ["./nothing", "/nothing/here", "nothing.jsonl", "~/nothing-here", "a/b/c", "a b"])
def test_absent_paths_are_not_taken_for_hub_ids(config, source, monkeypatch):
    monkeypatch.setattr(opening, "read_hub", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match=f"no file or folder '{source}'"):
        load(config(source))


def test_hub_set(config, monkeypatch):
    import datasets

    asked = []

    def fake(name, subset, split):
        asked.append((name, subset, split))
        return datasets.Dataset.from_list([pair(f"{split}1"), pair(f"{split}2", chosen="")])

    monkeypatch.setattr(datasets, "load_dataset", fake)
    data = load(config("org/set", name="sub", split="train_prefs", eval_split="test_prefs"))
    assert asked == [("org/set", "sub", "train_prefs"), ("org/set", "sub", "test_prefs")]
    assert [row.source for row in (*data.train, *data.eval)] == ["org/set[train_prefs]:1", "org/set[test_prefs]:1"]
    assert [(b.reason, b.row) for b in data.bad] == [("empty_answer", 2), ("empty_answer", 2)]
    with pytest.raises(UserError, match=r"2 bad|1 bad"):
        load(config("org/set", max_bad_rows=0))


def test_hub_out_of_reach(config, monkeypatch):
    import datasets

    def fail(*_, **__):
        raise ConnectionError("Couldn't reach 'org/set' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=r"'org/set'.*ConnectionError.*offline.*local file.*HF_HOME.*HF_ENDPOINT"):
        load(config("org/set"))


def test_folder(jsonl, tmp_path, config):
    jsonl([pair(2)], "b.jsonl")
    jsonl([pair(1)], "a.jsonl")
    assert prompts(load(config(tmp_path)).train) == ["p1", "p2"]
    with pytest.raises(UserError, match="would be the training rows"):
        load(config(tmp_path, eval_split="test"))
    write_csv(tmp_path / "c.csv", [pair(3)])
    (tmp_path / "README.md").write_text("What this is.")
    assert prompts(load(config(tmp_path)).train) == ["p1", "p2", "p3"]


def test_folder_with_splits(jsonl, tmp_path, config):
    for i, stem in enumerate(("test_prefs", "train_prefs-00001-of-00002", "train_prefs-00000-of-00002", "train_sft")):
        jsonl([pair(i)], f"{stem}.jsonl")
    data = load(config(tmp_path, split="train_prefs", eval_split="test_prefs"))
    assert (prompts(data.train), prompts(data.eval)) == (["p2", "p1"], ["p0"])
    with pytest.raises(UserError, match="none for the split 'train': set the split to one of "):
        load(config(tmp_path))


def test_folder_names_the_file_of_a_bad_row(jsonl, tmp_path, config):
    jsonl([pair(1)], "a.jsonl")
    path = jsonl([pair(1, prompt="")], "b.jsonl")
    with pytest.raises(UserError, match=f"{tmp_path} has 1 bad row, .*: {path} row 1: the prompt is empty"):
        load(config(tmp_path))


def test_bundled(jsonl, tmp_path, config, monkeypatch):
    monkeypatch.setattr(opening, "BUNDLED", tmp_path)
    jsonl([pair(1), pair(2)], "toy_train.jsonl")
    jsonl([pair(3)], "toy_eval.jsonl")
    jsonl([{"prompt": f"p{i}", "completion": "c"} for i in range(4)], "toy_sft.jsonl")
    data = load(config("bundled:toy", eval_size=1, eval_split="test"))
    assert (prompts(data.train), prompts(data.eval)) == (["p1", "p2"], ["p3"])
    assert data.train[0].source == "toy_train.jsonl:1"
    assert prompts(load(config("bundled:toy", eval_source="bundled:toy")).eval) == ["p3"]
    data = load(config("bundled:toy"), "sft")
    assert (len(data.train), data.eval, data.layout) == (4, [], "completions")
    data = load(config("bundled:toy", eval_size=1), "sft")
    assert (len(data.train), len(data.eval)) == (3, 1)
    with pytest.raises(UserError, match=r"no file other_train.jsonl.*are: toy\."):
        load(config("bundled:other"))


def test_eval_source(jsonl, config):
    train, other = jsonl([pair(1), pair(2)], "a.jsonl"), jsonl([pair(2), pair(3), pair(4)], "b.jsonl")
    data = load(config(train, eval_source=str(other), eval_limit=2, limit=2))
    assert (prompts(data.train), prompts(data.eval)) == (["p1", "p2"], ["p2", "p3"])
    assert "1 held-out prompts are training prompts too" in data.description
    with pytest.raises(UserError, match="would be the training rows"):
        load(config(train, eval_source=str(train), eval_split="test"))


def test_held_out_rows_depend_on_content_only_and_share_no_prompt(jsonl, config):
    records = [pair(i // 3, chosen=f"c{i}") for i in range(60)]
    data = load(config(jsonl(records), eval_size=10))
    assert len(data.eval) == 9  # three prompts of three rows; a tenth row would tear a prompt apart
    assert len(data.train) == 51
    assert not set(prompts(data.train)) & set(prompts(data.eval))
    assert [row.source for row in data.train] == sorted(
        (r.source for r in data.train), key=lambda s: int(s.split(":")[1])
    )
    random.Random(0).shuffle(records)
    again = load(config(jsonl(records, "other.jsonl"), eval_size=10))
    assert set(prompts(again.eval)) == set(prompts(data.eval))
    fewer = load(config(jsonl(records, "other.jsonl"), eval_size=10, limit=5, eval_limit=2))
    assert (fewer.train, fewer.eval) == (again.train[:5], again.eval[:2])


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ({"kind": "sum"}, "no training row has sum in the column kind; it has add, half, plural"),
        ({"sort": ["add"]}, "no training row has add in the column sort, which no row has"),
    ],
)
def test_training_rows_by_their_columns(where, said, jsonl, config):
    """Values or one value, before the limit; held-out rows stay; what no row has is named beside what there is."""
    kinds = ["add", "plural", "half", "add", "add"]
    rows, held_out = ([pair(f"{part}{i}", kind=kind) for i, kind in enumerate(kinds)] for part in ("", "held "))
    path, other = jsonl(rows, "rows.jsonl"), jsonl(held_out, "held_out.jsonl")

    def kept(where, **fields):
        data = load(config(path, eval_source=str(other), train_where=where, **fields))
        assert len(data.eval) == 5
        return prompts(data.train)

    assert kept({"kind": "add"}) == ["p0", "p3", "p4"]
    assert kept({"kind": ["half", "plural"]}) == ["p1", "p2"]
    assert kept({"kind": "add"}, limit=2) == ["p0", "p3"]
    with pytest.raises(UserError, match=said):
        kept(where)


@pytest.mark.parametrize(("column", "value"), [("weight", "72 kg"), ("tools", "a hammer"), ("system", 3)])
def test_a_column_that_means_something_else_can_be_left_out(jsonl, config, column, value):
    """It is refused with the setting, or without; with `data.ignore` the rows are those of a file without it."""
    other = [pair(i, **{column: value}) for i in range(2)]
    with pytest.raises(UserError, match=column):
        load(config(jsonl(other)))
    assert [row.completions for row in load(config(jsonl(other), ignore=[column])).train] == [
        ("c0", "r0"),
        ("c1", "r1"),
    ]
    kept = load(config(jsonl(other), ignore=[column], eval_source=str(jsonl([pair(5)], "held_out.jsonl")))).train
    assert [row.meta for row in kept] == [{}, {}]


def test_a_column_to_leave_out_that_is_not_there_is_refused(jsonl, config):
    """By the columns of the training rows; one that is mapped cannot be left out either."""
    path = jsonl([pair(0)])
    with pytest.raises(
        UserError, match=r"data\.ignore has 'kilos', but the columns of .* are chosen, prompt, rejected\."
    ):
        load(config(path, ignore=["kilos"]))
    with pytest.raises(UserError, match=r"data\.ignore leaves out 'best', which data\.columns reads"):
        config(path, ignore=["best"], columns={"chosen": "best"})


@pytest.mark.parametrize("size", [6, 1])
def test_impossible_eval_size(jsonl, config, size):
    with pytest.raises(UserError, match=r"cannot be set aside .* 6 rows of 2 prompts"):
        load(config(jsonl([pair(i // 3, chosen=f"c{i}") for i in range(6)]), eval_size=size))


def test_sft_from_preference_data(jsonl, config):
    data = load(config(jsonl([pair(1, score_chosen=2, score_rejected=1, key="k")])), "sft")
    assert data.train == [Row("p1", ("c1",), meta={"key": "k"}, source=data.train[0].source)]
    lists = [{"prompt": "p", "completions": ["a", "b", "c"], "scores": [1, 3, 2], "weight": 2}]
    data = load(config(jsonl(lists)), "sft")
    assert data.train == [Row("p", ("b",), source=data.train[0].source)]
    assert "the best completions of lists serve for SFT; SFT does not use their weights" in data.description
    labelled = [{"prompt": f"p{i}", "completion": "c", "label": i > 1} for i in range(4)]
    data = load(config(jsonl(labelled)), "sft")
    assert [(row.prompt, row.labels) for row in data.train] == [("p2", None), ("p3", None)]
    assert "2 rows labelled undesirable are not used" in data.description
    with pytest.raises(UserError, match="no row labelled true"):
        load(config(jsonl(labelled[:1])), "sft")


def test_fingerprint_is_of_the_content(jsonl, config):
    first, second = jsonl([pair(1), pair(2)], "a.jsonl"), jsonl([pair(1), pair(2)], "b.jsonl")
    changed, swapped = jsonl([pair(1), pair(2, key=1)], "c.jsonl"), jsonl([pair(2), pair(1)], "d.jsonl")
    prints = [load(config(path)).fingerprint for path in (first, second, changed, swapped)]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3
    assert fingerprint([Row("p", ("c",))], []) != fingerprint([], [Row("p", ("c",))])
    others = [Row("p", ("c",)), Row("p", ("c",), weight=2.0), Row("p", ("c",), steps=""), Row("p", ("c",), steps="s")]
    assert len({fingerprint([row]) for row in others}) == 4


def test_a_pairwise_loss_refuses_labelled_rows():
    pairs = [Row("p", ("c", "r"), source="f:1")]
    require_pairs(pairs, "dpo")
    with pytest.raises(UserError, match=r"Loss dpo compares.*row f:1 has one completion with a label"):
        require_pairs([Row("p", ("c",), (True,), source="f:1")], "dpo")


def test_a_loss_that_reads_scores_refuses_rows_without():
    scored = Row("p", ("c", "r"), scores=(2.0, 1.0))
    require_scores([scored], "lipo")
    with pytest.raises(UserError, match=r"Loss lipo reads scores, and row f:1 has none"):
        require_scores([scored, Row("p", ("c", "r"), source="f:1")], "lipo")


def test_rejected_rows_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "run" / "rejected_rows.jsonl"
    rows = [BadRow("empty_answer", "the answer is empty", "f", 7), BadRow("not_utf8", "byte 3 \ud800", "g", 1)]
    write_rejected(rows, path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0] == {"reason": "empty_answer", "message": "the answer is empty", "file": "f", "row": 7}
    assert [line["row"] for line in lines] == [7, 1]
    with pytest.raises(TypeError):
        write_rejected([*rows, BadRow("x", {1, 2}, "f", 1)], path)
    assert len(path.read_text().splitlines()) == 2
    assert [p.name for p in path.parent.iterdir()] == ["rejected_rows.jsonl"]


def test_real_pairs_hold_out_whole_prompts(shared, config):
    source = shared / "pandalm_human" / "pairs.jsonl"
    data = load(config(source, eval_size=100))
    assert len(data.train) + len(data.eval) == 836
    assert 95 <= len(data.eval) <= 100
    assert not {json.dumps(p) for p in prompts(data.train)} & {json.dumps(p) for p in prompts(data.eval)}
    assert data.eval[0].meta.keys() == {"agree", "models"}
