"""Every step has a rate, and a training stops at the first number that is not finite, before it does harm."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from alignment.config.schema import OptimConfig
from alignment.errors import NotFinite, UserError
from alignment.training.callbacks import Checkpoints, last_checkpoint
from alignment.training.optimizers import SCHEDULES, check_optimizer
from alignment.training.stage_trainer import StageTrainer, last_good
from tests.conftest import each, random_groups, tiny_policy
from tests.helpers.steps import groups_for, make_loss, make_trainer

pytestmark = pytest.mark.slow

LR = 1e-2


class OneWeight(nn.Module):
    """The loss is the mean of the weight times what a row says."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, values):
        """The loss."""
        return {"loss": (self.weight * values).mean()}


class Small(StageTrainer):
    """A stage of one weight."""

    title = "The small stage"
    settings = "optim"


def small(folder, values=(1.0,) * 8, schedule="constant", warmup=0, **settings):
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=len(values), learning_rate=LR, lr_scheduler_type=schedule,
        warmup_steps=warmup, per_device_train_batch_size=1, use_cpu=True, report_to="none", disable_tqdm=True,
        logging_steps=1, logging_nan_inf_filter=False, remove_unused_columns=False,
        train_sampling_strategy="sequential", **{"save_strategy": "no", "max_grad_norm": 0.0} | settings,
    )  # fmt: skip
    rows = [{"values": value} for value in values]
    return Small(model=OneWeight(), args=arguments, train_dataset=rows, callbacks=[Checkpoints(9)])


def rates(trainer):
    return [row["learning_rate"] / LR for row in trainer.state.log_history if "learning_rate" in row]


