"""A chat template for each source of a mixture: tokens, ends of turn, checks, key and names are the source's own."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alignment.config.compose import load
from alignment.config.data import DataConfig, Exhausted, TemplateText
from alignment.data.conversations.ends import ends_of_turn
from alignment.data.inspection.inspection import inspect
from alignment.data.preparation import prepared
from alignment.data.preparation.prepare import fit_preferences, load_conversations, read_preferences
from alignment.data.rows.reasons import UnusableRows
from alignment.errors import UserError
from alignment.policy.chat_templates import settle_template, templates_of, with_templates
from tests.conftest import recommended_loss
from tests.helpers.chat_templates import CHATML, LLAMA3, QWEN3
from tests.helpers.prepared import small_limits

__all__ = ["small_limits"]

# Llama 3's way with an end of turn and a header of its own.
OTHER_END = LLAMA3.replace("<|im_end|>", "</s>")
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>bot {% generation %}{{ m.content }}<|im_end|>"
    "{% endgeneration %}{% else %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>bot {% endif %}"
)
TEMPLATES: dict[str, str | None] = {"chatml": None, "llama": OTHER_END, "marked": MARKED}
"""By the name of a source; None: the tokenizer's own, which is ChatML."""


def own(text: str | None, name: str = "own.jinja") -> TemplateText | None:
    return None if text is None else TemplateText(text, name)


def turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def record(source: str, i: int) -> dict[str, Any]:
    """A pair, every other one of several turns; the row says whose it is."""
    chosen = [turn("assistant", f"yes {i}")]
    if i % 2:
        chosen += [turn("user", f"sure about {i}?"), turn("assistant", "very")]
    return {"prompt": [turn("user", f"{source} {i}")], "chosen": chosen, "rejected": [turn("assistant", "no")]}


@pytest.fixture
def chat(tiny: Any) -> Any:
    """The tiny tokenizer with ChatML."""
    tiny.chat_template = CHATML
    return tiny


@pytest.fixture
def files(jsonl: Any) -> dict[str, Path]:
    return {name: jsonl([record(name, i) for i in range(6)], f"{name}.jsonl") for name in TEMPLATES}


def groups(config: DataConfig, tokenizer: Any) -> list[list[Any]]:
    """The tokens, masks and sources of all training and held-out groups."""
    data, left_out = fit_preferences(read_preferences(config, tokenizer), config, recommended_loss("dpo"))
    assert not left_out
    return [[(group.dataset, group.source, tuple(group.keys())) for group in part] for part in (data.train, data.eval)]


def sequences(config: DataConfig, tokenizer: Any) -> tuple[list[Any], list[Any]]:
    data, left_out = load_conversations(config, tokenizer)
    assert not left_out
    named = [next(name for name in TEMPLATES if f"{name}.jsonl" in source) for source in data.sources]
    train = list(zip(named, map(str, data.train), strict=True))
    return train, list(zip(data.eval_datasets or [""] * 9, map(str, data.eval), strict=False))


@pytest.mark.parametrize("read", [groups, sequences])
def test_a_source_has_the_tokens_of_a_run_with_it_alone_under_its_template(
    read: Callable[..., Any], files: Any, mixture: Any, config: Any, chat: Any
) -> None:
    """Trained and held out, answers of several turns by the template's marks too."""
    sources = {name: {"source": files[name], "eval_size": 2, "chat_template": own(TEMPLATES[name])} for name in files}
    train, held_out = read(mixture(sources), chat)
    for name, template in TEMPLATES.items():
        alone = copy.copy(chat)
        alone.chat_template = template or CHATML
        for mixed, single in zip((train, held_out), read(config(files[name], eval_size=2), alone), strict=True):
            tokens = Counter(one[1:] for one in mixed if one[0] == name)
            assert tokens == Counter(one[1:] for one in single) and tokens
        alone.chat_template = CHATML if template else LLAMA3
        other = {one[1:] for one in read(config(files[name], eval_size=2), alone)[0]}
        assert not other & {one[1:] for one in train}, "another template writes other tokens"


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.permutations(list(TEMPLATES)), st.tuples(*[st.integers(1, 3)] * 3), st.integers(0, 3))
def test_order_weights_and_seed_choose_rows_and_change_no_token(
    files: Any, mixture: Any, chat: Any, order: list[str], weights: tuple[int, ...], seed: int
) -> None:
    """A row has the same tokens in every mixture with its source."""

    def tokens(names: list[str], shares: tuple[int, ...], **fields: Any) -> dict[str, Any]:
        sources = {
            name: {"source": files[name], "chat_template": own(TEMPLATES[name]), "weight": float(share)}
            for name, share in zip(names, shares, strict=True)
        }
        found = groups(mixture(sources, exhausted=Exhausted.repeat, **fields), chat)[0]
        assert {name for name, *_ in found} == set(names)
        return {source: keys for _, source, keys in found}

    assert tokens(order, weights, seed=seed) == tokens(list(TEMPLATES), (1, 1, 1))


