"""The comparison itself on a tiny model: all runs train along one trajectory, whatever the base model's weights are."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torch import nn

from alignment.config.schema import Device
from alignment.data.rows.row import Row
from alignment.kernels import matmul
from alignment.policy.adapter import attach_adapter
from alignment.policy.load import load_base, load_tokenizer, resolve_device
from alignment.scoring import head as scoring_head
from alignment.scoring.layout import FlatLayout, SharedLayout
from alignment.training.sampler import StepSampler
from alignment.types import Group
from tests.bench import against_trl, one_run, parts, preparation
from tests.bench.floor import Shape
from tests.bench.job import PAIRS_OF_RUNS, SEED, Case, Job, PeakRate, Preparation
from tests.bench.profiling import kind_of, profile_step
from tests.bench.summary import check_losses
from tests.conftest import random_groups
from tests.helpers.adapters import adapter

RUNS = [run for together in PAIRS_OF_RUNS for run in together]


@pytest.fixture
def job(tiny_model_folder, tmp_path):
    """The same four pairs of random tokens in two steps, at a learning rate that moves the loss at once."""
    source = str(tiny_model_folder)
    lora = adapter(r=4, alpha=8)
    model = load_base(preparation.model_config(source), None, source, resolve_device(Device.auto))
    attach_adapter(model, lora, seed=0).save_pretrained(str(tmp_path / "adapter"))
    pairs = [[ids.tolist() for ids in (group.prompt, *group.completions)] for group in random_groups(4)] * 2
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    return Job(
        run="",
        model=source,
        adapter=str(tmp_path / "adapter"),
        pairs=str(tmp_path / "pairs.json"),
        pairs_per_step=4,
        nf4=False,
        cache=str(tmp_path),
        beta=0.1,
        lr=3e-2,
        tokens_per_batch=64,
        profile=False,
    )


@pytest.mark.slow
def test_all_runs_follow_one_trajectory(job):
    turns = dict.fromkeys(RUNS, 0)

    def count(run):
        turns[run] += 1

    results = {
        run: one_run.run(replace(job, run=run, profile=run == "ours_warm"), lambda run=run: count(run)) for run in RUNS
    }
    losses = {run: result["losses"] for run, result in results.items()}
    assert check_losses(losses, "exact") < 1e-4
    assert abs(losses["ours_cold"][1] - math.log(2)) > 1e-2  # the second loss depends on the first update
    assert [results[run]["stored"] for run in ("ours_cold", "ours_warm")] == [0, 8]
    paid = {run: result["reference_seconds"]["wall"] > 0 for run, result in results.items()}
    assert paid == {"ours_cold": True, "trl_default": False, "ours_warm": False, "trl_precomputed": True}
    assert all(len(result["seconds"]["wall"]) == 2 for result in results.values())
    assert set(turns.values()) == {2}
    assert sum(results["ours_warm"]["profile"]["shares"].values()) == pytest.approx(1)


@pytest.mark.slow
def test_a_run_without_a_part_computes_the_same_by_other_means(job, monkeypatch):
    """And the part is out: counted by the passes, the calls of the head's routine and of oneDNN's."""
    monkeypatch.setattr(scoring_head, "_ScoreOnce", scoring_head._ScoreOnce)  # put back after the test
    products, one_pass, builds = matmul._has_onednn, scoring_head._ScoreOnce, (FlatLayout._build, SharedLayout._build)
    results, pairs_a_pass, rows_a_pass = {}, {}, {}
    one_run.run(replace(job, run="ours_cold"))
    for part in parts.PARTS:
        passes = []
        for layout, build in zip((FlatLayout, SharedLayout), builds, strict=True):
            monkeypatch.setattr(layout, "_build", _noting(build, passes))
        results[part] = one_run.run(replace(job, run="ours_warm", without=part, tokens_per_batch=1024))
        pairs_a_pass[part] = {len(batch.indices) for batch in passes[-2:]}
        rows_a_pass[part] = {len(batch.input_ids) for batch in passes[-2:]}
        assert (scoring_head._ScoreOnce is not one_pass) == (part == "head")
        assert (matmul._has_onednn is not products) == (part == "oneDNN")
        monkeypatch.setattr(scoring_head, "_ScoreOnce", one_pass)
        monkeypatch.setattr(matmul, "_has_onednn", products)
    check_losses({part: result["losses"] for part, result in results.items()}, "exact")
    assert pairs_a_pass[""] == pairs_a_pass["padding"] == {4}
    assert pairs_a_pass["packing"] == {1}
    assert [part for part in parts.PARTS if rows_a_pass[part] != {1}] == ["sharing", "padding"]
    assert results["cache"]["stored"] is None and results[""]["stored"] == 8


def _noting(build, passes):
    """The static method that notes in `passes` what `build` makes."""
    return staticmethod(lambda *args: passes.append(build(*args)) or passes[-1])


def test_a_part_is_held_against_the_run_that_differs_by_it_alone():
    seconds = {"sharing": 4.0, "padding": 8.0}
    results = {
        part: {"losses": [math.log(2)], "seconds": {"wall": [99.0, seconds.get(part, 2.0)]}, "peak_bytes": 2**30}
        for part in parts.PARTS
    }
    rows = parts.table(results, 2)
    assert [row[1:3] for row in rows[1:4]] == [["1.000", ""], ["2.000", "2.00x faster"], ["4.000", "2.00x faster"]]


@pytest.mark.slow
def test_trl_trains_on_the_same_quantised_base(job):
    results = {
        run: one_run.run(replace(job, run=run, nf4=nf4))["losses"]
        for run, nf4 in (("ours_cold", True), ("trl_precomputed", True), ("trl_default", False))
    }
    exact = results.pop("trl_default")
    check_losses(results, "rounded")
    quantised = results["trl_precomputed"]
    assert abs(quantised[1] - exact[1]) > 3 * abs(quantised[1] - results["ours_cold"][1])


def test_tasks_survive_the_way_to_their_process(job):
    case = Case(name="prompts", source="bundled:quickstart", steps=2, cut=(8, 4))
    for task in (
        job,
        PeakRate(turns=3),
        Preparation(folder="/somewhere", model=None, random_qwen3="4B", cases=(case,)),
    ):
        read = one_run.read_task(json.dumps(asdict(task)))
        assert asdict(read) == json.loads(json.dumps(asdict(task)), object_hook=_tuples)
        assert type(read) is type(task)


def _tuples(fields):
    return {key: tuple(v) if key == "cases" else v for key, v in fields.items()}


def test_wait_is_not_counted(monkeypatch):
    """Every step is over before its turn is given up, and the next one begins when the turn is back."""
    seen, now = [], 0.0
    monkeypatch.setattr(one_run.Clock, "_now", lambda clock: (now, now, now))

    def wait():
        nonlocal now
        seen.append(len(turns.clock.seconds()["wall"]))
        now += 50

    turns = one_run.StepTurns(wait)
    for _ in range(3):
        turns.on_step_begin(None, None, None)
        now += 1
    turns.on_train_end(None, None, None)
    assert seen == [0, 1, 2]
    assert turns.clock.seconds()["wall"] == [1, 1, 1]


def test_pairs_cut_from_running_text():
    """By hand: a chosen answer goes on where its prompt ends, and no token is used twice."""
    ids = np.arange(100, dtype=np.int32)
    groups = [Group(ids[0:4], (ids[4:7], ids[50:53])), Group(ids[7:9], (ids[9:12], ids[53:56]))]
    pairs = [[part.tolist() for part in pair] for pair in preparation.cut_pairs(groups, 4, 2, 2)]
    assert pairs == [[[0, 1, 2, 3], [4, 5], [50, 51]], [[6, 7, 8, 9], [10, 11], [52, 53]]]
    with pytest.raises(ValueError, match="too few for 3 pairs"):
        preparation.cut_pairs(groups, 4, 2, 3)


def test_rows_stand_where_the_shuffle_of_a_run_puts_them_right():
    rows = [Row(f"{i}?", (f"{i}!", "no")) for i in range(9)]
    placed = preparation.before_shuffle(rows, 4)
    assert placed != rows and len(set(map(id, placed))) == 9
    assert [placed[i] for step in StepSampler(9, 4, SEED).steps(0) for i in step] == rows
    assert preparation.before_shuffle([], 4) == []


def test_absent_real_data_become_one_bundled_case(tmp_path):
    cases = {case.name: case for case in against_trl.choose_cases(against_trl.CASES, tmp_path)}
    assert list(cases) == ["quickstart", "prompts", "nf4"]
    assert {case.source for case in cases.values()} == {"bundled:quickstart"}
    assert cases["prompts"].cut == (768, 128) and cases["nf4"].nf4
    data = tmp_path / "pandalm_human" / "pairs.jsonl"
    data.parent.mkdir()
    data.touch()
    cases = {case.name: case.source for case in against_trl.choose_cases(against_trl.CASES, tmp_path)}
    assert cases == {
        "quickstart": "bundled:quickstart",
        "short": str(data),
        "prompts": "bundled:quickstart",
        "nf4": str(data),
    }


def test_bundled_text_is_enough_for_long_prompts(tiny_model_folder):
    """The tiny tokenizer makes a token of every byte: a real one makes a quarter of them."""
    tokenizer = load_tokenizer(preparation.model_config(str(tiny_model_folder)), str(tiny_model_folder))
    case = Case(name="prompts", source="bundled:quickstart", steps=4, pairs_per_step=2, cut=(4 * 768, 4 * 128))
    pairs, _ = preparation.draw_pairs(case, tokenizer)
    assert [[len(part) for part in pair] for pair in pairs] == [[3072, 512, 512]] * 10
    assert len({pair[0].tobytes() for pair in pairs}) == 10


def test_random_qwen3_has_the_size_of_its_name(tiny_model_folder, tmp_path, monkeypatch):
    """Made narrow and shallow; its weights are counted by hand."""
    monkeypatch.setitem(preparation.QWEN3_SIZES, "0.6B", (64, 96, 2, 8, True))
    tokenizer = load_tokenizer(preparation.model_config(str(tiny_model_folder)), str(tiny_model_folder))
    device = resolve_device(Device.auto)
    source = preparation.random_qwen3("0.6B", tokenizer, tmp_path, device)
    base = load_base(preparation.model_config(source), None, source, device)
    lora = adapter(r=2, alpha=4)
    shape = preparation.model_shape(base, lambda: attach_adapter(base, lora, seed=0))
    # Queries, keys and values 64 -> 8 * 128, output back to 64, three products with 96.
    widths = [*[(64, 1024)] * 3, (1024, 64), (64, 96), (64, 96), (96, 64)]
    assert shape == Shape(
        linear=2 * sum(i * o for i, o in widths),
        adapter=2 * 2 * sum(i + o for i, o in widths),
        layers=2,
        attention=1024,
        hidden=64,
        vocabulary=151_936,
    )
    assert base.config.tie_word_embeddings


def test_peak_rate_counts_two_operations_per_product(monkeypatch):
    monkeypatch.setattr(one_run.Clock, "seconds", lambda self: {"wall": [5.0, 2.0, 4.0]})  # the first one warms up
    monkeypatch.setattr(torch, "randn", lambda *size, **kw: torch.zeros(*size[:1], 2, 2))
    turns = []
    rates = one_run.run(PeakRate(turns=3), lambda: turns.append(1))
    size, products = (8192, 200) if torch.cuda.is_available() else (4096, 1)
    expected = [products * 2 * size**3 / 2.0, products * 2 * size**3 / 4.0]
    assert rates == {"torch_rates": expected, "our_rates": expected}
    assert len(turns) == 3


class _Policy(nn.Module):
    """A decoder and a head, as the profiler has to tell them apart."""

    def __init__(self, decoder_width, head_width):
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(8, decoder_width), nn.Linear(decoder_width, 8))
        self.head = nn.Linear(8, head_width)

    def get_decoder(self):
        return self.decoder

    def forward(self, x):
        return self.head(self.decoder(x)).sum()


@pytest.mark.parametrize(("widths", "low", "high"), [((8, 4096), 0.7, 1.0), ((4096, 8), 0.0, 0.3)])
def test_profile_tells_head_from_decoder(widths, low, high):
    policy = _Policy(*widths)
    x = torch.randn(4096, 8)
    with torch.no_grad():
        found = profile_step(policy, lambda: policy(x))
        outside = profile_step(policy, lambda: policy.head(x))
    assert low < found["shares"]["head"] < high
    assert sum(share for *_, share in found["operators"]) <= 1 + 1e-9
    assert "head" not in outside["shares"]
    assert not policy._forward_hooks and not policy.decoder._forward_pre_hooks


def test_kinds_of_operators():
    assert kind_of("aten::mm") == kind_of("mkldnn::_linear_pointwise") == "matrix products"
    assert kind_of("aten::_scaled_dot_product_flash_attention_for_cpu_backward") == "attention"
    assert kind_of("aten::mul") == kind_of("aten::_log_softmax") == "elementwise, copies and the rest"
