"""Weights & Biases: one run for all stages of a recipe, with the metric names that users of TRL know."""

from __future__ import annotations

import json
import logging
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from alignment.config.schema import MAX_NAME, TrackingConfig
from alignment.errors import UserError
from alignment.files import atomic_write_text, redact, to_json
from alignment.runs.rank_tracking import IDENTITY, SharedRun, first_problem, join_run, leave_run, settings_of
from alignment.runs.record import LINE_KEYS, read_metrics

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


def metric_row(stage: str, step: int, split: str, metrics: Mapping[str, float]) -> dict[str, Any]:
    """One row under its W&B names: `train/rewards/margins` in the preference stage, `sft/train/loss` in SFT."""
    prefix = f"sft/{split}" if stage == "sft" else split
    return {f"{prefix}/{name}": value for name, value in metrics.items()} | {f"{stage}/step": step, "stage": stage}


class Tracker:
    """Sends the numbers of a run to W&B while it runs; without a W&B run it sends nothing.

    An error in W&B is logged once and ends the tracking, never the training. The run folder has all numbers anyway.

    Args:
        rows: of metrics.jsonl, of which W&B has the first `num_there`; it is sent the others.
        team: the other ranks that send their system metrics to this run.

    Attributes:
        run_id: id with which a later process continues the W&B run; None without one.
    """

    def __init__(
        self,
        run: wandb.Run | None,
        rows: Sequence[Mapping[str, Any]] = (),
        num_there: int = 0,
        team: Team | None = None,
    ) -> None:
        self._run = run
        self._team = team
        self.run_id: str | None = run.id if run is not None else None
        self._sent: set[tuple[str, int, str]] = set()
        self._guarded(_define_axes)
        for row in rows[num_there:]:
            metrics = {name: value for name, value in row.items() if name not in LINE_KEYS}
            self.log(row["stage"], row["step"], row["split"], metrics)
        self._sent.update((row["stage"], row["step"], row["split"]) for row in rows)

    def log(self, stage: str, step: int, split: str, metrics: Mapping[str, float]) -> None:
        """Send one row in the background, unless W&B has it from before a resume.

        `split` is "train" or "eval", and names are those of metrics.jsonl.
        """
        if (stage, step, split) in self._sent:
            return
        row = metric_row(stage, step, split, metrics)
        self._guarded(lambda run: run.log(row))

    def table(self, name: str, header: Sequence[str], rows: Sequence[Sequence[str | float | None]]) -> None:
        """Send a table."""

        def send(run: wandb.Run) -> None:
            from wandb import Table

            run.log({name: Table(list(header), [list(row) for row in rows], allow_mixed_types=True)})

        self._guarded(send)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set final values; secrets are masked."""
        masked = sendable(values)
        self._guarded(lambda run: run.summary.update(masked))

    def finish(self, exit_code: int = 0) -> None:
        """Close the run. Waits at most two minutes for the upload; the rest stays on disk for `wandb sync`."""
        self._guarded(lambda run: run.finish(exit_code=exit_code))
        self._run = None

    def _guarded(self, action: Any) -> None:
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:
            self._run = None
            logger.warning("W&B failed and gets nothing more of this run; training goes on: %s", error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._team is not None and kind is None:  # after an error they end with rank 0
            self._team.tell(leave_run)
        self.finish(0 if kind is None else 1)


def _define_axes(run: wandb.Run) -> None:
    """Plot every metric over the steps of its stage. W&B's summaries are then the values of the saved policy."""
    for stage, names in (("sft", ["sft/*"]), ("preference", ["train/*", "eval/*"])):
        run.define_metric(f"{stage}/step", hidden=True)
        for name in names:
            run.define_metric(name, step_metric=f"{stage}/step")


def open_tracker(
    config: TrackingConfig | None,
    *,
    run_dir: Path,
    recipe: str,
    run_config: Mapping[str, Any],
    stages: Sequence[str],
    team: Team | None = None,
) -> Tracker:
    """Start the tracker of a run. Its files are in `run_dir`/wandb and its id is in `run_dir`/wandb_run_id.

    A resumed run continues the same W&B run and sends each row once: it sends rows that a kill kept back, and does not
    send the rows again that it repeats (metrics.jsonl has their latest values).

    Raises:
        UserError: `mode` is online, and the login is missing or refused.
    """
    is_shared = team is not None and config is not None and config.system == "each"
    sweep = sweep_name(run_dir)
    name = run_dir.name if sweep else f"{recipe}-{run_dir.name}"
    run = start_run(
        config,
        run_dir,
        run_config,
        group=(sweep or recipe)[:MAX_NAME],
        job_type="sweep member" if sweep else "+".join(stages),
        name=name[:MAX_NAME],
        is_shared=is_shared,
    )
    if run is None:
        return Tracker(None)
    path = run_dir / "metrics.jsonl"
    rows = read_metrics(path) if path.exists() else []
    if team is None or not is_shared or run.settings.mode != "shared":
        if is_shared:
            logger.warning(
                "tracking.system=each: only rank 0's system metrics are kept, because W&B's mode for several writers "
                "of a run keeps nothing offline, nor goes on from what was."
            )
        return Tracker(run, rows, run.starting_step)
    shared = SharedRun(run.id, run.project, run.entity, _INIT_SECONDS, _FINISH_SECONDS)
    answers = dict(enumerate(team.tell(join_run, shared), 1))
    if any(answers.values()):
        logger.warning("%s; training goes on.", first_problem(answers))
    return Tracker(run, rows, len(rows), team)  # W&B counts no rows of a run with several writers


def sweep_name(run_dir: Path) -> str | None:
    """Name of the sweep that the run belongs to, from the files that Hydra leaves; None if it belongs to none."""
    parent = run_dir.absolute().parent
    hydra = run_dir / ".hydra" / "hydra.yaml"  # other sweepers than Hydra's own write no multirun.yaml
    is_member = (parent / "multirun.yaml").exists() or (hydra.exists() and "mode: MULTIRUN" in hydra.read_text())
    return parent.name if is_member else None


def start_run(
    config: TrackingConfig | None,
    folder: Path,
    run_config: Mapping[str, Any],
    *,
    group: str,
    job_type: str,
    name: str,
    notes: str | None = None,
    is_shared: bool = False,
) -> wandb.Run | None:
    """Start or continue the W&B run of a folder. None if nothing is tracked or W&B fails. Never asks you anything.

    Without a login, or if W&B cannot be reached, the run stays offline. An offline part has all rows of the run, so it
    replaces everything sent before, and earlier parts are not sent any more.

    Args:
        group, name: used if the configuration sets none.
        is_shared: whether other ranks send their system metrics to it, which W&B can only online.

    Raises:
        UserError: `mode` is online, and the login is missing or refused; or it is offline, and the run is shared.
    """
    mode = _mode(config)
    if config is None or mode == "disabled":
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
            group=config.group or group,
            job_type=job_type,
            name=config.name or name,
            notes=notes,
            tags=list(config.tags),
            config=sendable(run_config),
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


def sendable(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with secrets masked, in types that JSON has."""
    return json.loads(to_json(redact(values)))


def _mode(config: TrackingConfig | None) -> str:
    """auto, online, offline or disabled; WANDB_MODE overrides the configuration."""
    if config is None:
        return "disabled"
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
