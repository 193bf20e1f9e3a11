"""Files of Axolotl (`axolotl train`) with `rl:` dpo, ipo, kto, orpo or simpo."""

from __future__ import annotations

from typing import Any

from alignment.errors import UserError, require
from alignment.migration.draft import Draft
from alignment.migration.keys.axolotl import TOKENIZER
from alignment.migration.loop import (
    finish_data,
    put_attention,
    put_held_out,
    put_ranks,
    put_schedule,
    put_sources,
    put_step,
    put_warmup,
    steps_of_run,
    steps_per_epoch,
)
from alignment.migration.losses import (
    TOKENS,
    Part,
    contrastive,
    odds_ratio,
    plain_sigmoid,
    put_loss,
    trl_pairs,
    with_nll,
)
from alignment.migration.trl import put_quantization

_COLUMNS = {
    "argilla": {},
    "argilla_chat": {},
    "intel": {},
    "ultra": {},
    "prompt_pairs": {},
    "icr": {"prompt": "input"},
    "nectar": {"completions": "answers"},
    "default": {},
}
"""Last word of a data set's type: the columns that have another name here; the others are recognised."""
_FIELDS = {
    "field_prompt": "prompt",
    "field_messages": "prompt",
    "field_system": "system",
    "field_chosen": "chosen",
    "field_rejected": "rejected",
    "field_completion": "completion",
    "field_label": "label",
    "field_tools": "tools",
}


def translate(draft: Draft) -> str:
    """Fill the recipe; returns the method.

    Raises:
        UserError: a method that this package does not train, or a value that cannot be read.
    """
    method = draft.value("rl")
    if method is None:
        raise UserError(
            "rl is missing, so the file trains SFT, which has no translation: start from the recipe sft_qwen3."
        )
    methods = ("dpo", "ipo", "kto", "orpo", "simpo")
    require(
        method in methods,
        f"rl: {method} has no translation; what has one: {', '.join(methods)}. Methods that draw answers and reward "
        "them "
        f"while they train are Axolotl's or TRL's: use one of them.",
    )
    put_step(draft, size="micro_batch_size", accumulation="gradient_accumulation_steps", total="batch_size")
    _put_rhythm(draft, steps_of_run(draft, "max_steps", "num_epochs"))
    put_schedule(draft, "lr_scheduler", "optimizer")
    _put_tracking(draft)
    put_ranks(draft, "deepspeed", "fsdp", "fsdp_config", "fsdp_version")
    _put_loss(draft, str(method))
    _put_model(draft)
    _put_adapter(draft)
    _put_data(draft)
    finish_data(draft)
    return str(method).upper()


def _put_rhythm(draft: Draft, total: int | None) -> None:
    draft.seen.update(("warmup_steps", "warmup_ratio", "save_strategy", "eval_strategy"))
    if draft.gives("warmup_steps") or draft.gives("warmup_ratio"):
        put_warmup(draft, total)
    else:
        draft.put("optim.warmup_ratio", 0.03 if total is None else min(int(0.03 * total), 100) / total, "warmup_ratio")
    for setting, steps, per_epoch, what in (
        ("trainer.save_every", "save_steps", "saves_per_epoch", "A checkpoint is saved"),
        ("trainer.eval_every", "eval_steps", "evals_per_epoch", "Held-out pairs are measured"),
    ):
        number = draft.number(steps) if draft.gives(steps) else 0
        draft.seen.add(per_epoch)
        if number >= 1:
            draft.put(setting, int(number), steps)
        elif draft.gives(per_epoch) and (epoch := steps_per_epoch(draft)) is not None:
            draft.put(setting, max(1, int(epoch / draft.number(per_epoch))), per_epoch)
        else:
            draft.put(setting, 0, per_epoch)
            key = steps if number else per_epoch
            if draft.gives(key):
                draft.note(
                    key, f"{setting} counts optimizer steps, which --rows tells. {what} at the end of the stage alone."
                )
    if draft.gives("save_total_limit") and draft.whole("save_total_limit") > 0:
        draft.put("trainer.keep_checkpoints", draft.whole("save_total_limit"), "save_total_limit")


