"""Files of TRL's commands (`trl dpo --config`, `trl kto --config`), and of the alignment handbook's scripts.

Facts of TRL 1.16; keys of versions before, and of the handbook, are in the table too.
"""

from __future__ import annotations

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

METHODS = ("dpo", "kto", "orpo", "cpo")
"""TRL's commands whose files have a translation. A file does not say which of them reads it."""
_DIVERGENCES = {"forward_kl": "forward_kl", "js_divergence": "jensen_shannon", "alpha_divergence": "alpha"}
_OTHER_METHODS = {
    "GRPO": ("num_generations", "reward_funcs", "reward_weights", "use_vllm", "vllm_mode", "rloo_k", "num_ppo_epochs"),
    "SFT": ("assistant_only_loss", "completion_only_loss", "packing_strategy", "eval_packing"),
    "reward modelling": ("center_rewards_coefficient",),
}


def translate(draft: Draft) -> str:
    """Fill the recipe; returns the method.

    Raises:
        UserError: a method or a loss that this package does not train, or a value that cannot be read.
    """
    _refuse_other_methods(draft)
    method = _method(draft)
    put_step(draft, size="per_device_train_batch_size", accumulation="gradient_accumulation_steps")
    put_warmup(draft, steps_of_run(draft, "max_steps", "num_train_epochs"))
    put_schedule(draft, "lr_scheduler_type", "optim")
    put_rhythm(draft)
    put_tracking(draft)
    put_ranks(draft, "fsdp", "fsdp_config", "deepspeed")
    _put_loss(draft, method)
    _put_reference(draft)
    _put_model(draft)
    _put_adapter(draft)
    _put_lengths(draft)
    _put_data(draft)
    finish_data(draft)
    draft.seen.add("use_cpu")
    if draft.flag("use_cpu"):
        draft.put("device", "cpu", "use_cpu")
    return method.upper()


def _refuse_other_methods(draft: Draft) -> None:
    for method, marks in _OTHER_METHODS.items():
        mark = next((key for key in marks if draft.gives(key)), None)
        if mark is None:
            continue
        otherwise = {
            "GRPO": "it rewards answers while it trains, which this package does not: use TRL for it",
            "SFT": "start from the recipe sft_qwen3 for it",
            "reward modelling": "start from the recipe reward_qwen3 for it",
        }
        raise UserError(f"{mark} is a key of {method}, which has no translation: {otherwise[method]}.")


def _method(draft: Draft) -> str:
    """What reads the file: said on the command line, or told by keys that only one of them has."""
    wanted, loss = draft.around.method, draft.value("loss_type")
    single = loss[0] if isinstance(loss, list) and loss else loss
    if wanted is not None:
        require(wanted in METHODS, f"--method must be one of {', '.join(METHODS)}, not '{wanted}'.")
        return wanted
    if single in ("kto", "apo_zero_unpaired") or draft.gives("desirable_weight") or draft.gives("undesirable_weight"):
        return "kto"
    if single in ("simpo", "alphapo") or draft.gives("simpo_gamma") or draft.gives("cpo_alpha"):
        return "cpo"
    if not draft.gives("loss_type"):
        draft.note(
            "loss_type",
            "The file does not say its method: it is read as DPO's. --method kto, orpo or cpo reads it as another's.",
        )
    return "dpo"


def _put_loss(draft: Draft, method: str) -> None:
    given = draft.value("loss_type")
    names = [str(name) for name in given] if isinstance(given, list) else [str(given)]
    if method == "orpo":
        put_loss(draft, odds_ratio(draft, draft.number("beta"), "beta"))
    elif method == "cpo":
        put_loss(
            draft,
            _contrastive(draft, "simpo" if draft.gives("simpo_gamma") and not draft.gives("loss_type") else names[0]),
            "loss_type",
        )
    elif method == "kto":
        name = names[0] if draft.gives("loss_type") else "kto"
        require(
            name in ("kto", "apo_zero_unpaired"),
            f"loss_type: {name} is no loss of TRL's KTO; those are kto and apo_zero_unpaired.",
        )
        keys = ("beta", "desirable_weight", "undesirable_weight")
        put_loss(draft, [Part(name, {key: draft.number(key) for key in keys}, 1.0, keys)], "loss_type")
        draft.note(
            "loss_type", "KTO's KL is estimated from the whole step here, and from a micro-batch there."
        ) if name == "kto" else None
    else:
        _put_pairs(draft, names)


