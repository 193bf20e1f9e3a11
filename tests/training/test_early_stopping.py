"""Early stopping: the rule, what a member keeps, and sweeps in which a member ends early."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from alignment.comparison.charts import frontiers
from alignment.comparison.curves import curves
from alignment.comparison.members import read_member
from alignment.comparison.ranking import compare
from alignment.comparison.sentences import cautions, headline, not_available
from alignment.comparison.tables import member_table, results, to_csv
from alignment.config.schema import StoppingConfig
from alignment.errors import UserError
from alignment.training.early_stopping import StopEarly, rank, rung_steps, stops
from tests.helpers.run_folders import change_json, change_values, make_run

NAN = math.nan


def config(metric: str = "nats/accuracies", eta: int = 2, rungs: int = 2) -> StoppingConfig:
    return StoppingConfig(metric=metric, eta=eta, rungs=rungs)


# The rule


@pytest.mark.parametrize(
    ("value", "others", "stopped_with_eta"),
    [
        (0.1, [], {2: False, 3: False, 4: False}),
        (0.6, [0.7], {2: True, 3: False, 4: False}),  # the best 1 of 2; too few for 3
        (0.7, [0.6], {2: False, 3: False, 4: False}),
        (0.6, [0.7, 0.5], {2: False, 3: True, 4: False}),  # the best 2 of 3, the best 1 of 3
        (0.5, [0.7, 0.6], {2: True, 3: True, 4: False}),
        (0.6, [0.7, 0.5, 0.4], {2: False, 3: False, 4: True}),  # the best 2, 2 and 1 of 4
        (0.5, [0.7, 0.6, 0.4], {2: True, 3: True, 4: True}),
        (0.5, [0.7, 0.6, 0.4, 0.3], {2: False, 3: True, 4: True}),  # the best 3, 2 and 2 of 5
        (0.6, [0.7, 0.5, 0.4, 0.3], {2: False, 3: False, 4: False}),
        # Who is as good as one that goes on goes on too.
        (0.7, [0.7], {2: False, 3: False, 4: False}),
        (0.7, [0.7, 0.7, 0.7], {2: False, 3: False, 4: False}),
        (0.5, [0.7, 0.5, 0.5], {2: False, 3: False, 4: True}),
        (0.5, [0.7, 0.7, 0.5], {2: True, 3: True, 4: True}),
        # What is no number is worse than any.
        (NAN, [0.1], {2: True, 3: False, 4: False}),
        (0.1, [NAN], {2: False, 3: False, 4: False}),
        (-math.inf, [NAN], {2: False, 3: False, 4: False}),
        (NAN, [NAN], {2: False, 3: False, 4: False}),
        (NAN, [NAN, NAN, 0.1], {2: False, 3: False, 4: True}),
    ],
)
def test_who_stops(value, others, stopped_with_eta):
    for eta, stopped in stopped_with_eta.items():
        assert stops(rank(value, others), 1 + len(others), eta) is stopped, eta


def test_as_many_go_on_as_the_rule_says():
    """By another way: the value of the last of the best 1/eta is the bar."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        count, eta = int(rng.integers(1, 13)), int(rng.integers(2, 5))
        values = rng.integers(0, 6, count).tolist()
        kept = count if count < eta else math.ceil(count / eta)
        bar = sorted(values, reverse=True)[kept - 1]
        for i, value in enumerate(values):
            others = values[:i] + values[i + 1 :]
            assert stops(rank(value, others), count, eta) is (value < bar)


@pytest.mark.parametrize(
    ("num_steps", "eta", "rungs", "expected"),
    [
        (24, 2, 2, {6: "1/4", 12: "1/2"}),
        (10, 3, 2, {2: "1/9", 4: "1/3"}),
        (100, 4, 1, {25: "1/4"}),
        (5, 2, 3, {1: "1/8", 2: "1/4", 3: "1/2"}),
        (6, 2, 3, {1: "1/8", 2: "1/4", 3: "1/2"}),
        (3, 2, 3, {1: "1/4"}),  # two rungs fall together; from the one at step 2 nothing could be saved
        (2, 2, 3, {}),
        (1, 2, 1, {}),
    ],
)
def test_the_rungs(num_steps, eta, rungs, expected):
    assert rung_steps(num_steps, config(eta=eta, rungs=rungs)) == expected


# A member