def test_answers_may_end_as_any_template_of_the_data_ends_them(files: Any, mixture: Any, chat: Any) -> None:
    """Each end of turn once, in the order of the sources; the tokenizer may lack a template."""
    sources = {name: {"source": files[name], "chat_template": own(TEMPLATES[name])} for name in files}
    ends = chat.convert_tokens_to_ids(["<|im_end|>", "</s>"])
    assert ends_of_turn(chat, mixture(sources)) == ends
    chat.chat_template = None
    assert ends_of_turn(chat, mixture({name: sources[name] for name in ("chatml", "llama")})) == ends[1:]
    assert ends_of_turn(chat, mixture({"chatml": sources["chatml"]})) == []


# A template that cannot serve


NO_PROMPT = CHATML.partition("{% if add")[0]
NO_SYSTEM = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"chat_template": own(NO_PROMPT)},
            r"6 of 6 rows get a header before their answer .*: set data\.sources\.llama\.chat_template to one with",
        ),
        (
            {"chat_template": own(NO_SYSTEM), "system": "Be brief."},
            r"6 of 6 rows hold text .* does not write .*: set data\.sources\.llama\.chat_template to one that does",
        ),
        ({"chat_template": own("{{ nothing.at.all }}")}, r"the chat template refuses it"),
    ],
)
def test_a_template_that_cannot_serve_is_named_by_its_source(
    fields: dict[str, Any], said: str, files: Any, mixture: Any, chat: Any
) -> None:
    """The sentence of a run with this template alone, with the setting of the source."""
    sources = {"chatml": {"source": files["chatml"]}, "llama": {"source": files["llama"], **fields}}
    with pytest.raises((UserError, UnusableRows), match=rf"(?s)^data\.sources\.llama: .*{said}"):
        read_preferences(mixture(sources), chat)


def test_rows_that_a_template_rewrites_are_left_out_with_the_name_of_its_setting(
    files: Any, mixture: Any, chat: Any
) -> None:
    """Those of several turns of this source alone."""
    sources = {name: {"source": files[name]} for name in ("chatml", "llama")}
    sources["llama"]["chat_template"] = own(QWEN3)
    config = mixture(sources)
    data, left_out = fit_preferences(read_preferences(config, chat), config, recommended_loss("dpo"))
    assert Counter(group.dataset for group in data.train) == {"chatml": 6, "llama": 3}
    assert {Path(row.file).name for row in left_out} == {"llama.jsonl"}
    assert all("or another data.sources.llama.chat_template (training: TRL's" in row.message for row in left_out)


def test_the_sft_stage_names_its_own_setting(files: Any, mixture: Any, chat: Any) -> None:
    sources = {"a": {"source": files["chatml"]}, "b": {"source": files["llama"], "chat_template": own(NO_PROMPT)}}
    with pytest.raises(UserError, match=r"^sft\.data\.sources\.b: .*set sft\.data\.sources\.b\.chat_template to"):
        load_conversations(mixture(sources), chat)


def test_the_inspection_of_a_source_says_its_own_setting_too(files: Any, mixture: Any, chat: Any) -> None:
    """Beside the sentence of the run, in the part of the source."""
    sources = {"a": {"source": files["chatml"]}, "b": {"source": files["llama"], "chat_template": own(NO_PROMPT)}}
    first, second = inspect(mixture(sources), chat, recommended_loss("dpo"), views=0)
    said = "set data.sources.b.chat_template to one with a generation prompt"
    assert first.refusal is not None and first.refusal.startswith("data.sources.b: ") and said in first.refusal
    assert second.refusal is not None and second.refusal.startswith("6 of 6 rows") and said in second.refusal


def test_rows_of_messages_and_a_tokenizer_without_a_template(files: Any, mixture: Any, tiny: Any) -> None:
    """A source with a template is written by it; one without is refused as ever."""
    sources = {"a": {"source": files["llama"], "chat_template": own(OTHER_END), "system": "Be brief."}}
    assert "Be brief." in tiny.decode(read_preferences(mixture(sources), tiny).train.groups[0].prompt)
    with pytest.raises(UserError, match=r"^data\.sources\.b: Row .* is a conversation, and the tokenizer has no chat"):
        read_preferences(mixture(sources | {"b": {"source": files["chatml"]}}), tiny)


