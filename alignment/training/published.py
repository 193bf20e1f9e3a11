"""Published models that have an option of their own in `conf/model`: their sizes, and the table of what each needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from alignment.config.compose import load
from alignment.files import asset_dir, atomic_write_text
from alignment.policy.architecture import build_model
from alignment.policy.layers import decoder_layers
from alignment.training.forecast import Machine, plan_stages
from alignment.training.layer_memory import layer_weights
from alignment.training.memory import GIB
from alignment.training.qwen3_table import QWEN3, QWEN3_ALIKE, TABLE_MEMORY, cell, qwen3_table, with_table

MARKERS = ("<!-- models, made by: python -m alignment.plan --table -->", "<!-- end of the models -->")
_LENGTH = 2048
"""Tokens of a prompt with its answer in the table."""


@dataclass(frozen=True, slots=True)
class Published:
    """A published model.

    Attributes:
        option: its name in `conf/model`.
        title: what people call it.
        recipe: which trains it.
        model_type: of its language model, as transformers names it.
        sizes: in which its configuration differs from that type's defaults.
        settings: what the recipe needs beside the option.
    """

    option: str
    title: str
    recipe: str
    model_type: str
    sizes: dict[str, Any]
    settings: tuple[str, ...] = ()


def _sizes(hidden: int, wide: int, layers: int, heads: int, keys: int, vocabulary: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "vocab_size": vocabulary,
        **more,
    }


def _qwen3(option: str, title: str, tied: bool = True) -> Published:
    return Published(option, title, "dpo_qwen3", "qwen3", QWEN3[title] | QWEN3_ALIKE | {"tie_word_embeddings": tied})


_ATTENTION = "adapter.target_modules=[q_proj,k_proj,v_proj,o_proj]"
"""For mixtures of experts: an adapter for each expert would be larger than what it adapts is worth."""

PUBLISHED = (
    _qwen3("qwen3_0p6b_base", "Qwen3-0.6B"),
    _qwen3("qwen3_1p7b_base", "Qwen3-1.7B"),
    _qwen3("qwen3_4b_base", "Qwen3-4B"),
    _qwen3("qwen3_8b_base", "Qwen3-8B", tied=False),
    Published(
        "qwen3_30b_a3b_base",
        "Qwen3-30B-A3B",
        "dpo_qwen3",
        "qwen3_moe",
        _sizes(2048, 6144, 48, 32, 4, 151936, head_dim=128, moe_intermediate_size=768, num_experts=128),
        (_ATTENTION,),
    ),
    Published(
        "qwen3p5_4b_base",
        "Qwen3.5-4B",
        "dpo_qwen3",
        "qwen3_5_text",
        _sizes(2560, 9216, 32, 16, 4, 248320, head_dim=256, linear_num_value_heads=32, tie_word_embeddings=True),
    ),
    Published(
        "smollm2_1p7b",
        "SmolLM2-1.7B",
        "dpo_chat",
        "llama",
        _sizes(2048, 8192, 24, 32, 32, 49152, tie_word_embeddings=True),
    ),
    Published(
        "smollm3_3b",
        "SmolLM3-3B",
        "dpo_chat",
        "smollm3",
        _sizes(2048, 11008, 36, 16, 4, 128256, tie_word_embeddings=True),
    ),
    Published(
        "llama3p2_3b",
        "Llama-3.2-3B",
        "dpo_chat",
        "llama",
        _sizes(3072, 8192, 28, 24, 8, 128256, head_dim=128, tie_word_embeddings=True),
    ),
    Published("llama3p1_8b", "Llama-3.1-8B", "dpo_chat", "llama", _sizes(4096, 14336, 32, 32, 8, 128256, head_dim=128)),
    Published(
        "gemma3_1b",
        "Gemma-3-1B",
        "dpo_chat",
        "gemma3_text",
        _sizes(1152, 6912, 26, 4, 1, 262144, head_dim=256, sliding_window=512),
    ),
    Published(
        "falcon_h1_1p5b_instruct",
        "Falcon-H1-1.5B",
        "dpo_mamba",
        "falcon_h1",
        _sizes(
            2048,
            4608,
            24,
            8,
            2,
            65537,
            head_dim=128,
            mamba_rms_norm=True,
            mamba_d_ssm=3072,
            mamba_n_heads=48,
            mamba_d_head=64,
            mamba_d_state=256,
        ),
    ),
    Published(
        "gpt_oss_20b",
        "gpt-oss-20b",
        "dpo_chat",
        "gpt_oss",
        _sizes(2880, 2880, 24, 64, 8, 201088, head_dim=64, num_local_experts=32),
        (_ATTENTION,),
    ),
)
"""From the models' own config.json on the hub."""