class Training:
    """What a Trainer tells the callback of a training in which nothing is computed."""

    def __init__(self, run_dir: Path, num_steps: int = 8, **settings) -> None:
        self.callback = StopEarly(config(**settings), run_dir, num_steps, 4)
        self.num_steps = num_steps
        self.step = 0

    def go_to(self, last: int, value: float, metric: str = "nats/accuracies") -> list[int]:
        """Train up to a step with one value in all evaluations; returns the steps that were evaluated."""
        evaluated = []
        if self.step == 0:
            self._evaluate(metric, value)
        while self.step < last:
            self.step += 1
            control = SimpleNamespace(should_evaluate=False, should_training_stop=self.step == self.num_steps)
            self.callback.on_step_end(None, SimpleNamespace(global_step=self.step), control)
            if control.should_evaluate:
                self._evaluate(metric, value)
                evaluated.append(self.step)
            if control.should_training_stop:
                break
        return evaluated

    def _evaluate(self, metric: str, value: float) -> None:
        state = SimpleNamespace(global_step=self.step)
        self.callback.on_evaluate(None, state, None, metrics={f"eval_{metric}": value, "eval_loss": 0.5})


def test_members_one_after_the_other(tmp_path):
    values = [0.5, 0.7, 0.6, 0.4, 0.7]
    ended = []
    for number, value in enumerate(values):
        training = Training(tmp_path / str(number))
        assert training.go_to(8, value) == ([2, 4] if training.step == 8 else [2])
        ended.append((training.step, training.callback.stopped and training.callback.stopped["place"]))
    # The first is alone, the second the better of two, the third the second of three, the fourth the last of four; who
    # has gone on is not asked again when a better one comes.
    assert ended == [(8, None), (8, None), (8, None), (3, 4), (8, None)]
    assert training.callback.stopped is None
    stopped = Training(tmp_path / "5")
    stopped.go_to(8, 0.3)
    assert stopped.callback.stopped == {
        "step": 3,
        "of_steps": 8,
        "rung": 2,
        "metric": "nats/accuracies",
        "value": 0.3,
        "place": 6,
        "of_members": 6,
    }


def test_members_in_step_are_all_compared_whoever_is_first(tmp_path):
    trainings = [Training(tmp_path / str(number)) for number in range(4)]
    for last in range(1, 9):
        for training, value in zip(trainings, [0.4, 0.5, 0.6, 0.7], strict=True):
            if training.callback.stopped is None:
                training.go_to(last, value)
    assert [training.step for training in trainings] == [3, 3, 5, 8]
    assert [training.callback.stopped["of_members"] for training in trainings[:3]] == [4, 4, 2]


def test_members_with_other_numbers_of_steps_are_compared_by_their_share(tmp_path):
    Training(tmp_path / "0", num_steps=40).go_to(12, 0.6)
    other = Training(tmp_path / "1", num_steps=8)
    other.go_to(8, 0.5)
    assert other.step == 3


def test_only_values_of_the_same_rung_and_metric_count(tmp_path):
    Training(tmp_path / "0").go_to(1, 0.9)
    Training(tmp_path / "1", metric="ranking/accuracies").go_to(8, 0.9, "ranking/accuracies")
    (tmp_path / "multirun.yaml").touch()
    alone = Training(tmp_path / "2")
    alone.go_to(8, 0.1)
    assert alone.step == 8


@pytest.mark.parametrize("first", [0.9, 0.1], ids=["stopped", "went on"])
def test_a_decision_is_kept(first, tmp_path):
    Training(tmp_path / "0").go_to(8, first)
    training = Training(tmp_path / "1")
    training.go_to(3, 0.5)
    assert (training.callback.stopped is not None) is (first == 0.9)
    # Now the other way round; a member that begins anew, or goes on from a step before, obeys the first decision.
    change_values(tmp_path / "0", 1.0 - first)
    again = Training(tmp_path / "1")
    again.go_to(3, 0.2)
    assert again.callback.stopped == training.callback.stopped


def test_a_member_that_was_not_asked_yet_is_asked_after_a_resume(tmp_path):
    Training(tmp_path / "0").go_to(8, 0.9)
    Training(tmp_path / "1").go_to(2, 0.5)
    resumed = Training(tmp_path / "1")
    resumed.step = 2
    resumed.go_to(8, 0.5)
    assert resumed.callback.stopped is not None and resumed.step == 3


def test_a_value_that_is_no_number_is_read_back(tmp_path):
    Training(tmp_path / "0").go_to(8, -1.0)
    training = Training(tmp_path / "1")
    training.go_to(8, NAN)
    assert training.step == 3 and math.isnan(training.callback.stopped["value"])


