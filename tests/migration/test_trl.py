"""TRL's files: every field of the installed classes is known, and the numbers mean the same."""

from __future__ import annotations

import math
import re
from dataclasses import MISSING, fields

import pytest
from trl import DPOConfig, KTOConfig, ModelConfig, ScriptArguments
from trl.scripts.utils import DatasetConfig, DatasetMixtureConfig

from alignment.errors import UserError
from alignment.losses import LOSSES
from alignment.losses.parity import CHECKS
from alignment.migration.keys.trl import DEFAULTS, TABLE
from alignment.migration.loop import share_of
from tests.helpers.migrated import drafted, migrated

MODEL = "model_name_or_path: org/model\ndataset_name: org/pairs\n"
FULL = (
    MODEL
    + """
model_revision: abc
dataset_config: main
dataset_train_split: train_prefs
dataset_test_split: test_prefs
use_peft: true
lora_r: 8
lora_alpha: 12
lora_dropout: 0.1
lora_target_modules: all-linear
lora_modules_to_save: [lm_head]
use_rslora: true
load_in_4bit: true
use_bnb_nested_quant: true
attn_implementation: sdpa
dtype: bfloat16
beta: 0.3
learning_rate: 5e-7
lr_scheduler_type: cosine
warmup_steps: 7
max_steps: 100
weight_decay: 0.01
adam_beta2: 0.95
max_grad_norm: 0.5
optim: adamw_torch
seed: 3
per_device_train_batch_size: 2
gradient_accumulation_steps: 4
logging_steps: 5
save_steps: 25
save_total_limit: 3
eval_strategy: steps
eval_steps: 20
max_length: 768
report_to: [wandb, tensorboard, comet_ml]
run_name: first
precompute_ref_log_probs: true
gradient_checkpointing: false
deepspeed: ds.json
remove_unused_columns: false
bf16: true
"""
)


@pytest.mark.parametrize("config", [DPOConfig, KTOConfig, ModelConfig, ScriptArguments, DatasetMixtureConfig])
def test_every_field_of_the_installed_classes_is_known(config):
    assert {field.name for field in fields(config)} <= TABLE.keys()


def test_every_field_of_a_source_is_translated_or_named():
    known = {"path", "name", "data_dir", "data_files", "split", "columns", "fraction"}
    assert {field.name for field in fields(DatasetConfig)} == known
    draft, _ = drafted("model_name_or_path: m\nloss_type: sigmoid\ndatasets: [{path: a/b, data_dir: x}]")
    assert "data_dir of a/b is left out" in draft.notes["datasets"]


def test_defaults_are_those_of_the_installed_classes():
    theirs = {}
    for config in (ScriptArguments, ModelConfig, KTOConfig, DPOConfig):
        theirs |= {field.name: field.default for field in fields(config) if field.default is not MISSING}
    for key, value in DEFAULTS.items():
        if key in theirs and key != "loss_type":
            assert theirs[key] == value, key
    assert DPOConfig.__dataclass_fields__["loss_type"].default_factory() == [DEFAULTS["loss_type"]]
    # A key that a recipe needs, and whose default is another one here: none is forgotten
    assert {"beta", "learning_rate", "num_train_epochs", "max_length", "seed", "lr_scheduler_type"} <= DEFAULTS.keys()


