"""Conversations: what is asked, what comes back, who is hidden, and which votes are kept."""

import json

import numpy as np
import pytest

from alignment.chat.session import Session, Settings, Stopped
from alignment.chat.votes import check_votes, keep_vote
from alignment.config.compose import load
from alignment.data.sources.loading import load_rows
from alignment.errors import UserError
from alignment.evaluation.sampling.answer import as_text
from alignment.evaluation.sampling.draw import draw
from alignment.evaluation.sampling.local import LocalEngine
from tests.helpers.chats import SHORT, chat, finished, silent, write_adapter


@pytest.fixture(scope="module")
def adapters(tiny_model_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return [write_adapter(tiny_model_folder, root / name, seed) for seed, name in enumerate(("one", "two"), 1)]


def texts(session: Session) -> list[list[str]]:
    return [[reply.text for reply in turn.replies] for turn in session.turns]


# Answers


def test_answers_are_those_that_the_engine_draws(adapters):
    """The same tokens as an evaluation's engine draws with this seed, and the text grows to the whole of them."""
    session = chat(*adapters)
    shown: list[tuple[int, str]] = []
    session.ask("Add 3 and 21", lambda column, text: shown.append((column, text)))
    for number, speaker in enumerate(session.guests.speakers):
        reply = session.turns[0].replies[number]
        with speaker.memory.acting(speaker.weights) as model:
            [[answer]] = draw(
                LocalEngine(model, speaker.memory.device, 4), [reply.prompt], 1, SHORT.sampling(speaker.stops)
            )
        assert reply.tokens.tolist() == answer.tokens.tolist() and reply.finish is answer.finish
        grown = [text for column, text in shown if column == number]
        whole = [as_text(speaker.questions.tokenizer, reply.tokens[:n].tolist(), speaker.stops) for n in range(1, 7)]
        assert grown == whole[: len(reply.tokens)] and grown[-1] == reply.text
    assert [column for column, _ in shown] == sorted(column for column, _ in shown), "one after the other"


def test_the_same_seed_gives_the_same_chat_and_retry_another(adapters):
    one, two = chat(*adapters), chat(*adapters)
    for session in (one, two):
        session.ask("First", silent)
        session.ask("Second", silent)
    assert texts(one) == texts(two)
    before = texts(one)[1]
    one.retry(silent)
    assert len(one.turns) == 2 and one.last.attempt == 1 and texts(one)[1] != before
    two.settings = two.settings.changed("seed", "5")
    two.retry(silent)
    assert texts(two)[1] != texts(one)[1]
    greedy = chat(*adapters, settings=SHORT.changed("temperature", "0"))
    greedy.ask("First", silent)
    once = texts(greedy)
    greedy.retry(silent)
    assert texts(greedy) == once


def test_each_policy_goes_on_from_its_own_answers(adapters):
    session = chat(*adapters, system="Be kind.")
    session.ask("First", silent)
    session.ask("Second", silent)
    assert texts(session)[0][0] != texts(session)[0][1]
    for number, speaker in enumerate(session.guests.speakers):
        first, second = (turn.replies[number] for turn in session.turns)
        expected = speaker.prompt(
            [
                {"role": "system", "content": "Be kind."},
                {"role": "user", "content": "First"},
                {"role": "assistant", "content": first.text},
                {"role": "user", "content": "Second"},
            ]
        )
        np.testing.assert_array_equal(second.prompt, expected)


def test_one_answer_is_stopped_and_the_other_is_drawn(adapters):
    session = chat(*adapters)
    steps = []

    def show(column, text):
        steps.append(column)
        if steps == [0, 0]:
            raise Stopped

    session.ask("First", show)
    stopped, whole = session.turns[0].replies
    assert len(stopped.tokens) == 2 and stopped.cut == "stopped"
    assert len(whole.tokens) == 6 and whole.cut == "cut after 6 tokens"


def test_undo_reset_and_what_fails_leave_a_whole_conversation(adapters):
    session = chat(*adapters)
    with pytest.raises(UserError, match="Nothing was asked yet"):
        session.undo()
    session.ask("First", silent)
    session.ask("Second", silent)
    before = texts(session)
    with pytest.raises(UserError, match="reads 1024"):
        session.ask("long " * 300, silent)
    assert texts(session) == before
    assert session.undo() == "Second" and texts(session) == before[:1]
    session.reset()
    assert session.turns == []
    session.ask("First", silent)
    session.set_system("Be kind.")
    assert session.turns == [], "another system text belongs to another conversation"


def test_what_is_saved(adapters):
    session = chat(*adapters, system="Be kind.")
    session.ask("First", silent)
    saved = json.loads(json.dumps(session.saved()))
    assert saved["policies"] == ["one", "two"] and saved["system"] == "Be kind."
    [turn] = saved["turns"]
    assert turn["question"] == "First" and turn["settings"]["max_new_tokens"] == 6 and turn["winner"] is None
    assert [answer["text"] for answer in turn["answers"]] == texts(session)[0]
    assert turn["answers"][0]["cut"] == "cut after 6 tokens"


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("temperatures", "1", "There is no setting temperatures .did you mean temperature.."),
        ("temperature", "hot", "temperature must be a number, not 'hot'"),
        ("temperature", "-1", "temperature must be a finite number, at least 0"),
        ("max_new_tokens", "1.5", "max_new_tokens must be an integer, not '1.5'"),
        ("max_new_tokens", "0", "max_new_tokens must be at least 1"),
        ("top_p", "0", r"top_p must be in \(0, 1\]"),
    ],
)
def test_settings_are_checked(key, value, told):
    with pytest.raises(UserError, match=told):
        Settings().changed(key, value)


# Blind


