"""Training rows that an evaluation set has too: by 13 words in a row, or as a whole where there are fewer."""

import json

import pytest

from alignment.data.preparation.prepare import fit_preferences, read_preferences
from alignment.data.sources.decontamination import words_of
from alignment.data.sources.loading import load_rows, origins
from alignment.data.sources.opening import BUNDLED
from alignment.errors import UserError
from tests.conftest import recommended_loss

LONG = "Write a long letter to your landlord, and ask (politely!) why the heating has been off since Monday."
"""18 words."""


def pair(prompt, chosen="c", rejected="r"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def kept(config, rows, evaluation, jsonl, **fields):
    """The prompts of the rows that stay, and the rows that are left out."""
    names = [str(jsonl(records, f"eval{i}.jsonl")) for i, records in enumerate(evaluation)]
    data = load_rows(config(jsonl(rows), decontaminate=names, **fields), stage="preference")
    return [row.prompt for row in data.train], data.dropped


def test_words():
    """Lower case, no signs; full-width letters are letters, a Chinese character is a word."""
    assert words_of("It's Ｆull-width,\n42 größer_ÄPFEL!") == ["it", "s", "full", "width", "42", "größer", "äpfel"]
    assert words_of("写一封信 to me") == ["写", "一", "封", "信", "to", "me"]


@pytest.mark.parametrize(
    ("prompt", "stays"),
    [
        (LONG, False),
        (f"Please help. {LONG.upper().replace(',', ' -')} Thanks", False),
        (" ".join(LONG.split()[2:15]), False),
        (" ".join(LONG.split()[2:14]), True),
        (LONG.replace("politely", "nicely"), True),
        ("What is 2 + 3?", False),
        ("what is 2 3", False),
        ("Tell me: what is 2 + 3? And then write a poem about the sea, the sand and the sun", True),
        ("What is 2 + 4?", True),
    ],
)
def test_what_collides(prompt, stays, config, jsonl):
    """13 words in a row, wherever they stand; a shorter prompt of the evaluation set only as a whole."""
    found, dropped = kept(
        config, [pair(prompt), pair("other")], [[{"prompt": LONG}, {"prompt": "What is 2 + 3?"}]], jsonl
    )
    assert found == [prompt, "other"] if stays else found == ["other"]
    assert len(dropped) == (not stays)


@pytest.mark.parametrize(
    "record",
    [
        {"question": LONG, "answer": "x"},
        {"instruction": LONG},
        {"turns": ["Hello", LONG]},
        {
            "messages": [
                {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": "Hi"},
                {"role": "user", "content": LONG},
            ]
        },
        {"conversations": [{"from": "human", "value": LONG}]},
        {"prompt": [{"role": "user", "content": LONG}], "chosen": "x"},
        {"chosen": f"\n\nHuman: {LONG}\n\nAssistant: x", "rejected": "y"},
        {"prompt": f"\n\nHuman: {LONG}\n\nAssistant:"},
    ],
    ids=lambda record: next(iter(record)),
)
def test_prompts_of_evaluation_sets_in_every_layout(record, config, jsonl):
    """Texts, turns, messages of the user, dialogues in one text; their rows need no answers."""
    row = {"prompt": [{"role": "system", "content": "Hello"}, {"role": "user", "content": f"Now: {LONG}"}]}
    answers = {"chosen": [{"role": "assistant", "content": "c"}], "rejected": [{"role": "assistant", "content": "r"}]}
    greeting = {"prompt": [{"role": "system", "content": LONG}, {"role": "user", "content": "Good day"}]}
    found, dropped = kept(config, [row | answers, greeting | answers], [[record]], jsonl)
    assert len(found) == len(dropped) == 1 and found[0][1]["content"] == "Good day"


def test_answers_by_choice(config, jsonl):
    """With them every text of the evaluation set counts, but only for 13 words: a short answer is nobody's."""
    rows = [pair("a", chosen=f"Sure. {LONG}"), pair("b", chosen="Yes"), pair("c", rejected=LONG), pair("d")]
    evaluation = [[{"prompt": "x", "answer": LONG}, {"prompt": "y", "answer": "yes"}]]
    assert kept(config, rows, evaluation, jsonl)[0] == ["a", "b", "c", "d"]
    assert kept(config, rows, evaluation, jsonl, decontaminate_answers=True)[0] == ["b", "d"]
    rows = [pair(LONG)]
    with pytest.raises(UserError, match="has no usable row, and 1 that share words with an evaluation set: row 1"):
        kept(config, rows, evaluation, jsonl, decontaminate_answers=True)


def test_rows_that_are_left_out_are_named(config, jsonl, tiny):
    """With the words and the set; in the summary, and among the rows for rejected_rows.jsonl, whatever may be bad."""
    rows = [pair("first"), pair(f"So: {LONG}"), pair("last")]
    names = [str(jsonl([{"prompt": "first words"}], "one.jsonl")), str(jsonl([{"prompt": LONG}], "two.jsonl"))]
    path = jsonl(rows)
    settings = config(path, decontaminate=names)
    data, left_out = fit_preferences(read_preferences(settings, tiny), settings, recommended_loss("dpo"))
    assert data.info["dropped"] == {"contaminated": 1} and len(data.train) == 2
    [row] = left_out
    assert (row.reason, row.file, row.row) == ("contaminated", str(path), 2)
    words = "write a long letter to your landlord and ask politely why the heating"
    assert row.message == f"its prompt has the words '{words}' of {names[1]}"
    assert any("1 row is left out, the first" in note for note in data.info["notes"])


def test_held_out_rows_of_their_own_source_stay(config, jsonl):
    """What is trained on is what counts."""
    held_out = jsonl([pair(LONG)], "held_out.jsonl")
    settings = config(jsonl([pair(LONG), pair("x")]), eval_source=str(held_out), decontaminate=[str(held_out)])
    data = load_rows(settings, stage="preference")
    assert ([row.prompt for row in data.train], len(data.eval)) == (["x"], 1)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere.jsonl", r"data\.decontaminate: There is no file or folder 'nowhere.jsonl'"),
        ("{answers}", r"data\.decontaminate: .* has no prompts: its columns are answer, and prompts are looked for in"),
        ("{empty}", r"has no prompts: its columns are none"),
    ],
)
def test_evaluation_sets_that_are_none(name, said, config, jsonl):
    """A missing file, or one without prompts: one sentence."""
    places = {"answers": jsonl([{"answer": LONG}], "answers.jsonl"), "empty": jsonl([], "empty.jsonl")}
    with pytest.raises(UserError, match=said):
        load_rows(config(jsonl([pair("x")]), decontaminate=[name.format(**places)]), stage="preference")


