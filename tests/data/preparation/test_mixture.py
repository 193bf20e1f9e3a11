"""Mixtures: how many rows each source gives, which and in which order; templates, held-out rows and repeats."""

import json
import logging
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignment.config.compose import load
from alignment.config.data import Duplicates, Exhausted
from alignment.data.preparation.mixture import draw, epoch_sizes
from alignment.data.preparation.prepare import fit_preferences, load_conversations, read_preferences
from alignment.data.rows.row import Row, content_key
from alignment.data.sources.opening import BUNDLED
from alignment.errors import UserError
from tests.conftest import recommended_loss


def pair(i, **fields):
    return {"prompt": f"p{i}", "chosen": f"c{i}", "rejected": f"r{i}"} | fields


def texts(count, begin="p"):
    return [Row(f"{begin}{i}", ("c", "r")) for i in range(count)]


def drawn_from(config, rows):
    """Source and place of the rows that are drawn, in their order."""
    contents = {name: np.array([content_key(row) for row in own], np.uint64) for name, own in rows.items()}
    return [(list(rows)[number], index) for number, index in draw(config, contents).tolist()]


# How many rows, and which


@pytest.mark.parametrize(
    ("shares", "rows", "exhausted", "sizes"),
    [
        ([{"weight": 1}, {"weight": 1}], [100, 40], "stop", [40, 40]),
        ([{"weight": 3}, {"weight": 1}], [90, 40], "stop", [90, 30]),
        ([{"weight": 0.7}, {"weight": 0.2}, {"weight": 0.1}], [700, 700, 70], "stop", [490, 140, 70]),
        ([{"weight": 1}, {"weight": 1}], [100, 40], "repeat", [100, 100]),
        ([{"weight": 3}, {"weight": 1}], [90, 40], "repeat", [120, 40]),
        ([{"count": 7}, {"weight": 2}, {"weight": 1}, {}], [9, 10, 10, 5], "stop", [7, 10, 5, 5]),
        ([{"count": 7}, {}], [3, 5], "repeat", [7, 5]),
        ([{"count": 0}, {}], [3, 5], "stop", [0, 5]),
        ([{"weight": 0}, {"weight": 1}], [3, 5], "stop", [0, 5]),
        ([{"weight": 1000}, {"weight": 1}], [10, 10], "stop", [10, 1]),
    ],
)
def test_how_many_rows_each_source_gives(shares, rows, exhausted, sizes, mixture):
    """Counts are exact; weights hold among the sources that have one, until the first, or the last, is used up."""
    names = [f"s{i}" for i in range(len(shares))]
    sources = {name: {"source": "x", **share} for name, share in zip(names, shares, strict=True)}
    config = mixture(sources, exhausted=Exhausted[exhausted])
    assert list(epoch_sizes(config, dict(zip(names, rows, strict=True))).values()) == sizes


def test_a_count_above_the_rows_is_refused(mixture):
    """It would draw rows twice, which has to be asked for."""
    config = mixture({"a": {"source": "x", "count": 4}})
    with pytest.raises(UserError, match=r"data\.sources\.a\.count=4 asks for more than its 3 rows: .*exhausted=repeat"):
        epoch_sizes(config, {"a": 3})


@given(
    st.lists(st.tuples(st.integers(1, 30), st.sampled_from([None, 0.5, 1, 3])), min_size=1, max_size=4),
    st.sampled_from(Exhausted),
    st.integers(0, 3),
)
def test_a_drawn_epoch(mixture, sources, exhausted, seed):
    """Every source gives its number, each of its rows as often as any other up to one time, and evenly spread."""
    shares = {f"s{i}": {"source": "x", "weight": weight} for i, (_, weight) in enumerate(sources)}
    config = mixture(shares, exhausted=exhausted, seed=seed)
    rows = {f"s{i}": texts(count, f"{i}-") for i, (count, _) in enumerate(sources)}
    sizes = epoch_sizes(config, {name: len(own) for name, own in rows.items()})
    order = drawn_from(config, rows)
    assert Counter(name for name, _ in order) == {name: size for name, size in sizes.items() if size}
    for name, own in rows.items():
        times = Counter(index for of, index in order if of == name)
        counts = [times[index] for index in range(len(own))]
        assert max(counts) - min(counts) <= 1
        assert max(counts) <= 1 or exhausted is Exhausted.repeat
    for end in range(len(order)):
        found = Counter(name for name, _ in order[:end])
        assert all(abs(found[name] - size * end / len(order)) <= len(sizes) for name, size in sizes.items())


