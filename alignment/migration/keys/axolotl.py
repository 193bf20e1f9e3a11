"""The keys of Axolotl for `rl:` dpo, ipo, kto, orpo and simpo, and what becomes of each: its schemas, its examples."""

from __future__ import annotations

from typing import Any

from alignment.migration.draft import Moves, Table, read, says

_PLAN = "Each stage plans by itself which layers it recomputes and how large its passes are (trainer.checkpoint_every)."
_PACKED = "Completions are laid out without padding, each prompt once, and preference data are not packed."
_FASTER = "Kernels of this package take its place, each compared with the slow way before it is used."
TOKENIZER = "The tokenizer and its tokens are the model's; model.eos_token is for a tokenizer without one."
"""Why its tokens have no setting."""
_SWEEP = "A run has all its steps and keeps the last policy; stopping=asha ends members of a sweep early."
_ROWS = "Rows are read, checked and tokenised before the first step, and kept for later runs."
_SENT = "A run is tracked as tracking.to says (wandb, tensorboard, mlflow, trackio), and sends nothing to the hub."

TABLE: Table = {
    # The method
    **read(
        "rl rl_beta dpo_label_smoothing dpo_use_weighting dpo_norm_loss dpo_loss_type dpo_loss_weights "
        "rpo_alpha orpo_alpha simpo_gamma cpo_alpha kto_desirable_weight kto_undesirable_weight trl",
    ),
    **says(
        "The reference's log-probs are always computed once and kept in a cache that all runs share.",
        "precompute_ref_log_probs rl_adapter_ref_model",
        unless=(None,),
    ),
    **says(
        _PACKED,
        "dpo_padding_free dpo_use_logits_to_keep sample_packing eval_sample_packing pad_to_sequence_len "
        "sample_packing_group_size sample_packing_bin_size batch_flattening dpo_use_liger_kernel",
        unless=(None, False, True, 200, 100_000),
    ),
    **says(
        "evaluation.prompts has answers written to held-out questions.",
        "dpo_generate_during_eval eval_table_size eval_max_new_tokens do_bench_eval do_causal_lm_eval",
        unless=(None, False, 0, 128),
    ),
    # The loop
    "num_epochs": Moves("trainer.epochs"),
    "learning_rate": Moves("optim.lr"),
    "weight_decay": Moves("optim.weight_decay"),
    "adam_beta1": Moves("optim.beta1"),
    "adam_beta2": Moves("optim.beta2"),
    "max_grad_norm": Moves("optim.max_grad_norm"),
    "seed": Moves("seed", "whole"),
    "logging_steps": Moves("trainer.log_every", "whole"),
    **read(
        "micro_batch_size gradient_accumulation_steps batch_size max_steps warmup_steps warmup_ratio "
        "lr_scheduler lr_scheduler_kwargs optimizer adam_epsilon save_steps save_strategy saves_per_epoch "
        "save_total_limit eval_steps eval_strategy evals_per_epoch deepspeed fsdp fsdp_config fsdp_version",
    ),
    **says(
        _PLAN,
        "gradient_checkpointing gradient_checkpointing_kwargs eval_batch_size auto_find_batch_size "
        "activation_offloading gc_steps unsloth max_memory gpu_memory_limit",
    ),
    **says(
        "The optimizer has no settings beyond those of optim.",
        "optim_args optim_target_modules adam_epsilon2 adam_beta3 lr_quadratic_warmup cosine_min_lr_ratio "
        "cosine_constant_lr_ratio lr_groups embedding_lr embedding_lr_scale",
    ),
    **says(
        _SWEEP,
        "early_stopping_patience load_best_model_at_end metric_for_best_model greater_is_better "
        "loss_watchdog_threshold loss_watchdog_patience",
    ),
    **says(
        "trainer.devices says how many GPUs share a step.",
        "ddp ddp_timeout ddp_bucket_cap_mb ddp_broadcast_buffers ddp_find_unused_parameters local_rank "
        "world_size device_map device accelerator_config context_parallel_size sequence_parallel_degree "
        "tensor_parallel_size",
        unless=(None, False, "", "auto", 1, "cuda", -1),
    ),
    **says(
        "resume=true goes on with the newest unfinished run of the recipe.",
        "resume_from_checkpoint auto_resume_from_checkpoints",
    ),
    **says(
        "Runs go to outputs/<recipe>/<time>, each to a folder of its own; hydra.run.dir=... names another.",
        "output_dir",
    ),
    **says(
        "Checkpoints have all that a run needs to go on.",
        "save_safetensors save_only_model save_first_step",
        unless=(None, False, True),
    ),
    # The model
    **read(
        "base_model revision_of_model trust_remote_code bf16 bfloat16 fp16 float16 float32 flash_attention "
        "sdp_attention eager_attention attn_implementation special_tokens",
    ),
    **read(
        "load_in_8bit load_in_4bit bnb_config_kwargs",
    ),
    **says(
        "Classes of model and tokenizer are told by the model's files.",
        "base_model_config model_type tokenizer_type tokenizer_config is_llama_derived_model "
        "is_mistral_derived_model is_qwen_derived_model is_falcon_derived_model tokenizer_use_fast "
        "processor_type",
    ),
    **says(
        TOKENIZER,
        "tokens added_tokens_overrides resize_token_embeddings_to_32x tokenizer_legacy "
        "tokenizer_use_mistral_common fix_untrained_tokens",
    ),
    **says(
        "Products of float32 stay float32.",
        "tf32",
    ),
    **says(
        "Products of 8 bits are not there.",
        "fp8",
    ),
    **says(
        "model.attention has auto, sdpa, eager and flash_attention_2.",
        "xformers_attention flex_attention s2_attention flash_optimum flash_attn_fuse_qkv flash_attn_fuse_mlp",
    ),
    **says(
        _FASTER,
        "plugins liger_rope liger_rms_norm liger_glu_activation liger_layer_norm "
        "liger_fused_linear_cross_entropy lora_mlp_kernel lora_qkv_kernel lora_o_kernel "
        "flash_attn_cross_entropy flash_attn_rms_norm torch_compile torch_compile_backend torch_compile_mode "
        "cut_cross_entropy unsloth_lora_mlp unsloth_lora_qkv unsloth_lora_o",
    ),
    **says(
        "The model is used as its files have it.",
        "overrides_of_model_config overrides_of_model_kwargs rope_scaling low_cpu_mem_usage gptq unfrozen_parameters",
    ),
    # The adapter
    **read(
        "adapter lora_model_dir lora_r lora_alpha lora_dropout lora_target_modules lora_target_linear "
        "lora_modules_to_save peft_use_dora peft_use_rslora peft_layers_to_transform peft_init_lora_weights "
        "loraplus_lr_ratio",
    ),
    **says(
        "Weights have one layout here.",
        "lora_fan_in_fan_out peft_layers_pattern lora_on_cpu loraplus_lr_embedding "
        "qlora_sharded_model_loading merge_lora",
        unless=(None, False, True, 1e-6),
    ),
    **says(
        "It is not there; adapters are in docs/adapters.md.",
        "relora_steps relora_warmup_steps relora peft loftq_config lora_target_parameters "
        "peft_layer_replication peft_trainable_token_indices",
    ),
    # The data
    **read(
        "datasets test_datasets val_set_size sequence_len max_prompt_len chat_template chat_template_jinja "
        "default_system_message dataset_exact_deduplication",
    ),
    **says(
        "A prompt is not learnt in a preference stage.",
        "train_on_inputs",
    ),
    **says(
        _ROWS,
        "dataset_prepared_path dataset_processes dataset_num_proc dataset_keep_in_memory dataset_shard_num "
        "dataset_shard_idx shuffle_merged_datasets skip_prepare_dataset dataloader_num_workers "
        "dataloader_pin_memory dataloader_prefetch_factor dataloader_drop_last push_dataset_to_hub "
        "pretrain_multipack_buffer_size",
        unless=(None, False, True, "", "last_run_prepared"),
    ),
    **says(
        "Rows are drawn at random; passes are packed by length without a change of the step.",
        "group_by_length curriculum_sampling",
    ),
    **says(
        "A row that is too long is cut, not left out.",
        "excess_length_strategy min_sample_len",
        unless=(None, "truncate"),
    ),
    **says(
        "Columns that training does not read are named in the log, and left alone.",
        "remove_unused_columns",
        unless=(None, True, False),
    ),
    # Tracking
    **read(
        "wandb_project wandb_entity wandb_name wandb_run_id wandb_mode use_wandb",
    ),
    **says(
        _SENT,
        "wandb_watch wandb_log_model use_tensorboard use_mlflow use_comet mlflow_tracking_uri "
        "mlflow_experiment_name comet_project_name hub_model_id hub_strategy hf_use_auth_token",
    ),
    **says(
        "A misspelt key of a recipe always ends the run.",
        "strict debug profiler_steps include_tokens_per_second neftune_noise_alpha",
    ),
}

DEFAULTS: dict[str, Any] = {
    "num_epochs": 1.0,
    "max_steps": -1,
    "lr_scheduler": "cosine",
    "optimizer": "adamw_torch_fused",
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "seed": 42,
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "warmup_steps": 0,
    "rl_beta": 0.1,
    "orpo_alpha": 0.1,
    "simpo_gamma": 0.5,
    "cpo_alpha": 1.0,
    "dpo_label_smoothing": 0.0,
    "discopop_tau": 0.05,
    "kto_desirable_weight": 1.0,
    "kto_undesirable_weight": 1.0,
    "sequence_len": 512,
    "val_set_size": 0.0,
    "lora_dropout": 0.0,
    "bnb_4bit_quant_type": "nf4",
    "bnb_double": True,
}
