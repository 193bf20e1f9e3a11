"""Whether the ranks of a machine share one base, decided before anything is loaded."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from alignment.config.schema import RunConfig, Shard
from alignment.data.preparation.prepare import PreferenceData, SFTData
from alignment.policy.architecture import build_model
from alignment.policy.load import resolve_device
from alignment.ranks.team import Post, Team
from alignment.stages.rounds import answers_of_a_group
from alignment.training.forecast import Machine, plan_stages, read_config, require_ranks
from alignment.training.memory import GIB
from alignment.training.shared_memory import why_whole

log = logging.getLogger(__name__)


def shares_base(
    config: RunConfig,
    team: Team | None,
    device: torch.device,
    conversations: SFTData | None,
    preferences: PreferenceData | None,
) -> bool:
    """Whether each rank is to hold a part of the base; a log line says so, and why.

    Args:
        config: of the run.
        team: its ranks; None for one process.
        device: of this rank.
        conversations, preferences: the data of the stages.

    Raises:
        UserError: `trainer.shard=node` asks for what cannot be.
    """
    ranks = 1 if team is None else team.place.local_size
    if config.trainer.shard is Shard.node:
        require_ranks(config, ranks)
        why = "trainer.shard=node"
    else:
        can = config.trainer.shard is Shard.auto and device.type == "cuda" and why_whole(config) is None
        if team is None or ranks < 2 or not can:
            return False
        memory = min(team.run(_memory, [config] * team.size, lambda _: _gpu_memory(device)))
        asked = replace(config, trainer=replace(config.trainer, devices=ranks))
        machine, longest = Machine("", device.type, memory), _longest(config, conversations, preferences)
        plans = plan_stages(asked, build_model(read_config(config, None)), machine, None, longest)
        if all(plan.ranks == 1 for plan in plans.values()):
            log.info("Each rank holds the whole base, which fits into its GPU (trainer.shard=auto).")
            return False
        why = f"trainer.shard=auto: a run with a whole one does not fit into {memory / GIB:.0f} GiB"
    what = "train parts of one model" if config.adapter is None else "share one base"
    log.info("The %d ranks of a machine %s (%s).", ranks, what, why)
    return True


def _longest(config: RunConfig, conversations: SFTData | None, preferences: PreferenceData | None) -> dict[str, int]:
    """Positions of the largest group of each stage, each token once; of rounds, as large as one can be."""
    longest = {}
    if conversations is not None:
        longest["sft"] = max(len(example["input_ids"]) for example in conversations.train)
    if preferences is not None:
        drawn = 0 if config.onpolicy is None else config.onpolicy.max_new_tokens * answers_of_a_group(config)
        sizes = ((len(g.prompt), sum(map(len, g.completions))) for g in preferences.train)
        longest["preference"] = max(prompt + max(answers, drawn) for prompt, answers in sizes)
    return longest


def _gpu_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0]


def _memory(post: Post, config: RunConfig) -> int:
    return _gpu_memory(resolve_device(config.device))
