"""A signal to stop: the step ends, its checkpoint is whole, and the run goes on from there to the last bit."""

import os
import signal

import pytest
from transformers import TrainerCallback

from alignment.training.callbacks import Checkpoints, Rhythm, complete_checkpoints
from alignment.training.sampler import StepSampler
from alignment.training.stop_signal import CheckpointAtStop
from tests.conftest import random_groups, tiny_policy
from tests.helpers.steps import make_loss, make_trainer

GROUPS = random_groups(6, seed=21)


class Sends(TrainerCallback):
    """Sends signals to this process in the midst of the second step."""

    def __init__(self, *numbers: int) -> None:
        self._numbers = numbers

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 1:
            for number in self._numbers:
                os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def _handlers():
    """SIGTERM is Ctrl-C, as in the command, and SIGUSR2 a launcher's wish."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)}
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def prepared(folder, *callbacks, num_steps=3, save_every=50):
    """A trainer of a few steps; its checkpoints are far apart."""
    trainer = make_trainer(tiny_policy(trained=True), GROUPS, make_loss("dpo"), folder)
    trainer.sampler = StepSampler(len(GROUPS), 2, 0, max_steps=num_steps)
    for callback in (*callbacks, Rhythm(None), Checkpoints(2), CheckpointAtStop()):
        trainer.add_callback(callback)
    settings = {"max_steps": num_steps, "learning_rate": 1e-2, "save_steps": save_every or 50, "logging_steps": 50}
    for name, value in (settings | {"save_strategy": "steps" if save_every else "no"}).items():
        setattr(trainer.args, name, value)
    return trainer


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def test_the_step_that_was_running_is_kept_and_the_run_ends_as_if_never_stopped(tmp_path):
    whole = prepared(tmp_path / "whole")
    whole.train()
    stopped = prepared(tmp_path / "stopped", Sends(signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    [(step, checkpoint)] = complete_checkpoints(tmp_path / "stopped")
    assert step == 2 and signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    again = prepared(tmp_path / "stopped")
    again.load_state(checkpoint)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert all(value.equal(weights(again)[name]) for name, value in weights(whole).items())


@pytest.mark.slow
def test_two_wishes_are_both_obeyed_and_the_same_twice_at_once(tmp_path):
    """A cluster that warns with one signal may send the other too; who asks twice does not wait for the step."""
    asked = []
    signal.signal(
        signal.SIGUSR2, lambda number, _: asked.append((number, len(complete_checkpoints(tmp_path / "both"))))
    )
    with pytest.raises(KeyboardInterrupt):
        prepared(tmp_path / "both", Sends(signal.SIGUSR2, signal.SIGTERM)).train()
    assert asked == [(signal.SIGUSR2, 1)]
    with pytest.raises(KeyboardInterrupt):
        prepared(tmp_path / "twice", Sends(signal.SIGTERM, signal.SIGTERM)).train()
    assert not complete_checkpoints(tmp_path / "twice")


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"save_every": 0}, {"num_steps": 2}])
def test_a_stage_without_a_checkpoint_to_write_stops_too(settings, tmp_path):
    """One that keeps none stops in its step, and one in its last step after it."""
    trainer = prepared(tmp_path, Sends(signal.SIGTERM), **settings)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step == settings.get("num_steps", 1)
    assert not complete_checkpoints(tmp_path)
