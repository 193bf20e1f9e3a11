"""Weights & Biases: one run for all stages of a recipe, with the metric names that users of TRL know."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from alignment.config.schema import TrackingConfig
from alignment.errors import UserError
from alignment.files import atomic_write_text
from alignment.runs.alerts import Alert
from alignment.runs.folder import sweep_name
from alignment.runs.rank_tracking import IDENTITY, SharedRun, first_problem, join_run, leave_run, settings_of
from alignment.runs.trackers.base import MARGINS, Cell, Row, Service, Told

if TYPE_CHECKING:
    import wandb

    from alignment.ranks.team import Team


logger = logging.getLogger(__name__)

_ENVIRONMENT_MODES = {
    "online": "online",
    "run": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}
_ID_FILE = "wandb_run_id"
_INIT_SECONDS = 30.0
_FINISH_SECONDS = 120.0
_out_of_reach: list[str] = []
"""Why W&B could not be reached, if it was tried: no later run of this process waits for it again."""


class WandbRun(Service):
    """A W&B run. Metrics are plotted over the steps of their stage; the last value of each is the saved policy's.

    Args:
        sent: the rows that W&B has.
        team: the other ranks that send their system metrics to this run.
    """

    title = "W&B"

    def __init__(self, run: wandb.Run, sent: Sequence[Row] = (), team: Team | None = None) -> None:
        self._run = run
        self._team = team
        self._waiting: dict[str, Any] = {}
        self.run_id = run.id
        self.sent = {row.key for row in sent}
        for stage, names in (("sft", ["sft/*"]), ("preference", ["train/*", "eval/*"])):
            run.define_metric(f"{stage}/step", hidden=True)
            for name in names:
                run.define_metric(name, step_metric=f"{stage}/step")

    def row(self, row: Row) -> None:
        """Send it in the background, with the tables that wait: W&B counts what it gets, and it is to count rows."""
        found: dict[str, Any] = {**row.named, f"{row.stage}/step": row.step, "stage": row.stage, **self._waiting}
        if row.margins is not None:
            import wandb

            histogram = wandb.Histogram(np_histogram=(np.array(row.margins.counts), np.array(row.margins.edges)))
            found[f"{row.split}/{MARGINS}"] = histogram
        self._waiting = {}
        self._run.log(found)

    def alert(self, alert: Alert) -> None:
        """Send it; W&B passes it on by mail or Slack, as its user wishes."""
        self._run.alert(alert.kind, alert.text, level="INFO" if alert.is_over else "WARN")

    def table(self, name: str, header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Keep it for the next row."""
        import wandb

        self._waiting[name] = wandb.Table(
            columns=list(header), data=[list(row) for row in rows], allow_mixed_types=True
        )

    def figure(self, name: str, figure: Any) -> None:
        """Keep it for the next row."""
        import wandb

        self._waiting[name] = wandb.Plotly(figure)

    def files(self, kind: str, paths: Sequence[Path]) -> None:
        """Send them as one artifact, and pictures as pictures too."""
        import wandb

        artifact = wandb.Artifact(f"{kind}-{self._run.id}", type=kind)
        for path in paths:
            artifact.add_file(str(path))
            if path.suffix == ".png":
                self._waiting[f"plots/{path.stem}"] = wandb.Image(str(path))
        self._run.log_artifact(artifact)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set them beside the last value of each metric."""
        self._run.summary.update(dict(values))

    def finish(self, exit_code: int) -> None:
        """Wait at most two minutes for the upload; the rest stays on disk for `wandb sync`."""
        if self._team is not None and exit_code == 0:  # after an error they end with rank 0
            self._team.tell(leave_run)
        if self._waiting:
            self._run.log(self._waiting)
            self._waiting = {}
        self._run.finish(exit_code=exit_code)


def open_service(config: TrackingConfig, told: Told, rows: Sequence[Row], team: Team | None) -> WandbRun | None:
    """Start or continue the W&B run of a folder. Its files are in `wandb` there and its id is in `wandb_run_id`.

    Args:
        rows: of metrics.jsonl. W&B has the first ones of them: as many as it has steps.
    """
    is_shared = team is not None and config.system == "each"
    run = start_run(config, told, is_shared=is_shared)
    if run is None:
        return None
    if team is None or not is_shared or run.settings.mode != "shared":
        if is_shared:
            logger.warning(
                "tracking.system=each: only rank 0's system metrics are kept, because W&B's mode for several writers "
                "of a run keeps nothing offline, nor goes on from what was."
            )
        return WandbRun(run, rows[: run.starting_step])
    shared = SharedRun(run.id, run.project, run.entity, _INIT_SECONDS, _FINISH_SECONDS)
    answers = dict(enumerate(team.tell(join_run, shared), 1))
    if any(answers.values()):
        logger.warning("%s; training goes on.", first_problem(answers))
    return WandbRun(run, rows, team)  # W&B counts no rows of a run with several writers


def start_run(config: TrackingConfig, told: Told, *, is_shared: bool = False) -> wandb.Run | None:
    """Start or continue the W&B run of a folder. None if nothing is tracked or W&B fails. Never asks you anything.

    Without a login, or if W&B cannot be reached, the run stays offline. An offline part has all rows of the run, so it
    replaces everything sent before, and earlier parts are not sent any more.

    Args:
        is_shared: whether other ranks send their system metrics to it, which W&B can only online.

    Raises:
        UserError: `mode` is online, and the login is missing or refused; or it is offline, and the run is shared.
    """
    folder, mode = told.folder, _mode(config)
    if mode == "disabled":
        return None
    if is_shared and mode == "offline":
        raise UserError(
            "tracking.system=each needs W&B online, whose mode for several writers of a run keeps nothing offline: set "
            "tracking.mode=online, or tracking.system=rank0."
        )
    import wandb

    # Which run it is
    id_file = folder / _ID_FILE
    begun_id = id_file.read_text().strip() if id_file.exists() else None
    for name_of_variable in () if _is_run_of_agent(folder) else IDENTITY:
        os.environ.pop(name_of_variable, None)
    try:
        wandb.setup()
    except Exception as error:
        why = f"W&B cannot be used with the variables WANDB_* of the environment ({' '.join(str(error).split())})"
        if mode == "online":
            raise UserError(f"{why}: unset them, or set tracking=none.") from error
        logger.warning("%s; training goes on without it.", why)
        return None

    # What an earlier process left
    earlier = list(folder.glob("wandb/offline-run-*/*.wandb"))
    folder.mkdir(parents=True, exist_ok=True)

    # Online if it can be, else offline
    is_shared = is_shared and not earlier  # parts that were kept offline replace what was sent
    own = settings_of(0) if is_shared else {}

    def start(mode: Literal["online", "offline", "shared"]) -> wandb.Run:
        return wandb.init(
            project=config.project,
            entity=config.entity,
            group=told.group,
            job_type=told.job_type,
            name=told.name,
            notes=told.notes,
            tags=list(told.tags),
            config=dict(told.config),
            dir=folder,
            id=begun_id,
            resume="allow" if begun_id and mode == "online" else None,
            reinit="create_new",
            mode=mode,
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=_INIT_SECONDS,
                finish_timeout=_FINISH_SECONDS,
                **(own if mode == "shared" else {}),
            ),
        )

    run, why = None, ""
    if mode != "offline":
        run, why = _start_online(lambda: start("shared" if is_shared else "online"), required=mode == "online")
    if run is None:
        reason = f" because {why}" if why else ""
        try:
            run = start("offline")
        except Exception as error:
            logger.warning("W&B failed and gets nothing of this run; training goes on: %s", error)
            return None
        parts = f"{shlex.quote(str(folder / 'wandb'))}/offline-run-*"
        logger.warning("W&B keeps this run offline%s; send it with: wandb sync %s", reason, parts)
    else:
        logger.info("W&B: %s", run.url)

    # What a later process needs
    for path in earlier:
        path.with_suffix(".wandb.synced").touch()  # tells `wandb sync` to skip it
    atomic_write_text(id_file, f"{run.id}\n")
    return run


def _is_run_of_agent(folder: Path) -> bool:
    """Whether an agent of a W&B sweep started this command as one run, whose id it chose."""
    is_one_run = sweep_name(folder) is None and not (folder / "multirun.yaml").exists()
    return "WANDB_SWEEP_ID" in os.environ and is_one_run


def _start_online(start: Callable[[], wandb.Run], required: bool) -> tuple[wandb.Run | None, str]:
    """The run, or the reason why there is none.

    Raises:
        UserError: the run is `required` to be online, and the login is missing or refused.
    """
    import wandb

    if _out_of_reach:
        return None, _out_of_reach[0]
    if why := login_problem():
        if required:
            raise UserError(
                f"W&B cannot be used online because {why}; run 'wandb login', or set tracking.mode=offline."
            )
        return None, why
    try:
        return start(), ""
    except wandb.errors.AuthenticationError as error:
        if required:
            raise UserError(
                f"W&B refused the login ({error}); run 'wandb login', or set tracking.mode=offline."
            ) from None
        why = f"the login was refused ({error})"
    except wandb.errors.CommError as error:
        why = f"W&B cannot be reached ({str(error).splitlines()[0]})"
        _out_of_reach.append(why)
    # W&B's service keeps the id of the failed start in use until it ends, which would end other runs too.
    if wandb.setup().most_recent_active_run is None:
        wandb.teardown()
    return None, why


def _mode(config: TrackingConfig) -> str:
    """auto, online, offline or disabled; WANDB_MODE overrides the configuration."""
    wanted = os.environ.get("WANDB_MODE")
    if not wanted:
        return config.mode
    if wanted not in _ENVIRONMENT_MODES:
        accepted = ", ".join(_ENVIRONMENT_MODES)
        raise UserError(f"The environment variable WANDB_MODE must be one of {accepted}, not '{wanted}'.")
    return _ENVIRONMENT_MODES[wanted]


def login_problem() -> str:
    """Why W&B has no login, by the environment, netrc and settings files; empty if it has one."""
    import wandb
    from wandb.sdk.lib import wbauth

    try:
        login = wbauth.authenticate_session(
            host=wandb.setup().settings.base_url, source="alignment", prompt=False, update_session=False
        )
    except wandb.errors.AuthenticationError as error:
        return f"the login is not valid ({error})"
    return "" if login else "you are not logged in"