def test_a_seed_and_the_content_decide(mixture):
    """Not the order of the rows in their files, nor where they are; another seed draws others."""
    config = mixture({"a": {"source": "x", "count": 10}, "b": {"source": "y", "count": 5}})
    rows = {"a": texts(50), "b": texts(9, "q")}

    def drawn(config, rows):
        return [rows[name][index].prompt for name, index in drawn_from(config, rows)]

    first = drawn(config, rows)
    assert first == drawn(config, {name: own[::-1] for name, own in rows.items()})
    assert first == ["p43", "q5", "p49", "p31", "q1", "p28", "p16", "q8", "p18", "p26", "q2", "p37", "p19", "q6", "p22"]
    assert set(first) != set(drawn(replace(config, seed=1), rows))
    assert drawn(replace(config, limit=6), rows) == first[:6]


# From files to groups


@pytest.fixture
def files(jsonl):
    """Two files of pairs; the second also has an answer column of another name."""
    return {
        "a": jsonl([pair(i, kind="even" if i % 2 == 0 else "odd") for i in range(12)], "a.jsonl"),
        "b": jsonl([{"question": f"q{i}", "best": f"c{i}", "worst": f"r{i}"} for i in range(8)], "b.jsonl"),
    }


B = {"columns": {"prompt": "question", "chosen": "best", "rejected": "worst"}}


def marked(mark):
    return {"template_kwargs": {"mark": mark}}


def text(tokenizer, group):
    return tokenizer.decode(group.prompt)


def test_each_source_has_its_own_columns_template_and_held_out_rows(files, mixture, qwen, caplog):
    """Groups know their source, its held-out rows stay apart, and the summary has the numbers of each."""
    qwen.chat_template = "{{ mark }}" + qwen.chat_template
    sources = {
        "a": {
            "source": files["a"],
            "system": "Be brief.",
            "eval_size": 4,
            "weight": 2,
            "template_kwargs": {"mark": "A"},
        },
        "b": {"source": files["b"], **B, "eval_size": 2, "weight": 1, "template_kwargs": {"mark": "B"}},
    }
    config = mixture(sources)
    with caplog.at_level(logging.INFO):
        data, left_out = fit_preferences(read_preferences(config, qwen), config, recommended_loss("dpo"))
    assert Counter(group.dataset for group in data.train) == {"a": 8, "b": 4}
    assert [group.dataset for group in data.eval] == ["a"] * 4 + ["b"] * 2 and not left_out
    for group in (*data.train, *data.eval):
        assert text(qwen, group).startswith("A" if group.dataset == "a" else "B")
        assert ("Be brief." in text(qwen, group)) == (group.dataset == "a")
        assert f"{files[group.dataset]}:" in group.source
    trained, held = ({text(qwen, group) for group in part} for part in (data.train, data.eval))
    assert not trained & held and len(held) == 6
    facts = data.info["sources"]["b"]
    assert (facts["train"], facts["of"], facts["eval"], round(facts["share"], 3)) == (4, 6, 2, 0.333)
    assert "b: 4 training rows of 6 (33.3% of the mixture), 2 held out" in caplog.text
    assert data.info["source"].startswith("the mixture of a, b: 12 training and 6 held-out rows; a: ")


def test_the_names_of_sources_change_no_token(files, mixture, config, tiny):
    """A mixture of one source has the tokens of that source alone, in another order; its digest knows no name."""
    alone = fit_preferences(read_preferences(config(files["a"]), tiny), config(files["a"]), recommended_loss("dpo"))[0]
    mixed = [
        fit_preferences(read_preferences(of, tiny), of, recommended_loss("dpo"))[0]
        for of in (mixture({name: {"source": files["a"]}}) for name in ("x", "y"))
    ]
    keys = [sorted(group.keys()[0] for group in data.train) for data in (alone, *mixed)]
    assert keys[0] == keys[1] == keys[2]
    assert mixed[0].info["tokens_digest"] == mixed[1].info["tokens_digest"] != alone.info["tokens_digest"]


def test_where_divides_one_file_into_sources(files, mixture, tiny):
    """Training and held-out rows alike; a value that no row has, and a source that is empty, are named."""
    even, odd = ({"source": files["a"], "where": {"kind": kind}, "eval_size": 2} for kind in ("even", ["odd"]))
    config = mixture({"even": even, "odd": odd}, duplicates=Duplicates.drop)
    read = read_preferences(config, tiny)
    assert Counter(group.dataset for group in read.train.groups) == {"even": 4, "odd": 4}
    for group, row in zip(read.held_out.groups, read.held_out.rows, strict=True):
        assert row.meta["kind"] == group.dataset
    with pytest.raises(
        UserError, match=r"data\.sources\.odd: where: no training row has none in the column kind; it has"
    ):
        read_preferences(mixture({"even": even, "odd": {"source": files["a"], "where": {"kind": "none"}}}), tiny)


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"source": "nowhere.jsonl"}, "There is no file or folder 'nowhere.jsonl'"),
        ({"source": "bundled:quickstart", "eval_size": 10**6, "eval_source": "nowhere.jsonl"}, "There is no file"),
        ({"source": "{a}", "eval_source": "{a}"}, "The held-out rows would be the training rows"),
        ({"source": "{empty}"}, "has no usable row"),
        ({"source": "{b}"}, "The layout of .* is not known"),
        ({"source": "{folder}", "split": "validation"}, "none for the split 'validation'"),
    ],
)
def test_what_is_wrong_with_a_source_names_it(own, said, files, jsonl, tmp_path, mixture, tiny):
    """One sentence, which begins with the source of the mixture."""
    (tmp_path / "folder").mkdir()
    places = files | {"empty": jsonl([], "empty.jsonl"), "folder": tmp_path / "folder"}
    jsonl([pair(1)], "folder/train.jsonl")
    own = {key: value.format(**places) if isinstance(value, str) else value for key, value in own.items()}
    with pytest.raises(UserError, match=rf"data\.sources\.second: .*{said}"):
        read_preferences(mixture({"first": {"source": files["a"]}, "second": own}), tiny)


