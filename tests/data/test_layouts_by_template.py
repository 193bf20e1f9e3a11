"""Each layout of the field with each kind of chat template: recognised with no setting, and right token by token.

The texts that are expected are written by hand from the templates' published formats, not by the code under test.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignment.config.data import DataConfig
from alignment.data.sources.loading import load_rows
from alignment.data.tokens.tokenization import tokenize_groups, tokenize_sft
from alignment.errors import UserError
from tests.conftest import each
from tests.helpers.chat_templates import CHATML, published

Turn = tuple[str, str]
ASKED: list[Turn] = [("user", "What is 2 + 3?")]
TALK: list[Turn] = [("user", "Hi"), ("assistant", "Hello!"), *ASKED]
BRIEF: list[Turn] = [("system", "Be brief."), *ASKED]


def chatml(turns: list[Turn], answer: str) -> tuple[str, str]:
    text = "".join(f"<|im_start|>{role}\n{said}<|im_end|>\n" for role, said in turns)
    return f"{text}<|im_start|>assistant\n", f"{answer}<|im_end|>"


def qwen3(turns: list[Turn], answer: str) -> tuple[str, str]:
    prompt, completion = chatml(turns, answer)
    return prompt, f"<think>\n\n</think>\n\n{completion}"


def qwen3_without_thoughts(turns: list[Turn], answer: str) -> tuple[str, str]:
    prompt, completion = chatml(turns, answer)
    return f"{prompt}<think>\n\n</think>\n\n", completion


def llama3(turns: list[Turn], answer: str) -> tuple[str, str]:
    text = "".join(f"<|start_header_id|>{role}<|end_header_id|>\n\n{said.strip()}<|eot_id|>" for role, said in turns)
    return f"<s>{text}<|start_header_id|>assistant<|end_header_id|>\n\n", f"{answer.strip()}<|eot_id|>"


def gemma(turns: list[Turn], answer: str) -> tuple[str, str]:
    roles = {"user": "user", "assistant": "model"}
    text = "".join(f"<start_of_turn>{roles[role]}\n{said.strip()}<end_of_turn>\n" for role, said in turns)
    return f"<s>{text}<start_of_turn>model\n", f"{answer.strip()}<end_of_turn>"


def plain(turns: list[Turn], answer: str) -> tuple[str, str]:
    return f"<s>{turns[-1][1]}", f"{answer}</s>"


TEMPLATES: dict[str, tuple[Callable[[list[Turn], str], tuple[str, str]], str | None, dict[str, Any]]] = {
    "Qwen3": (qwen3, published("qwen3"), {}),
    "Qwen3, thinking off": (qwen3_without_thoughts, published("qwen3"), {"enable_thinking": False}),
    "Llama 3": (llama3, published("llama3"), {}),
    "Gemma": (gemma, published("gemma"), {}),
    "ChatML": (chatml, CHATML, {}),
    "none": (plain, None, {}),
}


def messages(turns: list[Turn]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in turns]


def sharegpt(turns: list[Turn]) -> list[dict[str, str]]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[role], "value": text} for role, text in turns]


def dialogue(turns: list[Turn]) -> str:
    return "".join(f"\n\n{'Human' if role == 'user' else 'Assistant'}: {text}" for role, text in turns)


def whole(turns: list[Turn], answer: str) -> list[Turn]:
    return [*turns, ("assistant", answer)]


QUESTION = ASKED[0][1]
LAYOUTS: dict[str, tuple[Any, list[Turn], list[str]]] = {
    "pairs of texts": ({"prompt": QUESTION, "chosen": "5", "rejected": "6"}, ASKED, ["5", "6"]),
    "pairs of messages": (
        {
            "prompt": messages(TALK),
            "chosen": messages([("assistant", "5")]),
            "rejected": messages([("assistant", "6")]),
        },
        TALK,
        ["5", "6"],
    ),
    "UltraFeedback, binarised": (
        {"prompt": QUESTION, "chosen": messages(whole(ASKED, "5")), "rejected": messages(whole(ASKED, "6"))},
        ASKED,
        ["5", "6"],
    ),
    "conversations alone": (
        {"chosen": messages(whole(BRIEF, "5")), "rejected": messages(whole(BRIEF, "6"))},
        BRIEF,
        ["5", "6"],
    ),
    "HH": ({"chosen": dialogue(whole(TALK, "5")), "rejected": dialogue(whole(TALK, "6"))}, TALK, ["5", "6"]),
    "Orca": ({"system": "Be brief.", "question": QUESTION, "chosen": "5", "rejected": "6"}, BRIEF, ["5", "6"]),
    "ShareGPT pairs": (
        {
            "conversations": sharegpt(TALK),
            "chosen": {"from": "gpt", "value": "5"},
            "rejected": {"from": "gpt", "value": "6"},
        },
        TALK,
        ["5", "6"],
    ),
    "ranked lists": ({"prompt": QUESTION, "completions": ["6", "5"], "scores": [1, 2]}, ASKED, ["5", "6"]),
    "UltraFeedback": (
        {
            "instruction": QUESTION,
            "completions": [{"response": "6", "overall_score": 1.5}, {"response": "5", "overall_score": 4}],
        },
        ASKED,
        ["5", "6"],
    ),
    "Nectar": (
        {"prompt": QUESTION, "answers": [{"answer": "6", "rank": 2.0}, {"answer": "5", "rank": 1.0}]},
        ASKED,
        ["5", "6"],
    ),
    "compared pairs": ({"prompt": QUESTION, "response_a": "6", "response_b": "5", "winner": "B"}, ASKED, ["5", "6"]),
    "HelpSteer": (
        {"prompt": QUESTION, "response_1": "5", "response_2": "6", "preference_strength": -2},
        ASKED,
        ["5", "6"],
    ),
    "arena votes": (
        {
            "conversation_a": messages(whole(ASKED, "6")),
            "conversation_b": messages(whole(ASKED, "5")),
            "winner": "model_b",
        },
        ASKED,
        ["5", "6"],
    ),
    "arena lists": (
        {
            "prompt": json.dumps([QUESTION]),
            "response_a": json.dumps(["5"]),
            "response_b": json.dumps(["6"]),
            **{"winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0},
        },
        ASKED,
        ["5", "6"],
    ),
    "Alpaca with a history": (
        {"instruction": QUESTION, "input": "", "chosen": "5", "rejected": "6", "history": [["Hi", "Hello!"]]},
        TALK,
        ["5", "6"],
    ),
    "labelled": ({"prompt": QUESTION, "completion": "5", "label": True}, ASKED, ["5"]),
    "thumbs": ({"question": QUESTION, "answer": "5", "thumbs_up": 1}, ASKED, ["5"]),
    "labelled messages": ({"messages": messages(whole(TALK, "5")), "label": False}, TALK, ["5"]),
}


@pytest.fixture
def tokenizer(tiny: Any) -> Callable[[str | None], Any]:
    """The tiny tokenizer with a template and its special tokens."""

    def make(template: str | None) -> Any:
        tiny.chat_template = template
        own = ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>", "<end_of_turn>"]
        tiny.add_special_tokens({"additional_special_tokens": own})
        return tiny

    return make


def tokens(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("layout", each(LAYOUTS, ("pairs of messages", "compared pairs")))
@pytest.mark.parametrize("template", TEMPLATES)
def test_preferences(
    template: str, layout: str, tokenizer: Any, config: Callable[..., DataConfig], jsonl: Callable[..., Path]
) -> None:
    """Prompt and answers have the tokens of the text as the model's makers publish it, or there is one sentence."""
    by_hand, text, switches = TEMPLATES[template]
    record, turns, answers = LAYOUTS[layout]
    own = tokenizer(text)
    settings = config(jsonl([record]), template_kwargs=switches)
    rows = load_rows(settings, stage="preference").train
    if (text is None and not isinstance(rows[0].prompt, str)) or (template == "Gemma" and turns[0][0] == "system"):
        with pytest.raises(UserError, match=r"has no chat template|System role not supported"):
            tokenize_groups(rows, own, settings)
        return
    (group,) = tokenize_groups(rows, own, settings).groups
    assert group.scored is None and len(group.completions) == len(answers)
    for answer, completion in zip(answers, group.completions, strict=True):
        prompt, right = by_hand(turns, answer)
        assert group.prompt.tolist() + completion.tolist() == tokens(own, prompt + right)
        assert group.prompt.tolist() == tokens(own, prompt)


