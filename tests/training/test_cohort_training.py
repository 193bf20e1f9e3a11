"""Members of a cohort train as each would by itself, whatever happens to the others."""

import functools
import signal
import threading
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments

from alignment.errors import NotFinite, UserError
from alignment.policy.layers import checkpoint_layers
from alignment.policy.load import save_policy
from alignment.reference.live import LiveReference
from alignment.training.callbacks import Checkpoints, Rhythm, last_checkpoint, prepare_trainer
from alignment.training.cohort import Cohort
from alignment.training.sampler import StepSampler
from alignment.training.trainer import PreferenceTrainer
from tests.conftest import recommended_loss
from tests.helpers.cohorts import LAYOUTS, frozen_base, policy_on
from tests.helpers.steps import groups_for

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Training:
    """One training of a cohort."""

    loss: str
    lr: float = 1e-2
    r: int = 4
    seed: int = 0
    steps: int = 3
    groups_per_step: int = 4
    clip: float = 1.0


FIVE = (
    Training("dpo", steps=4),
    Training("ipo", lr=3e-3, r=2, seed=1),
    Training("simpo", lr=2e-2, r=8, seed=2, groups_per_step=7),
    Training("kto", seed=3, clip=0.1),
    Training("orpo", lr=5e-3, r=3, seed=4, groups_per_step=2, steps=5),
)
COUPLED = (Training("beta_dpo"), Training("wpo", seed=1), Training("aot", seed=2, steps=2), Training("dpo", seed=3))


def trainer_of(base, training, folder, *, layout="shared", every=0, max_steps=None):
    loss = recommended_loss(training.loss)
    groups = groups_for(loss, num=10)
    policy = policy_on(base, r=training.r, seed=training.seed, shared=layout == "shared")
    checkpoint_layers(policy, every)
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=max_steps or training.steps, use_cpu=True, report_to="none",
        disable_tqdm=True, remove_unused_columns=False, learning_rate=training.lr, save_strategy="steps", save_steps=2,
        logging_steps=1, lr_scheduler_type="constant", seed=training.seed, max_grad_norm=training.clip,
    )  # fmt: skip
    rows = LAYOUTS[layout]()
    trainer = PreferenceTrainer(
        model=policy, args=arguments, groups=groups, eval_groups=groups[:3], loss=loss,
        reference=LiveReference(policy, rows, 1000, CPU) if loss.requirements().reference else None, layout=rows,
        tokens_per_batch=60, sampler=StepSampler(len(groups), training.groups_per_step, training.seed, 2),
        callbacks=[Rhythm(2), Checkpoints(5)],
    )  # fmt: skip
    prepare_trainer(trainer, None)
    return trainer


def train(trainer, resume=False):
    checkpoint, _ = last_checkpoint(Path(trainer.args.output_dir)) if resume else (None, 0)
    if checkpoint is not None:
        trainer.load_state(checkpoint)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return trainer


def together(base, trainers, resume=False, width=None):
    def training(member, trainer):
        member.base(lambda: base)
        trainer.objective.passes = member
        return train(trainer, resume)

    cohort = Cohort(width or len(trainers))
    return cohort.run([partial(training, trainer=trainer) for trainer in trainers])


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def history(trainer):
    """What was logged, but for sums since the process began, and for signs of differences that are 0."""
    kept = []
    for row in trainer.state.log_history:
        left_out = ("runtime", "_per_second", "train_loss", *(("accuracies", "ties") if row["step"] == 1 else ()))
        kept.append({name: value for name, value in row.items() if not name.endswith(left_out)})
    return kept


