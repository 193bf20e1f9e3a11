"""Every kind of verifiable instruction, followed and not; and IFEval's own prompts where they are at hand."""

import json

import pytest

from alignment.errors import UserError
from alignment.evaluation.judges.base import Item
from alignment.evaluation.judges.ifeval import CHECKS, WITHOUT_CHECK, InstructionJudge, is_followed
from tests.conftest import shared_data

AT_LEAST_2, LESS_2 = {"relation": "at least"}, {"relation": "less than"}
CASES = {
    "combination:repeat_prompt": [
        ({"prompt_to_repeat": "Say hi. Twice"}, ["say hi. twice\nhi hi", "  Say hi. Twice"], ["hi. Say hi. Twice"]),
    ],
    "combination:two_responses": [
        ({}, ["one ****** two", "******one******two******"],
         ["one", "one ****** one ", "a******b******c", "a************b"]),
    ],
    "detectable_content:number_placeholders": [
        ({"num_placeholders": 2}, ["[name] and [street]", "[a][b][c]"], ["[name]", "(a) (b)", "[a\nb] [c]"]),
    ],
    "detectable_content:postscript": [
        ({"postscript_marker": "P.S."}, ["Bye.\nP.S. Write!", "bye p. s. x"], ["PS: write", "p.p"]),
        ({"postscript_marker": "P.P.S"}, ["P.P.S bye", "p. p. s. bye"], ["P.S. bye", "pps"]),
    ],
    "detectable_format:constrained_response": [
        ({}, ["My answer is yes.", "So: My answer is maybe. Bye"], ["my answer is yes.", "My answer is yes", "no"]),
    ],
    "detectable_format:json_format": [
        ({}, ['{"a": [1]}', '```json\n{"a": 1}\n```', "```JSON\n[]```", "```\n3\n```"],
         ['{"a": 1} bye', "{'a': 1}", "Here: {}", "[" * 99_999]),
    ],
    "detectable_format:multiple_sections": [
        ({"section_spliter": "SECTION", "num_sections": 2}, ["SECTION 1\na\nSECTION 2\nb", "SECTION1 SECTION2"],
         ["SECTION 1 a", "Section 1 Section 2", "SECTION SECTION"]),
    ],
    "detectable_format:number_bullet_lists": [
        ({"num_bullets": 2}, ["* a\n* b", "- a\n  * b\ntext", "*a\n-b"], ["* a", "* a\n* b\n* c", "** a **\n** b **"]),
    ],
    "detectable_format:number_highlighted_sections": [
        ({"num_highlights": 2}, ["*a b* and **c**", "*a* *b* *c*"], ["*a*", "** ** *a*", "*a\nb* *c*"]),
    ],
    "detectable_format:title": [
        ({}, ["<<A title>>\ntext", "text << x >>"], ["<title>", "<<>>", "<< >>", "<<a\nb>>"]),
    ],
    "keywords:existence": [
        ({"keywords": ["mom", "Father"]}, ["My MOM and father.", "moms, fathers"], ["mom", "dad"]),
        ({"keywords": ["c++"]}, ["I like C++"], ["I like c"]),
    ],
    "keywords:forbidden_words": [
        ({"forbidden_words": ["rock", "field"]}, ["rocks and fields", "stone"], ["a ROCK.", "the field"]),
    ],
    "keywords:frequency": [
        ({"keyword": "war", "frequency": 2, **AT_LEAST_2}, ["War and warfare", "war war war"], ["war", "peace"]),
        ({"keyword": "war", "frequency": 2, **LESS_2}, ["war", "peace"], ["war WAR"]),
    ],
    "keywords:letter_frequency": [
        ({"letter": "t", "let_frequency": 2, "let_relation": "at least"}, ["Tt", "tattle"], ["t", "x"]),
        ({"letter": "#", "let_frequency": 2, "let_relation": "less than"}, ["#a", "a"], ["#a #b"]),
    ],
    "length_constraints:nth_paragraph_first_word": [
        ({"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "president"},
         ["a b\n\nPresident, x", 'a\n\n"President" x', "a\n\npresident's x"],
         ["President\n\na", "a\n\nPresidents x", "President", "a\n\nb\n\npresident", "a\n\n\n\npresident"]),
    ],
    "length_constraints:number_paragraphs": [
        ({"num_paragraphs": 2}, ["a\n***\nb", "***\na *** b\n***"], ["a\n\nb", "a *** b *** c", "a *** *** b"]),
    ],
    "length_constraints:number_words": [
        ({"num_words": 3, **AT_LEAST_2}, ["one two three", "a-b c"], ["one two", "!!! ?"]),
        ({"num_words": 3, **LESS_2}, ["one, two"], ["one two three"]),
    ],
    "punctuation:no_comma": [({}, ["a; b"], ["a, b"])],
    "startend:end_checker": [
        ({"end_phrase": "Any question?"}, ["Bye. Any question?", 'x any QUESTION?"\n'], ["Any question? Bye", "x"]),
    ],
    "startend:quotation": [({}, ['"a b"', ' ""\n'], ['"a', "'a'", '"', 'x "a"'])],
}  # fmt: skip
EACH = [(kind, *case) for kind, cases in CASES.items() for case in cases]


@pytest.mark.parametrize(("kind", "settings", "followed", "broken"), EACH)
def test_an_instruction_is_followed_or_not(kind, settings, followed, broken):
    """Both outcomes, by hand from the description of each kind."""
    assert [text for text in followed if not is_followed(kind, text, settings)] == []
    assert [text for text in broken if is_followed(kind, text, settings)] == []


def test_every_kind_has_cases_and_an_empty_answer_follows_none():
    """A kind that is added without cases fails here."""
    assert CASES.keys() == CHECKS.keys() and not CHECKS.keys() & set(WITHOUT_CHECK)
    assert not any(is_followed(kind, " \n", settings) for kind, settings, *_ in EACH)


def item(answer="", **meta) -> Item:
    return Item("Do it.", (answer,), meta, "rows.jsonl:7")


def test_the_score_is_the_share_that_is_followed():
    """Settings of other kinds stand there as null, as in the hub's copy of the prompts."""
    asked = {
        "instruction_id_list": ["punctuation:no_comma", "keywords:frequency"],
        "kwargs": [{}, {"keyword": "a", "frequency": 2, "relation": "at least", "num_words": None}],
    }
    half, all_of_it = InstructionJudge().score([item("b, a a", **asked), item("a a", **asked)])
    assert (half.score, half.correct, half.reasons) == (0.5, False, ("does not follow punctuation:no_comma",))
    assert (all_of_it.score, all_of_it.correct, all_of_it.reasons) == (1.0, True, ())


@pytest.mark.parametrize(
    ("meta", "said"),
    [
        ({}, "needs a list `instruction_id_list`"),
        ({"instruction_id_list": ["startend:quotation"], "kwargs": []}, "needs a list `instruction_id_list`"),
        (
            {"instruction_id_list": ["startend:quotes"], "kwargs": [{}]},
            r"no instruction startend:quotes \(did you mean",
        ),
        ({"instruction_id_list": [WITHOUT_CHECK[0]], "kwargs": [{}]}, "leave such prompts out"),
        ({"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": None}]}, "lacks keywords"),
    ],
)
def test_what_cannot_be_checked_is_refused_before_the_run(meta, said):
    """One sentence, which names the row."""
    with pytest.raises(UserError, match=f"rows.jsonl:7: .*{said}"):
        InstructionJudge().require([item(**meta)])


def test_most_of_the_published_prompts_can_be_judged():
    """387 of 541; the others have an instruction that needs NLTK or langdetect."""
    rows = [json.loads(line) for line in (shared_data("ifeval_prompts") / "input_data.jsonl").read_text().splitlines()]
    judge, usable = InstructionJudge(), []
    for row in rows:
        if not set(WITHOUT_CHECK) & set(row["instruction_id_list"]):
            asked = Item(row["prompt"], (row["prompt"],), row)
            judge.require([asked])
            usable.append(asked)
    assert (len(usable), len(rows)) == (387, 541)
    assert all(found.score is not None for found in judge.score(usable))