def _put_tracking(draft: Draft) -> None:
    keys = {"wandb_project": "project", "wandb_entity": "entity", "wandb_name": "name", "wandb_mode": "mode"}
    draft.seen.update((*keys, "wandb_run_id", "use_wandb"))
    if not draft.gives("wandb_project") and not draft.flag("use_wandb"):
        draft.choose("tracking", "none", "wandb_project", "use_wandb")
        return
    draft.choose("tracking", "wandb", "wandb_project", "use_wandb")
    for key, setting in keys.items():
        if draft.gives(key):
            draft.put(f"tracking.{setting}", draft.text(key), key)
    if draft.gives("wandb_run_id"):
        draft.note("wandb_run_id", "Each run has an id of its own.")


def _put_loss(draft: Draft, method: str) -> None:
    inner = draft.value("trl") or {}
    require(isinstance(inner, dict), f"trl must be a mapping, not {inner!r}.")
    if inner.get("beta") is not None:
        draft.defaults = {**draft.defaults, "rl_beta": inner["beta"], "orpo_alpha": inner["beta"]}
        draft.note("trl", "Its beta is the loss's.")
        require(
            not draft.gives("rl_beta"), "trl.beta and rl_beta are two values for one number: leave one of them out."
        )
    draft.seen.update(
        ("kto_desirable_weight", "kto_undesirable_weight", "simpo_gamma", "cpo_alpha", "dpo_label_smoothing")
    )
    draft.seen.update(
        ("rl_beta", "orpo_alpha", "dpo_use_weighting", "dpo_norm_loss", "dpo_loss_type", "dpo_loss_weights")
    )
    if method == "orpo":
        key = "rl_beta" if draft.gives("rl_beta") else "orpo_alpha"
        put_loss(draft, odds_ratio(draft, draft.number(key), key), "rl")
    elif method == "simpo":
        put_loss(draft, contrastive(draft, "rl", ("rl_beta", "simpo_gamma", "cpo_alpha")), "rl")
    elif method == "kto":
        keys = ("rl_beta", "kto_desirable_weight", "kto_undesirable_weight")
        values = dict(zip(("beta", "desirable_weight", "undesirable_weight"), map(draft.number, keys), strict=True))
        draft.note("rl", "KTO's KL is estimated from the whole step here, and from a micro-batch there.")
        put_loss(draft, [Part("kto", values, 1.0, keys)], "rl")
    else:
        names = draft.names("dpo_loss_type") or ["ipo" if method == "ipo" else "sigmoid"]
        given = draft.value("dpo_loss_weights")
        weights = [1.0] * len(names) if given is None else given
        require(
            isinstance(weights, list) and len(weights) == len(names),
            f"dpo_loss_weights must be a list of {len(names)} numbers.",
        )
        where = "dpo_loss_type" if draft.gives("dpo_loss_type") else "rl"
        parts = trl_pairs(draft, names, [float(w) for w in weights], (where, "rl_beta", "dpo_label_smoothing"))
        beta = draft.number("rl_beta")
        if draft.flag("dpo_norm_loss"):
            plain_sigmoid(parts, "dpo_norm_loss")
            parts = [Part("ln_dpo", {"beta": beta}, 1.0, ("rl_beta", "dpo_norm_loss"))]
        if draft.flag("dpo_use_weighting"):
            plain_sigmoid(parts, "dpo_use_weighting")
            parts = [Part("wpo", {"beta": beta}, 1.0, ("rl_beta", "dpo_use_weighting"))]
            draft.note(
                "dpo_use_weighting",
                "WPO's weight is at most 1 here, as in its authors' code; TRL has had no limit since 0.29.",
            )
        if draft.gives("rpo_alpha"):
            parts = with_nll(draft, parts, draft.number("rpo_alpha"), "rpo_alpha", TOKENS)
        put_loss(draft, parts, where, "dpo_loss_weights")


