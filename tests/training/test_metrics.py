"""Metrics by hand, as exact means over examples, and the rows of single pairs that they are the means of."""

import json
import math
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from alignment.data.tokens.units import as_rows
from alignment.losses import LossInputs, LossOutput
from alignment.training.metrics import Means, Observed, held_out_rows, preference_metrics, read
from alignment.types import Group, RaggedLogps
from tests.conftest import random_groups, tiny_policy
from tests.helpers.commands import command, write_project
from tests.helpers.steps import make_loss, make_trainer, moved, sequence_logp

POLICY = RaggedLogps.from_sequences([torch.tensor(v).double() for v in ([-1.0, -2.0], [-4.0], [-3.0], [-1.0] * 4)])
REFERENCE = RaggedLogps.from_sequences([torch.tensor(v).double() for v in ([-2.0, -3.0], [-5.5], [-2.5], [-2.0] * 4)])
# Two pairs. Log-ratios 2, 1.5 and -0.5, 4; per token 1, 1.5 and -0.5, 1; lengths 2, 1 and 1, 4.
REWARDS = torch.tensor([5.0, 1.0, 2.0, 2.0]).double()
BY_HAND: dict[str, list[float]] = {
    "rewards/chosen": [5, 2],
    "rewards/rejected": [1, 2],
    "rewards/margins": [4, 0],
    "rewards/accuracies": [1, 0],
    "logps/chosen": [-3, -3],
    "logps/rejected": [-4, -4],
    "lengths/chosen": [2, 1],
    "lengths/rejected": [1, 4],
    "lengths/gap": [1, -3],
    "nats/chosen": [2, -0.5],
    "nats/rejected": [1.5, 4],
    "nats/margins": [0.5, -4.5],
    "nats/accuracies": [1, 0],
    "nats_per_token/chosen": [1, -0.5],
    "nats_per_token/rejected": [1.5, 1],
    "nats_per_token/margins": [-0.5, -1.5],
    "nats_per_token/accuracies": [0, 0],
    "rewards/ties": [0, 1],
    "ranking/accuracies": [1, 1],
    "ranking/accuracies_per_token": [1, 0],
}


def values(metrics):
    return {name: column.tolist() for name, column in metrics.items()}


def test_pairs_by_hand():
    found = values(preference_metrics(LossInputs(POLICY, REFERENCE), LossOutput(torch.zeros(2), REWARDS)))
    assert found == BY_HAND | {"kl/offline": [2, 1.5, -0.5, 4]}


def test_what_passes_gave_is_read_with_one_copy_and_to_the_last_bit(monkeypatch):
    """In every dtype: float32 log-probs, boolean labels, counts, scores that are not a number."""
    policy, reference = (RaggedLogps(x.values.float() / 3, x.offsets) for x in (POLICY, REFERENCE))
    policy.values.requires_grad_()
    scores = torch.tensor([1 / 3, math.nan, 0.1, 2.0], dtype=torch.float64)
    sizes, labels = torch.tensor([2, 2]), torch.tensor([True, False, False, True])
    output = LossOutput(policy.sums()[:2], REWARDS.float(), parts={"nll": torch.tensor([0.1, -math.inf])})
    given = [LossInputs(policy, reference, sizes=sizes, scores=scores), LossInputs(policy, labels=labels)]
    copies, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: copies.append(tensor) or cpu(tensor))
    observed = [Observed.of(inputs, output) for inputs in given]
    assert not any(tensor.requires_grad for seen in observed for tensor in seen.tensors.values()), "they keep the graph"
    found = list(read(observed))
    assert len(copies) == 1
    for (inputs, out), expected in zip(found, given, strict=True):
        assert (inputs.reference is None, inputs.sizes is None) == (expected.reference is None, expected.sizes is None)
        theirs = preference_metrics(expected, output)
        ours = preference_metrics(inputs, out)
        assert ours.keys() == theirs.keys()
        for name, column in theirs.items():
            torch.testing.assert_close(ours[name], column, rtol=0, atol=0, equal_nan=True)
    assert list(read([])) == []


