"""The keys of TRL, and what becomes of each.

They are all fields of DPOConfig, KTOConfig, ModelConfig and ScriptArguments of TRL 1.16, and keys of versions before
and of the alignment handbook.
"""

from __future__ import annotations

from typing import Any

from alignment.migration.draft import Table, read, says
from alignment.migration.keys.arguments import DEFAULTS as TRAINING_DEFAULTS
from alignment.migration.keys.arguments import TRAINING

_CACHED = "The reference's log-probs are always computed once and kept in a cache that all runs share."
_TEMPLATE = (
    "The chat template is the model's; data.chat_template names another: a Jinja file, or one of the tokenizer's."
)
_PADDING = "Completions are laid out without padding, each prompt once."

TABLE: Table = {
    **TRAINING,
    # The method
    **read(
        "loss_type loss_weights beta label_smoothing ld_alpha f_divergence_type f_alpha_divergence_coef "
        "use_weighting discopop_tau desirable_weight undesirable_weight sync_ref_model ref_model_mixup_alpha "
        "ref_model_sync_steps rpo_alpha simpo_gamma cpo_alpha max_length max_prompt_length truncation_mode "
        "router_aux_loss_coef trust_remote_code model_init_kwargs",
    ),
    **says(
        _CACHED,
        "precompute_ref_log_probs precompute_ref_batch_size precompute_ref_eval_batch_size",
        unless=(None,),
    ),
    **says(
        "Dropout acts in SFT alone: preference stages have none, as with disable_dropout=true.",
        "disable_dropout",
        unless=(None, True),
    ),
    **says(
        _PADDING,
        "padding_free pad_to_multiple_of use_logits_to_keep",
        unless=(None, False, "auto"),
    ),
    **says(
        "An answer may have what its prompt leaves of data.max_length.",
        "max_completion_length max_target_length",
    ),
    **says(
        "The tokenizer's own tokens are used; padding never counts.",
        "pad_token label_pad_token_id padding_value is_encoder_decoder",
    ),
    **says(
        "Layers that are recomputed take its place.",
        "activation_offloading",
    ),
    **says(
        "Preference data are not packed: each prompt is laid out once, with its answers behind it.",
        "packing",
    ),
    **says(
        "The reference is the policy as the preference stage begins.",
        "reference_free model_adapter_name ref_adapter_name force_use_ref_model ref_model_init_kwargs",
    ),
    **says(
        "evaluation.prompts has answers written to held-out questions.",
        "generate_during_eval",
        unless=(None, False),
    ),
    # The model
    **read(
        "model_name_or_path model_revision dtype torch_dtype attn_implementation use_flash_attention_2 "
        "use_peft lora_r lora_alpha lora_dropout lora_target_modules lora_modules_to_save use_rslora use_dora "
        "load_in_8bit load_in_4bit bnb_4bit_quant_type use_bnb_nested_quant",
    ),
    **says(
        "Experts of a mixture get adapters by the name of their modules in adapter.target_modules.",
        "lora_target_parameters",
    ),
    **says(
        "A causal language model trains here.",
        "lora_task_type",
        unless=(None, "CAUSAL_LM"),
    ),
    **says(
        "Packed weights are stored as bitsandbytes has them.",
        "bnb_4bit_quant_storage",
    ),
    **says(
        "The tokenizer is the model's.",
        "tokenizer_name_or_path model_code_revision",
    ),
    # The data
    **read(
        "dataset_name dataset_config dataset_train_split dataset_test_split dataset_streaming datasets "
        "streaming test_split_size dataset_mixture dataset_mixer dataset_splits dataset_configs",
    ),
    **says(
        "Ranks keep no buffers in step that would have to be left out.",
        "ignore_bias_buffers",
    ),
    **says(
        _TEMPLATE,
        "chat_template auto_insert_empty_system_msg chat_template_path",
    ),
    **says(
        "data.source and its split say what is read.",
        "dataset_text_field text_column",
    ),
    **says(
        "Sets are read whole; data.limit ends the reading.",
        "max_train_samples max_eval_samples",
    ),
}

DEFAULTS: dict[str, Any] = {
    **TRAINING_DEFAULTS,
    "learning_rate": 1e-6,
    "logging_steps": 10,
    "max_length": 1024,
    "loss_type": "sigmoid",
    "beta": 0.1,
    "label_smoothing": 0.0,
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 0.5,
    "discopop_tau": 0.05,
    "desirable_weight": 1.0,
    "undesirable_weight": 1.0,
    "ref_model_mixup_alpha": 0.6,
    "ref_model_sync_steps": 512,
    "simpo_gamma": 0.5,
    "cpo_alpha": 1.0,
    "report_to": "none",
    "model_revision": "main",
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "bnb_4bit_quant_type": "nf4",
    "dataset_train_split": "train",
    "dataset_test_split": "test",
}
