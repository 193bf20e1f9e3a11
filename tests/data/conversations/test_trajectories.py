"""Completions of several turns, token by token: what is prompt, what is scored, what is context."""

import re
from functools import partial

import numpy as np
import pytest

from alignment.config.data import ScoredTurns
from alignment.data.conversations.dialect import Dialect
from alignment.data.conversations.writer import Writer
from alignment.data.layouts.recognition import recognise, to_row
from alignment.data.rows.row import BadRow, Row
from alignment.data.tokens.token_store import GROUPS, Stored, StoreWriter
from alignment.data.tokens.tokenization import tokenize_groups, tokenize_sft
from alignment.errors import UserError
from tests.conftest import each
from tests.helpers.chat_templates import CHATML, LLAMA3, NO_END, published, published_names


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text} | more


def tool(text):
    return {"role": "tool", "content": text}


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
CALLING = [user("sum?"), assistant("", tool_calls=[CALL]), tool("5"), assistant("It is 5.")]
TALK = [user("hi"), assistant("one"), user("more"), assistant("two")]


def row_of(record, stage="preference"):
    layout = recognise([record], {}, stage, "f")
    row = to_row(record, layout, {}, "f", 1)
    assert isinstance(row, Row), row
    return row


def pair(chosen, rejected):
    return row_of({"chosen": chosen, "rejected": rejected})


def shown(tokenizer, group):
    """The texts of prompt and completions; what is scored stands in «»."""
    texts = [tokenizer.decode(group.prompt)]
    for k, completion in enumerate(group.completions):
        mask = np.ones(len(completion), bool) if group.scored is None else group.scored[k]
        text = ""
        for i, token in enumerate(completion):
            text += "«" * bool(mask[i] and not (i and mask[i - 1])) + tokenizer.decode([token])
            text += "»" * bool(mask[i] and not (i + 1 < len(mask) and mask[i + 1]))
        texts.append(text)
    return texts


def sft_shown(tokenizer, sequence):
    ids, mask = np.array(sequence["input_ids"], np.int32), np.array(sequence["completion_mask"], bool)
    group = type("Sequence", (), {"prompt": ids[:1], "completions": (ids[1:],), "scored": (mask[1:],)})
    return "".join(shown(tokenizer, group))


# Where the prompt ends


@pytest.mark.parametrize(
    ("chosen", "rejected", "cut"),
    [
        (TALK, [*TALK[:3], assistant("2")], 3),  # at the last answer, as ever
        (TALK, [user("hi"), assistant("1"), user("more"), assistant("two")], 1),
        (TALK, [user("hi"), assistant("1")], 1),
        (TALK, TALK[:2], 1),  # one ends where the other goes on
        (TALK, [*TALK[:2], user("less"), assistant("two")], 1),  # another question: from the answer before it
        (CALLING, [*CALLING[:3], assistant("5")], 3),
        (CALLING, [*CALLING[:2], tool("6"), assistant("It is 5.")], 1),
        ([*CALLING[:3], *CALLING[2:]], [*CALLING[:3], assistant("5")], 1),
        (
            [user("hi"), assistant("a", reasoning_content="x"), user("u"), assistant("b")],
            [user("hi"), assistant("a", reasoning_content="y"), user("u"), assistant("c")],
            1,
        ),
    ],
)
def test_the_prompt_is_what_both_share(chosen, rejected, cut):
    """Up to a turn where an answer is due; with the prompt in a column of its own it is the same."""
    row = pair(chosen, rejected)
    assert row.prompt == chosen[:cut]
    assert row.completions == (chosen[cut:], rejected[cut:])
    question = chosen[0]["content"]
    asked = {"prompt": chosen[:1], "chosen": chosen[1:], "rejected": rejected[1:]}
    whole = {"prompt": question, "chosen": chosen, "rejected": rejected}
    for record in (asked, asked | {"prompt": question}, whole):
        again = row_of(record)
        assert (again.prompt, again.completions) == (row.prompt, row.completions)
    system = {"role": "system", "content": "s"}
    for record in (whole | {"prompt": [system, *chosen[:1]]}, whole | {"system": "s"}):
        assert row_of(record).prompt == [system, *row.prompt]
    ranked = row_of({"prompt": chosen[:1], "completions": [rejected[1:], chosen[1:]], "scores": [1, 2]})
    assert (ranked.prompt, ranked.completions) == (row.prompt, row.completions)


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason", "said"),
    [
        (TALK, [user("ho"), *TALK[1:]], "prompts_differ", "differ before their first answer"),
        ([assistant("a"), *TALK], [assistant("b"), *TALK], "prompts_differ", "differ before their first answer"),
        (TALK, [*TALK, user("u")], "bad_roles", "ends with a turn of user"),
        (TALK, [], "empty_answer", "no messages"),
        (TALK, [user("hi"), assistant("b"), user("u"), tool("t"), assistant("c")], "bad_roles", "a tool turn stands"),
    ],
)
def test_pairs_that_share_no_question(chosen, rejected, reason, said):
    record = {"chosen": chosen, "rejected": rejected}
    layout = recognise([{"chosen": TALK, "rejected": TALK[:2]}], {}, "preference", "f")
    bad = to_row(record, layout, {}, "f", 1)
    assert isinstance(bad, BadRow)
    assert bad.reason == reason
    assert said in bad.message


