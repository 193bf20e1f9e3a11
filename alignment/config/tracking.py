"""The settings of tracking: with which services, under which names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from alignment.errors import as_names, has_password, require

MAX_NAME = 128
"""Characters that W&B takes for the name of a project, a group or a run."""


TRACKER_PACKAGES = {
    "wandb": ("wandb",),
    "tensorboard": ("tensorboard",),
    "mlflow": ("mlflow", "sqlalchemy", "alembic"),
    "trackio": ("trackio",),
}
"""What a run can be tracked with, as `tracking.to` names it, and the packages that it takes. Each is a module of
`alignment.runs.trackers`."""


@dataclass(kw_only=True)
class TrackingConfig:
    """With what a run is tracked; `tracking=none` sets the whole node to null.

    `entity`, `mode` and `system` are W&B's. `mode` auto: online if logged in, else offline. `system` says whose system
    metrics its run has: those that rank 0 sees, or each rank's. `uri` is where MLflow's store is.
    """

    to: Any  # names of TRACKER_PACKAGES, or one
    project: str
    group: str | None
    name: str | None
    tags: Any  # words, or one word
    entity: str | None
    mode: str
    system: str
    uri: str | None

    def __post_init__(self) -> None:
        self.to = as_names("tracking.to", self.to)
        require(bool(self.to), "tracking.to names no tracker: set tracking=none for none.")
        others = [name for name in self.to if name not in TRACKER_PACKAGES]
        accepted = ", ".join(TRACKER_PACKAGES)
        require(not others, f"tracking.to must be of {accepted}, not {', '.join(others)}; tracking=none is for none.")
        self.tags = as_names("tracking.tags", self.tags)
        # What W&B itself refuses, after the run has begun
        for tag in self.tags:
            require(len(tag) <= 64, f"tracking.tags: W&B takes tags of at most 64 characters, and '{tag}' is longer.")
        for key in ("project", "group", "name"):
            too_long = f"tracking.{key}: W&B takes at most {MAX_NAME} characters."
            require(len(getattr(self, key) or "") <= MAX_NAME, too_long)
        signs = sorted(set("/\\#?%:") & set(self.project))
        require(not signs, f"tracking.project: W&B takes no {' '.join(signs)} in the name of a project.")
        modes = ("auto", "online", "offline")
        require(self.mode in modes, f"tracking.mode must be one of {', '.join(modes)}, not '{self.mode}'.")
        known = ("rank0", "each")
        require(self.system in known, f"tracking.system must be one of {', '.join(known)}, not '{self.system}'.")
        # A setting of a service that the run is not tracked with
        plain = {"entity": (None, "wandb"), "mode": ("auto", "wandb"), "system": ("rank0", "wandb")}
        for key, (usual, service) in {**plain, "uri": (None, "mlflow")}.items():
            value = getattr(self, key)
            require(
                value == usual or service in self.to,
                f"tracking.{key}={value} is for {service} alone, and tracking.to={','.join(self.to)}.",
            )
        require(
            self.uri is None or not has_password(self.uri),
            "tracking.uri: an address has a password, which would stand in the files of the run: give it by "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD.",
        )
