"""What quantisers and adapters are worth, on a real model and real text: `make bench-quantization`.

`python -m tests.bench.quantization [--parts errors dpo adapters depth] [--steps N] [--out DIR] [--docs]`; README.md
beside this file says how to read it.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alignment.config.compose import as_plain, compose_node, to_run_config
from alignment.config.registry import register
from alignment.config.schema import RunConfig
from alignment.data.sources.loading import load_rows
from alignment.data.tokens.tokenization import tokenize_groups
from alignment.files import atomic_write_text, cache_dir
from alignment.kernels.allocator import keep_freed_memory
from alignment.policy.adapter import attach_adapter
from alignment.policy.load import load_base, load_tokenizer
from alignment.policy.quantize import plain_weight
from alignment.policy.source import model_source
from alignment.runs.record import machine, named, versions
from alignment.scoring.layout import FlatLayout
from alignment.scoring.logps import join_scores, score_groups
from alignment.types import Group
from tests.bench.against_trl import BUNDLED, REAL_DATA, RESULTS
from tests.bench.job import ROOT

CPU = torch.device("cpu")
TEXT, PAIRS = "llamafactory_demo/pairs_en.jsonl", "pandalm_human/pairs.jsonl"
QUANTISERS = {
    "float32": ("quantization=none",),
    "NF4": ("quantization=nf4", "quantization.double=false"),
    "NF4, double": ("quantization=nf4",),
    "ICQ by entropy": ("quantization=icq", "quantization.calibration=entropy"),
    "ICQ by MSE": ("quantization=icq", "quantization.calibration=mse"),
}
PLAIN, BASE = "float32", "NF4, double"
"""What errors and drift are measured from, and what gains are measured against."""
ADAPTERS = {
    "LoRA": (),
    "rsLoRA": ("adapter.rslora=true",),
    "DoRA": ("adapter=dora",),
    "PiSSA": ("adapter=pissa",),
    "LoRA+": ("adapter=lora_plus",),
    "A = 0": ("adapter.init=zero_a",),
    "IEC": ("adapter.iec=true",),
    "Spectrum, 25 %": ("spectrum=0.25",),
}
SEEDS = (0, 1)
DOCS = ROOT / "docs" / "quantisers.md"
MARKERS = ("<!-- benchmark: make bench-quantization -->", "<!-- end of the benchmark -->")

Rows = dict[str, dict[str, float]]


def source(name: str) -> str:
    """Real data beside the checkout, or else the bundled ones."""
    path = REAL_DATA / name
    return str(path) if path.is_file() else BUNDLED


def config_of(*overrides: str, data: str = PAIRS, model: str | None = None) -> RunConfig:
    """A run of the benchmark: DPO without SFT, nothing tracked, nothing sampled."""
    register()
    return to_run_config(_node(*overrides, data=data, model=model))


def _node(*overrides: str, data: str, model: str | None) -> Any:
    found = source(data)
    held_out = () if found == BUNDLED else ("data.eval_size=64",)
    return compose_node(
        [
            "recipe=quickstart", "sft=none", "tracking=none", "device=cpu", f"data.source={found}", *held_out,
            "data.system=null", "data.limit=null", "data.eval_limit=64", "data.max_length=256",
            "data.max_prompt_length=192", "trainer.groups_per_step=4", "trainer.save_every=0", "evaluation.prompts=0",
            "evaluation.judge=none", "evaluation.kl_prompts=0", *((f"model.name={model}",) if model else ()),
            *overrides,
        ]
    )  # fmt: skip


# Errors of the quantisers


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that a quantiser packs."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


def bits_per_weight(layers: Sequence[nn.Linear]) -> float:
    """Of packed weights, scales and constants; not the maps of codes, which are the same for all."""
    bits, weights = 0, 0
    for layer in layers:
        state = getattr(layer.weight, "quant_state", None)
        if state is None:
            parts = [layer.weight]
        else:
            inner = state.state2
            parts = [layer.weight, state.absmax, *([inner.absmax, state.offset] if inner is not None else [])]
            parts += list(layer.buffers())
        bits += sum(8 * part.numel() * part.element_size() for part in parts)
        weights += layer.in_features * layer.out_features
    return bits / weights


def _tokens(group: Group) -> torch.Tensor:
    """(1, tokens): the prompt with its only answer."""
    return torch.cat([torch.from_numpy(part).long() for part in (group.prompt, *group.completions)])[None]


@torch.no_grad()
def layer_inputs(model: nn.Module, text: Group) -> dict[str, torch.Tensor]:
    """What each linear layer is given for one text: (tokens, in)."""
    inputs, hooks = {}, []
    for name, layer in linear_layers(model).items():
        note = lambda _, args, name=name: inputs.__setitem__(name, args[0].flatten(0, -2).clone())  # noqa: E731
        hooks.append(layer.register_forward_pre_hook(note))
    model(input_ids=_tokens(text))
    for hook in hooks:
        hook.remove()
    return inputs


@torch.no_grad()
def layer_errors(model: nn.Module, plain: nn.Module, inputs: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Means over the layers of the relative squared error of weights and of outputs."""
    weights, outputs = [], []
    exact = linear_layers(plain)
    for name, layer in linear_layers(model).items():
        weight = exact[name].weight
        error = plain_weight(layer) - weight
        weights.append((error.square().sum() / weight.square().sum()).item())
        x = inputs[name]
        outputs.append(((x @ error.T).square().sum() / (x @ weight.T).square().sum()).item())
    return {"weight_error": statistics.mean(weights), "output_error": statistics.mean(outputs)}