def _contrastive(draft: Draft, name: str) -> list[Part]:
    keys = ("beta", "simpo_gamma", "cpo_alpha")
    if name == "simpo":
        return contrastive(draft, "loss_type", keys)
    require(name == "sigmoid", f"loss_type: CPO with {name} has no translation; what has one: sigmoid, simpo.")
    settings = {
        "beta": draft.number("beta"),
        "lam": draft.number("cpo_alpha"),
        "label_smoothing": draft.number("label_smoothing"),
        **TOKENS,
    }
    return [Part("cpo", settings, 1.0, ("beta", "cpo_alpha", "label_smoothing"))]


def _put_pairs(draft: Draft, names: list[str]) -> None:
    given = draft.value("loss_weights")
    weights = [1.0] * len(names) if given is None else given
    fine = isinstance(weights, list) and all(isinstance(w, int | float) and not isinstance(w, bool) for w in weights)
    require(
        fine and len(weights) == len(names),
        f"loss_weights must be a list of {len(names)} numbers, one for each loss_type.",
    )
    parts = trl_pairs(draft, names, [float(weight) for weight in weights], ("loss_type", "beta", "label_smoothing"))
    beta = draft.number("beta")
    if draft.gives("ld_alpha") and draft.number("ld_alpha") != 1:
        old = plain_sigmoid(parts, "ld_alpha")
        parts = [Part("ld_dpo", {"beta": beta, "alpha": draft.number("ld_alpha")}, old.weight, ("beta", "ld_alpha"))]
    if (divergence := str(draft.value("f_divergence_type"))) != "reverse_kl":
        require(
            divergence in _DIVERGENCES,
            f"f_divergence_type must be one of reverse_kl, {', '.join(_DIVERGENCES)}, not '{divergence}'.",
        )
        old = plain_sigmoid(parts, "f_divergence_type")
        ours, alpha = _DIVERGENCES[divergence], None
        if ours == "alpha":
            alpha = 1 - draft.number("f_alpha_divergence_coef")
            draft.note("f_alpha_divergence_coef", "The paper's alpha, which loss.alpha is, is 1 minus this number.")
        keys = ("beta", "f_divergence_type", "f_alpha_divergence_coef")
        parts = [Part("f_dpo", {"beta": beta, "divergence": ours, "alpha": alpha}, old.weight, keys)]
    if draft.flag("use_weighting"):
        old = plain_sigmoid(parts, "use_weighting")
        parts = [Part("wpo", {"beta": beta}, old.weight, ("beta", "use_weighting"))]
        draft.note(
            "use_weighting", "WPO's weight is at most 1 here, as in its authors' code; TRL has had no limit since 0.29."
        )
    if draft.gives("rpo_alpha"):
        parts = with_nll(draft, parts, draft.number("rpo_alpha"), "rpo_alpha", TOKENS)
    put_loss(draft, parts, "loss_type", "loss_weights")


def _put_reference(draft: Draft) -> None:
    keys = ("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps")
    draft.seen.update(keys)
    if draft.flag("sync_ref_model"):
        mix = draft.number("ref_model_mixup_alpha")
        draft.put("reference.sync_every", draft.whole("ref_model_sync_steps"), *keys)
        draft.put("reference.sync_mix", mix, *keys)
        draft.put("reference.mode", "cache" if mix == 1 else "live", *keys)