def test_a_step_has_one_turn():
    record = {"prompt": "p", "steps": "s", "chosen": TALK[1:], "rejected": "b"}
    layout = recognise([{"prompt": "p", "steps": "s", "chosen": "a", "rejected": "b"}], {}, "preference", "f")
    assert "several turns" in to_row(record, layout, {}, "f", 1).message


# What is scored, by hand


@pytest.mark.parametrize("score", list(ScoredTurns))
def test_turns_by_hand_on_a_tokenizer_of_characters(tiny, config, score):
    """ChatML and a Llama template: the context keeps its headers, an answer its end of turn, `last` the last answer."""
    row = pair([user("x"), assistant("y"), user("u"), assistant("zz")], [user("x"), assistant("w")])
    every = score is ScoredTurns.all
    tiny.chat_template = CHATML
    data = tokenize_groups([row], tiny, config(score=score))
    first = "«y<|im_end|>»" if every else "y<|im_end|>"
    assert shown(tiny, data.groups[0]) == [
        "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n",
        first + "\n<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n«zz<|im_end|>»",
        "«w<|im_end|>»",
    ]
    assert data.counts["several_turns"] == 1
    tiny.chat_template = LLAMA3
    assert shown(tiny, tokenize_groups([row], tiny, config(score=score)).groups[0]) == [
        "<s><|im_start|>user\n\nx<|im_end|><|im_start|>assistant\n\n",
        first + "<|im_start|>user\n\nu<|im_end|><|im_start|>assistant\n\n«zz<|im_end|>»",
        "«w<|im_end|>»",
    ]
    tiny.chat_template = NO_END  # no token ends a turn: the last one gets EOS
    assert shown(tiny, tokenize_groups([row], tiny, config(score=score)).groups[0]) == [
        "user: x\nassistant: ",
        ("«y\n»" if every else "y\n") + "user: u\nassistant: «zz\n</s>»",
        "«w\n</s>»",
    ]


def test_a_shared_answer_is_context_and_a_shared_start_prompt(tiny, config):
    """Where the user or the tool goes on differently, the answer before it is in both completions, unscored."""
    tiny.chat_template = CHATML
    row = pair(TALK, [*TALK[:2], user("less"), assistant("2")])
    _, chosen, rejected = shown(tiny, tokenize_groups([row], tiny, config()).groups[0])
    assert chosen.startswith("one<|im_end|>\n<|im_start|>user\nmore")
    assert (chosen.count("«"), rejected.count("«")) == (1, 1)
    assert (chosen[-15:], rejected[-13:]) == ("«two<|im_end|>»", "«2<|im_end|>»")


