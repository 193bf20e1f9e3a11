"""Completion of settings by the Tab key of a shell: Hydra's own."""

from __future__ import annotations

from contextlib import suppress

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from alignment.config.compose import VERSION_BASE
from alignment.config.registry import register
from alignment.files import asset_dir


def complete(action: str, shell: str) -> None:
    """Print what a shell asks for: the script that it runs, or the words that may stand at the end of `$COMP_LINE`.

    Args:
        action: install, uninstall or query.
        shell: bash, zsh or fish.
    """
    register()
    with initialize_config_dir(config_dir=str(asset_dir("conf")), version_base=VERSION_BASE):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        # An error would stand in the middle of the line that you type: a line that is wrong so far has no words
        with suppress(HydraException, OmegaConfBaseException):
            hydra.shell_completion("config", [f"{action}={shell}"])
