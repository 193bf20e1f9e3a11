"""The SFT stage as a result that a run keeps for others, and takes over where another has done the very same stage."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from alignment.config.schema import RunConfig
from alignment.data.prepare import SFTData
from alignment.files import atomic_write_bytes, to_json
from alignment.policy.adapter import has_adapter, load_adapter
from alignment.policy.identity import policy_identity
from alignment.runs.record import RunRecord, read_metrics
from alignment.stages.store import StageStore, stage_key
from alignment.training.callbacks import LogFunction

log = logging.getLogger(__name__)


def sft_key(model: nn.Module, config: RunConfig, data: SFTData, template: str | None) -> str:
    """Name of the result that the SFT stage of a run would have; `template` is the tokenizer's."""
    assert config.sft is not None
    settings = {
        "adapter": config.adapter and asdict(config.adapter),
        "optim": asdict(config.sft.optim),
        "trainer": asdict(config.sft.trainer),
        "seed": config.sft.seed,
        "template": template,
    }
    return stage_key(model, (data.train, data.eval), settings)


def save_sft(store: StageStore, key: str, folder: Path, model: nn.Module, name: str, record: RunRecord) -> None:
    """Keep what the SFT stage has left in its folder and in the metrics; `name` is what people call the model."""
    identity, description = policy_identity(model)
    rows = [row for row in read_metrics(record.metrics_path) if row["stage"] == "sft"]
    content = {
        "identity": identity,
        "description": {"stage": "sft", "model": name, "dtype": description["dtype"]},
        "result": json.loads((folder / "done.json").read_bytes()),
        "plan": json.loads((folder / "plan.json").read_bytes()),
        "rows": [{k: v for k, v in row.items() if k not in ("stage", "time", "wall_s")} for row in rows],
    }
    store.put(key, folder / "policy", content)


def reuse_sft(
    store: StageStore,
    key: str,
    folder: Path,
    model: nn.Module,
    load: Callable[[Path], nn.Module],
    record: RunRecord,
    log_metrics: LogFunction,
) -> tuple[nn.Module, dict[str, Any]] | None:
    """The policy of the SFT stage that was done before and its result, with all that the stage leaves in its folder.

    Args:
        model: the policy that the stage starts from. It becomes the one that is returned if it has an adapter; a whole
            model is left as it is.
        load: gives a whole model that was saved.

    Returns:
        None where there is no such result, or none that is sound; `model` is as it was then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "policy", ignore_errors=True)
    content = store.take(key, folder / "policy")
    if content is None:
        return None
    adapted = has_adapter(model)
    fresh = {name: p.detach().clone() for name, p in model.named_parameters() if adapted and p.requires_grad}
    policy = load_adapter(model, folder / "policy") if adapted else load(folder / "policy")
    if policy_identity(policy)[0] != content["identity"]:
        model.load_state_dict(fresh, strict=False)
        log.warning("The kept result %s is not the policy that it was: SFT is done again.", key[:12])
        store.drop(key)
        return None
    log.info("SFT was done before (%s).", key[:12])
    record.rewind("sft", -1)
    for row in content["rows"]:
        step, split = row.pop("step"), row.pop("split")
        log_metrics(step, split, {name: float(value) for name, value in row.items()})
    atomic_write_bytes(folder / "plan.json", to_json(content["plan"], indent=2))
    result = content["result"] | {"taken_over": key}
    atomic_write_bytes(folder / "done.json", to_json(result, indent=2))
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return policy, result
