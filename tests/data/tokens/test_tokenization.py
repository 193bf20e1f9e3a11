"""Prompt and completion boundaries, end tokens, truncation: by hand on a tiny tokenizer, as properties on Qwen's."""

import json

import numpy as np
import pytest

from alignment.config.data import Keep
from alignment.data.layouts.recognition import recognise, to_row
from alignment.data.rows.row import Row
from alignment.data.tokens.tokenization import tokenize_groups, tokenize_sft
from alignment.errors import UserError
from tests.helpers.chat_templates import CHATML, COUNTING, LLAMA3, NO_END, QWEN3, R1


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


def pair(prompt, chosen, rejected, number=1):
    return Row(prompt, (chosen, rejected), source=f"data.jsonl:{number}")


def chat(prompt, *answers):
    return Row(user(prompt), tuple(assistant(a) for a in answers), source="data.jsonl:1")


def tokens(tokenizer, ids):
    return tokenizer.convert_ids_to_tokens([int(i) for i in ids])


def parts(tokenizer, group):
    return [tokens(tokenizer, group.prompt), *(tokens(tokenizer, c) for c in group.completions)]


@pytest.mark.parametrize(
    ("row", "expected", "seams"),
    [
        (pair("x", "yz", "w"), [["<s>", "x"], ["y", "z", "</s>"], ["w", "</s>"]], 0),
        # "a" and "b" merge in the chosen text only, so both completions begin with the prompt's last character
        (pair("xa", "bz", "cz"), [["<s>", "x"], ["ab", "z", "</s>"], ["a", "c", "z", "</s>"]], 1),
        # the same beginning of both completions is theirs, not the prompt's
        (pair("x", "yz", "yw"), [["<s>", "x"], ["y", "z", "</s>"], ["y", "w", "</s>"]], 0),
        (Row("xa", ("bz",), labels=(True,), source="f:1"), [["<s>", "x"], ["ab", "z", "</s>"]], 1),
        (Row("xa", ("cz",), labels=(True,), source="f:1"), [["<s>", "x", "a"], ["c", "z", "</s>"]], 0),
        # BOS and EOS in the text are not doubled
        (pair("<s>x", "y</s>", "w"), [["<s>", "x"], ["y", "</s>"], ["w", "</s>"]], 0),
        (
            Row("x", ("y", "z", "w"), scores=(3.0, 2.0, 1.0), source="f:1"),
            [["<s>", "x"], ["y", "</s>"], ["z", "</s>"], ["w", "</s>"]],
            0,
        ),
    ],
)
def test_plain_text_by_hand(tiny, config, row, expected, seams):
    data = tokenize_groups([row], tiny, config())
    assert parts(tiny, data.groups[0]) == expected
    assert data.counts["seam_moves"] == seams
    assert data.counts["eos_appended"] == 0  # counted for templates only
    assert (data.groups[0].labels, data.groups[0].scores, data.groups[0].source) == (row.labels, row.scores, row.source)


def test_chatml_by_hand(tiny, config):
    tiny.chat_template = CHATML
    data = tokenize_groups([chat("x", "y", "zz")], tiny, config())
    header = ["<|im_start|>", *"user", "\n", "x", "<|im_end|>", "\n", "<|im_start|>", *"assistant", "\n"]
    # no BOS, since the template writes none; nothing behind the end of turn
    assert parts(tiny, data.groups[0]) == [header, ["y", "<|im_end|>"], ["z", "z", "<|im_end|>"]]


def test_line_breaks_merging_at_the_seam_of_a_template(tiny, config):
    tiny.chat_template = CHATML
    data = tokenize_groups([chat("x", "\ny", "z")], tiny, config())
    prompt, chosen, rejected = parts(tiny, data.groups[0])
    assert (prompt[-1], chosen, rejected) == ("t", ["\n\n", "y", "<|im_end|>"], ["\n", "z", "<|im_end|>"])
    assert data.counts["seam_moves"] == 1


