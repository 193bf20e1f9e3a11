"""What the preference stage has where its loss draws answers: a teacher as the reference, and held-out draws."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from alignment.config.schema import RunConfig
from alignment.evaluation.sampling.answer import Sampling
from alignment.evaluation.sampling.local import LocalEngine
from alignment.files import CacheKind
from alignment.policy.identity import policy_identity
from alignment.policy.teacher import load_teacher
from alignment.ranks.team import Post
from alignment.reference.store import ReferenceStore
from alignment.reference.teacher import Teacher
from alignment.scoring.prompt_sharing import choose_layout
from alignment.stages.following import require_same_model
from alignment.stages.rounds import Rounds
from alignment.stages.stage import Workspace
from alignment.training.drawn import HeldOutDraws
from alignment.types import Group


def loaded_teacher(config: RunConfig, work: Workspace) -> nn.Module:
    """The frozen teacher, which every rank loads.

    Raises:
        UserError: it cannot be loaded, or a rank has another one.
    """
    teacher = load_teacher(config, work.device, work.cache)
    if work.team is not None:
        own = policy_identity(teacher)[0]
        for rank, found in enumerate(work.team.tell(_load_teacher, (config, work.cache)), 1):
            require_same_model(rank, found, own, config.distill.teacher)
    return teacher


def _load_teacher(post: Post, asked: tuple[RunConfig, Path]) -> str:
    config, cache = asked
    teacher = load_teacher(config, post.device, cache)
    post.teacher = teacher, choose_layout(teacher, post.device)
    return policy_identity(teacher)[0]


def teacher_of(
    model: nn.Module, policy: nn.Module, config: RunConfig, work: Workspace, tokens_per_batch: int
) -> Teacher:
    """The reference that a loaded teacher is.

    Args:
        policy: whose tokens alone are among the teacher's likeliest; it may have more.
        tokens_per_batch: of one of its passes.
    """
    store = ReferenceStore(CacheKind.reference.under(work.cache))
    checks, count = config.reference.spot_checks, config.loss.requirements().likeliest
    causal: Any = policy
    likeliest = (count, causal.get_input_embeddings().num_embeddings) if count else None
    layout = choose_layout(model, work.device)
    return Teacher(store, model, layout, tokens_per_batch, work.device, checks, team=work.team, likeliest=likeliest)


def held_out_draws(
    model: nn.Module,
    teacher: Teacher,
    config: RunConfig,
    held_out: Sequence[Group],
    work: Workspace,
    stops: Sequence[int],
    rounds: Rounds,
) -> HeldOutDraws:
    """Answers of the policy to the held-out prompts, which the teacher scores beside those of the running round."""
    assert config.onpolicy is not None, "a loss that draws has rounds"

    def prepare(answers: Sequence[Group]) -> None:
        teacher.prepare([*rounds.done[-1].groups, *answers])

    engine = LocalEngine(model, work.device, config.evaluation.batch_size, work.team)
    how = Sampling(stops=tuple(stops), max_new_tokens=config.onpolicy.max_new_tokens, seed=config.seed)
    return HeldOutDraws(held_out, engine, work.cache, how, prepare)
