"""What a preference stage compares its policy with: a teacher, stored log-probs, a live reference, or nothing."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from alignment.config.schema import ReferenceMode, RunConfig
from alignment.files import CacheKind
from alignment.losses import Quantity
from alignment.losses import title as loss_title
from alignment.reference.base import Reference
from alignment.reference.cached import CachedReference
from alignment.reference.live import LiveReference
from alignment.reference.store import ReferenceStore
from alignment.scoring.layout import BatchLayout
from alignment.stages.distillation import teacher_of
from alignment.stages.stage import Workspace
from alignment.training.budget import Plan
from alignment.types import Group

log = logging.getLogger(__name__)


def with_live_reference(config: RunConfig) -> RunConfig:
    """With a live reference where the loss compares whole distributions, which no store keeps."""
    if config.reference.mode is ReferenceMode.live:
        return config
    if Quantity.divergence not in config.loss.requirements().quantities:
        return config
    log.info("%s compares whole distributions, so the reference runs beside the policy.", loss_title(config.loss.name))
    return replace(config, reference=replace(config.reference, mode=ReferenceMode.live))


def has_reference(config: RunConfig) -> bool:
    """Whether the loss or the metrics compare the policy with another one."""
    needs = config.loss.requirements()
    return needs.reference or (config.reference.for_metrics and not needs.rewards)


def make_reference(
    config: RunConfig,
    work: Workspace,
    model: nn.Module,
    layout: BatchLayout,
    plan: Plan,
    teacher: nn.Module | None,
    fixed: Sequence[Group],
) -> Reference | None:
    """The reference, which is the policy as it is now, or the teacher; None for a stage without one.

    Args:
        config: from `with_live_reference`.
        teacher: of a loss that has one.
        fixed: groups whose log-probs stay those of the start.
    """
    if teacher is not None:
        return teacher_of(teacher, model, config, work, plan.tokens_per_batch)
    if not has_reference(config):
        return None
    needs = config.loss.requirements()
    if not needs.reference:
        log.info(
            "%s needs no reference. One is read for the metrics alone; reference.for_metrics=false leaves it out.",
            loss_title(config.loss.name),
        )
    if config.reference.mode is ReferenceMode.live:
        budget = plan.tokens_per_batch  # beside what a step keeps
        return LiveReference(model, layout, budget, work.device, config.reference.sync_mix, work.team)
    return CachedReference(
        ReferenceStore(CacheKind.reference.under(work.cache)),
        model,
        layout,
        plan.reference_tokens,
        work.device,
        config.reference.spot_checks,
        with_entropies=Quantity.entropy in needs.quantities,
        team=work.team,
        fixed=fixed,
    )