def test_template_with_bos_on_a_tokenizer_that_adds_bos(tiny, config):
    tiny.chat_template = LLAMA3
    (group,) = tokenize_groups([chat("x", "y ", "z")], tiny, config()).groups
    for completion in group.completions:
        sequence = tokens(tiny, [*group.prompt, *completion])
        assert sequence.count("<s>") == 1
        assert sequence[0] == "<s>"
        assert sequence[-1] == "<|im_end|>"
        assert sequence.count("</s>") == 0  # the template's end of turn is the end: no second one behind it
    assert parts(tiny, group)[1:] == [["y", "<|im_end|>"], ["z", "<|im_end|>"]]


def test_template_without_end_of_turn_gets_eos(tiny, config):
    tiny.chat_template = NO_END
    data = tokenize_groups([chat("x", "y", "z")], tiny, config())
    assert parts(tiny, data.groups[0])[1:] == [["y", "\n", "</s>"], ["z", "\n", "</s>"]]
    assert data.counts["eos_appended"] == 2


@pytest.mark.parametrize(("kwargs", "in_prompt"), [({}, False), ({"enable_thinking": False}, True)])
def test_qwen3_thinking_template(tiny, config, kwargs, in_prompt):
    tiny.chat_template = QWEN3
    (group,) = tokenize_groups([chat("x", "y", "z")], tiny, config(template_kwargs=kwargs)).groups
    thought = ["<think>", "\n\n", "</think>", "\n\n"]
    prompt, chosen, rejected = parts(tiny, group)
    if in_prompt:
        assert prompt[-5:] == ["\n", *thought]
        assert (chosen, rejected) == (["y", "<|im_end|>"], ["z", "<|im_end|>"])
    else:
        assert prompt[-2:] == ["t", "\n"]
        assert (chosen, rejected) == ([*thought, "y", "<|im_end|>"], [*thought, "z", "<|im_end|>"])


def test_generation_prompt_that_answers_do_not_have(tiny, config):
    tiny.chat_template = R1
    row = chat("x", "<y", "z")  # "<" is a character of "<think>" too: tokens decide, not characters
    data = tokenize_groups([row], tiny, config())
    assert parts(tiny, data.groups[0]) == [
        ["<s>", "<|im_start|>", *"user", " ", "x", "</s>", "<|im_start|>", *"assistant", " "],
        ["<", "y", "</s>"],
        ["z", "</s>"],
    ]
    assert (data.counts["template_splits"], data.counts["seam_moves"]) == (1, 0)
    (sft,) = tokenize_sft([row], tiny, config()).sequences
    assert tokens(tiny, np.array(sft["input_ids"])[np.array(sft["completion_mask"]) == 1]) == ["<", "y", "</s>"]


def test_template_that_rewrites_the_prompt_drops_the_row(tiny, config):
    tiny.chat_template = COUNTING
    rows = [chat("x", "y", "z"), Row(user("count"), (assistant("y"), assistant("z")), source="data.jsonl:2")]
    data = tokenize_groups(rows, tiny, config())
    assert [row.source for row in data.rows] == ["data.jsonl:1"]
    assert [(d.reason, d.file, d.row) for d in data.drops] == [("template_not_prefix", "data.jsonl", 2)]
    assert [d.reason for d in tokenize_sft(rows, tiny, config()).drops] == ["template_not_prefix"]


def test_template_that_refuses_a_row(tiny, config):
    tiny.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    )
    with pytest.raises(UserError, match=r"None of the 1 rows.*no system role \(data\.system=null"):
        tokenize_groups([chat("x", "y", "z")], tiny, config(system="Be brief"))