def test_bad_rows_of_a_source_are_kept(files, jsonl, mixture, tiny):
    """They are named, and all of them are at hand for the file of rejected rows."""
    bad = jsonl([pair(1), pair(2, chosen="")], "bad.jsonl")
    with pytest.raises(UserError, match=r"data\.sources\.b: .*has 1 bad row") as caught:
        read_preferences(mixture({"a": {"source": files["a"]}, "b": {"source": bad}}), tiny)
    assert [row.row for row in caught.value.rows] == [2]


def test_rows_of_labels_and_pairs_mix_for_a_loss_of_rows(files, jsonl, mixture, tiny):
    """Pairs become rows beside labelled ones, trained on and held out; a loss of pairs refuses the labelled ones."""
    labelled = [{"prompt": f"l{i}", "completion": "x", "label": i % 2 == 0} for i in range(8)]
    sources = {"a": {"source": files["a"], "eval_size": 2}, "l": {"source": jsonl(labelled, "l.jsonl"), "eval_size": 3}}
    config = mixture(sources)
    data, _ = fit_preferences(read_preferences(config, tiny), config, recommended_loss("kto"))
    assert Counter(group.dataset for group in data.train) == {"a": 20, "l": 5}
    assert Counter(group.dataset for group in data.eval) == {"a": 4, "l": 3} and len(data.eval_rows) == 7
    assert all(group.labels is not None for group in (*data.train, *data.eval))
    with pytest.raises(UserError, match="Loss dpo compares completions"):
        fit_preferences(read_preferences(config, tiny), config, recommended_loss("dpo"))


# Repeats


def test_repeated_rows_are_counted_or_left_out(jsonl, config, mixture, tiny):
    """Within a source and across sources, by what a row trains on; those left out are named with the first."""
    one = jsonl([pair(1), pair(2), pair(1, note="another"), pair(1, chosen="other")], "one.jsonl")
    two = jsonl([pair(2), pair(3)], "two.jsonl")
    read = read_preferences(config(one), tiny)
    assert "1 training rows repeat an earlier one" in read.loaded.description and len(read.train.groups) == 4
    assert read_preferences(config(one, duplicates=Duplicates.drop), tiny).loaded.dropped[0].row == 3

    sources = {"one": {"source": one}, "two": {"source": two}}
    config = mixture(sources)
    data, left_out = fit_preferences(read_preferences(config, tiny), config, recommended_loss("dpo"))
    assert "in all sources together 2 training rows repeat an earlier one" in data.info["source"]
    assert len(data.train) == 6 and not left_out
    config = mixture(sources, duplicates=Duplicates.drop)
    data, left_out = fit_preferences(read_preferences(config, tiny), config, recommended_loss("dpo"))
    assert len(data.train) == 4 and data.info["dropped"] == {"duplicate": 2}
    assert [(row.file, row.row, row.message) for row in left_out] == [
        (str(one), 3, f"{one}:1 is the same row"),
        (str(two), 1, f"{one}:2 is the same row"),
    ]


def test_held_out_prompts_of_one_source_in_another_are_said(jsonl, mixture, tiny):
    """Each source keeps its own apart; across sources they are counted."""
    one, two = jsonl([pair(i) for i in range(8)], "one.jsonl"), jsonl([pair(i) for i in range(8)], "two.jsonl")
    config = mixture({"one": {"source": one, "eval_size": 3}, "two": {"source": two}})
    description = read_preferences(config, tiny).loaded.description
    assert "in all sources together 3 held-out prompts are training prompts too" in description


# SFT