SFT: dict[str, Any] = {
    "messages": {"messages": messages(whole(TALK, "5"))},
    "ShareGPT": {"conversations": sharegpt(whole(TALK, "5"))},
    "Alpaca with a history": {"instruction": QUESTION, "input": "", "output": "5", "history": [["Hi", "Hello!"]]},
    "prompt and completion": {"prompt": messages(TALK), "completion": messages([("assistant", "5")])},
    "the chosen side": {"chosen": messages(whole(TALK, "5")), "rejected": messages(whole(TALK, "6"))},
}


@pytest.mark.parametrize("layout", each(SFT, ("messages",)))
@pytest.mark.parametrize("template", [name for name in TEMPLATES if name != "none"])
def test_sft(
    template: str, layout: str, tokenizer: Any, config: Callable[..., DataConfig], jsonl: Callable[..., Path]
) -> None:
    """The last answer is scored, the first one too unless Qwen3 writes it otherwise than it would be said."""
    by_hand, text, switches = TEMPLATES[template]
    own = tokenizer(text)
    settings = config(jsonl([SFT[layout]]), template_kwargs=switches)
    (sequence,) = tokenize_sft(load_rows(settings, stage="sft").train, own, settings).sequences
    prompt, right = by_hand(TALK, "5")
    ids, mask = np.array(sequence["input_ids"]), np.array(sequence["completion_mask"], dtype=bool)
    assert ids.tolist() == tokens(own, prompt + right)
    scored = tokens(own, right) if "Qwen3" in template else tokens(own, by_hand(TALK[:1], "Hello!")[1] + right)
    assert ids[mask].tolist() == scored


