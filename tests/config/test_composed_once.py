"""What `tests/helpers/composition.py` keeps is what Hydra composes."""

from omegaconf import OmegaConf

from alignment.config.compose import compose_node
from alignment.config.registry import register
from tests.helpers import composition


def test_it_is_what_hydra_composes():
    """With other values than those it was first composed with, after somebody has written into the first."""
    register()
    options = ("recipe=dpo_qwen3", "loss=ipo")
    values = ("loss.tau=0.2", "+data.columns.prompt=question", "hydra.run.dir=there")
    compose_node([*options, "loss.tau=0.3"]).loss.tau = 9
    lists = len(composition._lists)
    found = OmegaConf.to_yaml(compose_node([*values, *options], with_hydra=True))
    assert len(composition._lists) == lists > 0
    with composition.hydra_itself():
        assert found == OmegaConf.to_yaml(compose_node([*values, *options], with_hydra=True))


def test_a_file_that_changes_is_composed_anew(tmp_path):
    """A recipe of your own, stored by `register` as often as a command is checked."""
    (tmp_path / "recipe").mkdir()
    for seed in (1, 2):
        recipe = f"# @package _global_\ndefaults: [{{override /loss: dpo}}]\nseed: {seed}\n"
        (tmp_path / "recipe" / "mine.yaml").write_text(recipe)
        for _ in range(2):
            register(tmp_path)
            assert compose_node(["recipe=mine"]).seed == seed
