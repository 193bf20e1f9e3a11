"""What the preference stage has where its loss draws answers: a teacher as the reference, and held-out draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from alignment.config.schema import RunConfig
from alignment.evaluation.sampling.answer import Sampling
from alignment.evaluation.sampling.local import LocalEngine
from alignment.files import CacheKind
from alignment.reference.store import ReferenceStore
from alignment.reference.teacher import Teacher
from alignment.scoring.prompt_sharing import choose_layout
from alignment.stages.rounds import Rounds
from alignment.stages.stage import Workspace
from alignment.training.drawn import HeldOutDraws
from alignment.types import Group


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
    return Teacher(store, model, layout, tokens_per_batch, work.device, checks, likeliest=likeliest)


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
