"""Ranked lists: as pairs, through the loading of a run's data, and what is reported of them."""

import json
import logging

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from alignment.config.compose import load
from alignment.config.data import ListPairs
from alignment.data.preparation.prepare import fit_preferences, read_preferences
from alignment.data.tokens.units import are_lists, as_pairs
from alignment.errors import UserError
from alignment.losses import LossInputs, LossOutput
from alignment.training.metrics import preference_metrics
from alignment.types import Group, RaggedLogps


def ids(*numbers):
    return np.array(numbers, dtype=np.int32)


def ranked(size, scores=None, **more):
    return Group(ids(9), tuple(ids(k) for k in range(size)), scores=scores, **more)


def places(pairs):
    return [tuple(int(completion[0]) for completion in pair.completions) for pair in pairs]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (ListPairs.best_vs_worst, [(0, 2), (0, 1)]),
        (ListPairs.best_vs_rest, [(0, 1), (0, 2), (0, 1)]),
        (ListPairs.all_pairs, [(0, 1), (0, 2), (1, 2), (0, 1)]),
    ],
)
def test_pairs_of_lists(how, expected):
    """Of a list of three and of one of two."""
    assert places(as_pairs([ranked(3), ranked(2)], how)) == expected


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (ListPairs.best_vs_worst, [(0, 3)]),
        (ListPairs.best_vs_rest, [(0, 2), (0, 3)]),
        (ListPairs.all_pairs, [(0, 2), (0, 3), (1, 2), (1, 3)]),
    ],
)
def test_equal_scores_are_no_pair(how, expected):
    lists = [ranked(4, (5.0, 5.0, 2.0, 2.0)), ranked(3, (1.0, 1.0, 1.0))]
    assert places(as_pairs(lists, how)) == expected


def test_a_pair_has_what_its_list_had():
    (pair,) = as_pairs([ranked(3, (3.0, 2.0, 0.5), weight=0.25, source="f:7")], ListPairs.best_vs_worst)
    assert (pair.scores, pair.weight, pair.source, pair.labels) == ((3.0, 0.5), 0.25, "f:7", None)
    assert pair.prompt.tolist() == [9]


def test_what_is_a_list():
    assert are_lists([ranked(2), ranked(3)])
    assert not are_lists([ranked(2), ranked(1)])


LISTS = [
    {"prompt": "a", "completions": ["x", "y", "z"], "scores": [1, 3, 2], "weight": 2},
    {"prompt": "b", "completions": ["x", "y"], "scores": [1, 1]},
    {"prompt": "c", "completions": ["x", "y", "z", "v"], "scores": [4, 4, 1, 0]},
]


@pytest.fixture
def load_lists(tmp_path, tiny_model_folder):
    """Load these records, trained on and held out, for a loss."""

    def run(loss, records, *overrides, held_out=LISTS):
        for name, rows in (("train", records), ("held_out", held_out)):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = load(
            "recipe=quickstart", f"loss={loss}", f"data.source={tmp_path / 'train.jsonl'}",
            f"data.eval_source={tmp_path / 'held_out.jsonl'}", "data.limit=null", "data.eval_limit=null", *overrides,
        )  # fmt: skip
        return fit_preferences(
            read_preferences(config.data, AutoTokenizer.from_pretrained(tiny_model_folder)), config.data, config.loss
        )[0]

    return run


@pytest.mark.slow
def test_a_loss_of_pairs_gets_the_pairs_of_lists(load_lists, caplog):
    caplog.set_level(logging.INFO)
    data = load_lists("dpo", LISTS[:1])
    assert [(g.scores, g.weight) for g in data.train] == [((3.0, 1.0), 2.0)]
    assert [(g.scores, row.prompt) for g, row in zip(data.eval, data.eval_rows, strict=True)] == [
        *(((3.0, 1.0), "a"), ((4.0, 0.0), "c")),
    ]
    assert (data.info["train"], data.info["eval"]) == (1, 2)
    assert "training: 1 pairs of 1 lists" in caplog.text
    assert "held-out: 2 pairs of 3 lists" in caplog.text


def test_each_pair_of_a_held_out_list_keeps_its_row(load_lists):
    data = load_lists("dpo", LISTS, "data.list_pairs=all_pairs")
    assert [group.source for group in data.eval] == [row.source for row in data.eval_rows]
    assert len(data.eval) == 3 + 0 + 5


