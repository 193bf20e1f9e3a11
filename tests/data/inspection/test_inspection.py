"""What the inspection counts, by hand on tiny rows, and the fate of each of their tokens."""

import pytest

from alignment.config.data import Keep
from alignment.data.inspection import inspection
from alignment.data.inspection.histogram import Bin, Summary, histogram, summary
from alignment.data.inspection.inspection import Cut, LeftOut
from alignment.data.inspection.template_verdict import template_verdict
from alignment.data.inspection.token_view import TokenView, pieces
from alignment.errors import UserError
from tests.conftest import recommended_loss
from tests.helpers.chat_templates import CHATML, LLAMA3, NO_END, QWEN3

NO_SYSTEM = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
NO_PROMPT = CHATML.partition("{% if add")[0]
DEFAULT_SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + CHATML
RAISES = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHATML
MERGED_SYSTEM = (
    "{% set s = messages[0].content + '\n' if messages[0].role == 'system' else '' %}<s>"
    "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ s if loop.first }}{{ m.content }}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def message(role, text, **more):
    return {"role": role, "content": text, **more}


def pair(prompt, chosen, rejected, **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


@pytest.fixture
def chat(tiny):
    """One token per character, and ChatML."""
    tiny.chat_template = CHATML
    return tiny


@pytest.fixture
def inspected(jsonl, config):
    """The inspection of records; settings over plain defaults."""

    def inspect(tokenizer, records, views=3, loss="dpo", **fields):
        (found,) = inspection.inspect(config(jsonl(records), **fields), tokenizer, recommended_loss(loss), views=views)
        return found

    return inspect


def told(view: TokenView) -> dict[str, list[str]]:
    """The runs of each sequence: the part, a star where the template wrote it, and the text."""
    return {
        name: [
            f"{part.name}{'*' * of_template} {''.join(token.text for token in run)}"
            for part, of_template, run in TokenView.runs(tokens)
        ]
        for name, tokens in view.sequences.items()
    }


# Numbers


def test_lengths_overlap_and_cuts_are_those_counted_by_hand(chat, inspected):
    """Plain characters: <|im_start|>user, a line break and the prompt, the end, then the answer's header."""
    header, between = 1 + len("user\n"), 1 + 1 + 1 + len("assistant\n")
    records = [pair("xyz", "a b", "a c d"), pair("x" * 20, "e", "f" * 9), pair("xy", "same", " same")]
    found = inspected(chat, records, max_length=40, max_prompt_length=30, allow=[])
    assert found.lengths["prompt"] == [header + 3 + between, header + 20 + between, header + 2 + between]
    assert found.lengths["chosen"] == [3 + 1, 1 + 1, 4 + 1]
    assert found.lengths["rejected"] == [5 + 1, 9 + 1, 5 + 1]
    assert found.needed == [22 + 6, 39 + 10, 21 + 6]
    assert found.overlaps == [1 / 4, 0, 1]
    # Only the second prompt is longer than 30, and then its rejected answer fills the ten tokens that are left.
    assert found.cuts == [
        Cut("data.max_prompt_length", "prompts", 1, 3, 9, 22 + 39 + 21),
        Cut("data.max_length", "answers", 0, 6, 0, 4 + 6 + 2 + 10 + 5 + 6),
    ]
    assert found.refusal is None and found.left_out == []
    (mistake,) = found.mistakes
    assert mistake.startswith("1 of 3 pairs have answers that are equal but for white space; the first is ")
    assert mistake.endswith("data.jsonl:3.")


def test_quantiles_and_bins_by_hand():
    """Ten lengths; of 1 to 10 the ninth is 9, and 11 bins of one each would be one too many."""
    assert summary([3, 1, 2]) == Summary(3, 1, 2, 2.0, 3, 3, 3)
    assert summary(list(range(1, 101))) == Summary(100, 1, 50, 50.5, 90, 99, 100)
    assert histogram({"a": [1, 1, 3], "b": [2]}) == [
        Bin(1, 2, {"a": 2, "b": 0}),
        Bin(2, 3, {"a": 0, "b": 1}),
        Bin(3, 4, {"a": 1, "b": 0}),
    ]
    assert histogram({}) == []


def test_one_long_row_does_not_flatten_the_bins():
    """99 of 100 lengths are below 100: steps of ten, and the long one in an open bin."""
    bins = histogram({"a": [*range(99), 5000]})
    assert [one.counts["a"] for one in bins] == [10] * 9 + [9, 1]
    assert bins[0].label == "0 to 9" and bins[-1].label == "100 or more"
    assert sum(one.counts["a"] for one in bins) == 100


# Refusals


def test_rows_left_out_are_counted_by_reason_and_the_run_s_sentence_is_kept(chat, inspected):
    """The rest is inspected; the run would stop for the bad rows, not for the tie."""
    records = [pair("x", "y", "z"), pair("x", "", "z"), pair("x", "", "z"), pair("x", 3, "z")]
    found = inspected(chat, records)
    assert [(one.count, one.reason) for one in found.left_out] == [
        (2, "with an empty answer"),
        (1, "with another type of value than text or messages"),
    ]
    assert found.left_out[0] == LeftOut(2, "with an empty answer", found.left_out[0].first)
    assert found.left_out[0].first.startswith("data.jsonl:2: ")
    assert "has 3 bad rows, and data.max_bad_rows allows 0" in found.refusal
    assert len(found.lengths["prompt"]) == 1 and len(found.views) == 1


def test_findings_that_stop_a_run_are_told_and_the_rows_shown(chat, inspected):
    """Every answer begins with the name of a role; with data.allow the run goes on and the finding stays."""
    records = [pair("What?", f"Assistant: {n}", f"no {n}") for n in range(3)]
    found = inspected(chat, records)
    assert found.refusal.startswith("3 of 3 rows have an answer that begins with the name of a role")
    assert len(found.mistakes) == 1 and found.mistakes[0].startswith("3 of 3 rows have an answer that begins")
    assert len(found.views) == 3
    allowed = inspected(chat, records, allow=["role_names"])
    assert allowed.refusal is None and allowed.mistakes == found.mistakes


def test_what_cannot_be_read_at_all_is_refused_as_a_run_refuses_it(chat, inspected):
    """Unknown columns, and labels where the loss wants pairs."""
    with pytest.raises(UserError, match="is not known: its columns are a, b"):
        inspected(chat, [{"a": 1, "b": 2}])
    with pytest.raises(UserError, match="compares completions of one prompt"):
        inspected(chat, [{"prompt": "x", "completion": "y", "label": True}])


def test_a_second_bos_and_answers_without_an_end_are_likely_mistakes(tiny, inspected):
    """The template writes BOS twice; another writes no end of turn, so that EOS is added to each of four answers."""
    tiny.chat_template = "<s>" + LLAMA3
    found = inspected(tiny, [pair("x", "y", "z")])
    assert any(sentence.startswith("1 of 1 rows begin with two BOS tokens") for sentence in found.mistakes)
    tiny.chat_template = NO_END
    found = inspected(tiny, [pair("x", "y", "z"), pair("v", "w", "u")])
    assert found.mistakes == [
        "4 of 4 answers get the tokenizer's EOS, because the chat template ends them with no special token."
    ]


# Tokens


def test_the_parts_of_a_pair_are_told_apart(chat, inspected):
    """The prompt `user` is the row's own word, although the template writes the same one before it."""
    (view,) = inspected(chat, [pair("user", "a b", "assistant")]).views
    header = "<|im_end|>\n<|im_start|>assistant\n"
    assert told(view) == {
        "prompt": ["prompt* <|im_start|>user\n", "prompt user", f"prompt* {header}"],
        "chosen": ["scored a b", "scored* <|im_end|>"],
        "rejected": ["scored assistant", "scored* <|im_end|>"],
    }


@pytest.mark.parametrize("keep", [Keep.end, Keep.start])
def test_what_is_cut_is_shown_where_it_is_cut(tiny, inspected, keep):
    """Plain text keeps its BOS; three of eight prompt tokens and two of five answer tokens go."""
    records = [pair("vwxyzuv", "klmn", "o")]
    (view,) = inspected(tiny, records, max_prompt_length=5, max_length=8, truncate_prompt=keep).views
    prompt = {
        Keep.end: ["prompt* <s>", "cut vwx", "prompt yzuv"],
        Keep.start: ["prompt* <s>", "prompt vwxy", "cut zuv"],
    }[keep]
    assert told(view) == {
        "prompt": prompt,
        "chosen": ["scored klm", "cut n", "cut* </s>"],
        "rejected": ["scored o", "scored* </s>"],
    }


def test_turns_of_users_between_those_of_the_assistant_are_context(chat, inspected):
    """A trajectory: the assistant's two turns are scored, each with its end; the user's turn is read."""
    turns = [message("assistant", "p"), message("user", "q"), message("assistant", "r")]
    records = [pair([message("user", "x")], turns, [message("assistant", "s")])]
    (view,) = inspected(chat, records).views
    assert told(view)["chosen"] == [
        "scored p",
        "scored* <|im_end|>",
        "context* \n<|im_start|>user\n",
        "context q",
        "context* <|im_end|>\n<|im_start|>assistant\n",
        "scored r",
        "scored* <|im_end|>",
    ]
    assert told(view)["rejected"] == ["scored s", "scored* <|im_end|>"]


def test_answers_of_lists_and_labelled_rows_have_their_names(chat, inspected):
    """A list of three with scores, and a labelled row with a weight."""
    (view,) = inspected(chat, [{"prompt": "x", "completions": ["p", "q", "r"], "scores": [1, 3, 2]}]).views
    assert [*view.sequences] == ["prompt", "best", "answer 2", "worst"] and view.remark == "scores 3, 2, 1"
    assert told(view)["best"] == ["scored q", "scored* <|im_end|>"]
    records = [{"prompt": "x", "completion": f"p{n}", "label": n == 0, "weight": 2} for n in range(2)]
    found = inspected(chat, records, loss="kto")
    assert [view.remark for view in found.views] == ["desirable, weight 2", "undesirable, weight 2"]
    assert found.lengths["desirable"] == [3] and found.lengths["undesirable"] == [3]


def test_conversations_of_sft_show_prompt_answers_and_cuts(chat, jsonl, config):
    """Both answers are learnt; the last one is cut behind its first sign."""
    turns = [message("user", "x"), message("assistant", "p"), message("user", "y"), message("assistant", "qrs")]
    whole = len("[user\nx]\n[assistant\np]\n[user\ny]\n[assistant\n")  # brackets for the template's special tokens
    records = [{"messages": turns}]
    settings = config(jsonl(records), max_length=whole + 1, max_prompt_length=8)
    (found,) = inspection.inspect(settings, chat, None, views=1)
    assert found.lengths == {"conversation": [whole + 4], "scored": [2 + 4]}
    assert found.cuts == [Cut("sft.data.max_length", "conversations", 1, 1, 3, whole + 4)]
    assert told(found.views[0])["conversation"][3:] == [
        "scored p",
        "scored* <|im_end|>",
        "context* \n<|im_start|>user\n",
        "context y",
        "context* <|im_end|>\n<|im_start|>assistant\n",
        "scored q",
        "cut rs",
        "cut* <|im_end|>",
    ]


def test_a_character_of_several_tokens_stands_at_the_last_of_them(qwen):
    """The pieces end to end are the text; a token inside a character adds nothing."""
    text = "naïve 🤷🏽 café\n"
    ids = qwen(text)["input_ids"]
    found = pieces(qwen, ids)
    assert "".join(found) == text and len(found) == len(ids) and "" in found


# The template


def verdict(tokenizer, config, template):
    tokenizer.chat_template = template
    return {trait.name: trait for trait in template_verdict(tokenizer, config())}


@pytest.mark.parametrize(
    ("template", "name", "says", "suspect"),
    [
        (CHATML, "BOS", "the template writes no <s>, though", True),
        (LLAMA3, "BOS", "the template writes <s> once", False),
        ("<s>" + LLAMA3, "BOS", "the template writes <s> twice", True),
        (CHATML, "EOS", "answers end with <|im_end|>, and the tokenizer's EOS is </s>", False),
        (NO_END, "EOS", "no special token, </s> is added", True),
        (CHATML, "generation prompt", "'<|im_start|>assistant\\n', and a given answer follows it as it is", False),
        (NO_PROMPT, "generation prompt", "writes none, and '<|im_start|>assistant\\n' before an answer", True),
        (QWEN3, "generation prompt", "a given answer follows", False),
        (CHATML, "earlier turns", "prefix-preserving", False),
        (QWEN3, "earlier turns", "are written otherwise once turns follow", True),
        (QWEN3, "thinking", "enable_thinking switches it", False),
        (QWEN3, "thinking", "an answer without a thought gets an empty one", False),
        (CHATML, "thinking", "reasoning_content is not written; thoughts of earlier answers are kept", False),
        (CHATML, "system turn", "written; without one there is none", False),
        (NO_SYSTEM, "system turn", "a system text is lost", True),
        (MERGED_SYSTEM, "system turn", "written into the user's turn", False),
        (DEFAULT_SYSTEM, "system turn", "writes its own: 'Be kind.'", False),
        (RAISES, "system turn", "refused: rows with a system text are left out", True),
        (None, "EOS", "</s> is added to each answer", False),
    ],
)
def test_the_template_s_verdict(tiny, config, template, name, says, suspect):
    """Each trait by what a template does, with and without the trap."""
    trait = verdict(tiny, config, template)[name]
    assert says in trait.verdict and trait.suspect == suspect, trait


def test_the_overview_says_what_a_run_s_log_says_and_nothing_twice(chat, inspected):
    """Layout and counts, not the rows left out and findings, which have places of their own."""
    found = inspected(chat, [pair("x", "y", "z", topic="t"), pair("x", "y", "y")], max_bad_rows=1)
    assert any("layout pairs" in line for line in found.overview)
    assert "Training does not read these columns: topic." in found.overview
    assert not any("left out, the first" in line for line in found.overview)


@pytest.mark.parametrize("bad", [False, True])
def test_each_source_of_a_mixture_is_inspected_by_itself(chat, jsonl, mixture, bad):
    """What is said of both together, and the run's sentence, stand at the first."""
    one = jsonl([pair("x", "yy", "z")] * 3, "a.jsonl")
    two = jsonl([pair("v", "w", "u"), pair("v", "w", "" if bad else "a")], "b.jsonl")
    found = inspection.inspect(
        mixture({"one": {"source": one}, "two": {"source": two}}), chat, recommended_loss("dpo"), views=1
    )
    assert [inspected.rows for inspected in found] == [3, 1 if bad else 2]
    assert found[0].lengths["chosen"] == [3] * 3 and found[1].views[0].source.endswith("b.jsonl:1")
    assert (found[0].refusal is not None and "two" in found[0].refusal) == bad


def test_a_source_of_a_mixture_that_cannot_be_read_is_named(chat, jsonl, mixture):
    """As a run names it."""
    sources = {"one": {"source": jsonl([pair("x", "yy", "z")])}, "two": {"source": jsonl([], "empty.jsonl")}}
    with pytest.raises(UserError, match=r"^data\.sources\.two: .*empty\.jsonl has no usable row\.$"):
        inspection.inspect(mixture(sources), chat, recommended_loss("dpo"), views=1)
