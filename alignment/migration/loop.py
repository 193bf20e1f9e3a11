"""The loop that other tools describe: steps and their size, warm-up, schedule, checkpoints, tracking, held-out rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from alignment.config.tracking import TRACKER_PACKAGES
from alignment.errors import require
from alignment.migration.draft import Draft

HELD_OUT = 200
"""Held-out rows where a file gives a share of rows whose number is not known."""
_SCHEDULES = {
    "cosine_with_min_lr": "cosine",
    "cosine_warmup_with_min_lr": "cosine",
    "warmup_stable_decay": "constant_with_warmup",
    "reduce_lr_on_plateau": "constant_with_warmup",
    "one_cycle": "cosine",
    "rex": "cosine",
}
"""Schedules that are not there, and what stands in for them."""
_OPTIMIZERS = {"adamw_hf": "adamw_torch", "adamw_torch_8bit": "adamw_8bit", "ao_adamw_8bit": "adamw_8bit"}
"""Optimizers under other names."""
_ATTENTION = {
    "flash_attention_2": "flash_attention_2",
    "fa2": "flash_attention_2",
    "sdpa": "sdpa",
    "eager": "eager",
    "disabled": "eager",
}


def put_step(draft: Draft, *, size: str, accumulation: str, total: str | None = None) -> None:
    """The groups of an optimizer step: what one process has at once, times the passes, times the processes."""
    devices = draft.around.devices
    groups = draft.whole(size) * draft.whole(accumulation) * devices
    if total is not None and draft.gives(total) and not draft.gives(accumulation):
        groups = draft.whole(total)
        draft.put("trainer.groups_per_step", groups, total)
    else:
        draft.put("trainer.groups_per_step", groups, size, accumulation)
    if devices > 1:
        draft.put("trainer.devices", "auto")
    draft.note(
        accumulation,
        f"A step has trainer.groups_per_step={groups} groups here, for {devices} process{'es' if devices > 1 else ''}; "
        f"how it is split changes no number. --devices says how many shared it there.",
    )


def steps_of_run(draft: Draft, max_steps: str, epochs: str) -> int | None:
    """The optimizer steps of the run; None where they are not known."""
    given = draft.value(max_steps)
    if given is not None and draft.whole(max_steps) > 0:
        draft.put("trainer.max_steps", draft.whole(max_steps), max_steps)
        return draft.whole(max_steps)
    draft.seen.add(max_steps)
    per_epoch = steps_per_epoch(draft)
    return None if per_epoch is None else max(1, math.ceil(per_epoch * draft.number(epochs)))


def steps_per_epoch(draft: Draft) -> int | None:
    """The optimizer steps of an epoch; None where the number of rows is not known."""
    rows = draft.around.rows
    return None if rows is None else math.ceil(rows / draft.settings["trainer.groups_per_step"])


def share_of(steps: int, total: int) -> float:
    """The share of all steps that is `steps` of them, once it is rounded up."""
    share = steps / total
    return share if math.ceil(share * total) == steps else (steps - 0.5) / total


def put_warmup(draft: Draft, total: int | None) -> None:
    """Warm-up, which is a share of all steps here."""
    steps = draft.number("warmup_steps")
    if steps == 0 or (not draft.gives("warmup_steps") and draft.gives("warmup_ratio")):
        ratio = draft.number("warmup_ratio") if draft.gives("warmup_ratio") else 0.0
        draft.put("optim.warmup_ratio", ratio, "warmup_ratio", "warmup_steps")
    elif 0 < steps < 1:
        draft.put("optim.warmup_ratio", steps, "warmup_steps")
    elif total is None:
        draft.put("optim.warmup_ratio", 0.1, "warmup_steps")
        draft.note(
            "warmup_steps",
            f"Warm-up is a share of all steps here, and of how many these {steps:g} are is not known: 0.1 stands in "
            "for "
            f"it. Give --rows, or set optim.warmup_ratio.",
        )
    else:
        draft.put("optim.warmup_ratio", share_of(draft.whole("warmup_steps"), total), "warmup_steps")
        draft.note("warmup_steps", f"{steps:g} steps are given as their share of {total}.")


def put_schedule(draft: Draft, schedule: str, optimizer: str) -> None:
    """Schedule and optimizer, by transformers' names."""
    name = str(draft.value(schedule))
    draft.put("optim.schedule", _SCHEDULES.get(name, name), schedule)
    if name in _SCHEDULES:
        draft.note(schedule, f"{name} is not there; {_SCHEDULES[name]} stands in for it.")
    if draft.value("lr_scheduler_kwargs"):
        draft.note(
            "lr_scheduler_kwargs",
            f"Schedules have no further settings here: {draft.settings['optim.schedule']} as it comes.",
        )
    optimizer_name = str(draft.value(optimizer))
    draft.put("optim.name", _OPTIMIZERS.get(optimizer_name, optimizer_name), optimizer)
    if draft.gives("adam_epsilon") and draft.number("adam_epsilon") != 1e-8:
        draft.note("adam_epsilon", "Adam's epsilon is 1e-8.")