def test_without_a_reference_nothing_is_in_nats():
    found = values(preference_metrics(LossInputs(POLICY), LossOutput(torch.zeros(2), REWARDS)))
    assert found == {name: column for name, column in BY_HAND.items() if not name.startswith("nats")}


def test_rows_by_hand():
    """The margin of rows without partners is the difference of the means of the two sides."""
    inputs = LossInputs(POLICY, REFERENCE, labels=torch.tensor([True, False, False, True]))
    means = Means()
    means.add(preference_metrics(inputs, LossOutput(torch.zeros(4), REWARDS)))
    assert means.take() == {
        "rewards/chosen": 3.5,
        "rewards/rejected": 1.5,
        "logps/chosen": -3.5,
        "logps/rejected": -3.5,
        "lengths/chosen": 3,
        "lengths/rejected": 1,
        "nats/chosen": 3,
        "nats/rejected": 0.5,
        "nats_per_token/chosen": 1,
        "nats_per_token/rejected": 0.5,
        "kl/offline": 1.75,
        "rewards/margins": 2,
        "nats/margins": 2.5,
        "nats_per_token/margins": 0.5,
        "lengths/gap": 2,
    }


def test_single_pairs_and_rows():
    groups = random_groups(2)
    inputs, output = LossInputs(POLICY, REFERENCE), LossOutput(torch.zeros(2), REWARDS)
    first, second = held_out_rows(groups, inputs, output)
    columns = BY_HAND | {"reference_logps/chosen": [-5, -2.5], "reference_logps/rejected": [-5.5, -8]}
    for number, row in enumerate((first, second)):
        assert row.pop("source") == ""
        row.pop("key")
        assert row == {name: column[number] for name, column in columns.items()}

    labelled = LossInputs(POLICY, REFERENCE, labels=torch.tensor([True, False, False, True]))
    rows = held_out_rows(as_rows(groups), labelled, output)
    assert rows[1] | {"key": 0} == {
        "source": "",
        "key": 0,
        "rewards/rejected": 1,
        "logps/rejected": -4,
        "lengths/rejected": 1,
        "nats/rejected": 1.5,
        "nats_per_token/rejected": 1.5,
        "reference_logps/rejected": -5.5,
    }


def test_the_key_is_of_the_tokens_alone():
    one, other = random_groups(2)
    again = Group(one.prompt.copy(), tuple(c.copy() for c in one.completions), weight=2.0, source="elsewhere:7")
    swapped = Group(one.prompt, one.completions[::-1])
    inputs = LossInputs(RaggedLogps.from_sequences([torch.zeros(1)] * 8))
    rows = held_out_rows([one, other, again, swapped], inputs, LossOutput(torch.zeros(4), torch.zeros(8)))
    assert rows[0]["key"] == rows[2]["key"]
    assert len({row["key"] for row in rows}) == 3
    assert rows[2]["source"] == "elsewhere:7"


def mean_of(rows, name):
    column = [row[name] for row in rows if name in row]
    return math.fsum(column) / len(column)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo", "simpo", "orpo", "kto"])