def test_a_blind_chat_hides_names_until_the_vote(adapters, tmp_path):
    session = chat(*adapters, blind=True, chance=1)
    orders = set()
    for _ in range(6):
        session.ask("First", silent)
        orders.add(tuple(session.order))
        assert session.titles == ["A", "B"] and session.hides
        with pytest.raises(UserError, match="vote first"):
            session.heat(0)
        with pytest.raises(UserError, match="vote first"):
            session.saved()
        order = list(session.order)
        session.ask("Second", silent)
        assert session.order == order, "whoever was A stays A as long as the conversation lasts"
        session.vote("tie", tmp_path / "votes.jsonl")
        assert not session.hides
        assert session.titles == [f"{a}: {('one', 'two')[number]}" for a, number in zip("AB", order, strict=True)]
        with pytest.raises(UserError, match="names are known"):
            session.retry(silent)
        assert session.renew() and session.turns == []
    assert orders == {(0, 1), (1, 0)}
    session.ask("First", silent)
    session.vote("tie", tmp_path / "votes.jsonl")
    session.ask("Second", silent)
    assert len(session.turns) == 1 and session.hides, "a new conversation has begun"
    with pytest.raises(UserError, match="needs two policies"):
        chat(adapters[0], against="none", blind=True)


# Votes


def rows_of(path, *settings):
    data = load("recipe=quickstart", f"data.source={path}", "data.limit=null", *settings).data
    return load_rows(data, stage="preference").train


def test_votes_are_preference_data(adapters, tmp_path):
    """A blind vote in each order, one on two turns and a tie, read as a run reads them."""
    path = tmp_path / "votes.jsonl"
    expected = []
    session = chat(*adapters, system="Be kind.", blind=True, chance=3)
    for number in range(4):
        session.ask(f"Question {number}", silent)
        finished(session)
        vote = "ab"[number % 2]
        better = session.order["ab".index(vote)]
        session.vote(vote, path)
        assert session.last.winner == better
        expected.append([session.last.replies[n].text for n in (better, 1 - better)])
    plain = chat(*adapters)
    for question in ("First", "Second"):
        plain.ask(question, silent)
        finished(plain)
    plain.vote("b", path)
    plain.retry(silent)
    plain.vote("tie", path)

    rows = rows_of(path)
    assert len(rows) == 5, "a tie makes no pair"
    for number, (row, (chosen, rejected)) in enumerate(zip(rows, expected, strict=False)):
        system, question = row.prompt
        assert system == {"role": "system", "content": "Be kind."} and question["content"] == f"Question {number}"
        assert [completion[0]["content"] for completion in row.completions] == [chosen, rejected]
    turns = rows[-1]
    assert [message["content"] for message in turns.prompt] == ["First"]
    both = [[message["content"] for message in completion] for completion in turns.completions]
    first, second = plain.turns[0].replies, json.loads(path.read_text().splitlines()[4])
    assert both[0] == [first[1].text, "Second", second["conversation_b"][-1]["content"]]
    assert both[1] == [first[0].text, "Second", second["conversation_a"][-1]["content"]]
    assert len(rows_of(path, "data.ties=both_ways")) == 7
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert {row["model_a"] for row in kept} == {"one", "two"} and kept[0]["blind"] and not kept[4]["blind"]
    assert kept[0]["settings"] == {
        "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "max_new_tokens": 6, "seed": 0
    }  # fmt: skip


def test_votes_that_would_teach_something_wrong_are_refused(adapters, tmp_path):
    path = tmp_path / "votes.jsonl"
    session = chat(*adapters)
    for words, told in (("a", "Nothing was asked yet"), ("c", "A vote is one of a, b, tie, not 'c'")):
        with pytest.raises(UserError, match=told):
            session.vote(words, path)
    session.ask("First", silent)
    with pytest.raises(UserError, match=r"An answer of A was cut after 6 tokens.*draw others with /retry"):
        session.vote("a", path)
    session.ask("Second", silent)
    finished(session)
    with pytest.raises(UserError, match=r"An answer of B was cut.*begin anew with /reset"):
        session.vote("b", path)
    session.reset()
    session.ask("First", silent)
    finished(session)
    session.last.replies[1] = session.last.replies[0]  # and whole
    with pytest.raises(UserError, match="Both answers are the same"):
        session.vote("a", path)
    assert not path.exists()
    session.vote("tie", path)
    with pytest.raises(UserError, match="You have voted on these answers"):
        session.vote("tie", path)
    assert len(path.read_text().splitlines()) == 1
    with pytest.raises(UserError, match="two policies side by side"):
        chat(adapters[0], against="none").vote("a", path)


def test_a_vote_that_cannot_be_kept_is_none(adapters, tmp_path):
    session = chat(*adapters)
    session.ask("First", silent)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        session.vote("tie", tmp_path / "file" / "votes.jsonl")
    assert session.last.winner is None and not session.is_known


def test_the_file_of_votes(tmp_path):
    """Appended whole, after a last line that somebody left open; another file is refused before anything is asked."""
    path = tmp_path / "new" / "votes.jsonl"
    check_votes(path)
    keep_vote(path, {"conversation_a": "é\n"})
    path.write_bytes(path.read_bytes().rstrip())
    keep_vote(path, {"conversation_a": 2})
    assert [json.loads(line)["conversation_a"] for line in path.read_text().splitlines()] == ["é\n", 2]
    check_votes(path)
    other = tmp_path / "pairs.jsonl"
    other.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    with pytest.raises(UserError, match="holds other data than votes"):
        check_votes(other)
    with pytest.raises(UserError, match=r"must end in .jsonl"):
        check_votes(tmp_path / "votes.json")
