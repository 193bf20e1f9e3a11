"""The model card: all that it says is from the files of the run."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined

from alignment.config.places import BUNDLED_PREFIX, is_on_hub
from alignment.losses import LOSSES
from alignment.losses import title as loss_title
from alignment.publishing.contents import MERGED, RECIPE, REPORT, Upload, sources_of
from alignment.publishing.paths import is_local, without_paths
from alignment.runs.cautions import cautions
from alignment.runs.folder import RunFiles, dig, loss_name, submapping
from alignment.runs.record import STAGES
from alignment.runs.report import ABOUT_EVALUATION, evaluation_table, settings_and_data
from alignment.runs.text import DASH, escape_markdown, format_value, is_number, markdown_table, short_hash

_TITLES = {"sft": "SFT", "preference": "preference"}
_OURS = "apache-2.0"
"""The license of what this package brings."""

_ADAPTER = """\
from peft import PeftModel
from transformers import {model}, AutoTokenizer{quantised}

tokenizer = AutoTokenizer.from_pretrained({name})
base = {model}.from_pretrained({base}{settings}, dtype="auto", device_map="auto")
model = PeftModel.from_pretrained(base, {name}).eval()"""
_WHOLE = """\
from transformers import {model}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({name})
model = {model}.from_pretrained({name}, dtype="auto", device_map="auto").eval()"""
_ASKED = """