def published_config(published: Published, **changes: Any) -> Any:
    """The configuration of its language model, as transformers reads it; `changes` make a smaller one of it."""
    return AutoConfig.for_model(published.model_type, **(published.sizes | changes))


def position_work(model: Any) -> int:
    """The weights that compute one position, with its logits: of a mixture's experts those that a position chooses."""
    config = model.config.get_text_config()
    experts = getattr(config, "num_experts_per_tok", None) or 0
    layers = sum(layer_weights(layer, experts)[1] for layer in decoder_layers(model))
    return layers + config.vocab_size * config.hidden_size


def models_table() -> str:
    """What each model needs under its recipe, in Markdown."""
    lines = [
        "| `model=` | model | recipe | time | " + " | ".join(f"{size} GiB" for size in TABLE_MEMORY) + " |",
        "|---|---|---|---|" + "---|" * len(TABLE_MEMORY),
    ]
    own = {recipe: load(f"recipe={recipe}").model.name for recipe in {p.recipe for p in PUBLISHED}}
    recipes = [load(f"recipe={p.recipe}", f"model={p.option}", *p.settings, "sft=none") for p in PUBLISHED]
    models = [build_model(published_config(published)) for published in PUBLISHED]
    work = {recipe.model.name: position_work(model) for recipe, model in zip(recipes, models, strict=True)}
    for published, recipe, model in zip(PUBLISHED, recipes, models, strict=True):
        cells = [f"{work[recipe.model.name] / work[own[published.recipe]]:.1f}"]
        for memory in TABLE_MEMORY:
            machine = Machine(f"a GPU of {memory} GiB", "cuda", memory * GIB)
            cells.append(cell(plan_stages(recipe, model, machine, _LENGTH)["preference"].chosen))
        row = (f"`{published.option}`", published.title, " ".join([published.recipe, *published.settings]), *cells)
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


SIZE_MARKERS = ("<!-- sizes, made by: python -m alignment.plan --table -->", "<!-- end of the sizes -->")
_SIZES = (8, 16, 24, 48, 80)
"""GiB of the GPUs in the table of sizes."""
_LARGER = {
    "Qwen3-14B": {"hidden_size": 5120, "intermediate_size": 17408, "num_hidden_layers": 40, "num_attention_heads": 40},
    "Qwen3-32B": {"hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64},
}
_METHODS = {
    "QLoRA, nothing recomputed": (),
    "QLoRA": (),
    "LoRA on 16 bits": ("quantization=none",),
    "all weights": ("quantization=none", "adapter=none"),
}


def sizes_table() -> str:
    """The largest Qwen3 that fits a GPU, by how it is trained, in Markdown."""
    models = {
        name: build_model(AutoConfig.for_model("qwen3", **sizes, **QWEN3_ALIKE, tie_word_embeddings=index < 3))
        for index, (name, sizes) in enumerate((QWEN3 | _LARGER).items())
    }
    recipes = {name: load("recipe=dpo_qwen3", "sft=none", *settings) for name, settings in _METHODS.items()}
    lines = ["| GPU | " + " | ".join(recipes) + " |", "|---|" + "---|" * len(recipes)]
    for memory in _SIZES:
        machine = Machine(f"a GPU of {memory} GiB", "cuda", memory * GIB)
        cells = []
        for name, recipe in recipes.items():
            largest = "none of them"
            for title, model in models.items():
                plan = plan_stages(recipe, model, machine, _LENGTH)["preference"].chosen
                if not plan.fits:
                    break  # nor do the larger ones
                if plan.checkpoint_every == 0 or "nothing" not in name:
                    largest = title
            cells.append(largest)
        lines.append(f"| {memory} GiB | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_tables() -> Path:
    """Make the tables in the recipes' README anew."""
    path = asset_dir("recipes") / "README.md"
    text = with_table(path.read_text(encoding="utf-8"), qwen3_table())
    text = with_table(text, sizes_table(), SIZE_MARKERS)
    atomic_write_text(path, with_table(text, models_table(), MARKERS))
    return path
