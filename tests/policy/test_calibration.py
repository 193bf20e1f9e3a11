"""Calibrated NF4: the search, what the layers compute, the cache, and what cannot be calibrated."""

import logging
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from alignment.config.schema import Calibration, Dtype
from alignment.errors import UserError
from alignment.kernels.calibrated import BLOCK, block_constants, is_calibrated, pack_constants
from alignment.policy import calibration
from alignment.policy.adapter import attach_adapter
from alignment.policy.calibration import search
from alignment.policy.identity import policy_identity
from alignment.policy.merge import _merged_weights, _put_weights
from alignment.policy.quantize import plain_weight
from tests.conftest import random_groups, tiny_config
from tests.helpers.policies import NF4, adapter, load, scores, train_adapter
from tests.helpers.wide_model import save_wide_model

MSE = replace(NF4, calibration=Calibration.mse)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_wide_model(tmp_path_factory.mktemp("wide"))


def heavy_blocks(count: int) -> torch.Tensor:
    """Blocks off centre and with tails, as trained weights have some."""
    torch.manual_seed(0)
    blocks = torch.distributions.StudentT(4.0).sample((count, BLOCK)) * 0.02
    return blocks + torch.randn(count, 1) * 0.02


def rounded(blocks: torch.Tensor, constants: torch.Tensor) -> torch.Tensor:
    """What bitsandbytes makes of blocks less their constants, with these added again."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(blocks - constants[:, None], blocksize=BLOCK, quant_type="nf4")
    return dequantize_4bit(packed, state) + constants[:, None]


def entropy(blocks: torch.Tensor, constants: torch.Tensor) -> torch.Tensor:
    """Of the shares of the codes that bitsandbytes gives to the values of a block."""
    values = rounded(blocks, constants) - constants[:, None]
    shares = torch.isclose(values[:, :, None], values[:, None, :], rtol=1e-4, atol=0).float().mean(-1)
    return -shares.log2().mean(-1)


def candidates(blocks: torch.Tensor, objective: Calibration) -> torch.Tensor:
    """(points, blocks): the grid around each block's median, by the definition."""
    median = blocks.quantile(0.5, dim=-1)
    radius = (blocks - median[:, None]).abs().amax(-1)
    span, points = calibration._GRIDS[objective]
    return median + torch.linspace(-span, span, points)[:, None] * radius


def test_the_mse_search_finds_the_best_point_of_the_grid():
    """Of every block, by quantising it at every point with bitsandbytes."""
    blocks = heavy_blocks(40)
    errors = torch.stack(
        [(rounded(blocks, tau) - blocks).square().sum(-1) for tau in candidates(blocks, Calibration.mse)]
    )
    found = search(blocks, Calibration.mse).flatten()
    torch.testing.assert_close((rounded(blocks, found) - blocks).square().sum(-1), errors.amin(0), rtol=1e-3, atol=1e-9)


def test_the_entropy_search_finds_the_best_point_of_the_grid():
    """The codes of a block are spread as evenly as at the best point; ties go to the point nearest to the median."""
    blocks = heavy_blocks(6)
    spread = torch.stack([entropy(blocks, tau) for tau in candidates(blocks, Calibration.entropy)])
    found = search(blocks, Calibration.entropy).flatten()
    assert (entropy(blocks, found) >= spread.amax(0) - 2e-2).all()  # a border value may fall on either side
    assert entropy(blocks, found).mean() > entropy(blocks, torch.zeros(6)).mean() + 0.02


def test_blocks_of_equal_values_are_kept_exactly():
    """A block of zeros, and one of a constant, need no code at all."""
    blocks = torch.stack([torch.zeros(BLOCK), torch.full((BLOCK,), 0.5)])
    for objective in (Calibration.entropy, Calibration.mse):
        assert search(blocks, objective).flatten().tolist() == [0.0, 0.5]
    assert block_constants(*pack_constants(torch.zeros(4, 2))).eq(0).all()


def test_constants_keep_eight_bits():
    """A byte each and one scale per 256; what is lost is a few per cent of the largest of them at most."""
    torch.manual_seed(0)
    constants = torch.randn(100, 9) * 1e-3
    codes, scales = pack_constants(constants)
    assert codes.dtype is torch.uint8 and codes.shape == (100, 9) and len(scales) == 4
    error = (block_constants(codes, scales) - constants).abs()
    assert 0 < error.max() < 0.02 * constants.abs().max()


