"""Float weights of a model whose base is quantised: found in shards and in larger models."""

import pytest
import torch

from alignment.errors import UserError
from alignment.policy.float_weights import FloatWeights


def test_float_weights_are_found_in_shards_and_larger_models(tmp_path, tiny_model_folder):
    """By their names in the index, also behind a prefix; in 8 bits they are none."""
    import json

    from safetensors.torch import load_file, save_file

    whole = load_file(tiny_model_folder / "model.safetensors")
    names = sorted(whole)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({f"model.language_model.{n.removeprefix('model.')}": whole[n] for n in part}, tmp_path / file)
    index = {f"model.language_model.{n.removeprefix('model.')}": file for file, part in shards.items() for n in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    weights = FloatWeights(str(tmp_path), None)
    for layer in ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.o_proj"):
        expected = whole[f"{layer}.weight"]
        assert torch.equal(weights.weight(layer, tuple(expected.shape)), expected)
    with pytest.raises(UserError, match="have none of this name and shape"):
        weights.weight("model.layers.0.mlp.up_proj", (1, 1))


def test_float_weights_are_not_those_of_a_tower(tmp_path):
    """Files of a model that also sees have other prefixes than the model, and the tower's layers the same names."""
    from safetensors.torch import save_file

    language, tower = torch.ones(2, 3), torch.zeros(2, 3)
    tail = "layers.0.self_attn.q_proj.weight"
    files = {f"language_model.model.{tail}": language, f"vision_tower.vision_model.encoder.{tail}": tower}
    save_file(files, tmp_path / "model.safetensors")
    found = FloatWeights(str(tmp_path), None).weight("model.language_model.layers.0.self_attn.q_proj", (2, 3))
    assert torch.equal(found, language)