@pytest.mark.parametrize(
    ("keep", "length", "expected"),
    [
        (Keep.end, 3, ["<s>", "3", "4"]),
        (Keep.start, 3, ["<s>", "1", "2"]),
        (Keep.end, 1, ["<s>"]),
        (Keep.start, 1, ["<s>"]),
        (Keep.end, 5, ["<s>", "1", "2", "3", "4"]),
    ],
)
def test_prompt_truncation(tiny, config, keep, length, expected):
    data = tokenize_groups([pair("1234", "y", "z")], tiny, config(max_prompt_length=length, truncate_prompt=keep))
    assert tokens(tiny, data.groups[0].prompt) == expected
    assert data.counts["truncated_prompts"] == (length < 5)
    assert parts(tiny, data.groups[0])[1:] == [["y", "</s>"], ["z", "</s>"]]


def test_a_shorter_prompt_leaves_more_room_for_the_completion(tiny, config):
    data = tokenize_groups([pair("12345", "abcdef", "9")], tiny, config(max_length=5, max_prompt_length=2))
    assert parts(tiny, data.groups[0]) == [["<s>", "5"], ["ab", "c", "d"], ["9", "</s>"]]


def test_keep_end_without_bos(qwen, config):
    row = chat("one two three four", "y", "z")
    (whole,) = tokenize_groups([row], qwen, config()).groups
    (cut,) = tokenize_groups([row], qwen, config(max_prompt_length=4)).groups
    assert cut.prompt.tolist() == whole.prompt[-4:].tolist()


@pytest.mark.parametrize(
    ("max_length", "chosen", "truncated"),
    [(6, ["1", "2", "3", "</s>"], 0), (5, ["1", "2", "3"], 1), (4, ["1", "2"], 1), (3, ["1"], 1)],
)
def test_truncated_completion_has_no_eos(tiny, config, max_length, chosen, truncated):
    data = tokenize_groups([pair("x", "123", "9")], tiny, config(max_length=max_length, max_prompt_length=2))
    assert parts(tiny, data.groups[0])[:2] == [["<s>", "x"], chosen]
    assert parts(tiny, data.groups[0])[2] == ["9", "</s>"][: max_length - 2]
    assert data.counts["truncated_completions"] == truncated + (max_length == 3)


def test_completions_that_agree_after_truncation_are_dropped_together(tiny, config):
    rows = [pair("x", "123y", "123z", 1), pair("x", "45y", "46z", 2)]
    data = tokenize_groups(rows, tiny, config(max_length=5, max_prompt_length=2))
    assert [(d.reason, d.row) for d in data.drops] == [("identical_after_tokenising", 1)]
    assert [row.source for row in data.rows] == [group.source for group in data.groups] == ["data.jsonl:2"]
    assert data.counts["groups"] == 1
    with pytest.raises(UserError, match="None of the 1 rows"):
        tokenize_groups(rows[:1], tiny, config(max_length=5, max_prompt_length=2))


def test_a_list_loses_its_duplicates(tiny, config):
    """Those of the text and those that truncation makes; a list of which one completion is left is dropped."""
    completions = ("123y", "45", "123z", "45", "6")
    rows = [
        Row("x", completions, scores=(5.0, 4.0, 3.0, 2.0, 1.0), source="data.jsonl:1", weight=0.5),
        Row("x", ("123y", "123z", "123v"), source="data.jsonl:2"),
    ]
    data = tokenize_groups(rows, tiny, config(max_length=5, max_prompt_length=2))
    assert parts(tiny, data.groups[0]) == [["<s>", "x"], ["1", "2", "3"], ["4", "5", "</s>"], ["6", "</s>"]]
    assert (data.groups[0].scores, data.groups[0].weight) == ((5.0, 4.0, 1.0), 0.5)
    assert data.counts["duplicate_completions"] == 2
    assert [(d.reason, d.row) for d in data.drops] == [("identical_after_tokenising", 2)]


