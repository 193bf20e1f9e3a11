"""Files of LLaMA-Factory (`llamafactory-cli train`), of its stages dpo and kto."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from alignment.errors import UserError, require
from alignment.migration.draft import Draft
from alignment.migration.loop import (
    finish_data,
    put_attention,
    put_held_out,
    put_precision,
    put_ranks,
    put_rhythm,
    put_schedule,
    put_sources,
    put_step,
    put_tracking,
    put_warmup,
    steps_of_run,
)
from alignment.migration.losses import SEQUENCES, Part, plain_sigmoid, put_loss, with_nll

_OTHER_STAGES = {
    "sft": "start from the recipe sft_qwen3 for it",
    "rm": "start from the recipe reward_qwen3 for it",
    "pt": "this package does not pre-train",
    "ppo": "it rewards answers while it trains, which this package does not: use LLaMA-Factory or TRL for it",
}
_COLUMNS = {
    "prompt": "prompt",
    "messages": "prompt",
    "chosen": "chosen",
    "rejected": "rejected",
    "response": "completion",
    "kto_tag": "label",
    "system": "system",
    "history": "history",
    "tools": "tools",
}
"""Columns of dataset_info.json, by our names."""
_OWN_NAMES = {
    "prompt": ("prompt", "instruction"),
    "messages": ("conversations", "messages"),
    "response": ("completion", "output", "response"),
    "kto_tag": ("label",),
}
"""Names of the file's columns that are recognised as they are; of the others, the name itself."""


def translate(draft: Draft, file: Path) -> str:
    """Fill the recipe; returns the method.

    Args:
        draft: to fill.
        file: where the keys stand; a relative `dataset_dir` is looked for around it.

    Raises:
        UserError: a stage or a loss that this package does not train, or a value that cannot be read.
    """
    stage = str(draft.value("stage"))
    if stage in _OTHER_STAGES:
        raise UserError(f"stage: {stage} has no translation: {_OTHER_STAGES[stage]}.")
    require(stage in ("dpo", "kto"), f"stage must be dpo or kto, not '{stage}'.")
    put_step(draft, size="per_device_train_batch_size", accumulation="gradient_accumulation_steps")
    put_warmup(draft, steps_of_run(draft, "max_steps", "num_train_epochs"))
    put_schedule(draft, "lr_scheduler_type", "optim")
    put_rhythm(draft)
    put_tracking(draft)
    put_ranks(draft, "fsdp", "fsdp_config", "deepspeed")
    _put_loss(draft, stage)
    _put_model(draft)
    _put_adapter(draft)
    _put_data(draft, file)
    finish_data(draft)
    return "KTO" if stage == "kto" else f"DPO with pref_loss {draft.value('pref_loss')}"


