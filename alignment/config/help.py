"""What `python -m alignment.run --help` says."""

from __future__ import annotations

import textwrap

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType

from alignment.config.compose import VERSION_BASE
from alignment.files import asset_dir

_WIDTH = 78
_BEGINNING = """\
Train a language model on preferences: SFT, then DPO or another loss, then a
report with samples and metrics.

  python -m alignment.run recipe=quickstart    a small model on a CPU, 4 minutes
  python -m alignment.run recipe=dpo_qwen3     Qwen3-1.7B with QLoRA on one GPU

Append overrides to change any value, e.g. loss=simpo loss.beta=2 seed=1.
Results go to outputs/<recipe>/<time>/; read report.md there.

Options
  -m, --multirun      run a sweep: every combination of comma-separated values,
                      e.g. -m recipe=quickstart loss.beta=0.1,0.3
  --config-dir DIR    also read your own recipes and options from this folder,
                      e.g. DIR/recipe/mine.yaml
  -c, --cfg job       show the configuration of the run instead of running it
  resume=true         continue the newest interrupted run of the recipe
  resume=FOLDER       continue the run in this folder
  -h, --help          show this text
"""
_END = """\
Show every setting of a recipe and its value:
  python -m alignment.run recipe=quickstart --cfg job

`alignment` lists the other commands, each with --help.
"""
_HIDDEN = ("schema", "hydra")


def help_text() -> str:
    """The help, at most 80 columns wide, with the options of every group that you can choose from."""
    groups = {name: options for name, options in _groups("").items() if name.split("/")[0] not in _HIDDEN}
    first = {name: groups.pop(name) for name in list(groups) if name.split("/")[0] == "recipe"}
    lines = ["Recipes and other choices (group=option)"]
    for name, options in (first | groups).items():
        text = f"{name}: {', '.join(options)}"
        lines += textwrap.wrap(text, _WIDTH, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
    return "\n".join([_BEGINNING, *lines, "", _END])


def _groups(parent: str) -> dict[str, list[str]]:
    """All groups of the store and their options; a recipe's own settings of a loss (`dpo@dpo_qwen3`) are none."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(asset_dir("conf")), version_base=VERSION_BASE):
        loader = GlobalHydra.instance().config_loader()

        def below(group: str) -> dict[str, list[str]]:
            options = [name for name in loader.get_group_options(group, ObjectType.CONFIG) if "@" not in name]
            found = {group: options} if group and options else {}
            for name in loader.get_group_options(group, ObjectType.GROUP):
                found |= below(f"{group}/{name}" if group else name)
            return found

        return below(parent)
