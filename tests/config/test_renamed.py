"""A setting under its old name is refused wherever it stands, in one sentence that gives the new name."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from alignment.config.compose import compose_node, load
from alignment.config.registry import register
from alignment.config.renamed import RENAMED, flat
from alignment.config.resume import changes
from alignment.errors import UserError


@pytest.fixture(autouse=True)
def renamed(monkeypatch):
    """`optim.rate` is a name of before, too, so that a section of the SFT stage has one."""
    register()
    monkeypatch.setitem(RENAMED, "optim.rate", "optim.lr")


def refused(*overrides: str, config_dir=None) -> str:
    with pytest.raises(UserError) as caught:
        load(*overrides, config_dir=config_dir)
    return str(caught.value)


@pytest.mark.parametrize("old", RENAMED)
def test_the_new_name_exists_and_the_old_one_does_not(old):
    keys = flat(OmegaConf.to_container(compose_node([]))).keys()
    assert RENAMED[old] in keys and old not in keys
    assert refused(f"{old}=1") == f"{old} is now called {RENAMED[old]}."


def test_a_section_of_the_sft_stage():
    assert refused("sft.optim.rate=1") == "sft.optim.rate is now called sft.optim.lr."


@pytest.mark.parametrize(
    ("name", "text", "key"),
    [
        ("recipe/mine.yaml", "optim: {rate: 1}\n", "optim.rate"),
        ("recipe/mine.yaml", "sft: {optim: {rate: 1}}\n", "sft.optim.rate"),
        ("recipe/mine.yaml", "sweep: {optim.rate: [1, 2]}\n", "optim.rate"),
        ("optim/mine.yaml", "defaults: [adamw, _self_]\nrate: 1\n", "optim.rate"),
    ],
)
def test_a_users_file(name, text, key, tmp_path):
    path = tmp_path / name
    path.parent.mkdir()
    path.write_text(text)
    new = key.replace("rate", "lr")
    assert refused(f"{path.parent.name}=mine", config_dir=tmp_path) == f"{path}: {key} is now called {new}."


def test_an_unfinished_run_of_before(tmp_path):
    node = compose_node(["recipe=quickstart"])
    written = OmegaConf.merge(OmegaConf.create(OmegaConf.to_container(node, resolve=True, enum_to_str=True)), {})
    written.optim = {"rate": 1.0}
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(written))
    with pytest.raises(UserError, match=r"begun by an earlier version.*: optim\.rate is now called optim\.lr\.$"):
        changes(tmp_path, node)