def _put_model(draft: Draft) -> None:
    base, adapter = draft.text("base_model"), draft.text("lora_model_dir")
    require(base is not None, "base_model is missing: Axolotl's file gives the model, and a recipe needs one.")
    draft.put("model.name", adapter or base, "lora_model_dir" if adapter else "base_model")
    if adapter:
        draft.note("base_model", "The base is the one that the adapter's own configuration names.")
        draft.note(
            "lora_model_dir", "Policy and reference both start at the base with this adapter, whose training goes on."
        )
    draft.put("model.revision", draft.text("revision_of_model"), "revision_of_model")
    if draft.flag("trust_remote_code"):
        draft.put("model.trust_remote_code", True, "trust_remote_code")
    for key, name in (
        ("flash_attention", "flash_attention_2"),
        ("sdp_attention", "sdpa"),
        ("eager_attention", "eager"),
    ):
        draft.seen.add(key)
        if draft.flag(key):
            put_attention(draft, key, name)
    if draft.gives("attn_implementation"):
        put_attention(draft, "attn_implementation", str(draft.value("attn_implementation")))
    halves, brains = ("fp16", "float16"), ("bf16", "bfloat16")
    draft.seen.update((*halves, *brains, "float32"))
    values = {key: draft.value(key) for key in (*halves, *brains, "float32")}
    refused = values["bf16"] is False and not values["bfloat16"] and not any(values[key] for key in halves)
    draft.put("model.dtype", "float32" if values["float32"] or refused else "auto", "bf16", "bfloat16", "float32")
    for key in halves:
        if values[key]:
            draft.note(
                key, "model.dtype=auto is bfloat16 where the GPU computes in it, else float16, with a loss scaler."
            )
    tokens = draft.value("special_tokens") or {}
    if isinstance(tokens, dict) and tokens.get("eos_token"):
        draft.put("model.eos_token", tokens["eos_token"], "special_tokens")
    if isinstance(tokens, dict) and set(tokens) - {"eos_token"}:
        draft.note("special_tokens", f"{TOKENIZER} Padding never counts.")


def _put_adapter(draft: Draft) -> None:
    kind = draft.value("adapter")
    require(
        kind in (None, "", "lora", "qlora"),
        f"adapter: {kind} has no translation; what has one: lora, qlora, or none of them.",
    )
    if kind:
        draft.choose("adapter", "dora" if draft.flag("peft_use_dora") else "lora", "adapter", "peft_use_dora")
        draft.put("adapter.r", draft.whole("lora_r") if draft.gives("lora_r") else 8, "lora_r")
        draft.put("adapter.alpha", draft.number("lora_alpha") if draft.gives("lora_alpha") else 8, "lora_alpha")
        draft.put("adapter.dropout", draft.number("lora_dropout"), "lora_dropout")
        targets = draft.names("lora_target_modules")
        linear = draft.flag("lora_target_linear") or not targets
        draft.put(
            "adapter.target_modules",
            ["all-linear"] if linear else targets,
            "lora_target_linear" if linear else "lora_target_modules",
        )
        draft.put("adapter.modules_to_save", draft.names("lora_modules_to_save"), "lora_modules_to_save")
        draft.put("adapter.rslora", draft.flag("peft_use_rslora"), "peft_use_rslora")
        if draft.gives("peft_layers_to_transform"):
            draft.put(
                "adapter.layers_to_transform", draft.value("peft_layers_to_transform"), "peft_layers_to_transform"
            )
        if draft.gives("loraplus_lr_ratio"):
            draft.put("adapter.lr_ratio", draft.number("loraplus_lr_ratio"), "loraplus_lr_ratio")
        if isinstance(draft.value("peft_init_lora_weights"), str):
            draft.put("adapter.init", draft.value("peft_init_lora_weights"), "peft_init_lora_weights")
        if linear and targets:
            draft.note("lora_target_modules", "lora_target_linear names all linear layers already.")
    else:
        draft.choose("adapter", "none", "adapter")
        for key in (
            "lora_r",
            "lora_alpha",
            "lora_dropout",
            "lora_target_linear",
            "lora_target_modules",
            "lora_modules_to_save",
        ):
            if draft.gives(key):
                draft.note(key, "Without adapter the whole model trains (adapter=none).")
    inner = draft.value("bnb_config_kwargs") or {}
    if isinstance(inner, dict) and "bnb_4bit_use_double_quant" in inner:
        draft.defaults = {**draft.defaults, "bnb_double": bool(inner["bnb_4bit_use_double_quant"])}
    put_quantization(draft, "bnb_4bit_quant_type", "bnb_double")


