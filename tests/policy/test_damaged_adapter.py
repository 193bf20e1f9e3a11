"""Saved adapters that are damaged: one sentence that names the folder, wherever they are read."""

import json

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file

from alignment.errors import UserError
from alignment.export.opened import open_policy
from alignment.policy.reward_model import holds_reward_model
from alignment.policy.saved_adapter import read_adapter
from alignment.policy.shared_base import SharedBase


@pytest.fixture
def folder(tmp_path, tiny_model_folder):
    LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(tiny_model_folder)}))
    save_file({"lora": torch.ones(8, 8)}, tmp_path / "adapter_model.safetensors")
    return tmp_path


def test_weights_that_are_cut(folder):
    """As an interrupted copy leaves them: at every length."""
    assert read_adapter(folder).settings.r == 2
    path = folder / "adapter_model.safetensors"
    whole = path.read_bytes()
    for length in (0, 5, 40, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=f"the adapter in {folder} cannot be read"):
            read_adapter(folder)
    with pytest.raises(UserError, match="cannot be read"), SharedBase(torch.nn.Linear(1, 1)).acting(folder):
        pass
    with pytest.raises(UserError, match="cannot be read"):
        open_policy(folder)


def test_settings_that_are_cut(folder):
    path = folder / "adapter_config.json"
    path.write_text('{"r": 2,')
    with pytest.raises(UserError, match="cannot be read"):
        read_adapter(folder)
    with pytest.raises(UserError, match=f"{path} is damaged"):
        holds_reward_model(folder)
    with pytest.raises(UserError, match="cannot be read"):
        open_policy(folder)
