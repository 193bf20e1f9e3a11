"""What a template does not know is written in its terms: roles, calls of tools, their arguments."""

import pytest

from alignment.data.layouts.recognition import recognise, to_row
from alignment.data.tokens.tokenization import tokenize_groups
from tests.helpers.chat_templates import CHATML, published

TOOLS = '[{"name": "add", "description": "Adds.", "parameters": {"x": "int"}}]'
CALLED = '{"name": "add", "arguments": {"x": 1}}'
TURNS = [
    {"from": "human", "value": "sum?"},
    {"from": "gpt", "value": "I add."},
    {"from": "function_call", "value": CALLED},
    {"from": "observation", "value": "5"},
    {"from": "gpt", "value": "It is 5."},
]


def written(tokenizer, config, template, turns=TURNS, **more):
    """The text of a ShareGPT conversation with a tool, as a labelled row's group holds it."""
    record = {"conversations": turns, "label": True} | more
    row = to_row(record, recognise([record], {}, "preference", "f"), {}, "f", 1)
    tokenizer.chat_template = template
    data = tokenize_groups([row], tokenizer, config())
    assert not [found for found in data.findings if not found.quiet]
    return tokenizer.decode([*data.groups[0].prompt, *data.groups[0].completions[0]])


@pytest.mark.parametrize("text", [False, True])
def test_function_calling_sharegpt(qwen, config, text):
    """A call becomes one that the template writes, with the tools of the row and in the turn before it; else text."""
    if text:
        assert written(qwen, config, CHATML) == (
            "<|im_start|>user\nsum?<|im_end|>\n<|im_start|>assistant\nI add.<|im_end|>\n"
            f"<|im_start|>assistant\n{CALLED}<|im_end|>\n<|im_start|>tool\n5<|im_end|>\n"
            "<|im_start|>assistant\nIt is 5.<|im_end|>"
        )
        return
    found = written(qwen, config, published("qwen2_5"), tools=TOOLS)
    assert found == written(qwen, config, published("qwen2_5"), tools=[TOOLS[1:-1]])  # each as text
    assert f"<tools>\n{TOOLS[1:-1]}\n</tools>" in found
    assert found.endswith(
        "<|im_start|>user\nsum?<|im_end|>\n"
        f"<|im_start|>assistant\nI add.\n<tool_call>\n{CALLED}\n</tool_call><|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n5\n</tool_response><|im_end|>\n<|im_start|>assistant\nIt is 5.<|im_end|>"
    )


def test_arguments_as_text(tiny, config):
    """DeepSeek's template joins them to other text."""
    turns = [TURNS[0], *TURNS[2:]]
    assert '<toolsep>add\n```json\n{"x": 1}\n```' in written(tiny, config, published("deepseekv3"), turns)
