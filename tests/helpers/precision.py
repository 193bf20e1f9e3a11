"""A policy in 16 bits as a run has it, its exact copy, and a step that is as right as the plain computation."""

import math

import torch
from transformers import TrainingArguments

from alignment.data.tokens.units import as_rows
from alignment.reference.live import LiveReference
from alignment.scoring.layout import FlatLayout
from alignment.training.sampler import StepSampler
from alignment.training.trainer import PreferenceTrainer
from tests.conftest import random_groups, tiny_policy
from tests.helpers.steps import make_loss, moved, plain_loss, step_gradient


def policy_on(device, dtype):
    """A trained adapter in fp32 on a base in `dtype`, as a run has it."""
    model = tiny_policy(torch.float32, trained=True).to(dtype)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model.to(device)


def in_float64(model):
    """The same weights on the CPU, with exact arithmetic as far as a comparison with 32 bits can tell."""
    copy = tiny_policy(torch.float64, trained=True)
    copy.load_state_dict({name: tensor.double().cpu() for name, tensor in model.state_dict().items()})
    return copy


def trainer_on(device, model, groups, loss, folder, reference, tokens_per_batch):
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=1, use_cpu=device.type == "cpu", report_to="none", disable_tqdm=True,
        max_grad_norm=0.0, remove_unused_columns=False,
    )  # fmt: skip
    return PreferenceTrainer(
        model=model, args=arguments, groups=groups, eval_groups=[], loss=loss, reference=reference,
        layout=FlatLayout(), tokens_per_batch=tokens_per_batch, sampler=StepSampler(len(groups), len(groups), 0),
        callbacks=[],
    )  # fmt: skip


def whole(gradient, names):
    return torch.cat([gradient[n].flatten().double().cpu() for n in names])


def assert_step_is_plain(name, device, dtype, folder):
    """Compare loss and whole gradient of one step with one sequence at a time in float64.

    fp32 is off by 2e-6 on a CPU; a GPU sums in other orders. bfloat16 loses a tenth of a gradient that is a difference
    of sums, with any code, and float16 a hundredth: it may not lose much more than the plain computation does.
    """
    groups = random_groups(5, seed=3)
    if name == "kto":
        groups = as_rows(groups)[2:9]
    policy, start = policy_on(device, dtype), policy_on(device, dtype)
    exact_start = in_float64(policy)
    reference = LiveReference(policy, FlatLayout(), 60, device)
    trainer = trainer_on(device, policy, groups, make_loss(name), folder, reference, tokens_per_batch=60)
    if trainer.scaler is not None:
        trainer.scaler.update(2.0**10)  # where a run's comes to rest with IPO, whose gradient is large
    moved(policy)
    loss, gradient = step_gradient(trainer, groups)
    reference.close()
    exact = in_float64(policy)
    expected = plain_loss(name, exact, exact_start, groups)
    expected.backward()
    names = [n for n, p in exact.named_parameters() if p.requires_grad]
    total = whole({n: p.grad for n, p in exact.named_parameters() if p.requires_grad}, names)
    allowed = 1e-4
    if dtype is not torch.float32:
        policy.zero_grad()
        with device, torch.autocast(device.type, dtype=dtype):
            plain = plain_loss(name, policy, start, groups)
        (plain * 256).backward()  # so that float16 keeps it, and has room
        plain_gradient = whole({n: p.grad / 256 for n, p in policy.named_parameters() if p.requires_grad}, names)
        allowed = 1.5 * ((plain_gradient - total).norm() / total.norm()).item()
        assert 0 < allowed < (0.4 if dtype is torch.bfloat16 else 0.05)
    assert total.norm() > 1e-3
    assert (whole(gradient, names) - total).norm() <= allowed * total.norm()
    assert math.isclose(loss, expected.item(), rel_tol=max(1e-4, 0.1 * allowed))