def texts(config: RunConfig, count: int) -> list[Group]:
    """Held-out prompts with their better answers."""
    assert config.data is not None
    found = model_source(config.model, cache_dir(None))
    rows = load_rows(config.data, stage="preference").train[:count]
    groups = tokenize_groups(rows, load_tokenizer(config.model, found.tokenizer), config.data).groups
    return [replace(group, completions=group.completions[:1], scores=None) for group in groups]


def measure_errors(count: int, model: str | None) -> Rows:
    """Bytes, errors, perplexity, drift and time of each quantiser."""
    found: Rows = {}
    groups = texts(config_of(data=TEXT, model=model), count)
    plain: Any = None
    inputs: dict[str, torch.Tensor] = {}
    exact = torch.zeros(0)
    with tempfile.TemporaryDirectory() as fresh:
        for name, overrides in QUANTISERS.items():
            config = config_of(*overrides, data=TEXT, model=model)
            base = model_source(config.model, cache_dir(None)).base
            seconds = []
            for _ in range(2 if config.quantization is not None else 1):  # the second time from the cache
                started = time.perf_counter()
                policy: Any = load_base(config.model, config.quantization, base, CPU, Path(fresh))
                seconds.append(time.perf_counter() - started)
            row = {"bits_per_weight": bits_per_weight(list(linear_layers(policy).values()))}
            if name == PLAIN:
                plain, inputs = policy, layer_inputs(policy, max(groups, key=lambda g: len(g.completions[0])))
            row |= layer_errors(policy, plain, inputs)
            row["load_seconds"], row["search_seconds"] = seconds[-1], max(0.0, seconds[0] - seconds[-1])

            # An adapter without effect, so that the layers run as they do in training
            started = time.perf_counter()
            logps = scored(attach_adapter(policy, config.adapter, 0), groups)
            row["scoring_seconds"] = time.perf_counter() - started
            exact = logps if name == PLAIN else exact
            row["perplexity"] = math.exp(-logps.mean().item())
            row["drift"] = (logps - exact).abs().mean().item()
            row["mean_drift"] = (logps - exact).mean().item()
            found[name] = row
            say(name, row)
            if name != PLAIN:
                del policy
            else:
                plain = load_base(config.model, None, base, CPU)  # without the adapter
    return found


@torch.no_grad()
def scored(model: nn.Module, groups: Sequence[Group]) -> torch.Tensor:
    """Log-probs of all tokens of the answers."""
    return join_scores(groups, list(score_groups(model.eval(), groups, FlatLayout(), 1024, CPU))).values


# Trainings


def train(overrides: Sequence[str], seed: int, steps: int, cache: Path, model: str | None) -> dict[str, float]:
    """DPO on the pairs; what the held-out pairs say at the end, and how fast it was."""
    from alignment.stages.chain import Chain

    settings = (*overrides, f"seed={seed}", f"trainer.max_steps={steps}", f"reference.path={cache}", "optim.lr=2e-4")
    register()
    node = _node(*settings, data=PAIRS, model=model)
    with tempfile.TemporaryDirectory() as folder:
        chain = Chain(to_run_config(node), Path(folder), "quickstart", as_plain(node))
        summary = chain.run()
        kept = Path(folder) / "spectrum.json"
        lowest = _lowest_layer(json.loads(kept.read_text())["content"]["modules"]) if kept.exists() else 0
    stage = summary["stages"]["preference"]
    metrics = stage["metrics"]
    return {
        "loss": metrics["eval/loss"],
        "accuracy": metrics["eval/rewards/accuracies"],
        "margin": metrics["eval/nats/margins"],
        "tokens_per_second": stage["tokens_per_second"],
        "start_loss": stage["start"]["loss"],
        "lowest_layer": lowest,
    }