REAL = {
    "LLaMA-Factory, pairs": "llamafactory_demo/dpo_en_demo.json",
    "LLaMA-Factory, labelled": "llamafactory_demo/kto_en_demo.json",
    "PandaLM": "pandalm_human/testset-v1.json",
}


def real(name: str, record: dict[str, Any]) -> tuple[list[Turn], list[str]]:
    """The turns and the answers of a record, by the description of its set."""
    if name == "PandaLM":
        votes = [record[f"annotator{k}"] for k in (1, 2, 3)]
        first, second = record["response1"], record["response2"]
        answers = [first, second] if votes.count(1) > 1 else [second, first]
        asked = "\n".join(filter(None, (record["instruction"], record["input"])))
        return [("user", asked)], answers
    if name.endswith("labelled"):
        *turns, answer = [(m["role"], m["content"]) for m in record["messages"]]
        return turns, [answer[1]]
    names = {"human": "user", "gpt": "assistant", "system": "system"}
    turns = [(names[m["from"]], m["value"]) for m in record["conversations"]]
    return turns, [record["chosen"]["value"], record["rejected"]["value"]]


@pytest.mark.matrix
@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("template", TEMPLATES)
def test_real_files(
    template: str, name: str, tokenizer: Any, config: Callable[..., DataConfig], tmp_path: Path, shared: Path
) -> None:
    """Forty rows of each set of the field as it is published, those that the tiny vocabulary can write."""
    by_hand, text, switches = TEMPLATES[template]
    own = tokenizer(text)
    known = set(own.get_vocab())

    def writable(record: dict[str, Any]) -> bool:
        if name == "PandaLM" and max([record[f"annotator{k}"] for k in (1, 2, 3)].count(v) for v in (1, 2)) < 2:
            return False
        turns, answers = real(name, record)
        texts = [*(said for _, said in turns), *answers]
        is_alike = all(isinstance(said, str) and said and said == said.strip() for said in texts)  # templates strip
        return is_alike and len(set(answers)) == len(answers) and set("".join(texts)) <= known

    records = [r for r in json.loads((shared / REAL[name]).read_text(encoding="utf-8")) if writable(r)][:40]
    assert len(records) >= 20
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(records))
    settings = config(path, template_kwargs=switches, max_length=60_000, max_prompt_length=30_000, allow=["role_names"])
    rows = load_rows(settings, stage="preference").train
    assert len(rows) == len(records)
    if text is None and not isinstance(rows[0].prompt, str):
        with pytest.raises(UserError, match="has no chat template"):
            tokenize_groups(rows, own, settings)
        return
    data = tokenize_groups(rows, own, settings)
    found = {group.source.rpartition(":")[2]: group for group in data.groups}
    for number, record in enumerate(records, 1):
        turns, answers = real(name, record)
        if template == "Gemma" and turns[0][0] == "system":
            assert str(number) not in found
            continue
        group = found[str(number)]
        for answer, completion in zip(answers, group.completions, strict=True):
            prompt, right = by_hand(turns, answer)
            assert group.prompt.tolist() + completion.tolist() == tokens(own, prompt + right)