# The schedule


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("schedule", each(SCHEDULES, ("constant", "cosine")))
def test_every_step_has_a_rate_and_only_the_warm_up_is_moved(schedule, steps, tmp_path):
    """Step i of w warm-up steps has (i+1)/w; later ones keep transformers' rate; a run of one step trains."""
    from transformers import get_scheduler

    for warmup in {0, 1, steps // 2, steps}:
        trainer = small(tmp_path, (1.0,) * steps, schedule, warmup)
        trainer.train()
        found = rates(trainer)
        optimizer = torch.optim.SGD(OneWeight().parameters(), lr=LR)
        own = get_scheduler(schedule, optimizer, warmup, steps)
        heats = warmup if schedule != "constant" else 0
        assert len(found) == steps and all(rate > 0 for rate in found)
        assert found[:heats] == pytest.approx([(i + 1) / warmup for i in range(heats)])
        assert found[heats:] == pytest.approx([own.lr_lambdas[0](i) for i in range(heats, steps)])
        assert trainer.model.weight.item() != 1.0


@pytest.mark.parametrize("schedule", each(SCHEDULES, ("linear", "cosine")))
def test_a_resumed_training_goes_on_at_the_same_rates(schedule, tmp_path):
    """Interrupted inside the warm-up and after it."""
    whole = small(tmp_path / "whole", schedule=schedule, warmup=4, save_strategy="steps", save_steps=2)
    whole.train()
    for step in (2, 6):
        resumed = small(tmp_path / "whole", schedule=schedule, warmup=4)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert rates(resumed) == rates(whole)
        assert resumed.model.weight.item() == whole.model.weight.item()


def test_a_polynomial_schedule_needs_a_rate_above_its_end():
    optim = OptimConfig(
        name="adamw_torch", lr=1e-8, weight_decay=0.0, beta1=0.9, beta2=0.999, schedule="polynomial",
        warmup_ratio=0.1, max_grad_norm=1.0, target_modules=None, master_weights=True,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"^optim\.schedule=polynomial ends at a rate of 1e-07, so optim\.lr must be"):
        check_optimizer("optim", optim, None, "cpu")


# What is not finite


class Spoil(TrainerCallback):
    """Writes into the weight after a step."""

    def __init__(self, step, value):
        self._step, self._value = step, value

    def on_step_end(self, args, state, control, model=None, **kwargs):
        """Write."""
        if state.global_step == self._step:
            model.weight.data.fill_(self._value)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_loss_that_is_not_finite_stops_before_the_update(bad, clip, tmp_path):
    """The weight stays as the step before left it, and checkpoints of steps that went well are named."""
    trainer = small(tmp_path, (1.0, 1.0, 1.0, bad, 1.0), save_strategy="steps", save_steps=1, max_grad_norm=clip)
    with pytest.raises(NotFinite) as caught:
        trainer.train()
    last = tmp_path / "checkpoint-2"
    clipping = (
        "a lower optim.max_grad_norm (now 1)" if clip else "with optim.max_grad_norm=1 (now 0, which clips nothing)"
    )
    assert str(caught.value) == (
        f"The small stage stopped at step 4, before its update, because its loss or log-probs are not finite; the last "
        f"good checkpoint is {last}: start a new run with a lower optim.lr (now 0.01) or {clipping}."
    )
    assert trainer.model.weight.isfinite().all() and trainer.state.global_step == 3


def test_a_gradient_that_is_not_finite_stops_too(tmp_path):
    """The loss of such a step is finite, so the policy before it is sound."""
    trainer = small(tmp_path, save_strategy="steps", save_steps=1)
    handle = []

    class Break(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                handle.append(model.weight.register_hook(lambda gradient: gradient * math.inf))

    trainer.add_callback(Break())
    with pytest.raises(NotFinite, match=r"at step 4, .*gradient is not finite; .*checkpoint-3:"):
        trainer.train()
    assert trainer.model.weight.isfinite().all()


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    """An update may overflow although all before it was finite."""
    trainer = small(tmp_path, save_strategy="steps", save_steps=2)
    trainer.callback_handler.callbacks.insert(0, Spoil(4, math.inf))
    with pytest.raises(NotFinite, match=r"stopped after step 4, because the update left weights that are not finite"):
        trainer.train()
    assert last_checkpoint(tmp_path) == (tmp_path / "checkpoint-2", 2)
    assert not (tmp_path / "checkpoint-4").exists()


def test_only_complete_checkpoints_are_good(tmp_path):
    """In the order of their steps, not of their names."""
    assert last_good(tmp_path) == "there is no good checkpoint"
    for step in (2, 9, 10, 11):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (2, 9, 10):
        (tmp_path / f"checkpoint-{step}" / "complete").touch()
    assert last_good(tmp_path).endswith("checkpoint-10")
    assert last_good(tmp_path, sound=10).endswith("checkpoint-9")


@pytest.mark.parametrize("name", ["dpo", "simpo", "kto"])
def test_the_rows_at_fault_are_named(name, tmp_path):
    """A group's log-prob that is not finite is found although the loss may hide it."""
    loss = make_loss(name)
    groups = [replace(group, source=f"rows.jsonl:{i}") for i, group in enumerate(groups_for(loss))]
    model = tiny_policy(torch.float32)
    trainer = make_trainer(model, groups, loss, tmp_path)
    trainer.args.logging_nan_inf_filter = False  # as in every run
    token = int(groups[2].completions[0][0])
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = math.nan
    at_fault = {group.source for group in groups if any(token in [*group.prompt, *c[:-1]] for c in group.completions)}
    assert 0 < len(at_fault) < len(groups)
    with pytest.raises(NotFinite) as caught:
        trainer.train()
    assert "its loss or log-probs are not finite" in str(caught.value)
    assert set(trainer.step_rows()) >= at_fault
    assert "rows.jsonl:" in str(caught.value)


def test_a_held_out_loss_that_is_not_finite_stops(tmp_path):
    """Before a checkpoint of this policy is made."""
    groups = random_groups(4)
    trainer = make_trainer(tiny_policy(torch.float32), groups, make_loss("simpo"), tmp_path, eval_groups=groups[:2])
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight.fill_(math.nan)
    with pytest.raises(
        NotFinite, match=r"^The preference stage stopped after step 0, because its held-out loss is nan;"
    ):
        trainer.evaluate()
    assert not list(Path(tmp_path).glob("checkpoint-*"))