def _lowest_layer(modules: Mapping[str, Any]) -> int:
    """Of the modules that train, by the first number in their names."""
    return min(int(part) for n, m in modules.items() if m["trains"] for part in n.split(".") if part.isdigit())


def measure_trainings(
    variants: Mapping[str, Sequence[str]],
    steps: int,
    seeds: Sequence[int],
    model: str | None,
    found: dict[str, list[dict[str, float]]],
) -> Iterator[None]:
    """Of each variant a training with each seed, in turns; the reference and what is searched are shared.

    `found` grows by one result before each yield. What it has already is not measured again.
    """
    cache = cache_dir(None)
    for number, seed in enumerate(seeds):
        for name, overrides in variants.items():
            if len(found.get(name, ())) > number:
                continue
            result = train(overrides, seed, steps, cache, model)
            found.setdefault(name, []).append(result)
            say(f"{name}, seed {seed}", result)
            yield


def measure_depth(model: str | None, count: int = 4, rounds: int = 4) -> Rows:
    """Time of forward and backward with adapters on the upper layers only; the depths take turns, the least counts."""
    config = config_of(data=TEXT, model=model)
    assert config.adapter is not None
    base = model_source(config.model, cache_dir(None)).base
    groups = texts(config, count)
    plain: Any = load_base(config.model, None, base, CPU)
    policies = {}
    for lowest in (0, plain.config.num_hidden_layers // 3, 2 * plain.config.num_hidden_layers // 3):
        found = [n for n in linear_layers(plain) if any(p.isdigit() and int(p) >= lowest for p in n.split("."))]
        adapter = replace(config.adapter, target_modules=found)
        policies[f"from layer {lowest} on"] = attach_adapter(load_base(config.model, None, base, CPU), adapter, 0)
    seconds: dict[str, list[float]] = {name: [] for name in policies}
    for _ in range(rounds):
        for name, policy in policies.items():
            started = time.perf_counter()
            for group in groups:
                ids = _tokens(group)
                policy(input_ids=ids, labels=ids).loss.backward()
            seconds[name].append(time.perf_counter() - started)
    return {name: {"seconds": min(values)} for name, values in seconds.items()}


def say(name: str, row: Mapping[str, float]) -> None:
    """Progress."""
    print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in row.items()), file=sys.stderr, flush=True)


# Tables


ERROR_COLUMNS = {
    "bits a weight": ("bits_per_weight", ".3f"),
    "weight error": ("weight_error", ".2e"),
    "output error": ("output_error", ".2e"),
    "perplexity": ("perplexity", ".3f"),
    "drift, nats a token": ("drift", ".4f"),
    "search, s": ("search_seconds", ".1f"),
    "load, s": ("load_seconds", ".1f"),
    "scoring, s": ("scoring_seconds", ".1f"),
}
TRAINING_COLUMNS = {
    "held-out loss": ("loss", ".4f"),
    "accuracy": ("accuracy", ".3f"),
    "margin, nats": ("margin", ".2f"),
    "tokens / s": ("tokens_per_second", ",.0f"),
}


def error_table(found: Rows) -> list[str]:
    """A row per quantiser."""
    lines = _head("quantiser", list(ERROR_COLUMNS))
    for name, row in found.items():
        lines.append(_line(name, [format(row[key], style) for key, style in ERROR_COLUMNS.values()]))
    return lines


def training_table(first: str, found: Mapping[str, Sequence[Mapping[str, float]]]) -> list[str]:
    """A row per variant: the mean over the seeds, and in brackets each of them."""
    lines = _head(first, list(TRAINING_COLUMNS))
    for name, runs in found.items():
        cells = []
        for key, style in TRAINING_COLUMNS.values():
            values = [run[key] for run in runs]
            cells.append(f"{statistics.mean(values):{style}} ({', '.join(format(v, style) for v in values)})")
        lines.append(_line(name, cells))
    return lines