def test_a_loss_of_rows_gets_the_rows_of_these_pairs(load_lists):
    data = load_lists("kto", LISTS)
    assert [group.labels for group in data.train] == [(True,), (True,), (False,), (False,)]
    assert all(len(group.completions) == 2 for group in data.eval)


def test_a_loss_that_draws_gets_each_prompt_once(load_lists):
    """Also those of lists in which no answer is better; an undesirable row asks its prompt as well as any other."""
    rows = [{"prompt": p, "completion": "z", "label": p == "r"} for p in ("q", "r", "q")]
    for records in ([*LISTS, LISTS[0]], rows):
        data = load_lists("opd", records, "distill.teacher=t", "onpolicy=distill")
        assert len(data.train) == len({record["prompt"] for record in records}) and len(data.eval) == 3
        assert {(group.labels, len(group.completions)) for group in [*data.train, *data.eval]} == {((True,), 1)}
        assert [group.source for group in data.eval] == [row.source for row in data.eval_rows]


def test_a_loss_of_lists_gets_lists_and_pairs_as_they_are(load_lists):
    data = load_lists("plackett_luce", LISTS, held_out=[{"prompt": "p", "chosen": "x", "rejected": "y"}])
    assert [group.scores for group in data.train] == [(3.0, 2.0, 1.0), (1.0, 1.0), (4.0, 4.0, 1.0, 0.0)]
    assert [len(group.completions) for group in data.eval] == [2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "record", "message"),
    [
        ("dpo", {"prompt": "p", "completions": ["x", "y", "z"], "scores": [1, 1, 1]}, "no training list has two"),
        ("lipo", {"prompt": "p", "completions": ["x", "y", "z"]}, r"lipo reads scores, and row .*:1 has none"),
        ("plackett_luce", {"prompt": "p", "completion": "x", "label": True}, r"plackett_luce compares .*:1 has one"),
    ],
)
def test_data_that_a_loss_cannot_use(load_lists, loss, record, message):
    with pytest.raises(UserError, match=message):
        load_lists(loss, [record])


def ragged(totals):
    """Two tokens each, the second of 0, with these sums."""
    values = torch.tensor([x for total in totals for x in (total, 0.0)], dtype=torch.float64)
    return RaggedLogps(values, 2 * torch.arange(len(totals) + 1))


REWARDS = torch.tensor([1.0, 2.0, -1.0, 0.5, 0.5, -3.0, -1.0], dtype=torch.float64)
"""Of a list of three, one of two, another of two."""


@pytest.mark.parametrize(
    ("scores", "concordance"),
    [(None, [0, 1, 1, 0, 0]), (torch.tensor([3, 3, 1, 2, 1, 1, 1], dtype=torch.float64), [1, 1, 0])],
)
def test_metrics_of_lists(scores, concordance):
    """Best against worst; two completions with equal scores are no pair, equal rewards are not right."""
    inputs = LossInputs(ragged(-2 - REWARDS), ragged([-5.0] * 7), sizes=torch.tensor([3, 2, 2]), scores=scores)
    output = LossOutput(torch.zeros(3), REWARDS)
    metrics = {name: values.tolist() for name, values in preference_metrics(inputs, output).items()}
    assert metrics["rewards/chosen"] == [1, 0.5, -3]
    assert metrics["rewards/rejected"] == [-1, 0.5, -1]
    assert metrics["rewards/margins"] == [2, 0, -2]
    assert metrics["rewards/accuracies"] == [1, 0, 0]
    assert metrics["rewards/ties"] == [0, 1, 0]
    assert metrics["rewards/concordance"] == concordance
    assert metrics["nats/margins"] == [-2, 0, 2]
    assert metrics["ranking/accuracies"] == metrics["ranking/accuracies_per_token"] == [0, 0, 1]


def test_metrics_of_pairs_have_no_concordance():
    inputs = LossInputs(ragged(REWARDS[:4]))
    metrics = preference_metrics(inputs, LossOutput(torch.zeros(2), REWARDS[:4]))
    assert "rewards/concordance" not in metrics
    assert metrics["rewards/margins"].tolist() == [-1, -1.5]