def _put_model(draft: Draft) -> None:
    inner = draft.value("model_init_kwargs") or {}
    require(isinstance(inner, dict), f"model_init_kwargs must be a mapping, not {inner!r}.")
    name = draft.text("model_name_or_path")
    require(name is not None, "model_name_or_path is missing: TRL's file gives the model, and a recipe needs one.")
    draft.put("model.name", name, "model_name_or_path")
    revision = inner.get("revision") or draft.text("model_revision")
    draft.put("model.revision", None if revision == "main" else revision, "model_revision")
    if draft.flag("trust_remote_code"):
        draft.put("model.trust_remote_code", True, "trust_remote_code")
    if draft.gives("router_aux_loss_coef"):
        draft.put("trainer.router_aux_loss_coef", draft.number("router_aux_loss_coef"), "router_aux_loss_coef")
    if draft.flag("use_flash_attention_2"):
        put_attention(draft, "use_flash_attention_2", "flash_attention_2")
    attention = inner.get("attn_implementation") or draft.text("attn_implementation")
    if attention:
        put_attention(draft, "attn_implementation", str(attention))
    put_precision(draft, "torch_dtype" if draft.gives("torch_dtype") else "dtype")
    read_here = {"revision", "attn_implementation", "dtype", "torch_dtype", "trust_remote_code", "use_cache"}
    if others := sorted(set(inner) - read_here):
        draft.note(
            "model_init_kwargs",
            f"The model is loaded by the settings of model and quantization: {', '.join(others)} is left out.",
        )


