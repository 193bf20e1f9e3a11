"""The keys of transformers' `TrainingArguments`, which TRL and LLaMA-Factory share, and the loop that they describe."""

from __future__ import annotations

from typing import Any

from alignment.migration.draft import Moves, Table, read, says

_LOOK = "The log of a run is not set here: metrics.jsonl in the run folder has every value."
_LOADING = (
    "Rows are read and tokenised before the first step, and kept for later runs: nothing loads beside the training."
)
_RANKS = "trainer.devices says how many GPUs share a step, and trainer.shard whether they share one base."
_HUB = "A run sends nothing to the hub: python -m alignment.push does, with a model card, once you have seen it."
_METRICS = "Held-out pairs are measured the same way for every loss, without metrics of your own."
_PLAN = "Each stage plans its passes by the memory it finds; it affects memory and never the result."
_BEST = "The policy of the last step is the one that is kept; stopping=asha ends members of a sweep early."

TRAINING: Table = {
    "num_train_epochs": Moves("trainer.epochs"),
    "learning_rate": Moves("optim.lr"),
    "weight_decay": Moves("optim.weight_decay"),
    "adam_beta1": Moves("optim.beta1"),
    "adam_beta2": Moves("optim.beta2"),
    "max_grad_norm": Moves("optim.max_grad_norm"),
    "seed": Moves("seed", "whole"),
    **read(
        "max_steps lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio optim "
        "per_device_train_batch_size gradient_accumulation_steps adam_epsilon logging_strategy logging_steps "
        "save_strategy save_steps save_total_limit eval_strategy evaluation_strategy eval_steps report_to "
        "run_name bf16 fp16 use_cpu fsdp fsdp_config deepspeed",
    ),
    **says(
        "Runs go to outputs/<recipe>/<time>, each to a folder of its own; hydra.run.dir=... names another.",
        "output_dir overwrite_output_dir logging_dir",
    ),
    **says(
        "The optimizer has no settings beyond those of optim.",
        "optim_args",
    ),
    **says(
        "Set optim.target_modules for optimizers that project gradients.",
        "optim_target_modules",
    ),
    **says(
        "The seed draws the order of the data, too.",
        "data_seed",
    ),
    **says(
        "Every loss here has the mean over all pairs of a step, however many devices share it.",
        "average_tokens_across_devices",
        unless=(None, True),
    ),
    **says(
        "It smooths the labels of SFT; losses that smooth preferences have loss.label_smoothing.",
        "label_smoothing_factor",
    ),
    **says(
        "Evaluation has the same dtype as training.",
        "bf16_full_eval fp16_full_eval",
    ),
    **says(
        "Products of float32 stay float32.",
        "tf32 tf32_mode",
    ),
    **says(
        f"{_PLAN} trainer.checkpoint_every=1 recomputes every layer, 0 none.",
        "gradient_checkpointing gradient_checkpointing_kwargs activation_checkpointing "
        "activation_checkpointing_kwargs auto_find_batch_size per_device_eval_batch_size "
        "eval_accumulation_steps torch_empty_cache_steps per_gpu_train_batch_size per_gpu_eval_batch_size",
    ),
    **says(
        "Layers are not compiled as a whole; kernels are chosen by themselves.",
        "torch_compile torch_compile_backend torch_compile_mode",
    ),
    **says(
        "Kernels of this package take its place, each compared with the slow way before it is used.",
        "use_liger_kernel liger_kernel_config",
    ),
    **says(
        "Training needs no cache of keys and values.",
        "use_cache",
    ),
    **says(
        "Noise on embeddings is for SFT, and is not there.",
        "neftune_noise_alpha",
    ),
    **says(
        _LOOK,
        "logging_first_step log_on_each_node log_level log_level_replica disable_tqdm debug "
        "include_num_input_tokens_seen skip_memory_metrics include_tokens_per_second",
        unless=(None, False, True, "", "no", [], "passive", "info", "warning"),
    ),
    **says(
        "A loss or gradient that is not finite ends the run with a sentence.",
        "logging_nan_inf_filter",
        unless=(None, False),
    ),
    **says(
        "tracking=wandb sends a run to Weights & Biases; its project is tracking.project.",
        "project trackio_space_id trackio_bucket_id trackio_static_space_id",
        unless=(None, "huggingface"),
    ),
    **says(
        _METRICS,
        "prediction_loss_only include_for_metrics batch_eval_metrics eval_do_concat_batches "
        "eval_use_gather_object label_names include_inputs_for_metrics",
        unless=(None, False, True, [], ()),
    ),
    **says(
        "Held-out pairs are measured at the start and at the end in any case.",
        "eval_on_start eval_delay do_eval",
        unless=(None, False, True, 0),
    ),
    **says(
        "Checkpoints have all that a run needs to go on.",
        "save_only_model save_on_each_node enable_jit_checkpoint save_safetensors "
        "restore_callback_states_from_checkpoint",
        unless=(None, False, True),
    ),
    **says(
        _HUB,
        "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision "
        "hub_model_revision",
        unless=(None, False, "", "every_save"),
    ),
    **says(
        _BEST,
        "load_best_model_at_end metric_for_best_model greater_is_better early_stopping_patience",
    ),
    **says(
        "resume=true goes on with the newest unfinished run of the recipe, with the rows that it has not seen.",
        "resume_from_checkpoint ignore_data_skip",
    ),
    **says(
        "A run gives the same numbers again on the same machine.",
        "full_determinism",
    ),
    **says(
        _RANKS,
        "accelerator_config parallelism_config ddp_find_unused_parameters ddp_bucket_cap_mb "
        "ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout local_rank",
        unless=(None, False, -1, 1800, 180000000),
    ),
    **says(
        "The last step of an epoch has what is left of it.",
        "dataloader_drop_last",
    ),
    **says(
        _LOADING,
        "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers "
        "dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order dataset_num_proc "
        "preprocessing_num_workers",
        unless=(None, False, True, 0),
    ),
    **says(
        "Columns that training does not read are named in the log, and left alone.",
        "remove_unused_columns",
        unless=(None, True, False),
    ),
    **says(
        "Rows are drawn at random; passes are packed by length without a change of the step.",
        "train_sampling_strategy length_column_name group_by_length",
        unless=(None, False, "random", "length"),
    ),
    **says(
        "The command trains.",
        "do_train do_predict",
        unless=(None, True, False),
    ),
}

DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 3.0,
    "max_steps": -1,
    "learning_rate": 5e-5,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "optim": "adamw_torch_fused",
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "logging_strategy": "steps",
    "logging_steps": 500,
    "save_strategy": "steps",
    "save_steps": 500,
    "eval_strategy": "no",
    "seed": 42,
}
"""What transformers 5 takes where a file is silent."""