def _put_data(draft: Draft) -> None:
    longest = draft.whole("sequence_len")
    draft.put("data.max_length", longest, "sequence_len")
    draft.put("data.max_prompt_length", longest - 1, "sequence_len")
    draft.put("data.truncate_prompt", "start", "sequence_len")
    draft.note("sequence_len", "A row that is longer is cut, first at the end of its answer; there it is left out.")
    if draft.gives("max_prompt_len"):
        draft.note("max_prompt_len", "It is not read by these methods; data.max_prompt_length cuts prompts here.")
    put_sources(draft, [_source(draft, item) for item in draft.mappings("datasets")], "datasets")
    tests = draft.mappings("test_datasets")
    draft.seen.add("val_set_size")
    if tests and "data.sources" not in "".join(draft.settings):
        source = _source(draft, tests[0])
        draft.put("data.eval_source", source["source"], "test_datasets")
        draft.put("data.eval_split", source["split"], "test_datasets")
        if len(tests) > 1:
            draft.note("test_datasets", "Held-out rows come from the first of them.")
    elif tests:
        draft.note(
            "test_datasets",
            "Each source of a mixture has held-out rows of its own: set data.sources.<name>.eval_source.",
        )
    elif draft.number("val_set_size"):
        put_held_out(draft, "val_set_size", draft.number("val_set_size"))
    if draft.gives("default_system_message"):
        draft.put("data.system", draft.text("default_system_message"), "default_system_message")
    if draft.flag("dataset_exact_deduplication"):
        draft.put("data.duplicates", "drop", "dataset_exact_deduplication")
    _put_template(draft)


def _put_template(draft: Draft) -> None:
    template, text = draft.value("chat_template"), draft.text("chat_template_jinja")
    draft.seen.update(("chat_template", "chat_template_jinja"))
    if text is not None and "{" not in text:
        draft.put("data.chat_template", text, "chat_template_jinja", "chat_template")
    elif text is not None:
        draft.note(
            "chat_template_jinja", "Put the text of the template into a file, and its name into data.chat_template."
        )
    elif template not in (None, "tokenizer_default") and not str(template).startswith("tokenizer_default_fallback"):
        draft.note(
            "chat_template",
            f"{template} is a template of Axolotl's; the model's own is used, and data.chat_template names another: "
            "a Jinja file.",
        )


def _source(draft: Draft, item: dict[str, Any]) -> dict[str, Any]:
    """One entry of `datasets`: its place, its split, and its type as names of columns."""
    files, path = item.get("data_files"), item.get("path")
    place = files if files and (path in (None, "json", "csv", "parquet", "arrow")) else path
    require(bool(place), "datasets: an entry has no path.")
    source: dict[str, Any] = {"source": place, "split": item.get("split") or "train"}
    for key in ("name", "revision"):
        if item.get(key):
            source[key] = item[key]
    columns: dict[str, str] = {}
    kind = item.get("type")
    fields = {**item, **kind} if isinstance(kind, dict) else item
    if isinstance(kind, str):
        family, _, form = kind.rpartition(".")
        columns.update(_COLUMNS.get(form, {}))
        if form not in _COLUMNS and family:
            draft.note(
                "datasets",
                f"The type {kind} of {place} is not known: `python -m alignment.data` shows how its rows are read.",
            )
        family = family or kind
        if family not in ("chat_template", "user_defined"):
            draft.note(
                "datasets",
                f"The type {kind} writes its template into the text; the model's own is used here, and "
                "data.chat_template names another.",
            )
    columns.update(
        {ours: fields[key] for key, ours in _FIELDS.items() if isinstance(fields.get(key), str) and fields[key] != ours}
    )
    if columns:
        source["columns"] = columns
    formats = [
        key for key in ("prompt_format", "chosen_format", "rejected_format", "completion_format") if key in fields
    ]
    if formats:
        draft.note("datasets", f"{', '.join(formats)}: the chat template writes prompts and answers.")
    known = {
        "path",
        "split",
        "type",
        "data_files",
        "name",
        "revision",
        "ds_type",
        "message_property_mappings",
        "roles",
        "trust_remote_code",
        *_FIELDS,
    }
    if others := sorted(set(item) - known):
        draft.note("datasets", f"{', '.join(others)} of {place} is left out.")
    if {"message_property_mappings", "roles"} & set(item):
        draft.note("datasets", "Keys and roles of messages are recognised by their usual names.")
    return source