def test_the_numbers_mean_the_same(tmp_path):
    config, draft = migrated(tmp_path, FULL, devices=3)
    model, adapter, data, optim, trainer = config.model, config.adapter, config.data, config.optim, config.trainer
    assert (model.name, model.revision, model.attention, model.dtype.name) == ("org/model", "abc", "sdpa", "bfloat16")
    assert (adapter.r, adapter.alpha, adapter.dropout, adapter.rslora) == (8, 12, 0.1, True)
    assert (adapter.target_modules, adapter.modules_to_save) == (["all-linear"], ["lm_head"])
    assert config.quantization.double
    assert (data.source, data.name, data.split, data.eval_split) == ("org/pairs", "main", "train_prefs", "test_prefs")
    assert (data.max_length, data.max_prompt_length, data.system, data.limit) == (768, 767, None, None)
    assert config.sft is None and config.seed == 3
    assert config.loss == LOSSES["dpo"](beta=0.3, label_smoothing=0.0)
    assert (optim.lr, optim.schedule, optim.weight_decay, optim.beta1, optim.beta2) == (5e-7, "cosine", 0.01, 0.9, 0.95)
    assert (optim.max_grad_norm, optim.name) == (0.5, "adamw_torch")
    assert math.ceil(optim.warmup_ratio * trainer.max_steps) == 7
    assert (trainer.max_steps, trainer.groups_per_step, trainer.devices) == (100, 2 * 4 * 3, "auto")
    assert (trainer.log_every, trainer.save_every, trainer.keep_checkpoints, trainer.eval_every) == (5, 25, 3, 20)
    assert (config.tracking.name, config.tracking.to) == ("first", ["wandb", "tensorboard"])
    assert "comet_ml" in draft.notes["report_to"] and "cache" in draft.notes["precompute_ref_log_probs"]
    assert "trainer.shard" in draft.notes["deepspeed"] and "remove_unused_columns" in draft.same


def test_a_silent_file_has_the_defaults_of_the_tool(tmp_path):
    config, _ = migrated(tmp_path, MODEL)
    optim, trainer = config.optim, config.trainer
    theirs = DPOConfig("out", bf16=False)
    assert (optim.lr, optim.schedule, optim.warmup_ratio) == (theirs.learning_rate, theirs.lr_scheduler_type.value, 0)
    assert (trainer.epochs, trainer.max_steps) == (theirs.num_train_epochs, None)
    assert trainer.groups_per_step == theirs.per_device_train_batch_size
    assert (config.seed, config.adapter, config.tracking, config.loss.beta) == (theirs.seed, None, None, theirs.beta)
    assert config.evaluation.prompts == 0 and config.data.eval_size == 0


def test_the_share_of_any_number_of_steps_is_these_steps():
    """7 / 25 * 25 is above 7 in floating point, and would be rounded up to 8."""
    for total in range(2, 120):
        assert all(math.ceil(share_of(steps, total) * total) == steps for steps in range(1, total))


