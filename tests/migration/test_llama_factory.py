"""LLaMA-Factory's files: its losses, adapters, data sets by name, and the reference that is another one there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from alignment.errors import UserError
from alignment.migration.draft import Circumstances
from alignment.migration.tools import TOOLS, translate
from tests.helpers.migrated import drafted, migrated

BASE = "model_name_or_path: org/model\nstage: dpo\ndataset: pairs\nfinetuning_type: lora\n"
FULL = (
    BASE
    + """
trust_remote_code: true
do_train: true
lora_rank: 16
lora_target: all
pref_beta: 0.2
pref_loss: sigmoid
dpo_label_smoothing: 0.05
template: llama3
cutoff_len: 1024
max_samples: 500
overwrite_cache: true
preprocessing_num_workers: 4
output_dir: saves/out
logging_steps: 10
save_steps: 200
plot_loss: true
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 5e-6
num_train_epochs: 2.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
val_size: 0.1
eval_strategy: steps
eval_steps: 50
quantization_bit: 4
quantization_method: bnb
packing: false
report_to: none
"""
)


def test_the_numbers_mean_the_same(tmp_path):
    config, draft = migrated(tmp_path, FULL, rows=2000)
    adapter, optim, trainer, data = config.adapter, config.optim, config.trainer, config.data
    assert (adapter.r, adapter.alpha, adapter.target_modules) == (16, 32, ["all-linear"])  # alpha: twice the rank
    assert (config.loss.name, config.loss.beta, config.loss.label_smoothing) == ("dpo", 0.2, 0.05)
    assert (optim.lr, optim.schedule, optim.warmup_ratio, config.seed) == (5e-6, "cosine", 0.1, 42)
    assert (trainer.epochs, trainer.groups_per_step, trainer.save_every, trainer.eval_every) == (2, 8, 200, 50)
    assert (data.max_length, data.limit, data.eval_size, data.source) == (1024, 500, 200, "pairs")
    assert config.quantization.double and config.model.trust_remote_code
    assert "dataset_info.json" in draft.notes["dataset"] and "chat template" in draft.notes["template"]
    assert {"packing", "overwrite_cache", "ddp_timeout", "do_train", "plot_loss"} <= set(draft.same)


@pytest.mark.parametrize(
    ("text", "loss", "settings"),
    [
        ("pref_loss: hinge", "hinge", {"beta": 0.1}),
        ("pref_loss: ipo\npref_beta: 0.5", "ipo", {"tau": 0.5, "reduction": "mean"}),
        ("pref_loss: orpo", "orpo", {"lam": 0.1, "nll_reduction": "sequence_mean", "nll_scope": "response"}),
        ("pref_loss: simpo\npref_beta: 2.5\nsimpo_gamma: 1.0", "simpo", {"beta": 2.5, "gamma_beta_ratio": 0.4}),
        ("ld_alpha: 0.5", "ld_dpo", {"beta": 0.1, "alpha": 0.5}),
        ("pref_ftx: 0.5", "mixture", {"weights": {"dpo": 1.0, "nll": 0.5}}),
        ("pref_bco_weight: 1.0", "mixture", {"weights": {"dpo": 0.5, "bco": 0.5}}),
        ("stage: kto\nkto_rejected_weight: 1.5", "kto", {"beta": 0.1, "undesirable_weight": 1.5}),
    ],
)
def test_losses(tmp_path, text, loss, settings):
    config, _ = migrated(tmp_path, f"{BASE}{text}")
    assert config.loss.name == loss
    for key, value in settings.items():
        ours = getattr(config.loss, key)
        assert getattr(ours, "value", ours) == value


def test_the_reference_after_sft_is_another_one_there():
    draft, _ = drafted(f"{BASE}adapter_name_or_path: saves/sft")
    assert draft.settings["model.name"] == "saves/sft"
    assert "base without the adapter" in draft.notes["adapter_name_or_path"]
    draft, _ = drafted(f"{BASE}ref_model: org/other")
    assert "policy as it starts" in draft.notes["ref_model"]


def test_adapters(tmp_path):
    config, _ = migrated(tmp_path, f"{BASE}use_dora: true\nlora_target: q_proj,v_proj\nloraplus_lr_ratio: 16")
    assert (config.adapter.kind, config.adapter.target_modules, config.adapter.lr_ratio) == (
        "dora",
        ["q_proj", "v_proj"],
        16,
    )
    config, _ = migrated(tmp_path, f"{BASE}pref_loss: simpo\npissa_init: true")
    assert config.adapter.init == "pissa_niter_16"
    config, _ = migrated(tmp_path, BASE.replace("lora", "oft"))
    assert (config.adapter.kind, config.adapter.block_size) == ("oft", 32)
    config, draft = migrated(tmp_path, BASE.replace("lora", "full") + "lora_rank: 8\npure_bf16: true")
    assert config.adapter is None and not config.optim.master_weights and "no effect" in draft.notes["lora_rank"]


def test_data_sets_are_found_by_their_name(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    entries = {
        "mine": {
            "file_name": "mine.json",
            "ranking": True,
            "columns": {"prompt": "ask", "chosen": "chosen", "rejected": "bad"},
        },
        "hub": {"hf_hub_url": "org/pairs", "subset": "en", "split": "train_prefs", "formatting": "sharegpt"},
    }
    (folder / "dataset_info.json").write_text(json.dumps(entries))
    given = {"model_name_or_path": "m", "stage": "dpo", "dataset": "mine,hub", "mix_strategy": "interleave_over"}
    given |= {"interleave_probs": "0.7,0.3", "max_samples": 10}
    draft, _ = translate(given, tmp_path / "examples" / "f.yaml", TOOLS["llamafactory"], Circumstances())
    told = draft.settings
    assert Path(told["data.sources.mine.source"]) == folder / "mine.json"
    assert told["data.sources.mine.columns"] == {"prompt": "ask", "rejected": "bad"}
    assert (told["data.sources.pairs.source"], told["data.sources.pairs.split"]) == ("org/pairs", "train_prefs")
    assert (told["data.sources.mine.weight"], told["data.sources.pairs.weight"], told["data.exhausted"]) == (
        0.7,
        0.3,
        "repeat",
    )
    assert told["data.sources.pairs.limit"] == 10 and "data.limit" not in told and "dataset" not in draft.notes


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stage: ppo", "stage: ppo has no translation.*use LLaMA-Factory or TRL"),
        ("stage: rm", "reward_qwen3"),
        ("stage: sft", "sft_qwen3"),
        ("pref_loss: kto_pair", "pref_loss: kto_pair has no translation"),
        ("finetuning_type: freeze", "finetuning_type: freeze has no translation"),
        ("stage: kto\npref_ftx: 1.0", "pref_ftx has no translation with stage kto"),
        ("adapter_name_or_path: a,b", "merge them into one model"),
    ],
)
def test_what_has_no_translation_is_one_sentence(text, said):
    with pytest.raises(UserError, match=said):
        drafted(f"{BASE}{text}")