def _put_adapter(draft: Draft) -> None:
    keys = (
        "lora_r",
        "lora_alpha",
        "lora_dropout",
        "lora_target_modules",
        "lora_modules_to_save",
        "use_rslora",
        "use_dora",
    )
    draft.seen.update(("use_peft", "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "use_bnb_nested_quant"))
    if not draft.flag("use_peft"):
        draft.choose("adapter", "none", "use_peft")
        for key in keys:
            if draft.gives(key):
                draft.note(key, "TRL reads it with use_peft=true alone: the whole model trains (adapter=none).")
    else:
        draft.choose("adapter", "dora" if draft.flag("use_dora") else "lora", "use_peft", "use_dora")
        draft.put("adapter.r", draft.whole("lora_r"), "lora_r")
        draft.put("adapter.alpha", draft.number("lora_alpha"), "lora_alpha")
        draft.put("adapter.dropout", draft.number("lora_dropout"), "lora_dropout")
        targets = draft.names("lora_target_modules")
        draft.put("adapter.target_modules", targets or ["q_proj", "v_proj"], "lora_target_modules")
        if not targets:
            draft.note(
                "lora_target_modules",
                "Without it peft adapts what it lists for the family, mostly q_proj and v_proj; "
                "adapter.target_modules=auto takes all layers that can learn.",
            )
        draft.put("adapter.modules_to_save", draft.names("lora_modules_to_save"), "lora_modules_to_save")
        draft.put("adapter.rslora", draft.flag("use_rslora"), "use_rslora")
    put_quantization(draft, "bnb_4bit_quant_type", "use_bnb_nested_quant")


def put_quantization(draft: Draft, kind: str, double: str) -> None:
    """The base in 4 bits (NF4), or as it is."""
    if draft.flag("load_in_8bit"):
        draft.note(
            "load_in_8bit", "There is no base in 8 bits: it keeps 16 (quantization=none); quantization=nf4 has 4."
        )
    if not draft.flag("load_in_4bit"):
        draft.choose("quantization", "none", "load_in_4bit")
        return
    draft.choose("quantization", "nf4", "load_in_4bit", kind)
    draft.put(
        "quantization.double", draft.flag(double), *(key for key in ("load_in_4bit", double) if key in draft.table)
    )
    if draft.value(kind) != "nf4":
        draft.note(kind, f"4 bits are NF4 here, not {draft.value(kind)}.")


def _put_lengths(draft: Draft) -> None:
    draft.seen.update(("max_length", "max_prompt_length", "truncation_mode"))
    unlimited = "max_length" in draft.given and draft.given["max_length"] is None
    longest = 32768 if unlimited else draft.whole("max_length")
    draft.put("data.max_length", longest, "max_length")
    if unlimited:
        draft.note("max_length", "A length is always limited here: 32768 stands in for none.")
    if draft.gives("max_prompt_length"):
        draft.put("data.max_prompt_length", draft.whole("max_prompt_length"), "max_prompt_length")
        side = "start" if draft.value("truncation_mode") == "keep_start" else "end"
        draft.put("data.truncate_prompt", side, "truncation_mode")
        return
    draft.put("data.max_prompt_length", longest - 1, "max_length")
    draft.put("data.truncate_prompt", "start", "truncation_mode")
    if not unlimited:
        draft.note(
            "max_length",
            "The answer is cut at its end in both; a prompt that fills max_length alone is cut here, and its row "
            "left out there.",
        )
    if draft.value("truncation_mode") == "keep_end":
        draft.note(
            "truncation_mode", "Rows that are too long lose the end of the answer here, and their beginning there."
        )


def _put_data(draft: Draft) -> None:
    mixture = draft.value("dataset_mixture") or {}
    require(isinstance(mixture, dict), f"dataset_mixture must be a mapping, not {mixture!r}.")
    evaluates = draft.value("eval_strategy") not in ("no", None) or draft.gives("evaluation_strategy")
    listed = mixture.get("datasets") or draft.mappings("datasets")
    draft.seen.update(("streaming", "test_split_size", "dataset_streaming", "dataset_configs", "dataset_splits"))
    if draft.gives("dataset_mixer"):
        _put_mixer(draft, evaluates)
    elif listed:
        key = "dataset_mixture" if mixture else "datasets"
        put_sources(draft, [_source(draft, key, item) for item in listed], key)
        share = mixture.get("test_split_size") or draft.value("test_split_size")
        if share:
            put_held_out(draft, key if mixture else "test_split_size", float(share))
        if draft.flag("streaming") or mixture.get("streaming"):
            draft.put("data.streaming", True, "streaming")
    else:
        name = draft.text("dataset_name")
        require(
            name is not None, "dataset_name is missing, and so are datasets and dataset_mixture: a recipe needs data."
        )
        source = {"source": name, "name": draft.text("dataset_config"), "split": draft.text("dataset_train_split")}
        put_sources(draft, [source], "dataset_name", "dataset_config", "dataset_train_split")
        if evaluates:
            draft.put("data.eval_split", draft.text("dataset_test_split"), "dataset_test_split")
        if draft.flag("dataset_streaming"):
            draft.put("data.streaming", True, "dataset_streaming")


def _source(draft: Draft, key: str, item: dict[str, Any]) -> dict[str, Any]:
    """One entry of TRL's `datasets`, or of the handbook's `dataset_mixture`, as a source."""
    require(isinstance(item, dict), f"{key} must be a list of mappings, not {item!r}.")
    files = item.get("data_files")
    path = (
        files
        if files and item.get("path") in ("json", "csv", "parquet", "arrow")
        else item.get("path") or item.get("id")
    )
    require(bool(path), f"{key}: an entry names no data set by path or id.")
    source = {"source": path, "name": item.get("name") or item.get("config"), "split": item.get("split") or "train"}
    if item.get("fraction") is not None:
        source["weight"] = float(item["fraction"])
    _note_share(draft, key, path, item.get("weight"))
    read_here = {"path", "id", "name", "config", "split", "data_files", "fraction", "weight", "columns"}
    if others := sorted(set(item) - read_here):
        draft.note(key, f"{', '.join(others)} of {path} is left out.")
    if item.get("columns"):
        draft.note(key, "Columns need not be chosen: the layout is recognised, and others are left alone.")
    return source


def _note_share(draft: Draft, key: str, path: object, share: Any) -> None:
    if share is not None and float(share) != 1:
        draft.note(
            key,
            f"The first {float(share):g} of the rows of {path}: a set is read whole here; data.limit, or count in a "
            "mixture, is a number of rows.",
        )


def _put_mixer(draft: Draft, evaluates: bool) -> None:
    """The handbook's old form: sets with the share of their rows, and the splits of all of them."""
    mixer = draft.value("dataset_mixer")
    require(isinstance(mixer, dict) and bool(mixer), f"dataset_mixer must map data sets to shares, not {mixer!r}.")
    splits = draft.names("dataset_splits") or ["train", "test"]
    configs = draft.names("dataset_configs") or [None] * len(mixer)  # type: ignore[list-item]
    sources = []
    for (path, share), name in zip(mixer.items(), configs, strict=False):
        _note_share(draft, "dataset_mixer", path, share)
        source = {"source": path, "name": name, "split": next((s for s in splits if "train" in s), splits[0])}
        test = next((split for split in splits if "test" in split), None)
        sources.append(source | ({"eval_split": test} if evaluates and test else {}))
    put_sources(draft, sources, "dataset_mixer", "dataset_splits", "dataset_configs")
