"""Answers by our loop against transformers' `generate`, in turns: the same policy, prompts, settings and batches.

`generate` runs on the layers of transformers and peft, without ours.

`python -m tests.bench.sampling [--prompts 16] [--counts 1 4] [--tokens 32] [--rounds 3]`; prints the table of
tests/bench/PROFILE.md.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alignment.config.compose import load
from alignment.data.preparation.prepare import fit_preferences, read_preferences
from alignment.data.tokens.units import spread_prompts
from alignment.evaluation.sampling.answer import Sampling, stop_tokens
from alignment.evaluation.sampling.draw import draw
from alignment.evaluation.sampling.local import LocalEngine
from alignment.evaluation.sampling.presets import without_presets
from alignment.evaluation.sampling.ways import way_of
from alignment.files import cache_dir
from alignment.kernels.base import original_class
from alignment.policy.adapter import attach_adapter, load_adapter
from alignment.policy.load import load_base, load_tokenizer
from alignment.policy.source import model_source
from alignment.runs.record import machine, named

CPU = torch.device("cpu")


def ours(model: Any, prompts: Sequence[np.ndarray], count: int, how: Sampling, rows: int) -> int:
    """Tokens of the answers."""
    answers = draw(LocalEngine(model, CPU, rows), prompts, count, how)
    return sum(len(answer.tokens) for each in answers for answer in each)


def theirs(model: Any, prompts: Sequence[np.ndarray], count: int, how: Sampling, rows: int) -> int:
    """Tokens of the answers of `generate`, in batches of as many rows, prompts of similar length together."""
    order = sorted(prompts, key=len)
    found = 0
    torch.manual_seed(how.seed)
    for start in range(0, len(order), max(1, rows // count)):
        batch = order[start : start + max(1, rows // count)]
        width = max(map(len, batch))
        ids = torch.full((len(batch), width), how.stops[0], device=model.device)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(batch):
            ids[row, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64)).to(ids)
            mask[row, width - len(prompt) :] = 1
        output = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=True, temperature=how.temperature, top_k=0, top_p=1.0,
            max_new_tokens=how.max_new_tokens, eos_token_id=list(how.stops), pad_token_id=how.stops[0],
            num_return_sequences=count,
        )  # fmt: skip
        for new in output[:, width:].cpu():
            ends = torch.isin(new, torch.tensor(how.stops)).nonzero()
            found += int(ends[0]) + 1 if len(ends) else len(new)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.sampling")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--adapter", type=Path, help="of a stage or a run; else a fresh one, whose answers are long")
    asked = parser.parse_args(argv)

    # The quickstart's policy, with an adapter as in training, and held-out questions
    config = load("recipe=quickstart", "tracking=none", "device=cpu")
    source = model_source(config.model, cache_dir(None))
    tokenizer = load_tokenizer(config.model, source.tokenizer)
    base = load_base(config.model, config.quantization, source.base, CPU)
    saved = asked.adapter
    model: Any = (load_adapter(base, saved) if saved else attach_adapter(base, config.adapter, 0)).eval()
    data, _ = fit_preferences(read_preferences(config.data, tokenizer), config.data, config.loss)
    prompts = [data.eval[i].prompt for i in spread_prompts(data.eval, asked.prompts)]
    how = Sampling(stops=tuple(stop_tokens(tokenizer, [], [])), max_new_tokens=asked.tokens, temperature=1.0, seed=0)
    way_of(model, CPU)
    plain = copy.deepcopy(model)
    for layer in plain.modules():
        layer.__class__ = original_class(layer)

    # In turns; processor time, as others may share the machine
    print(f"{named(machine())}; {torch.get_num_threads()} threads; {len(prompts)} prompts, up to {asked.tokens} tokens")
    print("| answers to a prompt | `generate` | ours | times |\n| ---: | ---: | ---: | ---: |")
    for count in asked.counts:
        rates: dict[Any, list[float]] = {(ours, model): [], (theirs, plain): []}
        with torch.no_grad(), without_presets(model), without_presets(plain):
            for _ in range(asked.rounds):
                for (side, of), found in rates.items():
                    started = time.process_time()
                    tokens = side(of, prompts, count, how, asked.rows)
                    found.append(tokens / (time.process_time() - started))
        own, other = rates.values()
        times = statistics.median(a / b for a, b in zip(own, other, strict=True))
        print(f"| {count} | {statistics.median(other):.1f} | {statistics.median(own):.1f} | {times:.2f} |", flush=True)


if __name__ == "__main__":
    main()