def _put_loss(draft: Draft, stage: str) -> None:
    beta, name = draft.number("pref_beta"), str(draft.value("pref_loss"))
    of_beta = ("pref_beta", "pref_loss")
    draft.seen.update(("kto_chosen_weight", "kto_rejected_weight", "simpo_gamma", "dpo_label_smoothing", "ld_alpha"))
    draft.seen.update(("pref_ftx", "pref_bco_weight", *of_beta))
    if stage == "kto":
        keys = ("pref_beta", "kto_chosen_weight", "kto_rejected_weight")
        require(
            draft.number("pref_ftx") == 0,
            "pref_ftx has no translation with stage kto: rows have no chosen answer of a pair; set it to 0.",
        )
        values = dict(zip(("beta", "desirable_weight", "undesirable_weight"), map(draft.number, keys), strict=True))
        draft.note("stage", "KTO's KL is estimated from the whole step here, and from a micro-batch there.")
        put_loss(draft, [Part("kto", values, 1.0, keys)])
        return
    if name == "sigmoid":
        smoothing = draft.number("dpo_label_smoothing")
        parts = [Part("dpo", {"beta": beta, "label_smoothing": smoothing}, 1.0, (*of_beta, "dpo_label_smoothing"))]
    elif name == "hinge":
        parts = [Part("hinge", {"beta": beta}, 1.0, of_beta)]
    elif name == "ipo":
        parts = [Part("ipo", {"tau": beta, "reduction": "mean"}, 1.0, of_beta)]
    elif name == "orpo":
        parts = [Part("orpo", {"lam": beta, **SEQUENCES}, 1.0, of_beta)]
    elif name == "simpo":
        require(beta > 0, f"pref_beta must be above 0, not {beta}.")
        gamma = draft.number("simpo_gamma")
        draft.note("simpo_gamma", "SimPO's margin is given as gamma / beta here (loss.gamma_beta_ratio).")
        parts = [Part("simpo", {"beta": beta, "gamma_beta_ratio": gamma / beta}, 1.0, (*of_beta, "simpo_gamma"))]
    else:
        raise UserError(
            f"pref_loss: {name} has no translation; what has one: sigmoid, hinge, ipo, orpo, simpo, and stage: kto."
        )
    if draft.gives("ld_alpha") and draft.number("ld_alpha") != 1:
        plain_sigmoid(parts, "ld_alpha")
        parts = [Part("ld_dpo", {"beta": beta, "alpha": draft.number("ld_alpha")}, 1.0, ("pref_beta", "ld_alpha"))]
        draft.note("ld_alpha", "The reference is discounted, too; there the policy alone is.")
    if share := draft.number("pref_bco_weight"):
        require(name not in ("orpo", "simpo"), f"pref_bco_weight has no effect with pref_loss: {name}; take it out.")
        parts[0].weight = 1 / (1 + share)
        bco = {"beta": beta, "density_weights": False}
        parts.append(Part("bco", bco, share / (1 + share), ("pref_bco_weight",)))
        draft.note("pref_bco_weight", "BCO's running mean counts a step as a whole here, and each micro-batch there.")
    put_loss(draft, with_nll(draft, parts, draft.number("pref_ftx"), "pref_ftx", SEQUENCES))


def _put_model(draft: Draft) -> None:
    name = draft.text("model_name_or_path")
    require(
        name is not None, "model_name_or_path is missing: LLaMA-Factory's file gives the model, and a recipe needs one."
    )
    adapters = draft.names("adapter_name_or_path")
    require(
        len(adapters) < 2,
        "adapter_name_or_path: several adapters are merged there before training: merge them into one model first.",
    )
    draft.seen.update(("create_new_adapter", "ref_model", "ref_model_adapters", "pure_bf16"))
    draft.put(
        "model.name", adapters[0] if adapters else name, "adapter_name_or_path" if adapters else "model_name_or_path"
    )
    if adapters:
        draft.note("model_name_or_path", "The base is the one that the adapter's own configuration names.")
        if draft.flag("create_new_adapter"):
            draft.note(
                "create_new_adapter",
                "The adapter goes on training here. For a new one, merge it into the base first and set model.name "
                "to that.",
            )
        else:
            draft.note(
                "adapter_name_or_path",
                "The reference is the policy as it starts, base and adapter. There it is the base without the adapter, "
                "so after SFT the two differ.",
            )
    for key in ("ref_model", "ref_model_adapters"):
        if draft.gives(key):
            draft.note(
                key,
                "The reference is always the policy as it starts, after the run's own SFT if it has one; another "
                "model cannot be it.",
            )
    revision = draft.text("model_revision")
    draft.put("model.revision", None if revision == "main" else revision, "model_revision")
    if draft.flag("trust_remote_code"):
        draft.put("model.trust_remote_code", True, "trust_remote_code")
    put_attention(draft, "flash_attn", str(draft.value("flash_attn")))
    if draft.gives("moe_aux_loss_coef"):
        draft.put("trainer.router_aux_loss_coef", draft.number("moe_aux_loss_coef"), "moe_aux_loss_coef")
    put_precision(draft, None)
    if draft.flag("pure_bf16"):
        draft.put("model.dtype", "bfloat16", "pure_bf16")
        draft.put("optim.master_weights", False, "pure_bf16")