def test_a_real_evaluation_set(shared, config, jsonl):
    """Each prompt of IFEval is found in a text around it; real pairs of another kind collide nowhere."""
    source = shared / "ifeval_prompts" / "input_data.jsonl"
    prompts = [json.loads(line)["prompt"] for line in source.read_text().splitlines()]
    short = sum(len(words_of(prompt)) < 13 for prompt in prompts)
    rows = [pair(f"Answer this: {prompt}") for prompt in prompts]
    data = load_rows(config(jsonl([*rows, pair("x")]), decontaminate=[str(source)]), stage="preference")
    assert len(data.dropped) == len(prompts) - short and short < 20
    pandalm = config(shared / "pandalm_human" / "pairs.jsonl", decontaminate=[str(source)])
    assert not load_rows(pandalm, stage="preference").dropped


def test_the_evaluation_sets_belong_to_the_files_of_prepared_data(config, jsonl):
    """Tokens that are kept depend on them, and of a bundled set on all of its files."""
    path, other = jsonl([pair("x")]), jsonl([{"prompt": LONG}], "eval.jsonl")
    assert origins(config(path, decontaminate=[str(other)])) == [path, other]
    bundled = sorted(BUNDLED.glob("quickstart_*.jsonl"))
    assert len(bundled) == 3
    assert origins(config(path, decontaminate=["bundled:quickstart"])) == [path, *bundled]


def test_bundled_sets_by_name(config):
    """`bundled:quickstart` is its held-out file; none of its prompts is trained on."""
    settings = config("bundled:quickstart", decontaminate=["bundled:quickstart"], limit=200)
    assert not load_rows(settings, stage="preference").dropped