def step_pair(prompt, steps, chosen, rejected):
    return Row(prompt, (chosen, rejected), source="data.jsonl:1", steps=steps)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        # no end-of-turn token behind a step
        (step_pair("x", "1\n", "2", "3\n"), [["<s>", "x", "1", "\n"], ["2"], ["3", "\n"]]),
        # the first step of all
        (step_pair("x", "", "2", "3"), [["<s>", "x"], ["2"], ["3"]]),
        # what merges with the end of the steps is the completion's, as it is at the end of a prompt
        (step_pair("x", "1a", "b", "c"), [["<s>", "x", "1"], ["ab"], ["a", "c"]]),
        # one that the step itself has stays
        (step_pair("x", "1", "2</s>", "3"), [["<s>", "x", "1"], ["2", "</s>"], ["3"]]),
    ],
)
def test_steps_of_plain_text(tiny, config, row, expected):
    data = tokenize_groups([row], tiny, config())
    assert parts(tiny, data.groups[0]) == expected
    assert data.counts["eos_appended"] == 0


def test_steps_follow_the_generation_prompt(tiny, config):
    """Strings and messages alike; blanks at the end of a step are scored, for the next step begins after them."""
    tiny.chat_template = CHATML
    header = ["<|im_start|>", *"user", "\n", "x", "<|im_end|>", "\n", "<|im_start|>", *"assistant", "\n"]
    for row in (
        step_pair("x", "1 ", "2\n", "3"),
        step_pair(user("x"), "1 ", assistant("2\n"), assistant("3")),
    ):
        data = tokenize_groups([row], tiny, config())
        assert parts(tiny, data.groups[0]) == [[*header, "1", " "], ["2", "\n"], ["3"]]
        assert data.counts["eos_appended"] == 0


def test_steps_follow_an_empty_thought(tiny, config):
    tiny.chat_template = QWEN3
    row = step_pair(user("x"), "1", assistant("2"), assistant("3"))
    (group,) = tokenize_groups([row], tiny, config(template_kwargs={"enable_thinking": False})).groups
    prompt, *steps = parts(tiny, group)
    assert prompt[-6:] == ["\n", "<think>", "\n\n", "</think>", "\n\n", "1"]
    assert steps == [["2"], ["3"]]


def test_a_truncated_prompt_keeps_its_last_steps(tiny, config):
    data = tokenize_groups([step_pair("x", "1234", "5", "6")], tiny, config(max_prompt_length=3))
    assert parts(tiny, data.groups[0]) == [["<s>", "3", "4"], ["5"], ["6"]]


def test_weights_reach_the_groups(tiny, config):
    rows = [pair("x", "y", "z"), Row("x", ("y",), (True,), source="f:1", weight=0.25)]
    assert [group.weight for group in tokenize_groups(rows, tiny, config()).groups] == [1.0, 0.25]


def test_prompt_that_merges_away_is_dropped(qwen, config):
    qwen.chat_template = None
    rows = [pair("a", "bout", "lso", 1), pair("Why?", " So.", " No.", 2)]
    assert [(d.reason, d.row) for d in tokenize_groups(rows, qwen, config()).drops] == [("no_prompt_tokens", 1)]


def test_template_that_drops_the_answer(tiny, config):
    tiny.chat_template = "{% for m in messages if m.role == 'user' or m.content != 'y' %}{{ m.content }}{% endfor %}"
    rows = [chat("x", "y"), chat("x", "z")]
    for data in (
        tokenize_groups(rows, tiny, config(allow=["unwritten"])),
        tokenize_sft(rows, tiny, config(allow=["unwritten"])),
    ):
        assert [d.reason for d in data.drops] == ["no_completion_tokens"]
        assert [row.completions for row in data.rows] == [(assistant("z"),)]


def test_a_group_does_not_depend_on_other_rows_or_on_the_padding_token(qwen, config):
    rows = [chat(f"Question {i}?" * (i + 1), f"Yes {i}", "No.\n\nNever " * i + "x") for i in range(5)]
    together = [g.keys() for g in tokenize_groups(rows, qwen, config()).groups]
    backwards = [g.keys() for g in tokenize_groups(rows[::-1], qwen, config()).groups][::-1]
    alone = [tokenize_groups([row], qwen, config()).groups[0].keys() for row in rows]
    qwen.pad_token = qwen.eos_token
    same_ids = [g.keys() for g in tokenize_groups(rows, qwen, config()).groups]
    assert together == backwards == alone == same_ids