def _put_adapter(draft: Draft) -> None:
    kind = draft.value("finetuning_type")
    lora = (
        "lora_rank",
        "lora_alpha",
        "lora_dropout",
        "lora_target",
        "additional_target",
        "loraplus_lr_ratio",
        "use_rslora",
        "use_dora",
        "pissa_init",
        "pissa_iter",
    )
    oft = ("oft_rank", "oft_block_size", "oft_target", "module_dropout")
    require(
        kind in ("lora", "full", "oft"),
        f"finetuning_type: {kind} has no translation; what has one: lora, full, oft. spectrum=<share> trains some "
        "layers whole here.",
    )
    for key in (*(lora if kind != "lora" else ()), *(oft if kind != "oft" else ())):
        if draft.gives(key) and key != "additional_target":
            draft.note(key, f"It has no effect with finetuning_type: {kind}.")
    draft.seen.update(
        ("additional_target", "loraplus_lr_ratio", "use_rslora", "use_dora", "pissa_init", "pissa_iter", "lora_alpha")
    )
    if kind == "full":
        draft.choose("adapter", "none", "finetuning_type")
    elif kind == "oft":
        require(
            draft.whole("oft_rank") == 0,
            "oft_rank has no translation: give oft_block_size, which adapter.block_size is.",
        )
        draft.choose("adapter", "oft", "finetuning_type")
        draft.put("adapter.block_size", draft.whole("oft_block_size"), "oft_block_size")
        draft.put("adapter.dropout", draft.number("module_dropout"), "module_dropout")
        draft.put("adapter.target_modules", _targets(draft, "oft_target"), "oft_target")
    else:
        draft.choose("adapter", "dora" if draft.flag("use_dora") else "lora", "finetuning_type", "use_dora")
        rank = draft.whole("lora_rank")
        draft.put("adapter.r", rank, "lora_rank")
        draft.put("adapter.alpha", draft.number("lora_alpha") if draft.gives("lora_alpha") else 2 * rank, "lora_alpha")
        draft.put("adapter.dropout", draft.number("lora_dropout"), "lora_dropout")
        if draft.number("lora_dropout"):
            draft.note("lora_dropout", "It acts in SFT alone, in both: preference stages switch dropout off.")
        draft.put("adapter.target_modules", _targets(draft, "lora_target"), "lora_target")
        draft.put("adapter.rslora", draft.flag("use_rslora"), "use_rslora")
        if draft.gives("loraplus_lr_ratio"):
            draft.put("adapter.lr_ratio", draft.number("loraplus_lr_ratio"), "loraplus_lr_ratio")
        if draft.flag("pissa_init"):
            iterations = draft.whole("pissa_iter")
            draft.put(
                "adapter.init", "pissa" if iterations < 1 else f"pissa_niter_{iterations}", "pissa_init", "pissa_iter"
            )
    if kind != "full" and draft.gives("additional_target"):
        draft.put("adapter.modules_to_save", draft.names("additional_target"), "additional_target")
    _put_quantization(draft)


def _targets(draft: Draft, key: str) -> list[str]:
    names = draft.names(key)
    return ["all-linear"] if names == ["all"] else names


def _put_quantization(draft: Draft) -> None:
    bits, method = draft.value("quantization_bit"), str(draft.value("quantization_method"))
    draft.seen.update(("quantization_type", "double_quantization"))
    if bits in (4, "4") and method in ("bnb", "bitsandbytes"):
        draft.choose("quantization", "nf4", "quantization_bit", "quantization_method")
        draft.put("quantization.double", draft.flag("double_quantization"), "double_quantization", "quantization_bit")
        if draft.value("quantization_type") != "nf4":
            draft.note("quantization_type", f"4 bits are NF4 here, not {draft.value('quantization_type')}.")
        return
    draft.choose("quantization", "none", "quantization_bit")
    if bits is not None:
        draft.note(
            "quantization_bit",
            f"A base in {bits} bits by {method} is not there: it keeps 16 (quantization=none); quantization=nf4 has 4.",
        )