def test_messages_say_what_is_not_learnt(tiny, config):
    """By their own keys; a row of which nothing is left is dropped with its reason."""
    tiny.chat_template = CHATML
    quiet = pair([user("x"), assistant("y", train=False), user("u"), assistant("z")], [user("x"), assistant("w")])
    nothing = pair([user("x"), assistant("y", weight=0)], [user("x"), assistant("w")])
    data = tokenize_groups([quiet, nothing], tiny, config())
    assert shown(tiny, data.groups[0])[1].startswith("y<|im_end|>\n<|im_start|>user\nu")
    assert [drop.reason for drop in data.drops] == ["nothing_to_learn"]
    assert not any("train" in found.kind for found in data.findings)


@pytest.mark.parametrize("layout", ["rows", "lists"])
def test_rows_and_lists_of_trajectories(tiny, config, layout):
    tiny.chat_template = CHATML
    turns = [assistant("y"), user("u"), assistant("z")]
    if layout == "lists":
        record = {"prompt": "x", "completions": [turns, "v", "w"]}
    else:
        record = {"prompt": "x", "completion": turns, "label": False}
    (group,) = tokenize_groups([row_of(record)], tiny, config()).groups
    _, first, *others = shown(tiny, group)
    assert first == "«y<|im_end|>»\n<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n«z<|im_end|>»"
    assert group.labels == ((False,) if layout == "rows" else None)
    assert others == (["«v<|im_end|>»", "«w<|im_end|>»"] if layout == "lists" else [])


def test_what_is_cut(tiny, config):
    """A completion ends with its last scored token; where none is left, the row is dropped, and counted."""
    tiny.chat_template = CHATML
    row = pair([user("x"), assistant("yy"), user("u" * 40), assistant("z")], [user("x"), assistant("w")])
    prompt = len(tokenize_groups([row], tiny, config()).groups[0].prompt)
    for room, expected in ((60, "«yy<|im_end|>»"), (3, "«yy<|im_end|>»"), (2, "«yy»")):
        data = tokenize_groups([row], tiny, config(max_length=prompt + room, max_prompt_length=prompt))
        assert shown(tiny, data.groups[0])[1] == expected
        assert data.groups[0].scored is None
        assert data.counts["truncated_completions"] == 1
    last = config(max_length=prompt + 60, max_prompt_length=prompt, score=ScoredTurns.last)
    with pytest.raises(UserError, match="hold none of its scored turns"):
        tokenize_groups([row], tiny, last)


def test_a_tokenizer_without_template(tiny, config):
    with pytest.raises(UserError, match=r"f:1 is a conversation, .* set model\.chat_template"):
        tokenize_groups([pair(TALK, TALK[:2])], tiny, config())


# Published templates, by hand


