"""The policy of a run, as it starts or as a finished stage has left it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from alignment.config.schema import RunConfig
from alignment.policy.adapter import attach_adapter, continue_adapter, load_adapter
from alignment.policy.adapter_start import StartSources
from alignment.policy.float_weights import FloatWeights
from alignment.policy.identity import policy_identity
from alignment.policy.load import load_base
from alignment.policy.merge import merge_adapter
from alignment.policy.reward_model import holds_reward_model, load_reward_weights, put_reward_head
from alignment.policy.source import ModelSource, other_base
from alignment.policy.spectrum import choose_trained

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PolicySource:
    """Everything that a policy is made from; the same on all ranks.

    Attributes:
        config: of the run.
        source: where its model comes from.
        cache: folder that all runs share.
        spectrum: file of the matrices that Spectrum has chosen for the run.
        trained: folder of the policy that a finished stage has left; None for a fresh one.
        sequences: tokens of training data, for inits that look at them.
        shared: whether the ranks of a machine will share its base, which is too large for a GPU: it stays on the CPU.
    """

    config: RunConfig
    source: ModelSource
    cache: Path
    spectrum: Path
    trained: Path | None
    sequences: Sequence[np.ndarray] = ()
    shared: bool = False


def load_policy(
    made: PolicySource, device: torch.device, base: Callable[[Callable[[], nn.Module]], nn.Module] | None = None
) -> nn.Module:
    """Load it.

    Args:
        made: from what.
        device: where it will be.
        base: gives the base model in place of the function that loads it, which it gets; None: that function.
    """
    config, start = made.config, made.source.adapter
    is_whole = made.trained is not None and config.adapter is None
    rewards = made.trained is not None and holds_reward_model(made.trained)
    source = str(made.trained) if is_whole and not rewards else made.source.base
    log.info("Loading %s on %s ...", config.model.name, device)

    def load() -> nn.Module:
        place = torch.device("cpu") if made.shared else device
        return load_base(config.model, config.quantization, source, device, made.cache, place, config.adapter is None)

    model: Any = load() if base is None else base(load)
    model.config.name_or_path = made.source.base  # also where its weights come from the run folder
    if rewards:
        put_reward_head(model)
    sources = StartSources(FloatWeights(source, config.model.revision), made.cache, lambda: made.sequences)
    if config.adapter is not None and made.trained is not None:
        return load_adapter(model, made.trained, sources.weights)
    seed = config.seed if config.sft is None else config.sft.seed
    adapter, modules = choose_trained(model, config.adapter, config.spectrum, made.cache, made.spectrum)
    if start is None or is_whole:
        policy = attach_adapter(model, adapter, seed, sources, modules)
        if rewards and made.trained is not None:
            load_reward_weights(policy, made.trained)
        return policy
    if adapter is None:
        log.info("%s is an adapter: it is added to the weights of %s.", start, source)
        return attach_adapter(merge_adapter(model, start), None, seed, modules=modules)
    log.info("%s is an adapter: the policy, and its reference, start at %s with it.", start, source)
    policy = continue_adapter(model, start, adapter, seed, sources)
    for difference in other_base(start, policy_identity(policy)[1]):
        log.warning("%s was trained on another base (%s): its log-probs are not those of that run.", start, difference)
    return policy