def test_a_metric_that_is_not_measured_is_refused_before_the_first_step(tmp_path):
    training = Training(tmp_path / "0", metric="nats/margins")
    with pytest.raises(UserError, match=r"stopping\.metric=nats/margins .* ranking/accuracies\.") as caught:
        training.go_to(8, 0.5, "ranking/accuracies")
    assert training.step == 0 and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("num_steps", "num_held_out", "said"), [(2, 4, "a stage of 2 steps"), (24, 0, "none are held out")]
)
def test_a_stage_that_cannot_be_stopped(num_steps, num_held_out, said, tmp_path):
    with pytest.raises(UserError, match=said):
        StopEarly(config(), tmp_path, num_steps, num_held_out)


# The comparison


def stopped_run(folder: Path, *, right: int, **settings) -> Path:
    """It reached step 7 of 24 and was asked nothing after that."""
    reason = {"step": 7, "of_steps": 24, "rung": 6, "metric": "nats/accuracies", "value": 0.5, "place": 3}
    make_run(folder, right=[i < right for i in range(20)], **settings)
    stages = json.loads((folder / "summary.json").read_text())["stages"]
    stages["preference"] |= {"steps": 7, "stopped": reason | {"of_members": 4}}
    change_json(folder / "summary.json", status="stopped", stages=stages, evaluation={})
    return folder


def test_stopped_members_are_in_the_comparison_but_not_in_its_ranks(tmp_path):
    scores = [1.0] * 4
    folders = [
        make_run(tmp_path / "0", settings={"beta": 0.1}, right=[i < 16 for i in range(20)], scores=scores),
        make_run(tmp_path / "1", settings={"beta": 0.2}, right=[i < 12 for i in range(20)], scores=scores),
        stopped_run(tmp_path / "2", settings={"beta": 0.2}, seed=1, right=20),
        stopped_run(tmp_path / "3", settings={"beta": 0.5}, right=20),
    ]
    found = compare([read_member(folder, folder.name) for folder in folders])
    assert [(variant.label, variant.seeds) for variant in found.ranked] == [
        ("DPO, beta 0.1", [0]),
        ("DPO, beta 0.2", [0]),
    ]
    assert found.rank_by.name == "win rate", "all that trained to the end have it"
    table = results(found)
    rows = {row[0]: set(row[1:]) for row in table.rows}
    assert "0\n1 stopped at step 7 of 24" in rows["DPO, beta 0.2"]
    assert any(cell.startswith("60.0%") for cell in rows["DPO, beta 0.2"]), "12 of 20, and not the 20 of seed 1"
    assert rows["DPO, beta 0.5"] == {"stopped", "0 stopped at step 7 of 24", "-"}
    said = "stopped at step 7 of 24: at step 6 number 3 of 4 members by nats/accuracies (0.5)"
    status = member_table(found).header.index("status")
    assert [row[status] for row in member_table(found).rows] == ["finished", "finished", said, said]
    assert "Stopped early and not ranked: 2 of 4 members." in headline(found)
    assert not_available(found) == []
    warned = dict(cautions(found))
    assert warned["In some variants only the better seeds trained to the end, which flatters their means"] == [
        "DPO, beta 0.2: 1 of 2 stopped"
    ]
    [told] = (details for kind, details in warned.items() if kind.startswith("Members that were stopped early"))
    assert told == [f"DPO, beta 0.2, seed 1: {said}", f"DPO, beta 0.5, seed 0: {said}"]
    assert not [kind for kind in warned if "steps" in kind or "prompts" in kind or "numbers of seeds" in kind]
    others = [detail for details in warned.values() if details is not told for detail in details]
    assert not [detail for detail in others if "beta 0.5" in detail], "what it is warned of where a training ended"
    assert len(curves(found)[0].figure["data"]) == 4
    assert "stopped early" in curves(found)[0].note
    assert len(frontiers(found)[0].figure["data"]) == 2
    lines = csv.DictReader(io.StringIO(to_csv(found)))
    assert [line["status"] for line in lines] == ["finished", "finished", "stopped", "stopped"]


def test_what_is_lost_of_a_stopped_member_is_no_error(tmp_path):
    folder = stopped_run(tmp_path / "0", right=3)
    summary = json.loads((folder / "summary.json").read_text())
    summary["stages"]["preference"]["stopped"] = "?"
    change_json(folder / "summary.json", **summary)
    found = compare([read_member(folder, "0"), read_member(make_run(tmp_path / "1"), "1")])
    assert "stopped" in [row[3] for row in member_table(found).rows]