# The settings


def test_templates_are_read_by_the_names_that_settings_give_them(tmp_path: Path, chat: Any, caplog: Any) -> None:
    """A file, one of the tokenizer's own by its name, or null, which is the model's."""
    chat.chat_template = {"default": CHATML, "tool_use": MARKED}
    (tmp_path / "llama.jinja").write_text(OTHER_END)
    given = (
        f"{{a: a.jsonl, b: {{source: b.jsonl, chat_template: tool_use}}, "
        f"c: {{source: c.jsonl, chat_template: '{tmp_path / 'llama.jinja'}'}}}}"
    )
    config = load("recipe=quickstart", "sft=none", "data.source=null", f"data.sources={given}")
    settle_template(chat, config.model, {})
    assert chat.chat_template == CHATML
    read = with_templates(config, chat, {})
    assert {name: part.chat_template for name, part in read.data.parts.items()} == {
        "a": None,
        "b": MARKED,
        "c": OTHER_END,
    }
    texts = {"model": CHATML, "data.sources.b": MARKED, "data.sources.c": OTHER_END}
    assert templates_of(read, chat) == texts
    (tmp_path / "llama.jinja").unlink()
    assert templates_of(with_templates(config, chat, texts), chat) == texts, "a run goes on with its copy"
    with pytest.raises(
        UserError,
        match=r"^data\.sources\.c\.chat_template: the file .*llama\.jinja does not exist, nor a template of the "
        r"tokenizer, which has default, tool_use\.$",
    ):
        with_templates(config, chat, {})

    # Where no row has the template that is saved with the policy, the log says so
    assert "saved with the policy" not in caplog.text
    sources = {name: config.data.sources[name] for name in ("b",)}
    with_templates(replace(config, data=replace(config.data, sources=sources)), chat, {})
    assert "No row of the last stage is written by the model's chat template, which is saved with" in caplog.text

    # The model's own goes the same way
    gone = replace(config.model, chat_template="gone.jinja")
    settle_template(chat, gone, {"model": LLAMA3})
    assert chat.chat_template == LLAMA3
    with pytest.raises(UserError, match=r"^model\.chat_template: the file gone\.jinja does not exist\.$"):
        settle_template(chat, gone, {})


def test_tokens_are_kept_by_the_text_of_each_template(files: Any, mixture: Any, chat: Any, small_limits: None) -> None:
    """Another text is another key, another name of the same text is not; with a date there is one for each day."""

    def key(template: TemplateText | None, day: date | None = None) -> str | None:
        sources = {"a": {"source": files["chatml"]}, "b": {"source": files["llama"], "chat_template": template}}
        return prepared._key(mixture(sources), "preference", chat, day, "")

    keys = [key(own(text)) for text in (None, OTHER_END, MARKED)]
    assert None not in keys and len(set(keys)) == 3
    assert key(own(MARKED, "elsewhere/same.jinja")) == keys[2]
    days = [date(2026, 3, day) for day in (1, 2)]
    assert len({key(own(MARKED), day) for day in days}) == 1
    assert len({key(own("{{ strftime_now('%Y') }}" + MARKED), day) for day in days}) == 2


def test_each_source_has_its_own_verdict(files: Any, mixture: Any, chat: Any) -> None:
    """What `python -m alignment.data` says of the template, and the tokens that it shows."""
    sources = {name: {"source": files[name], "chat_template": own(TEMPLATES[name], f"{name}.jinja")} for name in files}
    found = {one.source: one for one in inspect(mixture(sources), chat, recommended_loss("dpo"), views=1)}
    verdicts = {name: {trait.name: trait.verdict for trait in one.traits} for name, one in found.items()}
    assert "template" not in verdicts["chatml"]
    assert verdicts["llama"]["template"] == "llama.jinja, in place of the model's"
    assert verdicts["llama"]["EOS"] == "answers end with </s>, the tokenizer's EOS"
    assert verdicts["chatml"]["EOS"] == "answers end with <|im_end|>, and the tokenizer's EOS is </s>"
    shown = ["".join(token.text for token in found[name].views[0].sequences["prompt"]) for name in ("llama", "marked")]
    assert shown == [
        "<s><|im_start|>user\n\nllama 0</s><|im_start|>assistant\n\n",
        "<|im_start|>user marked 0<|im_end|><|im_start|>bot ",
    ]
