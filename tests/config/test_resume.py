"""A run that began before a default changed, or before a setting existed, goes on with its own settings."""

from __future__ import annotations

import pytest
import yaml
from omegaconf import OmegaConf

from alignment.config.compose import as_plain, compose_node, to_run_config
from alignment.config.registry import register
from alignment.config.renamed import FORMER_DEFAULTS
from alignment.config.resume import finished_run, resumed_overrides
from alignment.errors import UserError
from tests.conftest import each

TYPED = ["recipe=quickstart", "optim.lr=3.0e-5", "+data.template_kwargs={thinking: false}"]
OLD = [f"{key}={value}" for key, value in FORMER_DEFAULTS.items()]
NEW_SINCE = (
    *("adapter.iec", "trainer.router_aux_loss_coef", "sft.trainer.router_aux_loss_coef", "spectrum"),
    *("evaluation.llm", "evaluation.reward_model", "evaluation.human_labels"),
)


@pytest.fixture(scope="module")
def old_run(tmp_path_factory):
    """The folder of an unfinished run that took the defaults of its time."""
    register()
    folder = tmp_path_factory.mktemp("old_run")
    settings = as_plain(compose_node([*TYPED, *OLD]))
    for name in NEW_SINCE:
        *sections, key = name.split(".")
        section = settings
        for part in sections:
            section = section[part]
        del section[key]
    settings["trainer"]["joint_passes"] = settings["sft"]["trainer"]["joint_passes"] = True  # gone since
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(settings)))
    (folder / ".hydra").mkdir()
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump([*TYPED, "trainer.joint_passes=true"]))
    return folder


@pytest.mark.slow
def test_it_goes_on_with_the_defaults_of_its_time(old_run):
    """Attention and adapter are those that it began with, and what did not exist then is off."""
    resumed = to_run_config(compose_node(resumed_overrides([f"resume={old_run}"], str(old_run), "quickstart")))
    began = to_run_config(compose_node([*TYPED, *OLD]))
    assert (resumed.model.attention, resumed.adapter.target_modules) == ("sdpa", ["all-linear"])
    resumed.resume = None
    assert resumed == began


REFUSED = [
    ("model.attention=eager", "model.attention (sdpa then, eager now)"),
    ("adapter.target_modules=[q_proj]", "adapter.target_modules (['all-linear'] then, ['q_proj'] now)"),
    ("adapter.iec=true", "adapter.iec (False then, True now)"),
    ("+data.template_kwargs.tools=true", "data.template_kwargs.tools (None then, True now)"),
    ("quantization=nf4", "quantization.calibration (None then, none now)"),
    ("loss=ipo", "loss.beta (0.1 then, None now)"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("typed", "said"), each(REFUSED, [REFUSED[0], REFUSED[2]]))
def test_another_setting_is_refused_in_one_sentence(typed, said, old_run):
    """An old default is no licence to change it, and a setting of today cannot be switched on."""
    with pytest.raises(UserError) as caught:
        resumed_overrides([f"resume={old_run}", typed], str(old_run), "quickstart")
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_finished_run_of_a_recipe_that_is_not_here_says_how_to_give_it(old_run, tmp_path):
    """As for a merge of runs whose recipe is in a folder of its own."""
    (tmp_path / ".hydra").mkdir()
    (tmp_path / "config.yaml").write_text((old_run / "config.yaml").read_text())
    (tmp_path / ".hydra" / "overrides.yaml").write_text("- recipe=nobodys\n")
    with pytest.raises(UserError, match=r"cannot be composed again: .*'recipe/nobodys'.*where it is with --config-dir"):
        finished_run(tmp_path)