def _put_data(draft: Draft, file: Path) -> None:
    longest = draft.whole("cutoff_len")
    draft.put("data.max_length", longest, "cutoff_len")
    draft.put("data.max_prompt_length", longest - 1, "cutoff_len")
    draft.put("data.truncate_prompt", "start", "cutoff_len")
    draft.note(
        "cutoff_len",
        "A row that is longer loses the end of its answer here; there prompt and answer are both cut, by their "
        "lengths.",
    )
    draft.seen.update(
        ("dataset_dir", "streaming", "mix_strategy", "interleave_probs", "eval_dataset", "enable_thinking")
    )
    folder = str(draft.value("dataset_dir"))
    known = _dataset_info(folder, file)
    sources = [_source(draft, "dataset", name, folder, known) for name in draft.names("dataset")]
    strategy = str(draft.value("mix_strategy"))
    if len(sources) > 1 and strategy != "concat":
        weights = [float(weight) for weight in draft.names("interleave_probs")] or [1.0] * len(sources)
        require(
            len(weights) == len(sources), f"interleave_probs must have {len(sources)} numbers, one for each data set."
        )
        for source, weight in zip(sources, weights, strict=True):
            source["weight"] = weight
        draft.put(
            "data.exhausted",
            "repeat" if strategy.startswith("interleave_over") else "stop",
            "mix_strategy",
            "interleave_probs",
        )
    put_sources(draft, sources, "dataset", "dataset_dir")
    if draft.gives("max_samples"):
        draft.put("data.limit", draft.whole("max_samples"), "max_samples")
        if len(sources) > 1:
            del draft.settings["data.limit"]
            for setting in [
                key for key in draft.settings if key.endswith(".source") and key.startswith("data.sources.")
            ]:
                draft.put(setting.removesuffix("source") + "limit", draft.whole("max_samples"), "max_samples")
    if draft.flag("streaming"):
        draft.put("data.streaming", True, "streaming")
    if draft.gives("enable_thinking"):
        draft.put("data.template_kwargs", {"enable_thinking": draft.flag("enable_thinking")}, "enable_thinking")
    held_out = [_source(draft, "eval_dataset", name, folder, known) for name in draft.names("eval_dataset")]
    if held_out and len(sources) == 1:
        draft.put(
            "data.eval_source",
            held_out[0]["source"] if len(held_out) == 1 else [s["source"] for s in held_out],
            "eval_dataset",
        )
    elif held_out:
        draft.note(
            "eval_dataset",
            "Each source of a mixture has held-out rows of its own: set data.sources.<name>.eval_source.",
        )
    elif draft.number("val_size"):
        put_held_out(draft, "val_size", draft.number("val_size"))


def _dataset_info(folder: str, file: Path) -> tuple[Path | None, dict[str, Any]]:
    """The folder of the data and what its dataset_info.json says, looked for from here and around the file."""
    for start in (Path(), *file.absolute().parents):
        path = start / folder / "dataset_info.json"
        if path.is_file():
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise UserError(f"{path} cannot be read as JSON: {error}.") from error
            return path.parent, content if isinstance(content, dict) else {}
    return None, {}


def _source(
    draft: Draft, key: str, name: str, folder: str, known: tuple[Path | None, dict[str, Any]]
) -> dict[str, Any]:
    """One data set, by its entry in dataset_info.json, or by its name where there is no such file."""
    place, entries = known
    entry = entries.get(name)
    if not isinstance(entry, dict):
        if folder != "ONLINE":
            where = "was not found" if place is None else f"does not have {name}"
            draft.note(
                key,
                f"{name} is a name of {folder}/dataset_info.json, which {where}: put the file or the hub id that it "
                "stands for into data.source.",
            )
        return {"source": name}
    path = entry.get("hf_hub_url") or (f"modelscope:{entry['ms_hub_url']}" if entry.get("ms_hub_url") else None)
    if path is None and entry.get("file_name") and place is not None:
        path = str(place / str(entry["file_name"]))
    require(path is not None, f"{key}: {name} has neither hf_hub_url nor file_name in dataset_info.json.")
    source: dict[str, Any] = {"source": path}
    if entry.get("subset"):
        source["name"] = entry["subset"]
    if entry.get("split"):
        source["split"] = entry["split"]
    given = entry.get("columns")
    columns: dict[str, Any] = given if isinstance(given, dict) else {}
    mapped = {_COLUMNS[k]: v for k, v in columns.items() if k in _COLUMNS and v not in _OWN_NAMES.get(k, (k,))}
    if mapped:
        source["columns"] = mapped
    if columns.get("query") not in (None, "input"):
        draft.note(key, f"The column {columns['query']} of {name} is not joined to the prompt.")
    if entry.get("tags"):
        draft.note(key, f"Roles of the messages of {name} are recognised by their usual names; tags are left out.")
    return source
