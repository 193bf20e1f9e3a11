"""The merged model of a run, also where no rank has the whole base."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from alignment.config.schema import Dtype
from alignment.errors import UserError
from alignment.policy.identity import policy_identity
from alignment.policy.load import end_with, resolve_dtype
from alignment.policy.merge import export_merged
from alignment.policy.sharding import is_sharded
from alignment.stages.policy import PolicySource, load_policy

log = logging.getLogger(__name__)


def export_whole(
    model: nn.Module,
    made: PolicySource,
    tokenizer: Any,
    folder: Path,
    device: torch.device,
    prompts: Sequence[np.ndarray],
    stops: Sequence[int],
) -> dict[str, Any]:
    """Write the merged model of the final policy; where ranks share the base, from one that is loaded on the CPU.

    Args:
        model: the policy.
        made: what the same policy is loaded from.
        folder: where to write.
        device: of the policy.
        prompts: that policy and merged model must continue alike.
        stops: the tokens that end an answer.

    Returns:
        As `export_merged`.

    Raises:
        UserError: the written model is not the policy.
    """
    config, source = made.config, made.source.base
    if is_sharded(model):
        log.info("The ranks share the base, so it is loaded once more, on the CPU, to merge the adapter.")
        dtype = Dtype(str(resolve_dtype(config.export.dtype, device)).removeprefix("torch."))  # as on the GPU
        config = replace(config, export=replace(config.export, dtype=dtype))
        trained, model, device = policy_identity(model)[0], load_policy(made, device), torch.device("cpu")
        if policy_identity(model)[0] != trained:
            raise UserError(
                f"export.merge: the policy as loaded from {made.trained} is not the one that was trained: its base has "
                f"changed since the run began, so bring it back, and go on with resume=true."
            )
    found = export_merged(model, tokenizer, folder, config, source, device, prompts)
    end_with(folder, stops)
    return found