def test_qwen3(qwen, config):
    """It leaves the thought of an earlier answer out: refused row by row; with `last`, or TRL's variant, it trains."""
    row = pair(TALK, [user("hi"), assistant("1")])
    calls = pair(CALLING, [user("sum?"), assistant("", tool_calls=[CALL]), tool("5"), assistant("No.")])
    thoughts = pair(
        [user("hi"), assistant("one", reasoning_content="T"), user("more"), assistant("two", reasoning_content="U")],
        [user("hi"), assistant("1", reasoning_content="V")],
    )
    qwen.chat_template = published("qwen3")
    data = tokenize_groups([row, thoughts, calls], qwen, config())
    assert [drop.reason for drop in data.drops] == ["template_not_prefix"] * 2
    assert "data.score=last" in data.drops[0].message
    header, empty = "<|im_start|>assistant\n", "<think>\n\n</think>\n\n"
    asked = f"<|im_start|>user\nhi<|im_end|>\n{header}"
    more = f"<|im_end|>\n<|im_start|>user\nmore<|im_end|>\n{header}"
    # the call that both share is the prompt's; thinking off puts the empty thought into the prompt
    shared = '\n<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>\n'
    shared += f"<|im_start|>user\n<tool_response>\n5\n</tool_response><|im_end|>\n{header}"
    assert shown(qwen, data.groups[0]) == [
        f"<|im_start|>user\nsum?<|im_end|>\n{header}" + shared[1:],
        f"«{empty}It is 5.<|im_end|>»",
        f"«{empty}No.<|im_end|>»",
    ]
    off = tokenize_groups([calls], qwen, config(template_kwargs={"enable_thinking": False})).groups[0]
    assert shown(qwen, off)[0].endswith(header + empty)
    assert shown(qwen, off)[1:] == ["«It is 5.<|im_end|>»", "«No.<|im_end|>»"]
    data = tokenize_groups([row, thoughts], qwen, config(score=ScoredTurns.last))
    assert [shown(qwen, group) for group in data.groups] == [
        [asked, f"one{more}«{empty}two<|im_end|>»", f"«{empty}1<|im_end|>»"],
        [asked, f"one{more}«<think>\nU\n</think>\n\ntwo<|im_end|>»", "«<think>\nV\n</think>\n\n1<|im_end|>»"],
    ]
    qwen.chat_template = published("qwen3_training")
    data = tokenize_groups([row, thoughts], qwen, config())
    assert [shown(qwen, group)[1] for group in data.groups] == [
        f"«{empty}one<|im_end|>»{more[10:]}«{empty}two<|im_end|>»",
        f"«<think>\nT\n</think>\n\none<|im_end|>»{more[10:]}«<think>\nU\n</think>\n\ntwo<|im_end|>»",
    ]
    off = tokenize_groups([row], qwen, config(template_kwargs={"enable_thinking": False})).groups[0]
    assert shown(qwen, off) == [asked + empty, f"«one<|im_end|>»{more[10:]}{empty}«two<|im_end|>»", "«1<|im_end|>»"]


def test_llama3_and_gemma(tiny, config):
    """Llama 3.1 with a tool, Gemma with its own name of the role and no system turn."""
    turns = ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<end_of_turn>", "<start_of_turn>"]
    tiny.add_special_tokens({"additional_special_tokens": turns})

    def head(role):
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

    tiny.chat_template = published("llama3_1")
    row = pair(CALLING, [user("sum?"), assistant("No.")])
    prompt, chosen, rejected = shown(tiny, tokenize_groups([row], tiny, config()).groups[0])
    assert prompt.endswith(f"{head('user')}sum?<|eot_id|>{head('assistant')}")
    assert chosen == (
        '«{"name": "add", "parameters": {"a": 2}}<|eot_id|>»'
        f'{head("ipython")}"5"<|eot_id|>{head("assistant")}«It is 5.<|eot_id|>»'
    )
    assert rejected == "«No.<|eot_id|>»"
    tiny.chat_template = published("gemma")
    row = pair(TALK, [user("hi"), assistant("1")])
    assert shown(tiny, tokenize_groups([row], tiny, config()).groups[0]) == [
        "<s><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n",
        "«one<end_of_turn>»\n<start_of_turn>user\nmore<end_of_turn>\n<start_of_turn>model\n«two<end_of_turn>»",
        "«1<end_of_turn>»",
    ]
    with pytest.raises(UserError, match=r"System role not supported \(data.system=null"):
        tokenize_groups([row], tiny, config(system="s"))


MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m == (messages | selectattr('role', 'equalto', 'user') | list)[-1] %}SYS {% endif %}"  # the last question
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content[0 if loop.last else CUT:] }}<|im_end|>"
    "{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(("cut", "said"), [(0, "«yy<|im_end|>»"), (1, "y<|im_end|>")])
def test_marks_of_a_template_where_its_text_changes(tiny, config, cut, said):
    """Marked answers are scored if they are as they were as the last one, whatever is in front of them."""
    tiny.chat_template = MARKED.replace("CUT", str(cut))
    row = row_of({"messages": [user("x"), assistant("yy"), user("u"), assistant("z")]}, "sft")
    data = tokenize_sft([row], tiny, config(allow=["unwritten"]))
    assert data.counts["last_turn_only"] == cut
    head = "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
    tail = "\n<|im_start|>user\nSYS u<|im_end|>\n<|im_start|>assistant\n«z<|im_end|>»"
    assert sft_shown(tiny, data.sequences[0]) == head + said + tail