def test_strings_are_messages_where_there_is_a_template(qwen, config):
    strings = tokenize_groups([pair("Hi", "Yes", "No")], qwen, config()).groups[0]
    messages = tokenize_groups([chat("Hi", "Yes", "No")], qwen, config()).groups[0]
    assert strings.keys() == messages.keys()


def test_system_message_is_added_where_there_is_none(qwen, config):
    given = Row([{"role": "system", "content": "Mine"}, *user("Hi")], (assistant("Yes"), assistant("No")), source="f:1")
    groups = tokenize_groups([chat("Hi", "Yes", "No"), given], qwen, config(system="Be brief")).groups
    prompts = [qwen.decode(group.prompt) for group in groups]
    turn = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert prompts[0] == f"<|im_start|>system\nBe brief<|im_end|>\n{turn}"
    assert prompts[1] == f"<|im_start|>system\nMine<|im_end|>\n{turn}"


@pytest.mark.parametrize("tokenize", [tokenize_groups, tokenize_sft])
@pytest.mark.parametrize(
    ("row", "fields", "message"),
    [
        (chat("x", "y", "z"), {}, "data.jsonl:1 is a conversation.*chat template"),
        (pair("x", "y", "z"), {"system": "Be brief"}, "data.system needs"),
        (pair("x", "y", "z"), {"template_kwargs": {"tokenize": True}}, "cannot set tokenize"),
        (
            pair("x", "y", "z"),
            {"template_kwargs": {"enable_thinking": "No"}},
            "must be true or false, not the text 'No'",
        ),
    ],
)
def test_refusals_without_a_template(tiny, config, tokenize, row, fields, message):
    with pytest.raises(UserError, match=message):
        tokenize([row], tiny, config(**fields))


TEXTS = [
    ("Hi!", "Hello.", "  Leading spaces\n"),
    ("Spell: na", "ïve café 你好", "\n\nTwo lines 🙂"),
    ("x = ", "12345", "{'a': [1, 2]}\t"),
    ('He said "', "don't\"", "<|im_start|"),
]


def check_chatml_group(tokenizer, group, prompt_text, answers):
    """What must hold for any ChatML group, whatever its text."""
    for completion, answer in zip(group.completions, answers, strict=True):
        assert tokenizer.decode([*group.prompt, *completion]) == f"{prompt_text}{answer}<|im_end|>"
        assert completion.tolist().count(tokenizer.eos_token_id) == 1
        assert completion[-1] == tokenizer.eos_token_id
        assert completion.dtype == np.int32
    rendered = tokenizer(prompt_text, add_special_tokens=False)["input_ids"]
    assert rendered[: len(group.prompt)] == group.prompt.tolist()
    # only the line break behind "assistant" can merge with the answer
    assert len(rendered) - len(group.prompt) in (0, 1)


@pytest.mark.parametrize("texts", TEXTS)
def test_decoding_gives_the_rendered_text(qwen, config, texts):
    prompt, *answers = texts
    (group,) = tokenize_groups([chat(prompt, *answers)], qwen, config()).groups
    check_chatml_group(qwen, group, f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n", answers)


@pytest.mark.parametrize("name", ["llamafactory_demo/pairs_en.jsonl", "llamafactory_demo/pairs_zh.jsonl"])
def test_real_pairs(qwen, config, shared, name):
    records = [json.loads(line) for line in (shared / name).read_text(encoding="utf-8").split("\n")[:60] if line]
    layout = recognise(records, {}, "preference", name)
    rows = [to_row(record, layout, {}, name, i) for i, record in enumerate(records, 1)]
    data = tokenize_groups(rows, qwen, config(max_length=32_000, max_prompt_length=16_000))
    assert not data.drops
    assert len(data.groups) == len(rows)
    for row, group in zip(data.rows, data.groups, strict=True):
        text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in row.prompt)
        check_chatml_group(qwen, group, f"{text}<|im_start|>assistant\n", [c[0]["content"] for c in row.completions])


