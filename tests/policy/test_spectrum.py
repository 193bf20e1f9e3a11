"""Spectrum: the ratio of a matrix, the choice among the matrices of a type, and what trains then."""

import pytest
import torch

from alignment.errors import UserError
from alignment.files import CacheKind, read_sealed
from alignment.policy import spectrum
from alignment.policy.adapter import attach_adapter
from alignment.policy.spectrum import choose, choose_modules, scan, signal_to_noise
from tests.conftest import random_groups
from tests.helpers.policies import NF4, adapter, load
from tests.helpers.steps import make_loss, make_trainer, step_gradient


def by_the_book(weight: torch.Tensor) -> float:
    """The formula as it stands, from a decomposition."""
    values = torch.linalg.svdvals(weight.double())
    sigma = (values.quantile(0.75) - values.quantile(0.25)) / 1.349
    bound = sigma * (1 + (min(weight.shape) / max(weight.shape)) ** 0.5)
    return (values[values > bound].sum() / values[values <= bound].sum() / values.max()).item()


@pytest.mark.parametrize("shape", [(96, 40), (40, 96), (64, 64)])
def test_the_ratio_is_that_of_the_formula(shape):
    """Also of tall matrices, whose smaller Gram matrix is the other one."""
    torch.manual_seed(0)
    weight = torch.randn(shape) + 4 * torch.randn(shape[0], 3) @ torch.randn(3, shape[1]) / shape[1] ** 0.5
    assert signal_to_noise(weight) == pytest.approx(by_the_book(weight), rel=1e-6)


def test_matrices_without_noise_or_without_anything():
    """Equal singular values are all signal: nothing is at or below a bound of 0. Zeros are nothing."""
    assert signal_to_noise(torch.diag(torch.tensor([2.0, 2.0, 2.0]))) == float("inf")
    assert signal_to_noise(torch.zeros(4, 6)) == 0.0


def test_each_type_has_its_share():
    """The best of each type, at least one, in the order of the model, whatever the other types' ratios are."""
    ratios = {f"model.layers.{i}.mlp.up_proj": float(i % 3) for i in range(6)}
    ratios |= {f"model.layers.{i}.attn.q_proj": 100.0 - i for i in range(6)}
    ratios |= {"model.extra": 0.0}
    choice = choose(ratios, 0.34)
    assert choice.chosen == [
        *("model.layers.2.mlp.up_proj", "model.layers.5.mlp.up_proj"),
        *("model.layers.0.attn.q_proj", "model.layers.1.attn.q_proj", "model.extra"),
    ]
    assert choice.table()[0] == "model.layers.*.mlp.up_proj: 2 of 6 (layers 2 5), ratio from 2; the rest up to 1"


def test_a_model_is_scanned_once(tiny_model_folder, tmp_path, monkeypatch, caplog):
    """The ratios are those of the weights, in NF4 of the unpacked ones; the cache has them, unless it is damaged."""
    model = load(tiny_model_folder)
    ratios = scan(model, tmp_path)
    assert list(ratios)[:2] == ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"]
    assert "lm_head" not in ratios and len(ratios) == 14
    name = "model.layers.1.mlp.down_proj"
    assert ratios[name] == pytest.approx(by_the_book(model.get_submodule(name).weight), rel=1e-6)
    assert scan(load(tiny_model_folder, NF4), tmp_path) != ratios

    monkeypatch.setattr(spectrum, "signal_to_noise", None)
    assert scan(load(tiny_model_folder), tmp_path) == ratios
    monkeypatch.undo()
    for path in CacheKind.spectrum.under(tmp_path).glob("*.json"):
        path.write_text(path.read_text().replace("q_proj", "p_proj"))
    assert scan(load(tiny_model_folder), tmp_path) == ratios
    assert "is damaged: the model is scanned anew" in caplog.text


def test_the_choice_is_kept_in_the_run_folder(tiny_model_folder, tmp_path, monkeypatch):
    """A run that goes on trains the same modules, even when its weights have changed; targets limit the choice."""
    model, kept = load(tiny_model_folder), tmp_path / "spectrum.json"
    chosen = choose_modules(model, 0.5, ["q_proj", "mlp.up_proj"], tmp_path, kept)
    assert [name.rpartition(".")[2] for name in chosen] in (["q_proj", "up_proj"], ["up_proj", "q_proj"])
    modules = read_sealed(kept)["modules"]
    assert len(modules) == 4 and [name for name, found in modules.items() if found["trains"]] == chosen
    monkeypatch.setattr(spectrum, "scan", None)
    assert choose_modules(model, 0.5, ["q_proj", "mlp.up_proj"], tmp_path, kept) == chosen
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"spectrum=0.5 chooses among linear layers, .*target_modules=nothing names"):
        choose_modules(model, 0.5, ["nothing"], tmp_path, tmp_path / "other.json")


LAST = ["model.layers.1.self_attn.v_proj", "model.layers.1.mlp.down_proj"]


@pytest.mark.parametrize("kind", ["lora", "nf4", "whole"])
def test_only_the_chosen_modules_train(tiny_model_folder, tmp_path, kind):
    """Adapters, or without them weights; the backward pass does not go below the lowest of them."""
    base = load(tiny_model_folder, NF4 if kind == "nf4" else None)
    model = attach_adapter(base, None if kind == "whole" else adapter(target_modules=LAST), 0, modules=LAST)
    trained = {n.removeprefix("base_model.model.") for n, p in model.named_parameters() if p.requires_grad}
    parts = ["weight"] if kind == "whole" else ["lora_A.default.weight", "lora_B.default.weight"]
    assert trained == {f"{module}.{part}" for module in LAST for part in parts}

    reached = []
    layers = (model if kind == "whole" else model.get_base_model()).model.layers
    for layer in layers:
        layer.register_forward_hook(lambda _, inputs, output: reached.append(output[0].requires_grad))
    trainer = make_trainer(model, groups := random_groups(3), make_loss("simpo"), tmp_path, reference=None)
    _, gradient = step_gradient(trainer, groups)
    assert not any(reached[::2]) and all(reached[1::2])
    assert all(part.abs().sum() > 0 for name, part in gradient.items() if "lora_A" not in name)