SPECIAL = re.compile(r"<[|｜][^<>{}'\" ]+?[|｜]>|<(?:end|start)_of_turn>|<turn\|>|<\|turn>")
CORE = ("qwen3_training", "deepseek_r1_distill_training", "phi3_training", "gemma3", "gptoss")


@pytest.mark.parametrize("name", each(published_names(), CORE))
def test_published_templates_score_what_the_policy_would_say(name, tiny, config):
    """Every scored turn is how the template ends a conversation with it, without the context; or there is a reason."""
    tiny.chat_template = published(name)
    tiny.add_special_tokens({"additional_special_tokens": sorted(set(SPECIAL.findall(tiny.chat_template)))})
    question, other = user("ASK"), [user("ASK"), assistant("bad")]
    call = assistant("", tool_calls=[CALL | {"id": "abcdefghi"}])
    result = tool("RESULT") | {"name": "add", "tool_call_id": "abcdefghi"}
    allow = ["unwritten", "special_tokens", "generation_prompt", "double_bos"]
    for turns in ([assistant("one"), user("MORE"), assistant("two")], [call, result, assistant("two")]):
        row = pair([question, *turns], other)
        for score in ScoredTurns:
            try:
                (group,) = tokenize_groups([row], tiny, config(score=score, allow=allow)).groups
            except UserError as error:
                reason = str(error)
                assert "the chat template" in reason, reason
                continue
            scored = [part.partition("»")[0] for part in shown(tiny, group)[1].split("«")[1:]]
            wanted = (0, 2) if score is ScoredTurns.all else (2,)
            assert len(scored) == len(wanted)
            for index, found in zip(wanted, scored, strict=True):
                assert turns[index]["content"] in found
                assert not any(word in found for word in ("ASK", "MORE", "RESULT"))
                render = partial(Writer(tiny, config()).render, generation=False, variables={})
                dialect = Dialect.of(tiny.chat_template, render)
                ends = render(dialect.write([question, *turns[: index + 1]]))
                assert found.removesuffix("</s>").rstrip() in ends.rstrip()


def test_harmony_scores_earlier_answers_without_the_end_that_only_a_history_has(tiny, config):
    """gpt-oss ends an answer with <|return|>, in a history with <|end|>, which no policy says; the rest is scored."""
    tiny.chat_template = published("gptoss")
    tiny.add_special_tokens({"additional_special_tokens": sorted(set(SPECIAL.findall(tiny.chat_template)))})
    talk = [user("x"), assistant("one"), user("u"), assistant("two")]
    own = "<|channel|>final<|message|>"
    first, last = f"«{own}one»<|end|><|start|>user<|message|>u<|end|><|start|>assistant", f"«{own}two<|return|>»"
    (group,) = tokenize_groups([pair(talk, [talk[0], assistant("other")])], tiny, config()).groups
    assert shown(tiny, group)[1:] == [first + last, f"«{own}other<|return|>»"]
    data = tokenize_sft([row_of({"messages": talk}, "sft")], tiny, config())
    assert data.counts["last_turn_only"] == 0
    assert sft_shown(tiny, data.sequences[0]).endswith(f"<|start|>assistant{first}{last}")
    thought = [user("x"), assistant("one", thinking="hm"), *talk[2:]]
    with pytest.raises(UserError, match="writes an answer differently once more turns follow"):
        tokenize_groups([pair(thought, [talk[0], assistant("other")])], tiny, config())


