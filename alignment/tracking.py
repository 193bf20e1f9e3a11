"""Weights & Biases: one run for all stages of a recipe, with the metric names that TRL's users have in their charts."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from alignment.config import TrackingConfig
from alignment.errors import UserError
from alignment.records import atomic_write_text, redact, to_json

if TYPE_CHECKING:
    import wandb

logger = logging.getLogger(__name__)

_ENVIRONMENT_MODES = {
    "online": "online",
    "run": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}
_INIT_SECONDS = 30.0
_FINISH_SECONDS = 120.0


class Tracker(Protocol):
    """Where the numbers of a run are sent while it runs; the run folder has them all without it."""

    @property
    def run_id(self) -> str | None:
        """Id under which a later process continues the same tracked run."""

    def log(self, stage: str, step: int, split: str, metrics: Mapping[str, float]) -> None:
        """Send one row; `split` is "train" or "eval", names as in metrics.jsonl."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set final values; secrets are masked."""

    def finish(self, exit_code: int = 0) -> None:
        """Close the run; 0 is success. A second call does nothing."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class NullTracker:
    """Sends nothing."""

    run_id: str | None = None

    def log(self, stage: str, step: int, split: str, metrics: Mapping[str, float]) -> None:
        """Do nothing."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Do nothing."""

    def finish(self, exit_code: int = 0) -> None:
        """Do nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


def metric_row(stage: str, step: int, split: str, metrics: Mapping[str, float]) -> dict[str, Any]:
    """One row under its W&B names: `train/rewards/margins` of the preference stage, `sft/train/loss` of SFT."""
    prefix = f"sft/{split}" if stage == "sft" else split
    return {f"{prefix}/{name}": value for name, value in metrics.items()} | {f"{stage}/step": step, "stage": stage}


class WandbTracker:
    """One W&B run. Whatever W&B's own code raises is logged once and ends the tracking, never the training."""

    def __init__(self, run: wandb.Run) -> None:
        self._run: wandb.Run | None = run
        self.run_id: str | None = run.id
        for stage, names in (("sft", ["sft/*"]), ("preference", ["train/*", "eval/*"])):
            run.define_metric(f"{stage}/step")
            for name in names:
                run.define_metric(name, step_metric=f"{stage}/step")

    def log(self, stage: str, step: int, split: str, metrics: Mapping[str, float]) -> None:
        """Send one row; the network is used in the background only."""
        row = metric_row(stage, step, split, metrics)
        self._guarded(lambda run: run.log(row))

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set final values; secrets are masked."""
        masked = _sendable(values)
        self._guarded(lambda run: run.summary.update(masked))

    def finish(self, exit_code: int = 0) -> None:
        """Close the run; waits for the upload at most two minutes, what is left stays on disk for `wandb sync`."""
        self._guarded(lambda run: run.finish(exit_code=exit_code))
        self._run = None

    def _guarded(self, action: Any) -> None:
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:
            self._run = None
            logger.warning("W&B failed and gets no more of this run, which goes on without it: %s", error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish(0 if kind is None else 1)


def open_tracker(
    config: TrackingConfig | None,
    *,
    run_dir: Path,
    recipe: str,
    run_config: Mapping[str, Any],
    stages: Sequence[str],
) -> Tracker:
    """Tracker of a run; its files are in `run_dir`/wandb and its id in `run_dir`/wandb_run_id.

    An id in that file continues the earlier W&B run: online at once, offline as a further folder that `wandb sync`
    appends to the first. Steps that a resume does again are there twice, with equal values; the last seconds before a
    kill may be missing (metrics.jsonl has neither fault). Never asks anything. Without a login, or if W&B cannot be
    reached, the run is kept offline. `UserError` if online was asked for by name and the login is missing or refused.
    """
    mode = _mode(config)
    if config is None or mode == "disabled":
        return NullTracker()
    import wandb

    id_file = run_dir / "wandb_run_id"
    resume_id = id_file.read_text().strip() if id_file.exists() else None
    run_dir.mkdir(parents=True, exist_ok=True)
    # Hydra's file in the folder of a sweep; so a member that is continued on its own stays a member.
    sweep = run_dir.parent.name if (run_dir.parent / "multirun.yaml").exists() else None

    def start(mode: str) -> wandb.Run:
        return wandb.init(
            project=config.project,
            entity=config.entity,
            group=config.group or sweep or recipe,
            job_type="+".join(stages) if sweep is None else "sweep member",
            name=config.name or (f"{recipe}-{run_dir.name}" if sweep is None else run_dir.name),
            tags=list(config.tags),
            config=_sendable(run_config),
            dir=run_dir,
            id=resume_id,
            # Also for offline runs: it is what makes `wandb sync` append a resumed part instead of starting over.
            resume="allow" if resume_id else None,
            reinit="create_new",
            mode="online" if mode == "online" else "offline",
            settings=wandb.Settings(
                silent=True, console="off", init_timeout=_INIT_SECONDS, finish_timeout=_FINISH_SECONDS
            ),
        )

    why = ""
    if mode != "offline":
        why = _login_problem()
        if why and mode == "online":
            raise UserError(
                f"W&B cannot be used online because {why}; run 'wandb login', or set tracking.mode=offline."
            )
    run = None
    if mode != "offline" and not why:
        try:
            run = start("online")
        except wandb.errors.AuthenticationError as error:
            if mode == "online":
                raise UserError(
                    f"W&B refused the login ({error}); run 'wandb login', or set tracking.mode=offline."
                ) from None
            wandb.teardown()
            why = f"the login was refused ({error})"
        except wandb.errors.CommError as error:
            wandb.teardown()  # else its service holds the id of the failed start as in use
            why = f"W&B cannot be reached ({str(error).splitlines()[0]})"
    if run is None:
        run = start("offline")
        logger.warning(
            "W&B keeps this run offline%s; send it with: wandb sync %s",
            f" because {why}" if why else "",
            run_dir / "wandb" / "offline-run-*",
        )
    else:
        logger.info("W&B: %s", run.url)
    atomic_write_text(id_file, f"{run.id}\n")
    return WandbTracker(run)


def _sendable(values: Mapping[str, Any]) -> dict[str, Any]:
    """Masked, and in types that JSON has."""
    return json.loads(to_json(redact(values)))


def _mode(config: TrackingConfig | None) -> str:
    """auto, online, offline or disabled; WANDB_MODE goes before the configuration."""
    if config is None:
        return "disabled"
    wanted = os.environ.get("WANDB_MODE")
    if not wanted:
        return config.mode
    if wanted not in _ENVIRONMENT_MODES:
        accepted = ", ".join(_ENVIRONMENT_MODES)
        raise UserError(f"The environment variable WANDB_MODE must be one of {accepted}, not '{wanted}'.")
    return _ENVIRONMENT_MODES[wanted]


def _login_problem() -> str:
    """Why W&B would ask for a login, from the environment, netrc and settings files alone; empty if it would not."""
    import wandb
    from wandb.sdk.lib import wbauth

    try:
        login = wbauth.authenticate_session(
            host=wandb.setup().settings.base_url, source="alignment", prompt=False, update_session=False
        )
    except wandb.errors.AuthenticationError as error:
        return f"the login is no valid one ({error})"
    return "" if login else "nobody is logged in"
