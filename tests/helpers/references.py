"""References for tests: short ways to make them, and what they must give."""

import torch

from alignment.reference.cached import CachedReference
from alignment.reference.live import LiveReference
from alignment.reference.store import ReferenceStore
from alignment.scoring.layout import FlatLayout
from tests.conftest import random_groups
from tests.helpers.policies import CPU
from tests.helpers.steps import sequence_logp

GROUPS = random_groups(6, seed=11)

ROUNDING = 2e-5
"""Nats per token between two fp32 scorings of the same tokens in batches of other shapes: sums over 32 to 97 terms of
size 1, in another order, are rounded by some 1e-7 each; the largest seen over these models is 1e-6."""


def cached(model, path, tokens_per_batch=10_000, spot_checks=0):
    return CachedReference(
        ReferenceStore(path / "reference.sqlite"), model, FlatLayout(), tokens_per_batch, CPU, spot_checks
    )


def live(model, tokens_per_batch=10_000):
    return LiveReference(model, FlatLayout(), tokens_per_batch, CPU)


def prepared(model, path, groups=GROUPS, **settings):
    """Values of the groups and the summary after one preparation."""
    reference = cached(model, path, **settings)
    reference.prepare(groups)
    values = reference.logps(groups)
    summary = reference.summary()
    reference.close()
    return values, summary


class Forwards:
    """Counts the rows of a model's forward passes."""

    def __init__(self, model):
        self.rows = 0
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module, args, kwargs):
        self.rows += len(kwargs["input_ids"])


def books(model, groups):
    """Per-token log-probs by the book, one sequence at a time."""
    with torch.no_grad():
        return torch.cat([sequence_logp(model, g.prompt, c) for g in groups for c in g.completions])