@pytest.mark.parametrize("thought", [{}, {"reasoning_content": "HM"}])
@pytest.mark.parametrize("name", each(published_names(), ("qwen3", "gptoss")))
def test_prompts_that_end_with_the_result_of_a_tool(name, thought, tiny, config):
    """The prompt is the template's own for a generation, token by token; the answer is what follows in the whole."""
    tiny.chat_template = published(name)
    tiny.add_special_tokens({"additional_special_tokens": sorted(set(SPECIAL.findall(tiny.chat_template)))})
    call = assistant("", tool_calls=[CALL | {"id": "abcdefghi"}], **thought)
    prompt = [user("ASK"), call, tool("RESULT") | {"name": "add", "tool_call_id": "abcdefghi"}]
    row = Row(prompt, ([assistant("yes")], [assistant("no")]), source="data.jsonl:1")
    switches = (
        [{}, {"enable_thinking": True}, {"enable_thinking": False}] if "enable_thinking" in published(name) else [{}]
    )
    for switch in switches:
        allow = ["unwritten", "special_tokens", "generation_prompt", "double_bos"]
        settings = config(max_length=9000, max_prompt_length=8000, allow=allow, template_kwargs=switch)
        if name == "gptoss" and thought:  # the template leaves the thought of a call out once there is an answer
            with pytest.raises(UserError, match="writes the prompt differently once an answer follows"):
                tokenize_groups([row], tiny, settings)
            continue
        try:
            (group,) = tokenize_groups([row], tiny, settings).groups
        except UserError:  # templates that know no tools
            assert not name.startswith(("qwen", "llama", "glm", "deepseek", "gptoss_training" * (not thought) or "-"))
            continue
        writer = Writer(tiny, settings)
        messages = writer.messages(row)
        asked, whole = writer.render(messages, True, {}), writer.render([*messages, *writer.answers(row)[0]], False, {})
        text, answer = (tiny.decode(ids) for ids in (group.prompt, group.completions[0]))
        assert asked.startswith(text) and whole.startswith(text + answer.removesuffix("</s>").rstrip())
        if whole.startswith(asked):  # two line breaks where prompt and answer meet are one token of the answer
            assert asked.removeprefix(text) in ("", "\n")
        assert ("RESULT" in text) == ("RESULT" in asked) and "yes" in answer and "RESULT" not in answer


# SFT


def test_sft_of_trajectories(tiny, config):
    """The chosen side of pairs and whole conversations alike: all of the assistant's turns, or the last."""
    tiny.chat_template = CHATML
    chosen = [user("x"), assistant("y"), user("u"), assistant("z")]
    for row in (pair(chosen, [user("x"), assistant("w")]), row_of({"messages": chosen}, "sft")):
        for score, first in ((ScoredTurns.all, "«y<|im_end|>»"), (ScoredTurns.last, "y<|im_end|>")):
            (sequence,) = tokenize_sft([row], tiny, config(score=score)).sequences
            text = sft_shown(tiny, sequence)
            assert text == (
                f"<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n{first}\n<|im_start|>user\nu<|im_end|>\n"
                "<|im_start|>assistant\n«z<|im_end|>»"
            )


def test_a_slow_tokenizer(config):
    """It does not say where its tokens stand: pairs of one turn train, others end in a sentence."""
    from transformers import ByT5Tokenizer

    slow = ByT5Tokenizer(chat_template=NO_END)
    assert len(tokenize_groups([pair(TALK[:2], [user("hi"), assistant("1")])], slow, config()).groups) == 1
    with pytest.raises(UserError, match="a ByT5Tokenizer, does not say where its tokens stand"):
        tokenize_groups([pair(TALK, TALK[:2])], slow, config())


def test_masks_in_files(tiny, config, tmp_path):
    """Groups with masks and without come back from the files of prepared data as they were."""
    tiny.chat_template = CHATML
    rows = [pair(TALK[:2], [user("hi"), assistant("1")]), pair(TALK, TALK[:2]), pair(TALK, [*TALK[:3], assistant("2")])]
    groups = tokenize_groups(rows, tiny, config()).groups
    writer = StoreWriter(tmp_path / "groups", GROUPS)
    for group in groups:
        writer.add([group])
    stored = Stored(tmp_path / "groups", GROUPS, writer.close())
    assert [group.scored is None for group in stored] == [True, False, True]
    assert [group.keys() for group in stored] == [group.keys() for group in groups]
    assert stored[1].scored_lengths == groups[1].scored_lengths