def assert_same(found, expected, tolerance=1e-10):
    for name, value in weights(expected).items():
        torch.testing.assert_close(weights(found)[name], value, rtol=tolerance, atol=tolerance)
    assert len(history(found)) == len(history(expected))
    for row, other in zip(history(found), history(expected), strict=True):
        assert row == pytest.approx(other, rel=max(tolerance, 1e-5), abs=1e-6)
    assert found.objective.state == pytest.approx(expected.objective.state)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Each training by itself, done once for all tests that compare with it."""

    @functools.cache
    def trained(training, layout="shared", tokens=60):
        trainer = trainer_of(frozen_base(), training, tmp_path_factory.mktemp("alone"), layout=layout)
        trainer.tokens_per_batch = tokens
        return train(trainer)

    return trained


@pytest.mark.parametrize(
    ("trainings", "layout", "every"),
    [
        (FIVE, "shared", 0),
        pytest.param(FIVE[:3], "flat", 1, marks=pytest.mark.matrix),
        pytest.param(COUPLED, "shared", 0, marks=pytest.mark.matrix),
    ],
)
def test_members_end_as_each_would_by_itself(trainings, every, layout, tmp_path, alone):
    """Losses, learning rates, ranks, seeds, clipping, sizes and numbers of steps all differ."""
    base = frozen_base()
    members = [
        trainer_of(base, training, tmp_path / f"member{i}", layout=layout, every=every)
        for i, training in enumerate(trainings)
    ]
    assert together(base, members) == members
    for member, training in zip(members, trainings, strict=True):
        assert_same(member, alone(training, layout))


FEW = (Training("dpo"), Training("kto", lr=3e-3, r=2, seed=1, steps=4))


def test_members_are_resumed_and_saved_as_their_own_runs(tmp_path, alone):
    base = frozen_base()
    cut = [trainer_of(base, t, tmp_path / f"member{i}", max_steps=3) for i, t in enumerate(FEW)]
    assert together(base, cut) == cut  # the checkpoints are those of step 2
    resumed = [trainer_of(base, t, tmp_path / f"member{i}") for i, t in enumerate(FEW)]
    assert together(base, resumed, resume=True) == resumed
    assert [history(trainer)[0]["step"] for trainer in resumed] == [1, 1]  # of the checkpoint
    for member, training in zip(resumed, FEW, strict=True):
        assert_same(member, alone(training))
        saved = []
        for trainer, folder in ((member, tmp_path / "together"), (alone(training), tmp_path / "alone")):
            save_policy(trainer.model, Tokenizer(), folder)
            saved.append(load_file(folder / "adapter_model.safetensors"))
        assert saved[0].keys() == saved[1].keys() and len(saved[0]) == 28
        assert saved[0]["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"].shape == (training.r, 32)
        for name, tensor in saved[0].items():
            torch.testing.assert_close(tensor, saved[1][name], rtol=1e-10, atol=1e-10)


class Tokenizer:
    """Has no files."""

    def save_pretrained(self, folder):
        """Save nothing."""


@pytest.mark.matrix
def test_a_place_that_is_free_goes_to_the_next_member(tmp_path, alone):
    """Four members of 4, 3, 3 and 3 steps in two places, which are never empty but at the end."""
    base = frozen_base()
    trainings = (FIVE[0], FIVE[1], FIVE[3], FEW[0])
    members = [trainer_of(base, t, tmp_path / f"member{i}") for i, t in enumerate(trainings)]
    assert together(base, members, width=2) == members
    for member, training in zip(members, trainings, strict=True):
        assert_same(member, alone(training))


def test_members_take_turns(tmp_path, alone):
    """Each ends with the very bits that it has by itself, and each has had its first step before one has its second."""
    base = frozen_base()
    trainers = [trainer_of(base, t, tmp_path / str(i)) for i, t in enumerate(FEW)]
    steps = []
    for i, trainer in enumerate(trainers):
        trainer.add_callback(Steps(i, steps))
    assert together(base, trainers) == trainers
    assert steps[: 2 * len(FEW)] == [(i, step) for step in (1, 2) for i in range(len(FEW))]
    for member, training in zip(trainers, FEW, strict=True):
        assert_same(member, alone(training), tolerance=0)


@dataclass
class Steps(TrainerCallback):
    """Notes whose steps end when."""

    member: int
    ended: list

    def on_step_end(self, args, state, control, **kwargs):
        """Note it."""
        self.ended.append((self.member, state.global_step))


def test_a_member_that_fails_leaves_the_others_alone(tmp_path, alone):
    base = frozen_base()
    trainers = [trainer_of(base, t, tmp_path / str(i)) for i, t in enumerate(FEW)]
    failing = trainer_of(base, Training("ipo"), tmp_path / "failing")
    failing.add_callback(FailAt(2))
    error, *others = together(base, [failing, *trainers])
    assert isinstance(error, UserError) and str(error) == "enough"
    assert others == trainers
    for member, training in zip(trainers, FEW, strict=True):
        assert_same(member, alone(training))


class FailAt(TrainerCallback):
    """Fails in the middle of a training, as a bad disk would."""

    def __init__(self, step, error=UserError):
        self._step, self._error = step, error

    def on_step_end(self, args, state, control, **kwargs):
        """Fail."""
        if state.global_step == self._step:
            raise self._error("enough")


@pytest.mark.matrix
@pytest.mark.parametrize("where", ["weights", "gradient"])
def test_a_member_without_finite_numbers_does_not_spoil_the_others(where, tmp_path, monkeypatch, alone):
    """It stops before its next update, and the others end as they would without it."""
    base = frozen_base()
    trainers = [trainer_of(base, t, tmp_path / str(i)) for i, t in enumerate(FEW)]
    broken = trainer_of(base, Training("simpo", steps=4), tmp_path / "broken")
    if where == "weights":
        broken.add_callback(BreakAt(1))
    else:
        monkeypatch.setattr(broken.objective, "loss", BrokenLoss(broken.objective.loss))
    before = weights(broken)
    first, error, last = together(base, [trainers[0], broken, trainers[1]])
    assert [first, last] == trainers
    step = 2 if where == "weights" else 1
    assert isinstance(error, NotFinite) and str(error).startswith(f"The preference stage stopped at step {step}, ")
    if where == "gradient":
        assert all(torch.equal(value, before[name]) for name, value in weights(broken).items())
    for member, training in zip(trainers, FEW, strict=True):
        assert_same(member, alone(training))


class BreakAt(TrainerCallback):
    """Puts infinite weights into a policy."""

    def __init__(self, step):
        self._step = step

    def on_step_end(self, args, state, control, model=None, **kwargs):
        """Break it."""
        if state.global_step == self._step:
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.fill_(torch.inf)


class BrokenLoss:
    """A loss whose values are no numbers."""

    def __init__(self, loss):
        self._loss = loss

    def __getattr__(self, name):
        return getattr(self._loss, name)

    def __call__(self, inputs, step_statistics):
        """NaN."""
        output = self._loss(inputs, step_statistics)
        return replace(output, losses=output.losses * torch.nan)


def test_an_interrupt_ends_all_members(tmp_path):
    before = set(threading.enumerate())
    base = frozen_base()
    trainers = [trainer_of(base, replace(t, steps=40), tmp_path / str(i)) for i, t in enumerate(FEW)]
    trainers[0].add_callback(Interrupt())
    with pytest.raises(KeyboardInterrupt):
        together(base, trainers)
    assert set(threading.enumerate()) <= before
    assert all(0 < trainer.state.global_step < 40 for trainer in trainers)


class Interrupt(TrainerCallback):
    """Presses Ctrl-C after two steps."""

    def on_step_end(self, args, state, control, **kwargs):
        """Send the signal."""
        if state.global_step == 2:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


def test_an_interrupt_reaches_a_member_that_computes():
    """Wherever it is, and not only where it waits for the others."""
    began, ended = threading.Event(), []

    def forever(member):
        try:
            began.set()
            while True:
                time.sleep(0.01)
        finally:
            ended.append(member)

    def interrupt():
        began.wait()
        time.sleep(0.1)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        Cohort(2).run([forever] * 3)
    assert len(ended) == 1  # the others never began
