"""Axolotl's files: its methods, the types of its data sets, warm-up by default, and epochs as steps."""

from __future__ import annotations

import math

import pytest

from alignment.errors import UserError
from tests.helpers.migrated import drafted, migrated

BASE = "base_model: org/model\nlearning_rate: 2e-4\nmicro_batch_size: 2\ngradient_accumulation_steps: 4\n"
DATA = "datasets: [{path: org/pairs, split: train, type: chatml.intel}]\n"
FULL = (
    BASE
    + """
rl: dpo
rl_beta: 0.2
chat_template: llama3
datasets:
  - path: org/chats
    type: chat_template.default
    field_messages: conversation
    field_chosen: good
    field_rejected: rejected
    message_property_mappings: {role: role, content: content}
val_set_size: 0.1
sequence_len: 4096
sample_packing: false
pad_to_sequence_len: true
adapter: qlora
load_in_4bit: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
wandb_project: prefs
wandb_name: first
wandb_watch:
num_epochs: 4
optimizer: paged_adamw_8bit
lr_scheduler: cosine
bf16: auto
tf32: false
gradient_checkpointing: true
logging_steps: 1
flash_attention: true
warmup_steps: 10
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.0
special_tokens: {pad_token: <pad>, eos_token: <eot>}
fsdp:
deepspeed:
"""
)


def test_the_numbers_mean_the_same(tmp_path):
    config, draft = migrated(tmp_path, FULL, rows=800)
    adapter, trainer, data = config.adapter, config.trainer, config.data
    assert (adapter.r, adapter.alpha, adapter.dropout, adapter.target_modules) == (32, 16, 0.05, ["all-linear"])
    assert (config.loss.name, config.loss.beta, config.optim.lr) == ("dpo", 0.2, 2e-4)
    assert (config.optim.name, config.optim.schedule, config.seed) == ("paged_adamw_8bit", "cosine", 42)
    assert (trainer.groups_per_step, trainer.epochs, trainer.save_every, trainer.eval_every) == (8, 4, 100, 25)
    assert math.ceil(config.optim.warmup_ratio * 400) == 10
    assert (data.source, data.columns, data.eval_size) == (
        "org/chats",
        {"prompt": "conversation", "chosen": "good"},
        80,
    )
    assert (config.tracking.project, config.tracking.name, config.model.eos_token) == ("prefs", "first", "<eot>")
    assert config.quantization.double and config.model.attention == "flash_attention_2"
    assert {"sample_packing", "pad_to_sequence_len", "wandb_watch", "tf32", "fsdp"} <= set(draft.same)
    assert "data.chat_template" in draft.notes["chat_template"]


@pytest.mark.parametrize(
    ("text", "loss", "settings"),
    [
        ("rl: ipo\nrl_beta: 0.4", "ipo", {"tau": 0.4, "reduction": "mean"}),
        ("rl: dpo\ntrl: {beta: 0.3}", "dpo", {"beta": 0.3}),
        ("rl: dpo\ndpo_norm_loss: true", "ln_dpo", {"beta": 0.1}),
        ("rl: dpo\ndpo_use_weighting: true", "wpo", {"beta": 0.1}),
        ("rl: dpo\nrpo_alpha: 0.5", "mixture", {"weights": {"dpo": 1.0, "nll": 0.5}}),
        ("rl: kto\nkto_desirable_weight: 0.2", "kto", {"desirable_weight": 0.2, "undesirable_weight": 1.0}),
        ("rl: orpo\norpo_alpha: 0.2", "orpo", {"lam": 0.2, "nll_scope": "prompt_and_response"}),
        ("rl: simpo\nrl_beta: 2\nsimpo_gamma: 1\ncpo_alpha: 0", "simpo", {"beta": 2, "gamma_beta_ratio": 0.5}),
        ("rl: simpo\nrl_beta: 2", "cpo_simpo", {"gamma_beta_ratio": 0.25, "alpha": 1.0}),
    ],
)
def test_methods(tmp_path, text, loss, settings):
    config, draft = migrated(tmp_path, f"{BASE}{DATA}{text}")
    assert config.loss.name == loss
    for key, value in settings.items():
        ours = getattr(config.loss, key)
        assert getattr(ours, "value", ours) == value
    assert loss != "cpo_simpo" or "cpo_alpha" in draft.notes["rl"]


def test_warm_up_by_default_is_a_few_steps_at_most():
    draft, _ = drafted(f"{BASE}{DATA}rl: dpo")
    assert draft.settings["optim.warmup_ratio"] == 0.03
    draft, _ = drafted(f"{BASE}{DATA}rl: dpo\nmax_steps: 10000")
    assert math.ceil(draft.settings["optim.warmup_ratio"] * 10000) == 100


def test_types_of_data_are_names_of_columns(tmp_path):
    text = """
datasets:
  - {path: a/one, type: llama3.icr}
  - path: json
    ds_type: json
    data_files: [two.jsonl]
    type: {field_prompt: ask, field_chosen: good, prompt_format: "{prompt}"}
  - {path: a/three, type: mine.own}
test_datasets: [{path: a/test}]
"""
    config, draft = migrated(tmp_path, f"{BASE}{text}rl: dpo")
    one, two, three = config.data.sources.values()
    assert (one.source, one.columns) == ("a/one", {"prompt": "input"})
    assert (two.source, two.columns) == (["two.jsonl"], {"prompt": "ask", "chosen": "good"})
    assert three.columns == {}
    for said in ("llama3.icr writes its template", "prompt_format", "mine.own of a/three is not known"):
        assert said in draft.notes["datasets"]
    assert "data.sources.<name>.eval_source" in draft.notes["test_datasets"]


def test_the_size_of_a_step(tmp_path):
    draft, _ = drafted(f"base_model: m\nlearning_rate: 1e-5\nrl: dpo\nbatch_size: 32\nmicro_batch_size: 2\n{DATA}")
    assert draft.settings["trainer.groups_per_step"] == 32


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rl: grpo", "rl: grpo has no translation.*use one of them"),
        ("", "rl is missing, so the file trains SFT"),
        ("rl: dpo\nadapter: llama-adapter", "adapter: llama-adapter has no translation"),
        ("rl: dpo\nrl_beta: 1\ntrl: {beta: 2}", "two values for one number"),
    ],
)
def test_what_has_no_translation_is_one_sentence(text, said):
    with pytest.raises(UserError, match=said):
        drafted(f"{BASE}{DATA}{text}")
