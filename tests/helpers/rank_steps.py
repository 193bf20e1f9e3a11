"""Preference steps of a tiny policy by one process or by several ranks, with everything that must be the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments

from alignment.policy.layers import checkpoint_layers
from alignment.policy.sharding import join_parts, take_part
from alignment.ranks.team import Post, Team, trained_parameters
from alignment.reference.cached import CachedReference
from alignment.reference.live import LiveReference
from alignment.reference.store import ReferenceStore
from alignment.scoring.layout import FlatLayout
from alignment.stages.following import PreferenceBegun, begin_preference, choose_together
from alignment.training.callbacks import Checkpoints, Rhythm
from alignment.training.objective import groups_to_reference
from alignment.training.sampler import StepSampler
from alignment.training.schedule import FollowPolicy, Schedule
from alignment.training.trainer import PreferenceTrainer
from alignment.types import Group
from tests.conftest import recommended_loss, tiny_policy
from tests.helpers.policies import NF4, load, train_adapter
from tests.helpers.steps import groups_for, moved

CPU = torch.device("cpu")


Make = Callable[[], Any]


def whole_policy() -> Any:
    """A policy of which every weight trains."""
    return tiny_policy(r=None).requires_grad_(True)


def packed_policy(folder: Path) -> Any:
    """A LoRA on the folder's model in NF4; computes in fp32."""
    model = load(folder, NF4)
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))


def hold(post: Post, make: Make) -> None:
    """Hold a policy with other weights that train: those of rank 0 arrive with the first task."""
    post.model = make()
    with torch.no_grad():
        for parameter in trained_parameters(post.model):
            parameter.add_(1)


def share(post: Post, _: Any) -> None:
    """Hold a part of the base."""
    share_base(post.model, post.team)


def share_base(model: Any, team: Team) -> None:
    """What every rank does with its policy."""
    join_parts(take_part(model, team.machine_groups(CPU), CPU), team)


def run_out(post: Post, model: Any = None) -> None:
    """Let a GPU's memory run out in the next pass with gradient."""
    base = (model or post.model).get_base_model()
    forward = base.forward

    def failing(*arguments: Any, **settings: Any) -> Any:
        result = forward(*arguments, **settings)
        if torch.is_grad_enabled():
            base.forward = forward
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return result

    base.forward = failing


def steps(
    team: Team | None,
    folder: Path,
    name: str,
    *,
    live: bool,
    num_steps: int = 2,
    refreshes: tuple = (),
    out_of_memory: int | None = None,
    make: Make | None = None,
    sharded: bool = False,
    checkpoint_every: int = 0,
    groups: Sequence[Group] | None = None,
    per_step: int = 5,
) -> dict:
    """Train for some steps and evaluate: what came of it.

    Args:
        out_of_memory: the rank that lacks it in the first pass.
        make: the policy, whose adapter then gets an effect; None: a tiny one.
        sharded: whether each rank holds a part of the base.
        groups: to train on, in place of ten short ones.
    """
    torch.manual_seed(0)
    loss, layout = recommended_loss(name), FlatLayout()
    groups = groups_for(loss, num=10) if groups is None else groups
    held_out = groups_for(loss, num=2, seed=6)
    policy = tiny_policy(trained=True) if make is None else train_adapter(make())
    checkpoint_layers(policy, checkpoint_every)
    if team is not None:
        team.tell(hold, make or tiny_policy)
        if sharded:
            team.run(share, [None] * team.size, lambda _: share_base(policy, team))
    chosen = choose_together(team, policy, CPU)
    if team is not None:
        begun = PreferenceBegun(loss, checkpoint_every, True, (1000, 1.0) if live else None, False, 0.0)
        team.tell(begin_preference, begun, trained_parameters(policy))
    sampler = StepSampler(len(groups), per_step, 3, 2)
    schedule = Schedule(sampler, sampler.first_steps(num_steps), refreshes)
    asked = groups_to_reference(loss, groups, schedule.steps, held_out)
    if live:
        reference: Any = LiveReference(policy, layout, 1000, CPU, team=team)
    else:
        store = ReferenceStore(folder / "store.sqlite")
        reference = CachedReference(store, policy, layout, 100, CPU, 2, team=team)
        reference.prepare(asked)
    callbacks = [Rhythm(None), Checkpoints(5)]
    if refreshes:
        callbacks.insert(0, FollowPolicy(reference, schedule, lambda _: asked))
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=num_steps, use_cpu=True, report_to="none", disable_tqdm=True,
        remove_unused_columns=False, learning_rate=0.1, save_strategy="no", logging_steps=1,
        lr_scheduler_type="constant", seed=3, optim="sgd", max_grad_norm=0.0,
    )  # fmt: skip
    trainer = PreferenceTrainer(
        model=policy, args=arguments, groups=groups, eval_groups=held_out, loss=loss, reference=reference,
        layout=layout, tokens_per_batch=60, sampler=sampler, callbacks=callbacks, team=team,
    )  # fmt: skip
    if team is not None and out_of_memory is not None:
        if out_of_memory:
            team.tell(run_out)
        else:
            run_out(None, policy)
    moved(policy)  # where all rewards are equal, rounding decides who is right
    trainer.train()
    found = {
        "weights": {name: p.detach().clone() for name, p in policy.named_parameters() if p.requires_grad},
        "state": trainer.objective.state,
        "held_out": trainer.held_out_metrics(held_out),
        "log": [{k: v for k, v in row.items() if "runtime" not in k} for row in trainer.state.log_history[:num_steps]],
        "tokens": trainer.num_tokens,
        "budget": trainer.tokens_per_batch,
        "layout": type(chosen),
        "identity": reference.summary()["identity"],
        "reference": {key: value for key, value in reference.summary().items() if key in ("hits", "misses")},
        "stored": {} if live else {k: torch.from_numpy(v) for k, v in reference.rows(asked).items()},
    }
    reference.close()
    return found
