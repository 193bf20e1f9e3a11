"""A run that trains a reward model: SFT first, then the head and the adapter; its files, its report, its resumption."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from alignment.config.compose import load
from alignment.errors import UserError
from alignment.runs.record import RunRecord
from alignment.stages.chain import Chain
from tests.helpers.commands import pair
from tests.helpers.reward_runs import settings


@pytest.fixture
def chain_of(tmp_path, tiny_model_folder, monkeypatch):
    """The chain of such a run in a folder of this name."""
    monkeypatch.setenv("ALIGNMENT_CACHE", str(tmp_path / "cache"))

    def chain(name, *others):
        return Chain(load(*settings(tmp_path, tiny_model_folder, *others)), tmp_path / name, "reward_quickstart", {})

    return chain


def held_out_pairs(folder: Path) -> list[dict]:
    """The rows of the end."""
    rows = map(json.loads, (folder / "held_out.jsonl").read_text().splitlines())
    return [row for row in rows if row["moment"] == "final"]


@pytest.mark.slow
def test_a_run_and_what_it_leaves(chain_of, tmp_path, tiny_model_folder):
    """SFT, then a reward model: no reference, no answers, metrics of rewards, and an adapter with which transformers
    and peft give the held-out rewards again, from the texts that the template writes."""
    summary = chain_of("run").run()
    folder, stage = tmp_path / "run", summary["stages"]["preference"]
    assert list(summary["stages"]) == ["sft", "preference"]
    assert (summary["reference"], summary["evaluation"]) == ({"mode": "none"}, {})
    assert stage["start"]["loss"] == pytest.approx(stage["start"]["closed_form"], rel=1e-5)
    assert {name for name in stage["metrics"] if name.startswith("eval/rewards")} == {
        f"eval/rewards/{name}"
        for name in ("chosen", "rejected", "margins", "accuracies", "ties", "mean", "calibration_error")
    }
    assert not [name for name in stage["metrics"] if "logps" in name or "nats" in name or "ranking" in name]
    report = (folder / "report.md").read_text()
    for part in ("## Calibration", "plots/reliability.png", "mean reward", "calibration error", "reward accuracy"):
        assert part in report, part
    assert (folder / "plots" / "reliability.png").stat().st_size > 1000

    tokenizer = AutoTokenizer.from_pretrained(folder / "adapter")
    base = AutoModelForSequenceClassification.from_pretrained(
        tiny_model_folder, num_labels=1, pad_token_id=tokenizer.pad_token_id
    )
    model = PeftModel.from_pretrained(base, folder / "adapter").eval()
    rows = {f"pairs.jsonl:{number}": pair(number) for number in range(1, 41)}
    for row in held_out_pairs(folder)[:5]:
        texts = rows[row["source"].rpartition("/")[2]]
        both = [[*texts["prompt"], *texts[side]] for side in ("chosen", "rejected")]
        written = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in both]
        batch = tokenizer(written, add_special_tokens=False, padding=True, return_tensors="pt")
        with torch.no_grad():
            found = model(**{key: batch[key] for key in ("input_ids", "attention_mask")}).logits[:, 0]
        assert found.tolist() == pytest.approx([row["rewards/chosen"], row["rewards/rejected"]], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True], ids=["adapter", "whole"])
def test_interrupted_and_resumed_is_the_same(whole, chain_of, tmp_path, monkeypatch):
    """Killed after a checkpoint, and once more between its last stage and its summary: the weights and the identity are
    those of a run that nothing has interrupted."""
    others = ["sft=none", *(["adapter=none", "optim.lr=0.001"] if whole else [])]
    expected = chain_of("whole", *others).run()
    log = RunRecord.log

    def broken(self, stage, step, split, metrics):
        if (stage, step, split) == ("preference", 3, "train"):
            raise KeyboardInterrupt
        log(self, stage, step, split, metrics)

    monkeypatch.setattr(RunRecord, "log", broken)
    with pytest.raises(KeyboardInterrupt):
        chain_of("cut", *others).run()
    monkeypatch.setattr(RunRecord, "log", log)
    finish = Chain._finish
    monkeypatch.setattr(Chain, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        chain_of("cut", *others).run()
    monkeypatch.setattr(Chain, "_finish", finish)
    found = chain_of("cut", *others).run()
    name = "model/model.safetensors" if whole else "adapter/adapter_model.safetensors"
    ours, theirs = (load_file(tmp_path / run / name) for run in ("cut", "whole"))
    assert ours.keys() == theirs.keys() and any(key.endswith("score.weight") for key in ours)
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=0, atol=0)
    assert found["model"]["final_identity"] == expected["model"]["final_identity"]


@pytest.mark.slow
def test_on_packed_weights_it_learns(chain_of, tmp_path):
    """QLoRA with the head in fp32: the held-out accuracy rises to what the pairs show plainly."""
    chain_of("run", "quantization=nf4", "sft=none", "trainer.max_steps=30").run()
    rows = held_out_pairs(tmp_path / "run")
    assert np.mean([row["rewards/accuracies"] for row in rows]) > 0.9
    weights = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert weights["base_model.model.score.weight"].dtype == torch.float32


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("evaluation.prompts=3", r"evaluation\.prompts=3 asks for answers, .*: set evaluation\.prompts=0\."),
        pytest.param(
            "evaluation.kl_prompts=2", r"kl_prompts=2 asks .*: set evaluation\.kl_prompts=0\.", marks=pytest.mark.slow
        ),
        pytest.param("reference=tr_dpo", r"need a loss with a reference", marks=pytest.mark.slow),
        pytest.param(
            "stopping=asha", r"metric=nats/accuracies is of .*: set stopping\.metric=rewards", marks=pytest.mark.slow
        ),
    ],
)
def test_what_a_reward_model_has_not_is_refused(setting, sentence):
    """Answers, a reference that follows, log-probs to stop by: each in one sentence, before the run."""
    with pytest.raises(UserError, match=sentence):
        load("recipe=reward_quickstart", setting)