def test_the_same_metrics_for_every_loss(name, tmp_path):
    """In nats, per token and per pair, against a plain computation, whatever the loss takes and optimises."""
    groups = random_groups(5, seed=3)
    policy, start = tiny_policy(trained=True), tiny_policy(trained=True)
    trainer = make_trainer(policy, groups, make_loss(name), tmp_path, tokens_per_batch=60, eval_groups=groups)
    moved(policy)
    found = {key.removeprefix("eval_"): value for key, value in trainer.evaluate().items()}
    with torch.no_grad():
        ratios = [
            [(sequence_logp(policy, g.prompt, c) - sequence_logp(start, g.prompt, c)).numpy() for c in g.completions]
            for g in groups
        ]
    sums = [(a.sum(), b.sum()) for a, b in ratios]
    per_token = [(a.mean(), b.mean()) for a, b in ratios]
    expected = {
        "nats/accuracies": sum(a > b for a, b in sums) / 5,
        "nats_per_token/chosen": sum(a for a, _ in per_token) / 5,
        "nats_per_token/rejected": sum(b for _, b in per_token) / 5,
        "nats_per_token/margins": sum(a - b for a, b in per_token) / 5,
        "nats_per_token/accuracies": sum(a > b for a, b in per_token) / 5,
        "lengths/gap": sum(len(a) - len(b) for a, b in ratios) / 5,
        "kl/offline": sum(a + b for a, b in sums) / 10,
    }
    for key, value in expected.items():
        assert math.isclose(found[key], value, rel_tol=1e-9), key
    for row, (a, b) in zip(trainer.held_out, sums, strict=True):
        assert math.isclose(row["nats/chosen"], a, rel_tol=1e-9) and math.isclose(row["nats/rejected"], b, rel_tol=1e-9)
    for key in trainer.held_out[0].keys() & found.keys():
        assert math.isclose(mean_of(trainer.held_out, key), found[key], rel_tol=1e-12, abs_tol=1e-15), key


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model_folder) -> dict[str, Path]:
    """Finished runs of three losses from one start."""
    folder = tmp_path_factory.mktemp("runs")
    config = write_project(folder, tiny_model_folder)
    found = {}
    for loss in ("dpo", "orpo", "kto"):
        cwd = folder / loss
        cwd.mkdir()
        ended = command("--config-dir", str(config), "recipe=tiny", f"loss={loss}", cwd=cwd, cache=folder / "cache")
        assert ended.code == 0, ended.err
        [found[loss]] = (cwd / "outputs" / "tiny").iterdir()
    return found


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_the_file_of_a_run_holds_what_the_logged_metrics_are_means_of(runs):
    for loss, folder in runs.items():
        by_moment = defaultdict(list)
        for row in read_lines(folder / "held_out.jsonl"):
            by_moment[row["moment"]].append(row)
        logged = [r for r in read_lines(folder / "metrics.jsonl") if (r["stage"], r["split"]) == ("preference", "eval")]
        for moment, metrics in (("start", logged[0]), ("final", logged[-1])):
            rows = by_moment[moment]
            assert [Path(row["source"]).name for row in rows] == [f"held_out.jsonl:{n}" for n in range(1, 5)], loss
            names = rows[0].keys() & metrics.keys()
            assert {"nats/margins", "nats_per_token/accuracies", "rewards/accuracies", "lengths/gap"} <= names
            for name in names:
                assert math.isclose(mean_of(rows, name), metrics[name], rel_tol=1e-12, abs_tol=1e-12), (loss, name)
        assert all(row["nats/chosen"] == row["nats/rejected"] == 0 for row in by_moment["start"])
        assert any(abs(row["nats/chosen"]) > 0.1 for row in by_moment["final"])


@pytest.mark.slow
def test_pairs_are_the_same_in_runs_of_different_losses(runs):
    """A comparison can be paired: the same keys in the same order, the same start, the same reference."""
    kept = ("moment", "source", "key", "lengths/chosen", "reference_logps/chosen", "reference_logps/rejected")
    tables = {}
    for loss, folder in runs.items():
        rows = read_lines(folder / "held_out.jsonl")
        tables[loss] = [tuple(row[name] for name in kept) for row in rows]
        assert len({row["key"] for row in rows}) == len(rows) / 2
    assert tables["dpo"] == tables["orpo"] == tables["kto"]


@pytest.mark.slow
def test_the_summary_says_what_a_comparison_asks_for(runs):
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in runs.values()]
    for summary in summaries:
        stage = summary["stages"]["preference"]
        assert stage["tokens_per_second"] > 0 and stage["seconds"] > 0 and stage["memory"]["measured"] > 0
        assert summary["data"]["preference"]["eval"] == 4
        assert stage["start"]["identity"] == summary["reference"]["identity"] != summary["model"]["final_identity"]
    assert len({summary["stages"]["preference"]["start"]["identity"] for summary in summaries}) == 1
    assert len({summary["data"]["preference"]["fingerprint"] for summary in summaries}) == 1
