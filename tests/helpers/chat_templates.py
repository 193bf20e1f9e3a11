"""Chat templates, each with a trap of its own, and those of published models that TRL knows."""

import importlib.util
from pathlib import Path


def published(name: str) -> str:
    """The chat template of a published model, or TRL's training variant of it (`<name>_training`)."""
    (trl,) = importlib.util.find_spec("trl").submodule_search_locations
    return (Path(trl) / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def published_names() -> list[str]:
    """All of them that are for text alone."""
    (trl,) = importlib.util.find_spec("trl").submodule_search_locations
    names = sorted(path.stem for path in (Path(trl) / "chat_templates").glob("*.jinja"))
    return [name for name in names if not any(kind in name for kind in ("_vl", "idefics", "llava", "smolvlm"))]


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "<s>{% for m in messages %}<|im_start|>{{ m.role }}\n\n{{ m.content | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
# Qwen3's way: the last answer gets an empty thought, earlier answers lose theirs; thinking off puts it in the prompt.
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# R1's way: generation starts inside a thought, a given answer has none.
R1 = (
    "<s>{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant <think>\n{% endif %}"
)
# Counts the messages in front, so that a long conversation's prompt changes with its answer.
COUNTING = "{% if messages[0].content == 'count' %}{{ messages | length }}{% endif %}" + CHATML
NO_END = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