def test_conversations_mix_too(files, mixture, qwen):
    """The same rules; held-out conversations know their source."""
    sources = {
        "a": {"source": files["a"], "eval_size": 4, "count": 5},
        "b": {"source": files["b"], **B, "eval_size": 1},
    }
    data, _ = load_conversations(mixture(sources), qwen)
    assert (len(data.train), len(data.eval), data.eval_datasets) == (12, 5, ["a"] * 4 + ["b"])
    assert Counter("a.jsonl" in source for source in data.sources) == {True: 5, False: 7}
    assert data.info["sources"]["a"]["train"] == 5


# Settings


def test_a_source_takes_the_settings_of_the_data_unless_it_has_its_own():
    """Those that say how rows are written and how many are held out; never which rows they are."""
    given = "{a: a.jsonl, b: {source: [x, y], system: null, chat_template: own.jinja, where: {k: [v]}}}"
    settings = (
        "data.chat_template=training",
        "data.source=null",
        "data.eval_size=7",
        "data.system=Brief.",
        f"data.sources={given}",
    )
    data = load("recipe=quickstart", *settings, "data.sources.b.weight=3").data
    a, b = data.parts.values()
    assert (a.source, a.system, a.eval_size, a.split) == ("a.jsonl", "Brief.", 7, "train")
    assert (a.chat_template, b.chat_template) == ("training", "own.jinja")
    assert (b.source, b.system, b.sources, b.max_length) == (["x", "y"], None, {}, data.max_length)
    assert data.named == ["a.jsonl", "x", "y"]
    assert (data.sources["b"].where, data.sources["b"].weight) == ({"k": ["v"]}, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("data.sources.mth.weight=2", r"data\.sources\.mth\.source is missing \(did you mean math\?\)"),
        ("data.sources.math.wigt=2", r"no setting data\.sources\.math\.wigt \(did you mean .*math\.weight"),
        ("sft.data.sources={a: {source: x, weight: much}}", r"sft\.data\.sources\.a\.weight takes a number"),
        (
            "sft.data.sources=[a, b]",
            r"^sft\.data\.sources takes values by name, such as \{name: value\}, not a list\.$",
        ),
    ],
)
def test_misspelt_sources_and_settings(given, said):
    """Names that are none, with the one that is meant."""
    with pytest.raises(UserError, match=said):
        load("recipe=quickstart", "data.source=null", "data.sources={math: {source: x.jsonl}}", given)


@pytest.mark.parametrize(
    ("name", "own", "more", "said"),
    [
        ("a", {"weight": -1.0}, {}, r"data\.sources\.a\.weight must be null or a finite number, at least 0, not -1"),
        ("a", {"weight": math.inf}, {}, r"data\.sources\.a\.weight must be null or a finite number"),
        ("a", {"weight": 1.0, "count": 2}, {}, r"data\.sources\.a has a weight and a count: leave one of them out"),
        ("a", {"count": -2}, {}, r"data\.sources\.a\.count must be null or at least 0, not -2"),
        ("a", {"weight": 0.0}, {}, r"data\.sources: no source has a weight or a count above 0"),
        ("rewards", {}, {}, r"data\.sources\.rewards: a metric has this name already"),
        ("dpo", {}, {}, r"data\.sources\.dpo: a metric has this name already"),
        ("a/b", {}, {}, r"the name 'a/b' of a source may have letters, digits, _ and - only"),
        ("a", {}, {"source": "x.jsonl"}, r"data\.source has no effect with data\.sources: set data\.source=null"),
        ("a", {}, {"eval_split": "test"}, r"data\.eval_split has no effect .*: set data\.eval_split=null"),
        ("a", {}, {"ignore": ["weight"]}, r"data\.ignore has no effect .*: set data\.ignore=\[\]"),
        ("a", {}, {"split": "test"}, r"data\.split has no effect .*: set data\.split=train"),
        ("a", {}, {"seed": -1}, r"data\.seed must be in \[0, 4294967296\), not -1"),
        ("a", {}, {"decontaminate_answers": True}, r"has no effect without data\.decontaminate"),
        ("a", {}, {"sources": {}}, r"data\.source=null names nothing to read: give it a source, or data\.sources"),
    ],
)
def test_wrong_settings_are_one_sentence(name, own, more, said, mixture):
    """A share that is none, a name that is taken, a setting without effect."""
    good = mixture({"b": {"source": "x"}})
    with pytest.raises(UserError, match=said):
        replace(good, **({"sources": mixture({name: {"source": "x", **own}}).sources} | more))


def test_the_shipped_mixture_holds_all_of_the_quickstart_set():
    """Its kinds are those of the bundled set, each in one of the sources."""
    data = load("recipe=quickstart", "data=quickstart_mixture").data
    kinds = [kind for source in data.sources.values() for kind in source.where["kind"]]
    rows = [json.loads(line) for line in (BUNDLED / "quickstart_train.jsonl").read_text().splitlines()]
    assert sorted(kinds) == sorted({row["kind"] for row in rows})
