"""Tracking with nothing of the user's own W&B."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from alignment.config.schema import TrackingConfig
from alignment.runs.trackers import wandb as wandb_service


def tracking_config(**values: Any) -> TrackingConfig:
    defaults = {
        "to": ["wandb"],
        "project": "p",
        "entity": None,
        "mode": "auto",
        "system": "rank0",
        "group": None,
        "name": None,
        "tags": [],
        "uri": None,
    }
    return TrackingConfig(**(defaults | values))


@pytest.fixture
def nobody_logged_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    import wandb

    for name in (
        "WANDB_MODE",
        "WANDB_API_KEY",
        "WANDB_IDENTITY_TOKEN_FILE",
        "WANDB_RUN_ID",
        "WANDB_RESUME",
        "WANDB_SWEEP_ID",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "settings"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(wandb_service, "_out_of_reach", [])
    wandb.teardown()
    yield monkeypatch
    wandb.teardown()
