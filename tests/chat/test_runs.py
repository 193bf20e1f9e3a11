"""Finished runs speak as they answered their held-out prompts, and a run trains on the votes of a chat with them."""

import json
import shutil

import numpy as np
import pytest
import yaml

from alignment.chat.opening import open_guests
from alignment.chat.session import Session, Settings
from alignment.errors import UserError
from tests.helpers.chats import SHORT, finished, silent
from tests.helpers.commands import command, write_project

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_model_folder):
    """A run with SFT and DPO and one without an adapter; the configuration folder and the cache."""
    root = tmp_path_factory.mktemp("chats")
    config = write_project(root / "project", tiny_model_folder)

    def run(name, *words):
        where = f"hydra.run.dir={name}"
        ended = command("--config-dir", str(config), "recipe=tiny", *words, where, cwd=root, cache=root / "cache")
        assert ended.code == 0, ended.err
        return root / name

    return run, run("one"), run("whole", "adapter=none", "sft=none", "trainer.max_steps=2", "evaluation.prompts=0")


@pytest.fixture(autouse=True)
def _recipes(made):
    """The runs' own recipe, as --config-dir has it."""
    from alignment.config.registry import register

    register(made[1].parent / "project" / "conf")


def guests_of(*folders, against="start"):
    return open_guests([str(folder) for folder in folders], against, ["device=cpu"])


def test_a_run_answers_as_it_has_answered(made):
    """Greedily and as long: the answers of its folder, before training, after SFT and at the end."""
    _, one, _ = made
    samples = [json.loads(line) for line in (one / "samples.jsonl").read_text().splitlines()]
    assert len({row[moment] for row in samples for moment in ("start", "sft", "final")}) > 2
    for against, moment in (("start", "start"), ("sft", "sft")):
        guests = guests_of(one, against=against)
        session = Session(guests, Settings(temperature=0.0, max_new_tokens=4), guests.speakers[0].system)
        for row in samples:
            session.reset()
            session.ask(row["prompt"], silent)
            assert [reply.text for reply in session.last.replies] == [row["final"], row[moment]]
        assert session.titles == ["A: one", {"start": "B: base", "sft": "B: after SFT"}[against]]
        assert len(guests.speakers[0].memory._bases) == 1


def test_a_whole_model_has_a_start_of_its_own(made):
    _, one, whole = made
    guests = guests_of(whole, one)
    prompt, answer = np.array([7, 8], np.int32), np.array([3, 4, 5], np.int32)
    found = [speaker.logps(prompt, answer) for speaker in (*guests.speakers, guests.pairs[0][1], guests.pairs[1][1])]
    np.testing.assert_array_equal(found[2], found[3])
    assert min(np.abs(found[a] - found[b]).max() for a, b in ((0, 1), (0, 2), (1, 2))) > 1e-3
    assert len(guests.speakers[0].memory._bases) == 2, "the trained model, and one base for all else"


def test_what_is_no_policy_is_refused(made, tmp_path):
    _, one, _ = made
    shutil.copytree(one, tmp_path / "sweep" / "0-one")
    shutil.copytree(one, tmp_path / "sweep" / "1-two")
    with pytest.raises(UserError, match=r"holds 2 runs: name one or two of them, such as .*0-one"):
        guests_of(tmp_path / "sweep")
    assert [speaker.name for speaker in guests_of(tmp_path / "sweep" / "0-one", one).speakers][1].endswith("one")
    shutil.rmtree(tmp_path / "sweep" / "1-two" / "adapter")
    with pytest.raises(UserError, match="has no policy to chat with: it is not finished"):
        guests_of(tmp_path / "sweep" / "1-two")
    shutil.rmtree(tmp_path / "sweep" / "0-one" / "stages" / "sft")
    with pytest.raises(UserError, match="has no policy after SFT"):
        guests_of(tmp_path / "sweep" / "0-one", against="sft")
    with pytest.raises(UserError, match="is no run folder and holds none"):
        guests_of(tmp_path)


def test_a_run_trains_on_votes(made, tmp_path):
    """As the file is, with the run's own recipe: every vote but the tie is a pair."""
    run, one, _ = made
    guests, votes = guests_of(one), tmp_path / "votes.jsonl"
    session = Session(guests, SHORT, guests.speakers[0].system, blind=True)
    for number in range(8):
        session.ask(f"Add {number} and 1", silent)
        finished(session)
        session.vote(("a", "b", "a", "tie")[number % 4], votes)
    trained = run("voted", f"data.source={votes}", "trainer.max_steps=2", "evaluation.prompts=0")
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["data"]["preference"]["train"] == 6
    assert yaml.safe_load((trained / "config.yaml").read_text())["data"]["source"] == str(votes)
    assert [speaker.name for speaker in guests_of(trained, one).speakers] == ["voted", "one"]
