"""float16: gradients that would become 0 survive, a step that overflows changes nothing, and a resumed run is equal."""

from dataclasses import replace

import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

from alignment.config.compose import load
from alignment.errors import NotFinite, UserError
from alignment.policy.adapter import attach_adapter
from alignment.scoring.layout import FlatLayout
from alignment.training.callbacks import Checkpoints, prepare_trainer, training_arguments
from alignment.training.loss_scaler import loss_scaler
from alignment.training.sampler import StepSampler
from alignment.training.trainer import PreferenceTrainer
from tests.conftest import random_groups, recommended_loss, tiny_policy
from tests.helpers.precision import assert_step_is_plain, in_float64, policy_on, whole
from tests.helpers.steps import make_loss, make_trainer, plain_loss, step_gradient

CPU = torch.device("cpu")
GROUPS = random_groups(4, seed=3)
HUGE = 2.0**40
"""As a factor of the loss it makes every gradient overflow float16."""


@pytest.fixture(scope="module")
def optim():
    return load("recipe=quickstart", "tracking=none", "optim.schedule=linear", "optim.warmup_ratio=0").optim


class Plant(TrainerCallback):
    """Sets the loss's factor before some steps."""

    def __init__(self, **factors):
        self.factors = {int(step.removeprefix("step")): factor for step, factor in factors.items()}
        self.seen = []

    def on_step_begin(self, args, state, control, **kwargs):
        """Set it, and keep what the step begins with."""
        scaler, trained = self.trainer.scaler, [p for p in self.trainer.model.parameters() if p.requires_grad]
        if state.global_step + 1 in self.factors:
            scaler.update(self.factors[state.global_step + 1])
        states = self.trainer.optimizer.state_dict()["state"]
        kept = [value for state in states.values() for value in state.values() if isinstance(value, torch.Tensor)]
        self.seen.append([value.detach().clone() for value in (*trained, *kept)])


def trainer_of(optim, folder, plant, steps=4):
    model = policy_on(CPU, torch.float16)
    loop = replace(load("recipe=quickstart", "tracking=none").trainer, groups_per_step=4, save_every=2, log_every=1)
    arguments = training_arguments(
        TrainingArguments, folder=folder, optim=optim, trainer=loop, num_steps=steps, seed=0, device=CPU,
        per_device_train_batch_size=len(GROUPS),
    )  # fmt: skip
    trainer = PreferenceTrainer(
        model=model, args=arguments, groups=GROUPS, eval_groups=[], loss=recommended_loss("simpo"), reference=None,
        layout=FlatLayout(), tokens_per_batch=60, sampler=StepSampler(len(GROUPS), len(GROUPS), 0, epochs=steps),
        callbacks=[plant, Checkpoints(9)],
    )  # fmt: skip
    prepare_trainer(trainer, optim)
    plant.trainer = trainer
    return trainer


def same(found, expected):
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_a_step_is_as_right_as_the_plain_computation(name, tmp_path):
    """Against float64, pass by pass, and with a loss that is derived over the whole step first."""
    assert_step_is_plain(name, CPU, torch.float16, tmp_path)


@pytest.mark.parametrize("scaled", [True, False])
def test_small_gradients_survive(scaled, tmp_path):
    """A beta of 1e-6 makes each token's derivative 1e-7, of which float16 keeps nothing without the scaler."""
    loss = make_loss("dpo")
    loss.beta = 1e-6
    model = policy_on(CPU, torch.float16)
    exact, start = in_float64(model), in_float64(model)
    trainer = make_trainer(model, GROUPS, loss, tmp_path)
    if not scaled:
        trainer.accelerator.scaler = None
    _, gradient = step_gradient(trainer, GROUPS)
    expected = plain_loss("dpo", exact, start, GROUPS)  # at the reference the gradient is in proportion to beta
    expected.backward()
    names = list(gradient)
    total = whole({n: p.grad * 1e-6 / 0.3 for n, p in exact.named_parameters() if p.requires_grad}, names)
    difference = (whole(gradient, names) - total).norm() / total.norm()
    assert difference < 0.02 if scaled else difference > 0.5


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_torch_fused"])
def test_a_step_that_overflows_changes_nothing(name, optim, tmp_path, caplog):
    """Neither weights nor states nor the schedule; the factor is halved, and the log says it once."""
    plant = Plant(step2=HUGE, step3=2.0**16)
    trainer = trainer_of(replace(optim, name=name, lr=1e-3), tmp_path, plant)
    with caplog.at_level("INFO", "alignment"):
        trainer.train()
    first, second, third, fourth = plant.seen
    assert same(third, second) and not same(second, first) and not same(fourth, third)
    said = [record.getMessage() for record in caplog.records if "overflows" in record.getMessage()]
    assert said == [
        "Step 2 changes nothing: its gradient overflows float16. The loss's factor falls from 1.09951e+12 to "
        "5.49756e+11."
    ]
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["skipped_steps"] for row in rows] == [0, 1, 1, 1]
    assert [row["loss_scale"] for row in rows] == [2.0**16, HUGE / 2, 2.0**16, 2.0**16]
    assert ["grad_norm" in row for row in rows] == [True, False, True, True]
    assert 0 < rows[0]["grad_norm"] < 100, "the norm is that of the gradient itself"
    rates = [row["learning_rate"] / 1e-3 for row in rows]
    assert rates == pytest.approx([1, 0.75, 0.75, 0.5])


def test_a_resumed_run_is_equal(optim, tmp_path):
    """The factor falls from 2^40 to 2^16 in steps 1 to 3; a run that begins with a new one would train in step 3."""
    settings = replace(optim, lr=1e-3)
    whole_run = trainer_of(settings, tmp_path, Plant(step1=HUGE), steps=6)
    whole_run.scaler.set_backoff_factor(2.0**-8)
    whole_run.train()
    assert (whole_run.scaler.skipped, whole_run.scaler.state_dict()["_growth_tracker"]) == (3, 3)
    resumed = trainer_of(settings, tmp_path, Plant(), steps=6)
    resumed.load_state(tmp_path / "checkpoint-2")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.scaler.state_dict() == whole_run.scaler.state_dict()
    assert same(*([p for p in t.model.parameters() if p.requires_grad] for t in (resumed, whole_run)))
    rows = [[row for row in t.state.log_history if "loss" in row] for t in (resumed, whole_run)]
    assert len(rows[0]) == 6 and rows[0] == rows[1]


def test_a_gradient_that_is_not_finite_by_itself_ends_the_run(optim, tmp_path):
    """Once the factor is 1 it is not to blame; the sentence says what float16 is."""
    plant = Plant(step1=2.0)
    trainer = trainer_of(optim, tmp_path, plant)
    weight = next(p for p in trainer.model.parameters() if p.requires_grad)
    weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NotFinite, match=r"at step 2, .*its gradient is not finite.*65504, with model\.dtype=float32"):
        trainer.train()
    assert trainer.scaler.skipped == 1


def test_weights_of_the_model_do_not_train_in_float16():
    with pytest.raises(UserError, match=r"^model\.dtype=float16 is for adapters, which train in float32"):
        loss_scaler(attach_adapter(tiny_policy(torch.float16, r=None), None, 0), CPU)
    assert loss_scaler(tiny_policy(torch.bfloat16), CPU) is None
