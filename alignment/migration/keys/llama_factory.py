"""The keys of LLaMA-Factory for its stages dpo and kto, and what becomes of each: its arguments and its examples."""

from __future__ import annotations

from typing import Any

from alignment.migration.draft import Table, read, says
from alignment.migration.keys.arguments import DEFAULTS as TRAINING_DEFAULTS
from alignment.migration.keys.arguments import TRAINING

_FASTER = "Kernels of this package take its place, each compared with the slow way before it is used."
_OTHER_OPTIMIZER = (
    "optim.name chooses the optimizer: galore_adamw and apollo_adamw with optim.target_modules, muon, adam_mini."
)
_PPO = "It belongs to PPO, which this package does not have."

TABLE: Table = {
    **TRAINING,
    # The method
    **read(
        "stage finetuning_type pref_beta pref_ftx pref_bco_weight pref_loss dpo_label_smoothing "
        "kto_chosen_weight kto_rejected_weight simpo_gamma ld_alpha ref_model ref_model_adapters",
    ),
    **says(
        "The reference has the base's quantisation.",
        "ref_model_quantization_bit",
    ),
    **says(
        _PPO,
        "reward_model reward_model_adapters reward_model_quantization_bit reward_model_type ppo_buffer_size "
        "ppo_epochs ppo_score_norm ppo_target ppo_whiten_rewards",
    ),
    **says(
        "SFT alone has it there.",
        "use_dft_loss",
    ),
    # The adapter
    **read(
        "lora_rank lora_alpha lora_dropout lora_target additional_target loraplus_lr_ratio use_rslora "
        "use_dora pissa_init pissa_iter create_new_adapter adapter_name_or_path oft_rank oft_block_size "
        "oft_target module_dropout",
    ),
    **says(
        "Embeddings have the rate of the other weights of B.",
        "loraplus_lr_embedding",
    ),
    **says(
        "export.merge=true writes base and adapter as one model.",
        "pissa_convert",
    ),
    **says(
        "Layers train whole with spectrum=<share>, by their signal; not by their number.",
        "freeze_trainable_layers freeze_trainable_modules freeze_extra_modules use_llama_pro",
    ),
    **says(
        _OTHER_OPTIMIZER,
        "use_galore use_apollo use_badam use_adam_mini use_muon",
    ),
    **says(
        "Only the language model of a model that sees trains.",
        "freeze_vision_tower freeze_multi_modal_projector freeze_language_model image_max_pixels "
        "video_max_pixels video_maxlen",
        unless=(None, True, False),
    ),
    # The model
    **read(
        "model_name_or_path model_revision trust_remote_code flash_attn moe_aux_loss_coef pure_bf16 "
        "quantization_bit quantization_method quantization_type double_quantization",
    ),
    **says(
        _FASTER,
        "use_unsloth use_unsloth_gc enable_liger_kernel use_v1_kernels",
    ),
    **says(
        "Each stage plans by itself which layers it recomputes (trainer.checkpoint_every).",
        "disable_gradient_checkpointing use_reentrant_gc",
        unless=(None, False, True),
    ),
    **says(
        "The tokenizer and the vocabulary are the model's.",
        "resize_vocab split_special_tokens add_tokens add_special_tokens new_special_tokens_config",
    ),
    **says(
        "The model is used as its files have it.",
        "rope_scaling shift_attn mixture_of_depths train_from_scratch",
    ),
    **says(
        "Norms and the head compute in float32 where it matters.",
        "upcast_layernorm upcast_lmhead_output",
    ),
    **says(
        "It has no bearing on training here.",
        "use_fast_tokenizer low_cpu_mem_usage cache_dir infer_backend infer_dtype offload_folder use_kv_cache "
        "print_param_status quantization_device_map adapter_folder",
        unless=(None, True, False, "auto", "huggingface"),
    ),
    **says(
        "Log in with the hub's own command; a recipe has no token.",
        "hf_hub_token ms_hub_token om_hub_token",
    ),
    **says(
        "Products of 8 bits are not there.",
        "fp8 fp8_backend fp8_enable_fsdp_float8_all_gather",
    ),
    # The data
    **read(
        "dataset eval_dataset dataset_dir cutoff_len max_samples val_size streaming mix_strategy "
        "interleave_probs enable_thinking",
    ),
    **says(
        "The chat template is the model's own; data.chat_template names another: a Jinja file, or one of the "
        "tokenizer's.",
        "template",
    ),
    **says(
        "data.system is the text of a conversation without a system message.",
        "default_system",
    ),
    **says(
        "A prompt is not learnt in a preference stage.",
        "train_on_prompt",
    ),
    **says(
        "An answer is all that follows the prompt; data.score=last learns its last turn alone.",
        "mask_history",
    ),
    **says(
        "Preference data are not packed: each prompt is laid out once, with its answers behind it.",
        "packing neat_packing",
    ),
    **says(
        "Rows are drawn at random.",
        "disable_shuffling buffer_size",
        unless=(None, False, 16384),
    ),
    **says(
        "Tokens are kept by the content of the data and their settings, and are never stale.",
        "overwrite_cache preprocessing_batch_size tokenized_path",
        unless=(None, False, True, 1000),
    ),
    **says(
        "The forms of calls of tools are recognised.",
        "tool_format",
    ),
    **says(
        "Each source of a mixture is reported by itself.",
        "eval_on_each_dataset",
        unless=(None, False, True),
    ),
    **says(
        "Padding is never learnt.",
        "ignore_pad_token_for_loss",
        unless=(None, True),
    ),
    **says(
        "Texts alone are read.",
        "media_dir",
    ),
    # The run
    **says(
        "plots/ and report.md are written for every run.",
        "plot_loss compute_accuracy include_effective_tokens_per_second",
        unless=(None, False, True),
    ),
    **says(
        "A run is tracked with wandb, tensorboard, mlflow or trackio (tracking.to).",
        "use_swanlab swanlab_project swanlab_run_name swanlab_mode swanlab_workspace",
        unless=(None, False),
    ),
    **says(
        "stopping=asha ends members of a sweep early; one run has all its steps.",
        "early_stopping_steps",
    ),
    **says(
        "A sweep on a cluster is described in docs/sweeps.md.",
        "ray_run_name ray_storage_path ray_num_workers placement_strategy resources_per_worker ray_init_kwargs",
    ),
    **says(
        "evaluation.prompts has answers written to held-out questions.",
        "predict_with_generate max_new_tokens temperature top_p",
    ),
}

DEFAULTS: dict[str, Any] = {
    **TRAINING_DEFAULTS,
    "stage": "sft",
    "finetuning_type": "lora",
    "pref_beta": 0.1,
    "pref_ftx": 0.0,
    "pref_bco_weight": 0.0,
    "pref_loss": "sigmoid",
    "dpo_label_smoothing": 0.0,
    "kto_chosen_weight": 1.0,
    "kto_rejected_weight": 1.0,
    "simpo_gamma": 0.5,
    "lora_rank": 8,
    "lora_dropout": 0.0,
    "lora_target": "all",
    "pissa_iter": 16,
    "oft_rank": 0,
    "oft_block_size": 32,
    "oft_target": "all",
    "module_dropout": 0.0,
    "model_revision": "main",
    "flash_attn": "auto",
    "quantization_method": "bnb",
    "quantization_type": "nf4",
    "double_quantization": True,
    "cutoff_len": 2048,
    "dataset_dir": "data",
    "mix_strategy": "concat",
    "val_size": 0.0,
}
