"""The families of models that people post-train, tiny: their configurations, and what a loaded policy shows of them.

`python -m tests.helpers.families` writes the table of docs/families.md.
"""

from __future__ import annotations

import math
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from alignment.kernels.linear import is_lora_layer
from alignment.policy.adapter import attach_adapter
from alignment.policy.targets import own_name
from alignment.scoring.layout import FlatLayout, ForkedLayout, SharedLayout
from alignment.scoring.prompt_sharing import choose_layout
from tests.conftest import TINY_SIZES
from tests.helpers.policies import CPU, NF4, adapter, load

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
TABLE = re.compile(r"^\|.*\n(?:\|.*\n)*", re.MULTILINE)
LAYOUTS = {SharedLayout: "shared prompts", ForkedLayout: "forked states", FlatLayout: "one row each"}
COLUMNS = ("family", "`model_type`", "layout", "attention", "in 4 bits", "adapters of `auto`", "special")

SIZES = TINY_SIZES | {
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
_WINDOW = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
_SHARED = {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}


@dataclass(frozen=True)
class Family:
    """A family: its title, `model_type`, what its tiny configuration has beside `SIZES`, and what is special."""

    title: str
    model_type: str
    settings: dict = field(default_factory=dict)
    special: str = ""
    core: bool = False

    def config(self, **changes):
        from transformers import AutoConfig

        return AutoConfig.for_model(self.model_type, **SIZES | self.settings | changes)


FAMILIES = [
    Family("Llama 2 and 3, SmolLM2", "llama", core=True),
    Family(
        "Llama 4 (text)",
        "llama4_text",
        {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 64, "moe_layers": [1]},
        "experts; attention in chunks",
    ),
    Family("Qwen2, Qwen2.5", "qwen2"),
    Family("Qwen3", "qwen3", core=True),
    Family("Qwen3 MoE", "qwen3_moe", _EXPERTS, "experts", core=True),
    Family(
        "Qwen3-Next",
        "qwen3_next",
        _EXPERTS | _LINEAR | {"shared_expert_intermediate_size": 16},
        "a recurrence; experts",
    ),
    Family("Qwen3.5 (text)", "qwen3_5_text", _LINEAR, "a recurrence; a norm with a gate", core=True),
    Family("Gemma 2", "gemma2", {"sliding_window": 16}, "capped scores, which only eager attention has"),
    Family("Gemma 3 (text)", "gemma3_text", _WINDOW),
    Family(
        "Gemma 3n (text)",
        "gemma3n_text",
        {
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "intermediate_size": [64] * 4,
            "vocab_size_per_layer_input": 97,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 4,
            "activation_sparsity_pattern": [0.0] * 4,
        },
        "later layers read the keys of earlier ones",
    ),
    Family(
        "Gemma 4 (text)",
        "gemma4_text",
        {
            "num_hidden_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"],
            "vocab_size_per_layer_input": 97,
            "hidden_size_per_layer_input": 8,
            "global_head_dim": 8,
        },
    ),
    Family("Mistral", "mistral", {"sliding_window": 16}),
    Family("Ministral 3", "ministral3"),
    Family("Mixtral", "mixtral", _EXPERTS, "experts"),
    Family("Phi-3, Phi-4", "phi3", {}, "query, key and value in one layer"),
    Family("OLMo 2", "olmo2"),
    Family("OLMo 3", "olmo3", _WINDOW),
    Family("OLMoE", "olmoe", _EXPERTS, "experts"),
    Family("Granite", "granite", {"logits_scaling": 2.0}),
    Family(
        "Granite 4 (hybrid)",
        "granitemoehybrid",
        _MAMBA | _EXPERTS | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 16},
        "a recurrence; experts",
    ),
    Family(
        "Falcon-H1",
        "falcon_h1",
        _MAMBA | {"mamba_d_ssm": 64, "lm_head_multiplier": 0.5},
        "a recurrence beside attention",
        core=True,
    ),
    Family(
        "Nemotron-H",
        "nemotron_h",
        {
            "layers_block_type": ["mamba", "attention", "mlp"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 16,
        },
        "a recurrence",
    ),
    Family("Mamba", "mamba", {"state_size": 4, "time_step_rank": 4}, "a recurrence", core=True),
    Family("Mamba-2", "mamba2", {"num_heads": 8, "state_size": 8, "n_groups": 1, "chunk_size": 16}, "a recurrence"),
    Family(
        "Jamba",
        "jamba",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
        "a recurrence; experts",
    ),
    Family("Bamba", "bamba", _MAMBA | {"attn_layer_indices": [1]}, "a recurrence"),
    Family(
        "LFM2",
        "lfm2",
        {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
        "a convolution over tokens",
    ),
    Family(
        "DeepSeek-V3",
        "deepseek_v3",
        _EXPERTS
        | _SHARED
        | {
            "num_key_value_heads": 4,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "qk_nope_head_dim": 8,
        },
        "latent attention; experts",
    ),
    Family("GLM-4", "glm4", {"partial_rotary_factor": 0.5}),
    Family("GLM-4 MoE", "glm4_moe", _EXPERTS | _SHARED, "experts"),
    Family(
        "gpt-oss",
        "gpt_oss",
        _EXPERTS | _WINDOW,
        "attention sinks, which only eager attention has; experts",
    ),
    Family("SmolLM3", "smollm3", {"no_rope_layers": [1, 0]}, "layers without positions"),
    Family("Cohere 2", "cohere2", _WINDOW),
    Family("EXAONE 4", "exaone4", _WINDOW),
    Family("Seed-OSS", "seed_oss"),
    Family("ERNIE 4.5", "ernie4_5"),
    Family("Hunyuan", "hunyuan_v1_dense"),
]


def write_model(family: Family, folder: Path) -> Path:
    """A random model of the family, saved as checkpoints are."""
    from alignment.policy.architecture import auto_class

    torch.manual_seed(0)
    config = family.config()
    auto_class(config).from_config(config).save_pretrained(folder)
    return folder


def write_chat_model(family: Family, folder: Path) -> Path:
    """A random model of the family that talks, by the tokenizer and the template of `write_tiny_model`."""
    from transformers import AutoTokenizer

    from alignment.policy.architecture import auto_class
    from alignment.policy.tiny_model import write_tiny_model

    write_tiny_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ends = {f"{kind}_token_id": tokenizer.eos_token_id for kind in ("pad", "bos", "eos")}
    config = family.config(vocab_size=len(tokenizer), max_position_embeddings=1024, **ends)
    torch.manual_seed(0)
    auto_class(config).from_config(config).save_pretrained(folder)
    return folder


def policy(folder: Path, targets="auto", quantization=NF4):
    """The model in the folder as a stage would begin with it."""
    return attach_adapter(load(folder, quantization, attention="auto"), adapter(target_modules=[targets]), 0)


def row(family: Family, model: nn.Module, layout) -> tuple[str, ...]:
    """What the table says of a loaded policy."""
    base = model.get_base_model()
    adapted = sorted({own_name(name) for name, module in base.named_modules() if is_lora_layer(module)})
    return (
        family.title,
        f"`{family.model_type}`",
        LAYOUTS[type(layout)],
        base.config._attn_implementation.removeprefix("shared_prompts_"),
        f"{100 * quantised_share(base):.0f} %",
        ", ".join(f"`{name}`" for name in adapted),
        family.special,
    )


def quantised_share(model) -> float:
    """The share of the decoder's weights, without embeddings, that are packed into 4 bits."""
    packed = whole = 0
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    for name, parameter in model.get_decoder().named_parameters():
        if "lora_" in name or id(parameter) in embeddings:
            continue
        state = getattr(parameter, "quant_state", None)
        packed += math.prod(state.shape) if state is not None else 0
        whole += math.prod(state.shape) if state is not None else parameter.numel()
    return packed / whole


def table() -> dict[str, str]:
    """The rows of the page, by `model_type`."""
    lines = TABLE.search(PAGE.read_text(encoding="utf-8"))[0].splitlines()
    return {re.search(r"`(\w+)`", line)[1]: line for line in lines[2:]}


def line(cells) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Load every family and write the table into the page."""
    lines = [line(COLUMNS), line(["---"] * len(COLUMNS))]
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            model = policy(write_model(family, Path(folder)))
            lines.append(line(row(family, model, choose_layout(model, CPU))))
    text = PAGE.read_text(encoding="utf-8")
    start, end = TABLE.search(text).span()
    PAGE.write_text(text[:start] + "\n".join(lines) + "\n" + text[end:], encoding="utf-8")
    print(f"Written: {PAGE}")


if __name__ == "__main__":
    main()