def depth_table(found: Rows) -> list[str]:
    """A row per depth, with the share of the time of the first."""
    whole = next(iter(found.values()))["seconds"]
    lines = _head("adapters", ["seconds", "of all layers'"])
    lines += [_line(name, [f"{row['seconds']:.2f}", f"{row['seconds'] / whole:.0%}"]) for name, row in found.items()]
    return lines


def _head(first: str, names: Sequence[str]) -> list[str]:
    return [_line(first, names), "| --- |" + " ---: |" * len(names)]


def _line(first: str, cells: Sequence[str]) -> str:
    return f"| {' | '.join([first, *cells])} |"


def markdown(result: Mapping[str, Any]) -> str:
    """The tables of everything that was measured."""
    settings = result["settings"]
    parts: list[str] = []
    if "errors" in result:
        parts += ["The quantisers:", "", *error_table(result["errors"]), ""]
    seeds = len(settings["seeds"])
    said = f"DPO, {settings['steps']} steps of 4 pairs, {seeds} seeds: their mean, and each of them"
    if "dpo" in result:
        parts += [f"{said}, on each quantiser:", "", *training_table("quantiser", result["dpo"]), ""]
    if "adapters" in result:
        parts += [f"{said}, with each adapter on float32:", "", *training_table("adapter", result["adapters"]), ""]
    if "depth" in result:
        parts += [
            "Forward and backward, where the lower layers have no adapters:",
            "",
            *depth_table(result["depth"]),
            "",
        ]
    facts = result["machine"]
    libraries = ", ".join(f"{n} {result['versions'][n]}" for n in ("torch", "bitsandbytes", "peft"))
    parts += [
        f"{result['date']}, {named(facts)}, {facts['cores']} cores; {libraries}. {result['minutes']:.0f} minutes."
    ]
    return "\n".join(parts) + "\n"


def put_into_docs(text: str, page: Path = DOCS, markers: tuple[str, str] = MARKERS) -> None:
    """Replace the tables between the markers of the page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(markers[0])
    after = rest.partition(markers[1])[2]
    page.write_text(f"{before}{markers[0]}\n\n{text}\n{markers[1]}{after}", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is asked for, and write quantization.json and quantization.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    every = ("errors", "dpo", "adapters", "depth")
    parser.add_argument("--parts", nargs="+", choices=every, default=every)
    parser.add_argument("--steps", type=int, default=24, help="optimizer steps of a training")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--texts", type=int, default=64, help="answers whose perplexity is measured")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these quantisers or adapters alone")
    parser.add_argument("--adapter", nargs="+", action="append", metavar="WORD", default=[], help="NAME OVERRIDE ...")
    parser.add_argument("--model", help="instead of the one in the wheel")
    parser.add_argument("--out", type=Path, help="folder of the results; what it has already is not trained again")
    parser.add_argument("--docs", action="store_true", help="also write the tables into docs/quantisers.md")
    arguments = parser.parse_args(argv)
    keep_freed_memory()
    started = time.monotonic()
    today = date.today().isoformat()
    folder = arguments.out or RESULTS / f"{today}-quantization"
    path = folder / "quantization.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"minutes": 0.0}

    def chosen(variants: Mapping[str, Sequence[str]]) -> dict[str, Sequence[str]]:
        return {n: o for n, o in variants.items() if not arguments.only or n in arguments.only}

    settings = {"steps": arguments.steps, "seeds": list(arguments.seeds)}
    if result.get("settings") != settings:  # other trainings than these
        result = {key: value for key, value in result.items() if key not in ("dpo", "adapters")}
    minutes = result["minutes"]

    def keep() -> None:
        spent = minutes + (time.monotonic() - started) / 60
        result.update(settings=settings, date=today, machine=machine(), versions=versions(), minutes=spent)
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, json.dumps(result, indent=1))

    adapters = ADAPTERS | {name: tuple(overrides) for name, *overrides in arguments.adapter}
    trainings = {"dpo": chosen(QUANTISERS), "adapters": chosen(adapters)}
    for part in arguments.parts:
        if part == "errors":
            result[part] = measure_errors(arguments.texts, arguments.model)
        elif part == "depth":
            result[part] = measure_depth(arguments.model)
        else:
            measured = result.setdefault(part, {})
            for _ in measure_trainings(trainings[part], arguments.steps, arguments.seeds, arguments.model, measured):
                keep()
    keep()
    text = markdown(result)
    (folder / "quantization.md").write_text(text)
    if arguments.docs:
        put_into_docs(text)
    print(text)


if __name__ == "__main__":
    main()
