"""Reuse of a stage: a run stores the result, and other runs with the very same stage take it over."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from torch import nn

from alignment.files import read_sealed, write_sealed
from alignment.policy.adapter import has_adapter, load_adapter
from alignment.policy.identity import policy_identity
from alignment.runs.record import RunRecord, read_metrics
from alignment.stages.stage import Stage, StageResult, write_result
from alignment.stages.store import StageStore
from alignment.training.callbacks import LogFunction

log = logging.getLogger(__name__)


def save_stage(
    store: StageStore, key: str, stage: Stage, result: StageResult, model: nn.Module, name: str, record: RunRecord
) -> None:
    """Keep the policy that the stage has saved, its metrics and its result; `name` is what people call the model."""
    identity, description = policy_identity(model)
    rows = [row for row in read_metrics(record.metrics_path) if row["stage"] == stage.name]
    content = {
        "identity": identity,
        "description": {"stage": stage.name, "model": name, "dtype": description["dtype"]},
        "result": result.to_dict(),
        "plan": read_sealed(stage.policy.parent / "plan.json"),
        "rows": [{k: v for k, v in row.items() if k not in ("stage", "time", "wall_s")} for row in rows],
    }
    store.put(key, stage.policy, content)


def reuse_stage(
    store: StageStore,
    key: str,
    stage: Stage,
    model: nn.Module,
    load: Callable[[Path], nn.Module],
    record: RunRecord,
    log_metrics: LogFunction,
) -> tuple[nn.Module, StageResult] | None:
    """Take over a stored result: its policy, its metrics, and every file that the stage would have left.

    Args:
        model: the policy that the stage starts from. With an adapter, the stored weights are put into it and it is
            returned; a whole model is left as it is.
        load: loads a whole model from a folder.

    Returns:
        The policy and the result of the stage; None if nothing sound is stored, and `model` is unchanged then.
    """
    folder = stage.policy.parent
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(stage.policy, ignore_errors=True)
    content = store.take(key, stage.policy)
    if content is None:
        return None
    # The policy, which must be the one that was kept.
    adapted = has_adapter(model)
    fresh = {name: p.detach().clone() for name, p in model.named_parameters() if adapted and p.requires_grad}
    policy = load_adapter(model, stage.policy) if adapted else load(stage.policy)
    if policy_identity(policy)[0] != content["identity"]:
        model.load_state_dict(fresh, strict=False)
        log.warning("The stored result %s holds another policy than it says: %s is done again.", key[:12], stage.title)
        store.drop(key)
        return None
    log.info("%s was done before (%s).", stage.title, key[:12])
    # Its metrics and files.
    record.rewind(stage.name, -1)
    for row in content["rows"]:
        step, split = row.pop("step"), row.pop("split")
        log_metrics(step, split, {name: float(value) for name, value in row.items()})
    write_sealed(folder / "plan.json", content["plan"], indent=2)
    result = stage.result_type(**content["result"] | {"taken_over": key})
    write_result(folder, result, stage.policy)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return policy, result