messages = [{turns}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
answer = model.generate(**inputs.to(model.device), max_new_tokens=200)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""
_SCORED = """

messages = [{"role": "user", "content": "Why is the sky blue?"}, {"role": "assistant", "content": "It scatters."}]
inputs = tokenizer.apply_chat_template(messages, return_dict=True, return_tensors="pt")
print(model(**inputs.to(model.device)).logits[0, 0])"""


@dataclass(frozen=True, slots=True)
class Licenses:
    """What is known of licenses, by the hub's names for them.

    Attributes:
        own: of what goes up; None if nobody has said.
        base: of the base model.
        data: of data sets, by their names.
    """

    own: str | None
    base: str | None
    data: Mapping[str, str | None]


def trained_on(run: RunFiles) -> dict[str, list[str]]:
    """The names of the training data of each stage."""
    found = {"sft": sources_of(dig(run.config, "sft", "data"))}
    if run.config.get("loss") is not None:
        found["preference"] = sources_of(run.config.get("data"))
    return {stage: names for stage, names in found.items() if names and submapping(run.summary, "data", stage)}


def is_reward_model(run: RunFiles) -> bool:
    """Whether the run has trained a model that gives rewards and writes nothing."""
    kind = LOSSES.get(loss_name(run.summary))
    return kind is not None and kind.reads_rewards


def model_card(
    run: RunFiles, repo: str, base: str | None, uploads: Sequence[Upload], licenses: Licenses, is_adapter: bool
) -> Upload:
    """The card of a run.

    Args:
        repo: where it goes.
        base: hub id of the base; None if it has none.
        uploads: what goes up beside it.
        is_adapter: whether the policy is an adapter rather than a whole model.
    """
    names = {upload.name for upload in uploads}
    has_merged = any(name.startswith(f"{MERGED}/") for name in names)
    header, rows = evaluation_table(run.summary, run.metrics)
    # Jinja has the metadata as a text of its own: no text of the run is read as a template
    template = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    text = template.from_string((Path(__file__).with_name("card.md.j2")).read_text("utf-8")).render(
        card_data=_metadata(run, repo, base, licenses, is_adapter).to_yaml(),
        name=escape_markdown(repo.rpartition("/")[2]),
        what=_what(run, base),
        cautions=[_escaped(caution.text) for caution in cautions(run)],
        notes=_notes(run, base, has_merged, is_adapter),
        code=_code(run, repo, base, is_adapter),
        results=markdown_table([escape_markdown(cell) for cell in header], rows) if rows else "",
        about_results=ABOUT_EVALUATION,
        loss=_loss(run),
        facts=markdown_table(["", ""], [(name, without_paths(str(value))) for name, value in settings_and_data(run)]),
        data=_data(run, licenses),
        license=_license(licenses, base),
        files=_files(names, has_merged, is_adapter),
        tracked=_tracked(run),
    )
    return Upload("README.md", ModelCard(text).content.encode("utf-8", "replace"))


def _escaped(text: str) -> str:
    return escape_markdown(without_paths(text))


def _metadata(run: RunFiles, repo: str, base: str | None, licenses: Licenses, is_adapter: bool) -> ModelCardData:
    on_hub = [name for names in trained_on(run).values() for name in names if is_on_hub(name)]
    reward, loss = is_reward_model(run), loss_name(run.summary)
    has_loss = bool(submapping(run.summary, "stages", "preference"))
    tags = [
        *(["reward-model"] if reward else []),
        *([loss.replace("_", "-")] if has_loss else []),
        *(["sft"] if submapping(run.summary, "stages", "sft") else []),
        *([str(dig(run.config, "adapter", "kind"))] if is_adapter else []),
        "preference-alignment",
    ]
    return ModelCardData(
        base_model=base,
        datasets=list(dict.fromkeys(on_hub)) or None,
        license=licenses.own,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-classification" if reward else "text-generation",
        tags=tags,
        model_name=repo.rpartition("/")[2],
        eval_results=_results(run) or None,
    )


def _results(run: RunFiles) -> list[EvalResult]:
    """The measured numbers that mean something without the run: shares, and what a judge has found."""
    summary, final = run.summary, submapping(run.summary, "stages", "preference", "metrics")
    names = trained_on(run)
    given = next(iter(names.get("preference") or names.get("sft") or ["-"]))
    name = without_paths(given) if not is_local(given) else given.rstrip("/").rpartition("/")[2]
    kind, judge = (given if is_on_hub(given) else "custom"), dig(summary, "evaluation", "judge", "kind")
    measured: dict[str, tuple[str, Any]] = {
        "Reward accuracy on held-out pairs": ("accuracy", final.get("eval/rewards/accuracies")),
        "Correct answers": ("accuracy", dig(summary, "evaluation", "answers", "final", "correct")),
    }
    for other, title in (("start", "before training"), ("sft", "after SFT")):
        rate = dig(summary, "evaluation", "win_rate", f"final_vs_{other}", "rate")
        measured[f"Win rate against the model {title}, judge {judge}"] = ("win_rate", rate)
    task = "text-classification" if is_reward_model(run) else "text-generation"
    return [
        EvalResult(
            task_type=task,
            dataset_type=kind,
            dataset_name=f"held-out rows of {name}",
            metric_type=metric,
            metric_name=title,
            metric_value=round(value, 4),
        )
        for title, (metric, value) in measured.items()
        if is_number(value)
    ]


def _what(run: RunFiles, base: str | None) -> str:
    told = base or str(dig(run.config, "model", "name"))
    name = f"[{escape_markdown(told)}](https://huggingface.co/{base})" if base else _name(told)
    stages = [stage for stage in STAGES if submapping(run.summary, "stages", stage)]
    how = " and then ".join(
        "SFT" if s == "sft" else escape_markdown(loss_title(loss_name(run.summary))) for s in stages
    )
    if submapping(run.summary, "merge"):
        how = "merging policies that were trained on it"
    made = "A reward model from" if is_reward_model(run) else "A model from"
    by = f"{made} {name}, by {how or 'training'}, with Alignment {_version(run)}"
    return f"{by}. This card was made from the files of the run."


def _version(run: RunFiles) -> str:
    return escape_markdown(str(dig(run.summary, "versions", "alignment") or ""))


def _name(given: str) -> str:
    """A name of a model or of data for readers: of a path, the last part."""
    return escape_markdown(given.rstrip("/").rpartition("/")[2] if is_local(given) else without_paths(given))


def _notes(run: RunFiles, base: str | None, has_merged: bool, is_adapter: bool) -> list[str]:
    notes = []
    if is_adapter and base is None:
        notes.append(
            f"The base, {_name(str(dig(run.config, 'model', 'name')))}, has no name on the hub: put yours in place of "
            f"`base-model`."
        )
    if is_adapter and run.config.get("quantization") is not None:
        notes.append("The base was in 4 bits (NF4) during training, and so it is here; in 16 bits the numbers differ.")
    if has_merged:
        notes.append(f'The same model, merged into one, is in the folder `{MERGED}`: add `subfolder="{MERGED}"`.')
    return notes


def _code(run: RunFiles, repo: str, base: str | None, is_adapter: bool) -> str:
    reward = is_reward_model(run)
    model = "AutoModelForSequenceClassification" if reward else "AutoModelForCausalLM"
    settings, quantised = ", num_labels=1, pad_token_id=tokenizer.pad_token_id" if reward else "", ""
    if revision := dig(run.config, "model", "revision"):
        settings += f", revision={json.dumps(str(revision))}"
    if run.config.get("quantization") is not None:
        quantised = ", BitsAndBytesConfig"
        double = bool(dig(run.config, "quantization", "double"))
        settings += (
            f', quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", '
            f"bnb_4bit_use_double_quant={double})"
        )
    template = _ADAPTER if is_adapter else _WHOLE
    loading = template.format(
        model=model,
        quantised=quantised,
        base=json.dumps(base or "base-model"),
        settings=settings,
        name=json.dumps(repo),
    )
    if reward:
        return loading + _SCORED
    turns = [{"role": "user", "content": "Why is the sky blue?"}]
    stage = "data" if run.config.get("loss") is not None else "sft"
    system = dig(run.config, "data", "system") if stage == "data" else dig(run.config, "sft", "data", "system")
    if isinstance(system, str) and "`" not in system:
        turns.insert(0, {"role": "system", "content": system})
    return loading + _ASKED.replace("{turns}", ", ".join(json.dumps(turn) for turn in turns))


def _loss(run: RunFiles) -> str:
    """The loss with its settings and papers."""
    name = loss_name(run.summary)
    if not submapping(run.summary, "stages", "preference"):
        return "SFT alone: the cross-entropy of the completions."
    settings = run.config.get("loss") or {}
    parts = dict(settings.get("weights") or {}) if isinstance(settings, Mapping) else {}
    lines = []
    for key in parts or [name]:
        kind = LOSSES.get(str(key))
        share = f", weight {format_value(parts[key])}" if parts else ""
        told = f"{kind.purpose}." if kind is not None else "a loss of its own."
        lines.append(
            f"**{escape_markdown(loss_title(str(key)))}**{share}: {escape_markdown(told)} {_papers(kind)}".strip()
        )
    return "\n\n".join(lines)


def _papers(kind: Any) -> str:
    """The paragraph of a loss's docstring that names its papers, with links."""
    paragraphs = (inspect.getdoc(kind) or "").split("\n\n") if kind is not None else []
    found = next((" ".join(p.split()) for p in paragraphs if re.match(r"Papers?: ", p)), "")
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", escape_markdown(found))


def _data(run: RunFiles, licenses: Licenses) -> str:
    rows = []
    for stage, names in trained_on(run).items():
        info = submapping(run.summary, "data", stage)
        for name in names:
            own = submapping(info, "sources", name)
            count = own.get("train", info.get("train"))
            license = _OURS if name.startswith(BUNDLED_PREFIX) else licenses.data.get(name)
            shown = name.rstrip("/").rpartition("/")[2] if is_local(name) else without_paths(name)
            rows.append(
                [
                    shown,
                    _TITLES[stage],
                    format_value(count),
                    short_hash(info.get("fingerprint") or DASH),
                    license or DASH,
                ]
            )
    header = ["data", "stage", "rows to train on", "fingerprint of the stage", "license"]
    return markdown_table(header, rows)


def _license(licenses: Licenses, base: str | None) -> str:
    told = f"The base's license is {escape_markdown(licenses.base)}. " if licenses.base else ""
    if licenses.own:
        return f"{told}This model: {escape_markdown(licenses.own)}."
    return f"{told}Nobody has stated a license for this model; that of its base, and those of the data, still hold."


def _files(names: set[str], has_merged: bool, is_adapter: bool) -> dict[str, str]:
    weights = "adapter_model.safetensors" if is_adapter else "*.safetensors"
    found = {weights: "the adapter, with its configuration" if is_adapter else "the model, with its configuration"}
    if has_merged:
        found[f"{MERGED}/"] = "base and adapter merged into one model"
    found |= {
        "tokenizer.json": "the tokenizer, with the chat template of the training",
        REPORT: "the report of the run",
        RECIPE: "all settings of the run",
    }
    return {name: what for name, what in found.items() if name in names or name in (weights, f"{MERGED}/")}


def _tracked(run: RunFiles) -> str:
    """The run's address at wandb.ai, which its log has; empty where it was offline, or at a server of your own."""
    path = run.folder / "run.log"
    found = (
        re.findall(r"W&B: (https://wandb\.ai/[\w./-]+)$", path.read_text("utf-8", "replace"), re.MULTILINE)
        if path.exists()
        else []
    )
    return found[-1] if found else ""