@pytest.mark.parametrize("total", [3, 7, 10, 99, 100, 1000, 4321])
def test_warm_up_has_as_many_steps(tmp_path, total):
    for steps in {1, 2, total // 3, total - 1}:
        draft, _ = drafted(f"{MODEL}max_steps: {total}\nwarmup_steps: {steps}")
        assert math.ceil(draft.settings["optim.warmup_ratio"] * total) == steps


def test_warm_up_of_an_unknown_number_of_steps_is_said():
    draft, _ = drafted(f"{MODEL}warmup_steps: 10")
    assert "--rows" in draft.notes["warmup_steps"]
    draft, _ = drafted(f"{MODEL}warmup_steps: 10\nnum_train_epochs: 2", rows=400)
    assert math.ceil(draft.settings["optim.warmup_ratio"] * 100) == 10
    draft, _ = drafted(f"{MODEL}warmup_steps: 0.1")
    assert draft.settings["optim.warmup_ratio"] == 0.1


TRL_NAMES = {
    "DPO sigmoid": "loss_type: sigmoid",
    "DPO robust, label_smoothing 0.1": "{loss_type: robust, label_smoothing: 0.1}",
    "DPO ipo": "loss_type: ipo",
    "DPO hinge": "loss_type: [hinge]",
    "DPO sft": "loss_type: sft",
    "DPO bco_pair": "loss_type: bco_pair",
    "DPO apo_zero": "loss_type: apo_zero",
    "DPO apo_down": "loss_type: apo_down",
    "DPO nca_pair": "loss_type: nca_pair",
    "DPO exo_pair, label_smoothing 0.001": "{loss_type: exo_pair, label_smoothing: 0.001}",
    "DPO sppo_hard, beta 0.001": "{loss_type: sppo_hard, beta: 0.001}",
    "DPO discopop, beta 0.05, tau 0.05": "{loss_type: discopop, beta: 0.05, discopop_tau: 0.05}",
    "DPO sigmoid, forward_kl": "f_divergence_type: forward_kl",
    "DPO sigmoid, js_divergence": "f_divergence_type: js_divergence",
    "DPO sigmoid, alpha_divergence, coefficient 0.7": (
        "{f_divergence_type: alpha_divergence, f_alpha_divergence_coef: 0.7}"
    ),
    "DPO sigmoid_norm, beta 5": "{loss_type: sigmoid_norm, beta: 5}",
    "DPO sigmoid, ld_alpha 0.5": "ld_alpha: 0.5",
    "DPO sigmoid, use_weighting, beta 0.01": "{use_weighting: true, beta: 0.01}",
    "DPO aot": "loss_type: aot",
    "DPO aot_unpaired": "loss_type: aot_unpaired",
    "KTO": "loss_type: kto",
    "KTO apo_zero_unpaired": "loss_type: apo_zero_unpaired",
    "CPO simpo, beta 2, simpo_gamma 1, cpo_alpha 0": "{loss_type: simpo, beta: 2, simpo_gamma: 1, cpo_alpha: 0}",
    "CPO simpo, beta 2, simpo_gamma 1": "{loss_type: simpo, beta: 2, simpo_gamma: 1}",
    "CPO sigmoid": "cpo_alpha: 1.0",
}
"""TRL's settings in the table of parity, as its files have them."""


def test_the_loss_is_the_one_that_the_table_of_parity_compares(tmp_path):
    """That table holds TRL's own values, which another test computes with TRL."""
    compared = {check.trl: check for check in reversed(CHECKS) if check.trl in TRL_NAMES}
    assert compared.keys() == TRL_NAMES.keys()
    for name, text in TRL_NAMES.items():
        text = text if text.startswith("{") else f"{{{text}}}"
        draft, _ = drafted(f"{text[:-1]}, model_name_or_path: m, dataset_name: d}}")
        ours = compared[name].loss
        settings = {
            key.removeprefix("loss."): value for key, value in draft.settings.items() if key.startswith("loss.")
        }
        assert draft.groups["loss"] == ours.name, name
        for key, value in settings.items():
            theirs = getattr(ours, key)
            assert pytest.approx(getattr(theirs, "value", theirs)) == value, (name, key)
        if abs(compared[name].trl_value / compared[name].formula - 1) > 1e-5:
            notes = f"{draft.notes.get('loss_type')} {draft.notes.get('use_weighting')}"
            assert "factor 1/2" in notes or "at most 1" in notes, name


def test_every_loss_of_the_installed_trl_has_a_translation():
    told = re.findall(r"`'(\w+)'`", DPOConfig.__dataclass_fields__["loss_type"].metadata["help"])
    assert len(told) >= 15
    for name in told:
        draft, _ = drafted(f"{MODEL}loss_type: {name}\nlabel_smoothing: 0.01")
        assert draft.groups["loss"] in LOSSES
    for name in KTOConfig.__dataclass_fields__["loss_type"].metadata["choices"]:
        assert drafted(f"{MODEL}loss_type: {name}")[0].groups["loss"] == name


def test_a_list_of_losses_is_a_mixture(tmp_path):
    text = f"{MODEL}loss_type: [sigmoid, bco_pair, sft]\nloss_weights: [0.8, 0.2, 1.0]\nbeta: 0.2"
    config, _ = migrated(tmp_path, text)
    assert config.loss.weights == {"dpo": 0.8, "bco_pair": 0.2, "nll": 1.0}
    assert config.loss.settings["bco_pair"].beta == 0.2
    assert config.loss.settings["nll"].nll_reduction.value == "token_mean"


def test_sppo_has_twice_the_weight_in_a_mixture(tmp_path):
    """TRL leaves out the factor 1/2."""
    config, _ = migrated(tmp_path, f"{MODEL}loss_type: [sppo_hard, sft]\nloss_weights: [0.5, 1]\nbeta: 0.001")
    assert config.loss.weights == {"sppo": 1.0, "nll": 1.0}


def test_an_old_rpo_alpha_is_a_sum(tmp_path):
    config, _ = migrated(tmp_path, f"{MODEL}rpo_alpha: 0.5\nbeta: 0.2")
    assert config.loss.weights == {"dpo": 1.0, "nll": 0.5} and config.loss.settings["dpo"].beta == 0.2


def test_smoothing_that_trl_ignores_is_left_out_and_said(tmp_path):
    config, draft = migrated(tmp_path, f"{MODEL}label_smoothing: 0.1")
    assert config.loss.label_smoothing == 0 and "0.29" in draft.notes["label_smoothing"]


def test_orpo_and_kto_are_asked_for(tmp_path):
    config, _ = migrated(tmp_path, f"{MODEL}beta: 0.05", method="orpo")
    assert (config.loss.name, config.loss.lam, config.loss.nll_scope.value) == ("orpo", 0.05, "prompt_and_response")
    config, draft = migrated(tmp_path, f"{MODEL}undesirable_weight: 2")
    assert (config.loss.name, config.loss.undesirable_weight) == ("kto", 2)
    assert "micro-batch" in draft.notes["loss_type"]


def test_the_reference_that_follows(tmp_path):
    config, _ = migrated(tmp_path, f"{MODEL}sync_ref_model: true\nref_model_sync_steps: 64")
    assert (config.reference.mode.name, config.reference.sync_every, config.reference.sync_mix) == ("live", 64, 0.6)


def test_mixtures(tmp_path):
    text = """
model_name_or_path: m
loss_type: sigmoid
datasets:
  - {path: a/pairs, fraction: 0.75}
  - {path: json, data_files: [x.jsonl, y.jsonl], fraction: 0.25}
test_split_size: 0.1
"""
    config, _ = migrated(tmp_path, text, rows=1000)
    first, second = config.data.sources.values()
    assert (first.source, first.weight, first.eval_size) == ("a/pairs", 0.75, 100)
    assert (second.source, second.weight, config.data.source) == (["x.jsonl", "y.jsonl"], 0.25, None)
    assert config.data.exhausted.name == "stop"


HANDBOOK = """
model_name_or_path: org/sft
torch_dtype: bfloat16
use_flash_attention_2: true
chat_template: "{% for m in messages %}{{ m.content }}{% endfor %}"
dataset_mixer: {org/feedback: 1.0}
dataset_splits: [train_prefs, test_prefs]
preprocessing_num_workers: 12
beta: 0.01
evaluation_strategy: steps
eval_steps: 100
max_length: 1024
max_prompt_length: 512
num_train_epochs: 1
optim: adamw_hf
push_to_hub: true
warmup_ratio: 0.1
"""


def test_the_handbooks_files(tmp_path):
    config, draft = migrated(tmp_path, HANDBOOK)
    data = config.data
    assert (data.source, data.split, data.eval_split) == ("org/feedback", "train_prefs", "test_prefs")
    assert (data.max_prompt_length, data.truncate_prompt.name, config.model.attention) == (
        512,
        "end",
        "flash_attention_2",
    )
    assert (config.optim.name, config.optim.warmup_ratio, config.trainer.eval_every) == ("adamw_torch", 0.1, 100)
    assert "data.chat_template" in draft.notes["chat_template"]
    newer = "model_name_or_path: m\nloss_type: ipo\ndataset_mixture: {datasets: [{id: a/b, split: train, weight: 0.5}]}"
    config, draft = migrated(tmp_path, newer)
    assert (config.data.source, config.loss.name) == ("a/b", "ipo") and "0.5 of the rows" in draft.notes[
        "dataset_mixture"
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("num_generations: 8", "num_generations is a key of GRPO.*use TRL"),
        ("assistant_only_loss: true", "sft_qwen3"),
        ("loss_type: sigmoids", "loss_type: sigmoids has no translation"),
        ("loss_type: [sigmoid, ipo]\nld_alpha: 0.5", "ld_alpha is translated with the loss sigmoid alone"),
        ("loss_type: [sigmoid, sigmoid]", "two of the losses are dpo"),
        ("loss_type: [sigmoid, sft]\nloss_weights: [1]", "loss_weights must be a list of 2 numbers"),
        ("beta: high", "beta must be a number, not 'high'"),
        ("use_peft: maybe", "use_peft must be true or false"),
        ("datasets: org/pairs", "datasets must be a list of mappings"),
    ],
)
def test_what_has_no_translation_is_one_sentence(text, said):
    with pytest.raises(UserError, match=said) as caught:
        drafted(f"{MODEL}{text}", "trl")
    assert "\n" not in str(caught.value)
