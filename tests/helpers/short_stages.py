"""A preference stage of two steps in this process, whole or from its checkpoint, for every loss unit and reference."""

from contextlib import nullcontext

from alignment.data.tokens.units import as_rows
from alignment.training.callbacks import prepare_trainer
from alignment.training.elastic import ElasticSteps
from alignment.training.objective import groups_to_reference
from alignment.training.sampler import StepSampler
from tests.conftest import random_groups
from tests.helpers.references import cached, live
from tests.helpers.steps import make_loss, make_trainer

PAIRS = random_groups(4, seed=21)
WAYS = [(loss, mode) for loss in ("dpo", "kto") for mode in ("cache", "live")]
"""Losses of pairs and of rows, stored and live references."""


def prepared(model, way, folder, store, lr_ratio=1.0):
    """A trainer of two steps, the groups, and their reference."""
    loss, mode = way
    groups = PAIRS if loss == "dpo" else as_rows(PAIRS)
    sampler = StepSampler(len(groups), len(groups) // 2, 0, max_steps=2)
    reference = cached(model, store) if mode == "cache" else live(model)
    steps = [range(len(groups)), *sampler.first_steps(2)]
    reference.prepare(groups_to_reference(make_loss(loss), groups, steps, ()))
    trainer = make_trainer(model, groups, make_loss(loss), folder, reference=reference)
    trainer.sampler = sampler
    trainer.lr_ratio = lr_ratio
    return trainer, groups, reference


def trained(model, way, folder, store, checkpoint=None, *, lr_ratio=1.0, optim=None, around=nullcontext):
    """The trainer after its two steps, the first of which it keeps, and what has trained.

    Args:
        optim: settings of the optimizer; None: the Trainer's own.
        around: makes what the stage runs in.
    """
    with around():
        trainer, _, reference = prepared(model, way, folder, store, lr_ratio)
        if optim is not None:
            prepare_trainer(trainer, optim)
        trainer.add_callback(ElasticSteps())
        settings = {
            "max_steps": 2, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2,
        }  # fmt: skip
        for name, value in settings.items():
            setattr(trainer.args, name, value)
        if checkpoint is not None:
            trainer.load_state(checkpoint)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        reference.close()
        return trainer, {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