def _every(draft: Draft, setting: str, strategy: str, steps: str, what: str) -> None:
    """How often something happens: never, each epoch, or each so many steps or so large a share of the run."""
    how = draft.value(strategy)
    number = draft.number(steps) if draft.value(steps) is not None else None
    if how in ("epoch", "best"):
        every = steps_per_epoch(draft) if how == "epoch" else None
        draft.put(setting, every or 0, strategy)
        if every is None:
            draft.note(
                strategy, f"{setting} counts optimizer steps; {how} is not there: {what} at the end of the stage alone."
            )
    elif how in ("no", "none", False, None):
        draft.put(setting, 0, strategy)
    elif number is not None and 0 < number < 1:
        draft.put(setting, 0, steps)
        draft.note(
            steps, f"{setting} counts optimizer steps, and has no share of them: {what} at the end of the stage alone."
        )
    else:
        draft.put(setting, 0 if number is None else int(number), steps, strategy)


def put_rhythm(draft: Draft) -> None:
    """Logging, checkpoints and evaluation, in optimizer steps."""
    if draft.value("logging_strategy") in ("steps", None) and draft.number("logging_steps") >= 1:
        draft.put("trainer.log_every", int(draft.number("logging_steps")), "logging_steps", "logging_strategy")
    else:
        draft.note("logging_steps", "trainer.log_every counts optimizer steps: every one is logged.")
        draft.seen.add("logging_strategy")
    _every(draft, "trainer.save_every", "save_strategy", "save_steps", "a checkpoint is saved")
    if draft.gives("save_total_limit") and draft.whole("save_total_limit") > 0:
        draft.put("trainer.keep_checkpoints", draft.whole("save_total_limit"), "save_total_limit")
    strategy = "evaluation_strategy" if draft.gives("evaluation_strategy") else "eval_strategy"
    _every(draft, "trainer.eval_every", strategy, "eval_steps", "held-out pairs are measured")


def put_tracking(draft: Draft) -> None:
    """With what a run is tracked, as far as this package knows it."""
    value = draft.value("report_to")
    targets = [str(target) for target in (value if isinstance(value, list) else [value or "none"])]
    draft.seen.update(("report_to", "run_name"))
    known = ["wandb"] if "all" in targets else [target for target in targets if target in TRACKER_PACKAGES]
    draft.choose("tracking", known[0] if known else "none", "report_to")
    if len(known) > 1:
        draft.put("tracking.to", known, "report_to")
    if draft.gives("run_name"):
        if known:
            draft.put("tracking.name", draft.text("run_name"), "run_name")
        else:
            draft.note("run_name", "A run that is not tracked has no name.")
    others = [target for target in targets if target not in (*known, "all", "none")]
    if others:
        draft.note("report_to", f"tracking.to has no {' and no '.join(others)}, so nothing is sent there.")


