"""One training step of a tiny policy, and the same computed from full logits without our code."""

from dataclasses import replace

import numpy as np
import torch
from transformers import TrainingArguments

from alignment.data.tokens.units import as_rows
from alignment.policy.reward_model import attach_reward_head, is_reward_model
from alignment.reference.cached import CachedReference
from alignment.reference.live import LiveReference
from alignment.reference.store import ReferenceStore
from alignment.scoring.ends import EndsLayout
from alignment.scoring.layout import FlatLayout
from alignment.training.sampler import StepSampler
from alignment.training.trainer import PreferenceTrainer
from alignment.types import Group
from tests.conftest import random_groups, recommended_loss

SETTINGS = {
    "dpo": {"beta": 0.3, "label_smoothing": 0.1},
    "ipo": {"tau": 0.2, "reduction": "mean"},
    "simpo": {"beta": 2.0, "gamma_beta_ratio": 0.5},
    "orpo": {"lam": 0.2},
    "kto": {"beta": 0.3, "desirable_weight": 1.0, "undesirable_weight": 1.5},
}


def make_loss(name: str):
    return recommended_loss(name, *(f"{key}={value}" for key, value in SETTINGS[name].items()))


def make_trainer(model, groups, loss, tmp_path, tokens_per_batch=10_000, reference="live", eval_groups=(), layout=None):
    layout = layout or FlatLayout()
    if loss.requirements().rewards:
        reference = None
        layout = EndsLayout(layout)
        if not is_reward_model(model):
            attach_reward_head(model, seed=0)
    if reference == "live" and (count := loss.requirements().likeliest):  # of a teacher, which are kept
        wanted = (count, model.config.vocab_size)
        store = ReferenceStore(tmp_path / "teacher.sqlite")
        reference = CachedReference(store, model, layout, tokens_per_batch, torch.device("cpu"), 0, likeliest=wanted)
        reference.prepare(groups)
    elif reference == "live":
        reference = LiveReference(model, layout, tokens_per_batch, torch.device("cpu"))
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True, max_grad_norm=0.0,
        remove_unused_columns=False,
    )  # fmt: skip
    return PreferenceTrainer(
        model=model,
        args=arguments,
        groups=groups,
        eval_groups=eval_groups,
        loss=loss,
        reference=reference,
        layout=layout,
        tokens_per_batch=tokens_per_batch,
        sampler=StepSampler(len(groups), len(groups), 0),
        callbacks=[],
    )


def step_gradient(trainer, groups):
    trainer.model.zero_grad()
    loss = trainer.training_step(trainer.model, {"groups": groups})
    scale = 1.0 if trainer.scaler is None else trainer.scaler.get_scale()
    return loss.item(), {n: p.grad / scale for n, p in trainer.model.named_parameters() if p.requires_grad}


def sequence_logp(model, prompt, completion, scored=None) -> torch.Tensor:
    """Per-token log-probs by the book: one row, no padding, full logits, log-softmax, gather; where they are scored."""
    ids = torch.tensor(np.concatenate([prompt, completion]).astype(np.int64))
    logits = model(input_ids=ids[None]).logits[0, :-1]
    values = logits.log_softmax(-1).gather(-1, ids[1:, None]).squeeze(-1)[len(prompt) - 1 :]
    return values if scored is None else values[torch.from_numpy(scored)]


def masks_of(group: Group):
    return group.scored or [None] * len(group.completions)


def plain_loss(name: str, policy, start, groups) -> torch.Tensor:
    """The five objectives written out from their papers, one example at a time."""
    s = SETTINGS[name]

    def pair(group: Group):
        texts = [(group.prompt, c, m) for c, m in zip(group.completions, masks_of(group), strict=True)]
        with torch.no_grad():
            ref = [sequence_logp(start, *text) for text in texts]
        return [sequence_logp(policy, *text) for text in texts], ref

    losses = []
    if name == "kto":
        rows = groups
        with torch.no_grad():
            gaps = []
            for i, row in enumerate(rows):
                other = rows[(i + 1) % len(rows)]
                text = (row.prompt, other.completions[0], masks_of(other)[0])
                gap = sequence_logp(policy, *text) - sequence_logp(start, *text)
                gaps.append(gap.sum())
            z0 = max(0.0, torch.stack(gaps).mean().item())
        for row in rows:
            [a], [A] = pair(row)
            u = a.sum() - A.sum()
            if row.labels[0]:
                losses.append(s["desirable_weight"] * (1 - torch.sigmoid(s["beta"] * (u - z0))))
            else:
                losses.append(s["undesirable_weight"] * (1 - torch.sigmoid(s["beta"] * (z0 - u))))
    for group in groups if name != "kto" else ():
        (a, b), (A, B) = pair(group)
        d = a.sum() - A.sum() - b.sum() + B.sum()
        if name == "dpo":
            e = s["label_smoothing"]
            right, wrong = (torch.log(torch.sigmoid(sign * s["beta"] * d)) for sign in (1, -1))
            losses.append(-(1 - e) * right - e * wrong)
        elif name == "ipo":
            h = (a.mean() - A.mean()) - (b.mean() - B.mean())
            losses.append((h - 1 / (2 * s["tau"])) ** 2)
        elif name == "simpo":
            margin = s["beta"] * (a.mean() - b.mean()) - s["gamma_beta_ratio"] * s["beta"]
            losses.append(-torch.log(torch.sigmoid(margin)))
        else:
            pa, pb = a.mean().exp(), b.mean().exp()
            log_odds = torch.log(pa / (1 - pa)) - torch.log(pb / (1 - pb))
            losses.append(-a.mean() - s["lam"] * torch.log(torch.sigmoid(log_odds)))
    return torch.stack(losses).mean()


def moved(model, seed=9):
    """Move the policy away from its start, so that no term of a gradient vanishes."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)


def groups_for(loss, num=6, seed=4):
    """Groups of the loss's unit, with scores and unequal weights."""
    unit = loss.requirements().unit
    groups = random_groups(num, k=3 if unit == "list" else 2, seed=seed)
    groups = [
        replace(group, scores=tuple(2.0 - 0.3 * i - 0.5 * k for k in range(len(group.completions))), weight=0.5 + i % 3)
        for i, group in enumerate(groups)
    ]
    return as_rows(groups) if unit == "row" else groups
