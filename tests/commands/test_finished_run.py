"""Runs of the command to their end: what they leave behind is right."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import each
from tests.helpers.tiny_runs import project, tiny

__all__ = ["project", "tiny"]


def read_summary(run_dir: Path) -> dict:
    return json.loads((run_dir / "summary.json").read_text())


def only_run(cwd: Path) -> Path:
    [folder] = (cwd / "outputs" / "tiny").iterdir()
    return folder


def assert_numbers(run_dir: Path) -> list[dict]:
    """Every metric is a finite number; the rows."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, int | float)), row
    return rows


def load_policy(run_dir: Path, base):
    from peft import PeftModel

    return PeftModel.from_pretrained(base, run_dir / "adapter").eval()


def plain_base(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def logits_of(model, run_dir: Path) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "adapter")
    ids = tokenizer("<|im_start|>user\nAdd 1 and 7!", return_tensors="pt").input_ids
    with torch.no_grad():
        return model(input_ids=ids).logits


SHORT = ("sft=none", "trainer.max_steps=2", "evaluation.prompts=0", "trainer.eval_every=0")


@pytest.mark.matrix
def test_a_sweep_over_losses_and_values_computes_the_reference_once(tiny, tmp_path, tiny_model_folder):
    """Pairs ask for one reference, which the first run computes for the others, its rows with others to KTO."""
    ended = tiny("-m", "loss=dpo,kto", "loss.beta=0.1,0.2", *SHORT)
    assert ended.code == 0, ended.err
    run_dirs = [next(tmp_path.glob(f"outputs/sweeps/*/{number}-tiny")) for number in range(4)]
    base = logits_of(plain_base(tiny_model_folder), run_dirs[0])
    losses = []
    for run_dir, (loss, beta) in zip(run_dirs, itertools.product(("dpo", "kto"), (0.1, 0.2)), strict=True):
        stage = read_summary(run_dir)["stages"]["preference"]
        assert (stage["loss"], stage["steps"], stage["settings"]["beta"]) == (loss, 2, beta)
        rows = assert_numbers(run_dir)
        assert [(row["split"], row["step"]) for row in rows] == [("eval", 0), ("train", 2), ("eval", 2)]
        assert not logits_of(load_policy(run_dir, plain_base(tiny_model_folder)), run_dir).allclose(base)
        losses.append(rows[-1]["loss"])
    assert losses[0] != losses[1] and losses[2] != losses[3]
    found = [read_summary(run_dir)["reference"] for run_dir in run_dirs]
    assert (found[0]["misses"], found[0]["hits"]) == (24, 0)
    assert (found[1]["misses"], found[1]["hits"]) == (0, 24)
    assert found[2]["hits"] > 0 and found[3]["misses"] == 0


@pytest.mark.slow
def test_a_run_of_sft_alone(tiny, tmp_path, tiny_model_folder):
    ended = tiny("loss=none")
    assert ended.code == 0, ended.err
    run_dir = only_run(tmp_path)
    rows = assert_numbers(run_dir)
    assert {row["stage"] for row in rows} == {"sft"} and rows[-2]["loss"] < rows[0]["loss"]
    base = plain_base(tiny_model_folder)
    before = logits_of(base, run_dir)
    assert not logits_of(load_policy(run_dir, base), run_dir).allclose(before)


@pytest.mark.slow
def test_a_report_that_cannot_be_written_leaves_all_results(tiny, tmp_path):
    """The last thing of a run fails: one sentence says so, and by which command it is made."""
    (tmp_path / "run" / "report.md").mkdir(parents=True)
    ended = tiny("loss=none", "sft.trainer.epochs=1", f"hydra.run.dir={tmp_path}/run")
    [line] = (line for line in ended.err.splitlines() if line.startswith("Error: "))
    assert ended.code == 1 and "Traceback" not in ended.err
    again = f"python -m alignment.report {tmp_path}/run"
    assert line.endswith(f"Is a directory. All results are written; the report is made again by: {again}")
    assert read_summary(tmp_path / "run")["status"] == "finished"


@pytest.mark.slow
@pytest.mark.parametrize("quantization", each(["none", "nf4"], ["none"]))
def test_the_merged_model_computes_what_the_policy_computes(quantization, tiny, tmp_path, tiny_model_folder):
    ended = tiny(*SHORT, f"quantization={quantization}", "export.merge=true", "export.dtype=float32")
    assert ended.code == 0, ended.err
    run_dir = only_run(tmp_path)
    if quantization == "none":
        base = plain_base(tiny_model_folder)
    else:
        from alignment.config.compose import load
        from alignment.policy.load import load_base

        config = load("quantization=nf4", f"model.name='{tiny_model_folder}'")
        base = load_base(config.model, config.quantization, str(tiny_model_folder), torch.device("cpu"))
    policy = logits_of(load_policy(run_dir, base), run_dir)
    merged = AutoModelForCausalLM.from_pretrained(run_dir / "merged")
    assert merged.dtype == torch.float32
    found = logits_of(merged, run_dir)
    torch.testing.assert_close(found, policy, rtol=0, atol=1e-5)
    # The comparison can fail: neither the base alone nor (under NF4) the adapter on the unquantised base pass it.
    assert not logits_of(plain_base(tiny_model_folder), run_dir).allclose(found, atol=1e-3)
    if quantization == "nf4":
        unquantised = load_policy(run_dir, plain_base(tiny_model_folder))
        assert not logits_of(unquantised, run_dir).allclose(found, atol=1e-3)
    assert AutoTokenizer.from_pretrained(run_dir / "merged").chat_template
    export = read_summary(run_dir)["export"]
    assert export["generation_agrees"] and export["max_logp_difference"] < 1e-5