def put_precision(draft: Draft, dtype: str | None) -> None:
    """The dtype of weights and compute; `auto` is bfloat16 on a GPU that has it, and float16 on another."""
    draft.seen.update(("bf16", "fp16"))
    named = "" if dtype is None else str(draft.value(dtype) or "")
    if draft.flag("fp16") or named in ("float16", "fp16"):
        draft.note(
            "fp16" if draft.flag("fp16") else str(dtype),
            "model.dtype=auto is bfloat16 where the GPU computes in it, else float16, with a loss scaler.",
        )
        value = "auto"
    elif named == "bfloat16":
        value = "bfloat16"
    else:
        value = "float32" if draft.gives("bf16") and not draft.flag("bf16") else "auto"
    keys = [key for key in ("bf16", dtype) if key is not None]
    draft.put("model.dtype", value, *keys)
    draft.note(
        "bf16" if draft.gives("bf16") or dtype is None else dtype,
        "Weights and products have one dtype, model.dtype; adapters are in float32, and weights that train in 16 bits "
        "have a float32 copy (optim.master_weights).",
    )


def put_attention(draft: Draft, key: str, name: str) -> None:
    """The attention, by transformers' name."""
    draft.put("model.attention", _ATTENTION.get(name, "auto"), key)
    if name not in _ATTENTION and name != "auto":
        draft.note(key, f"{name} is not among sdpa, eager and flash_attention_2: model.attention=auto chooses.")


def put_ranks(draft: Draft, *keys: str) -> None:
    """DeepSpeed and FSDP, which ranks with whole or shared bases stand for."""
    for key in keys:
        if draft.value(key):
            draft.note(
                key,
                "trainer.devices says how many GPUs share a step, and trainer.shard whether a machine's share one "
                "base; "
                "both give the numbers of one GPU.",
            )


def put_held_out(draft: Draft, key: str, share: float) -> None:
    """Held-out rows set aside from the training rows: a number, or a share of them."""
    rows = draft.around.rows
    if share >= 1:
        size = int(share)
    elif rows is not None:
        size = round(share * rows)
    else:
        size = HELD_OUT
        draft.note(
            key,
            f"data.eval_size is a number of rows, and {share:g} of how many is not known: {size} stands in for it. "
            "Give --rows.",
        )
    draft.put("data.eval_size", size, key)


def put_sources(draft: Draft, sources: Sequence[Mapping[str, object]], *keys: str) -> None:
    """One set as the data, or several as a mixture. Each has the settings of a source under their names here.

    Raises:
        UserError: no set at all.
    """
    require(bool(sources), f"{keys[0]} names no data set.")
    draft.put("data.system", None)
    if len(sources) == 1:
        for name, value in sources[0].items():
            draft.put(f"data.{name}", value, *keys)
        return
    draft.put("data.source", None)
    taken: set[str] = set()
    for source in sources:
        name = source_name(str(source["source"]), taken)
        for key, value in source.items():
            draft.put(f"data.sources.{name}.{key}", value, *keys)


def source_name(source: str, taken: set[str]) -> str:
    """A name for a source of a mixture, which no other one has: the last word of its path."""
    word = source.rstrip("/").rpartition("/")[2].partition(".")[0]
    word = "".join(letter if letter.isalnum() else "_" for letter in word) or "set"
    name, count = word, 2
    while name in taken:
        name, count = f"{word}_{count}", count + 1
    taken.add(name)
    return name


def finish_data(draft: Draft) -> None:
    """What every recipe has: no SFT stage, and questions to the policy only where some are held out."""
    draft.choose("sft", "none")
    held_out = ("data.eval_split", "data.eval_source", "data.eval_size")
    some = any(draft.settings.get(setting) for setting in held_out) or any(
        setting.startswith("data.sources.") and ".eval_" in setting for setting in draft.settings
    )
    if not some:
        draft.put("evaluation.prompts", 0)