TURNS = [*user("One?"), *assistant("First."), *user("Two?")]


def scored(tokenizer, sequence):
    """The scored stretches as text."""
    ids, mask = np.array(sequence["input_ids"]), np.array(sequence["completion_mask"])
    assert ids.shape == mask.shape
    edges = np.nonzero(np.diff(mask, prepend=0, append=0))[0].reshape(-1, 2)
    return [tokenizer.decode(ids[start:stop].tolist()) for start, stop in edges]


def test_sft_scores_every_answer_to_its_end_of_turn(qwen, config):
    data = tokenize_sft([Row(TURNS, (assistant("Second."),), source="f:1")], qwen, config())
    assert scored(qwen, data.sequences[0]) == ["First.<|im_end|>", "Second.<|im_end|>"]
    assert qwen.decode(data.sequences[0]["input_ids"]).endswith("assistant\nSecond.<|im_end|>")
    assert data.counts == {"sequences": 1, "last_turn_only": 0, "truncated": 0, "eos_appended": 0}


def test_sft_scores_the_last_answer_where_earlier_ones_are_rewritten(tiny, config):
    tiny.chat_template = QWEN3
    rows = [Row(TURNS, (assistant("Second."),), source="f:1"), chat("x", "y")]
    data = tokenize_sft(rows, tiny, config())
    assert [scored(tiny, s) for s in data.sequences] == [
        ["<think>\n\n</think>\n\nSecond.<|im_end|>"],
        ["<think>\n\n</think>\n\ny<|im_end|>"],
    ]
    assert data.counts["last_turn_only"] == 1


@pytest.mark.parametrize("texts", TEXTS)
def test_sft_of_one_turn_scores_what_a_group_scores(qwen, config, texts):
    row = chat(texts[0], texts[1])
    (group,) = tokenize_groups([row], qwen, config()).groups
    (sequence,) = tokenize_sft([row], qwen, config()).sequences
    assert sequence["input_ids"] == [*group.prompt, *group.completions[0]]
    assert sequence["completion_mask"] == [0] * len(group.prompt) + [1] * len(group.completions[0])


@pytest.mark.parametrize(
    ("max_length", "expected"),
    [
        (9, [("<s>", 0), ("x", 0), ("1", 1), ("2", 1), ("3", 1), ("</s>", 1)]),
        (5, [("<s>", 0), ("x", 0), ("1", 1), ("2", 1), ("3", 1)]),
        (3, [("<s>", 0), ("x", 0), ("1", 1)]),
    ],
)
def test_sft_plain_text_and_truncation(tiny, config, max_length, expected):
    row = Row("x", ("123",), source="f:1")
    data = tokenize_sft([row], tiny, config(max_length=max_length, max_prompt_length=1))
    (sequence,) = data.sequences
    assert list(zip(tokens(tiny, sequence["input_ids"]), sequence["completion_mask"], strict=True)) == expected
    assert data.counts["truncated"] == (max_length < 6)


def test_sft_drops_a_conversation_without_a_scored_token(tiny, config):
    rows = [Row("long prompt", ("1",), source="f:1"), Row("x", ("1",), source="f:2")]
    data = tokenize_sft(rows, tiny, config(max_length=5, max_prompt_length=2))
    assert [(d.reason, d.row) for d in data.drops] == [("completion_truncated_away", 1)]
    assert [row.source for row in data.rows] == ["f:2"]


def test_sft_seam_belongs_to_the_answer_but_the_first_token_to_nobody(tiny, config):
    (sequence,) = tokenize_sft([Row("xa", ("b",), source="f:1")], tiny, config()).sequences
    assert scored(tiny, sequence) == ["ab</s>"]
    tiny.backend_tokenizer.post_processor = None
    (sequence,) = tokenize_sft([Row("a", ("b",), source="f:1")], tiny, config()).sequences
    assert (tokens(tiny, sequence["input_ids"]), sequence["completion_mask"]) == (["ab", "</s>"], [0, 1])
