"""Hydra's grid sweeper for recipes with members of their own; Hydra looks for plugins in this namespace alone."""

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import Override


class MemberSweeper(BasicSweeper):
    """Launches what `alignment.compose.sweep_members` lists."""

    @staticmethod
    def split_arguments(overrides: list[Override], max_batch_size: int | None) -> list[list[list[str]]]:
        """All members as one batch: every launcher has its own limit of what runs at once."""
        from alignment.compose import sweep_members  # not where Hydra only looks for its plugins

        return [sweep_members([override.input_line or "" for override in overrides])]
