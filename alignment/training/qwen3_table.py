"""The table of plans for the published Qwen3 sizes in the recipes' README."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

from alignment.config.compose import load
from alignment.policy.architecture import build_model
from alignment.training.budget import Plan, describe_checkpointing
from alignment.training.forecast import Machine, plan_stages
from alignment.training.memory import GIB

QWEN3: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "Qwen3-1.7B": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
    "Qwen3-4B": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
    "Qwen3-8B": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
}
"""What the published configurations of the table's models differ in."""
QWEN3_ALIKE = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}
_UNTIED = "Qwen3-8B"
TABLE_LENGTHS = (512, 1024, 2048, 4096)
TABLE_MEMORY = (24, 80)
"""GiB of the GPUs in the table."""
_MARKERS = ("<!-- made by: python -m alignment.plan --table -->", "<!-- end of the table -->")


def qwen3_table() -> str:
    """Plans of QLoRA DPO for the published Qwen3 sizes, as the recipe `dpo_qwen3` has it, in Markdown."""
    recipe = load("recipe=dpo_qwen3", "sft=none")
    lines = [
        "| model | prompt and answer up to | " + " | ".join(f"{size} GiB" for size in TABLE_MEMORY) + " |",
        "|---|---|" + "---|" * len(TABLE_MEMORY),
    ]
    for name, sizes in QWEN3.items():
        config = AutoConfig.for_model("qwen3", **sizes, **QWEN3_ALIKE, tie_word_embeddings=name != _UNTIED)
        model = build_model(config)
        for length in TABLE_LENGTHS:
            cells = []
            for memory in TABLE_MEMORY:
                machine = Machine(f"a GPU of {memory} GiB", "cuda", memory * GIB)
                cells.append(cell(plan_stages(recipe, model, machine, length)["preference"].chosen))
            lines.append(f"| {name} | {length} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(plan: Plan) -> str:
    """A plan in a table: which layers are checkpointed, positions of a pass, GiB."""
    if not plan.fits:
        return "does not fit"
    return f"{describe_checkpointing(plan.checkpoint_every)}, {plan.tokens_per_batch}, {plan.needs.total / GIB:.1f}"


def with_table(text: str, table: str, markers: tuple[str, str] = _MARKERS) -> str:
    """The text with the table between its markers."""
    begin, end = markers
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n\n{table}\n\n{end}{after}"