@pytest.mark.parametrize("objective", [Calibration.entropy, Calibration.mse])
def test_every_layer_is_quantised_without_its_constants(folder, objective):
    """A layer's weights are what bitsandbytes makes of the rest, plus the constants; by MSE nearer than plain NF4's."""
    plain, nf4, found = load(folder), load(folder, NF4), load(folder, replace(NF4, calibration=objective))
    gain = []
    for name, layer in found.named_modules():
        if not hasattr(getattr(layer, "weight", None), "quant_state"):
            continue
        assert is_calibrated(layer), name
        weight = plain.get_submodule(name).weight
        constants = block_constants(layer.tau_codes, layer.tau_scales)
        expected = rounded(weight.reshape(-1, BLOCK), constants.flatten()).view_as(weight)
        # double quantisation of the scales moves them by less than a hundredth
        assert (plain_weight(layer) - expected).abs().max() < 0.02 * weight.abs().max()
        errors = [(plain_weight(m.get_submodule(name)) - weight).square().sum() for m in (found, nf4)]
        gain.append(errors[0] / errors[1])
    assert len(gain) == 14
    if objective is Calibration.mse:
        assert torch.stack(gain).mean() < 0.75


@pytest.mark.parametrize("trained", [False, True])
def test_the_policy_computes_with_the_calibrated_weights(folder, trained):
    """Logits and gradients equal those of a plain model that holds the same weights, by fast and own forwards."""
    from alignment.kernels.base import is_patched

    model = attach_adapter(load(folder, MSE), adapter(), 0)
    if trained:
        train_adapter(model)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert is_patched(layer) and is_patched(model.get_base_model().model.layers[0].mlp)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    _put_weights(plain, _merged_weights(model))
    for rows in (3, 90):  # few rows leave the adapter apart, many merge it
        ids = torch.arange(rows)[None] % 97
        torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=1e-4, atol=1e-4)

    def gradient():
        model.zero_grad()
        model(input_ids=torch.arange(9)[None]).logits.sin().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    fast = gradient()
    for module in model.modules():
        if is_patched(module):
            module.__class__ = type(module)._original_class
    for mine, own in zip(fast, gradient(), strict=True):
        torch.testing.assert_close(mine, own, rtol=1e-3, atol=1e-4)


def test_sixteen_bits_use_the_constants_too(folder):
    """In bfloat16 the log-probs are those of 32 bits up to rounding, nearer than plain NF4's."""
    groups = random_groups(6)
    exact = scores(load(folder, MSE), groups)
    rounded_ = scores(load(folder, replace(MSE, compute_dtype=Dtype.bfloat16), Dtype.bfloat16), groups)
    other = scores(load(folder, NF4), groups)
    assert (rounded_ - exact).abs().mean() < 0.3 * (other - exact).abs().mean()


def test_a_model_is_searched_once(folder, monkeypatch, caplog):
    """The second load reads the cache; objectives, and plain NF4, are other policies; a damaged file is made anew."""
    first = load(folder, MSE)
    identity, description = policy_identity(first)
    assert description["quantization"] == "nf4, calibrated"
    others = [policy_identity(load(folder, q))[0] for q in (NF4, replace(MSE, calibration=Calibration.entropy))]
    assert len({identity, *others}) == 3

    monkeypatch.setattr(calibration, "search", None)
    assert policy_identity(load(folder, MSE))[0] == identity
    monkeypatch.undo()
    from alignment.files import CacheKind, cache_dir

    for path in CacheKind.calibration.under(cache_dir(None)).glob("*.safetensors"):
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert policy_identity(load(folder, MSE))[0] == identity
    assert "is damaged: the model is calibrated anew" in caplog.text


def test_narrow_layers_stay_plain(tiny_model_folder, tmp_path, caplog):
    """A block of 64 weights would reach over the ends of rows; a model of narrow layers alone is refused."""
    with caplog.at_level(logging.INFO):
        model = load(tiny_model_folder, MSE)
    assert "12 layers stay plain NF4" in caplog.text
    layers = model.model.layers
    assert is_calibrated(layers[0].mlp.down_proj) and not is_calibrated(layers[0].mlp.up_proj)

    AutoModelForCausalLM.from_config(tiny_config(intermediate_size=48)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"calibration=mse: .* has no 4-bit layer whose width is a multiple of 64"):
        load(tmp_path, MSE)
