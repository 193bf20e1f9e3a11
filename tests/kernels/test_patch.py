"""Patched layers against peft's and transformers' own, value by value and gradient by gradient."""

import copy

import pytest
import torch
from torch.nn import functional as F

from alignment.kernels import base, linear, norm, rotary
from alignment.kernels import matmul as products
from alignment.kernels.matmul import add_matmul, matmul, transposed_matmul
from alignment.kernels.patch import patch_layers
from alignment.policy.identity import policy_identity
from alignment.reference.frozen import FrozenPolicy
from tests.bench.layers import Layer, Saved
from tests.helpers.patched import FEW, MANY, MODELS, PATCHED, assert_close, classes, compute, lora_layers, pair, tiny


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("shape", [FEW, MANY])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_values_and_gradients_are_those_of_peft(kind, shape, dtype, tolerance):
    own, changed = pair(kind, dtype)
    assert classes(changed) == PATCHED[kind]
    assert_close(compute(changed, shape), compute(own, shape), tolerance)


@pytest.mark.parametrize("shape", [FEW, MANY])
def test_a_quantised_base_gives_the_same(shape):
    own, changed = pair("qwen3", nf4=True)
    assert {"PatchedLinear4bit", "PatchedQwen3MLP"} <= classes(changed)
    assert_close(compute(changed, shape), compute(own, shape), 1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma"])
@pytest.mark.parametrize("nf4", [False, True])
def test_products_added_to_the_adapters_as_on_a_gpu_give_the_same(kind, nf4, monkeypatch):
    dtype, tolerance = (torch.float32, 1e-5) if nf4 else (torch.float64, 1e-12)
    own, changed = pair(kind, dtype=dtype, nf4=nf4)
    calls = []
    monkeypatch.setattr(linear, "_is_gpu", lambda x: calls.append(x) or True)
    monkeypatch.setattr(linear, "_UNPACKED_FROM", 1)
    for shape in (FEW, MANY):  # with many rows a CPU forms the merged weight, which a GPU never does
        assert_close(compute(changed, shape), compute(own, shape), tolerance)
    assert calls


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gemma"])
@pytest.mark.parametrize("nf4", [False, True])
def test_16_bits_under_autocast_are_as_close_to_the_truth_as_peft_is(kind, nf4):
    own, changed = pair(kind, torch.bfloat16, nf4)
    for model in (own, changed):
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.data = p.data.float()  # as peft keeps it
    exact = compute(copy.deepcopy(own).float()) if not nf4 else None
    found, expected = compute(changed, autocast=torch.bfloat16), compute(own, autocast=torch.bfloat16)
    for name, value in expected.items():
        assert found[name].dtype is value.dtype, name
        truth = exact[name] if exact else value
        error = ((found[name] - truth).norm() / truth.norm()).item()
        peft_error = ((value - truth).norm() / truth.norm()).item()
        assert error <= (1.5 * peft_error if exact else 0.1), (name, error, peft_error)


def test_16_bits_without_autocast_and_an_adapter_in_16_bits():
    own, changed = pair("llama", torch.bfloat16)
    found, expected = compute(changed), compute(own)
    assert last_function(changed) == "_Linear"
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 0.1 * value.norm(), name


# What is kept


def kept(model, num_tokens=64):
    with Saved(model) as saved:
        layer = Layer(model, num_tokens)
        layer.forward()
    return saved.num_bytes / num_tokens


def test_a_layer_keeps_what_the_documentation_says():
    own, changed = pair("llama")
    h, i, q, k = 32, 48, 32, 16
    tables = 2 * 8  # cosines and sines, once for all layers
    by_hand = 2 * h + 2 * i + 2 * q + 2 * k + 2 + 4 + tables
    assert kept(changed) == 4 * by_hand
    assert kept(own) > 1.6 * 4 * by_hand


def test_norms_on_heads_keep_their_input_too():
    _, changed = pair("qwen3")
    h, i, q, k = 32, 48, 32, 16
    assert kept(changed) == 4 * (2 * h + 2 * i + 2 * q + 2 * k + 2 + 4 + 2 * 8 + q + k + 4 + 2)


# Calls that a patched forward does not cover


def last_function(model):
    """The autograd function that made the output of the first query projection."""
    layer = next(m for n, m in model.named_modules() if n.endswith("layers.0.self_attn.q_proj"))
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(7), dtype=layer.weight.dtype)
    return type(layer(x.requires_grad_()).grad_fn).__name__.removesuffix("Backward")


def two_adapters(model):
    torch.manual_seed(1)
    model.add_adapter("second", copy.copy(model.peft_config["default"]))
    model.base_model.set_adapter(["default", "second"])
    for layer in lora_layers(model):
        layer.lora_B["second"].weight.data.fill_(0.1)


def trained_weights(model):
    for layer in lora_layers(model):
        layer.base_layer.weight.requires_grad_(True)


def adapter_bias(model):
    torch.manual_seed(1)
    for layer in lora_layers(model):
        up = layer.lora_B["default"]
        up.bias = torch.nn.Parameter(torch.randn(up.out_features))
        layer.lora_bias["default"] = True


def hooks(model):
    for layer in lora_layers(model):
        layer.lora_A["default"].register_forward_hook(lambda module, inputs, output: 2 * output)


def merged(model):
    model.merge_adapter()


@pytest.mark.parametrize("change", [two_adapters, trained_weights, adapter_bias, hooks, merged])
def test_other_calls_take_the_own_forward(change):
    own, changed = pair("llama")
    assert last_function(changed) == "_Linear"
    change(own)
    change(changed)
    assert last_function(changed) != "_Linear"
    assert_close(compute(changed), compute(own), 1e-5)


def test_a_dora_keeps_its_own_forward():
    from peft import LoraConfig, get_peft_model

    def dora(model):
        torch.manual_seed(0)
        return get_peft_model(model.unload(), LoraConfig(r=4, target_modules=["q_proj", "up_proj"], use_dora=True))

    own = dora(tiny())
    changed = copy.deepcopy(own)
    patch_layers(changed)
    assert last_function(changed) != "_Linear"
    assert_close(compute(changed), compute(own), 1e-5)


def test_dropout_counts_in_training_only():
    _, changed = pair("llama")
    for layer in lora_layers(changed):
        layer.lora_dropout["default"] = torch.nn.Dropout(0.5)
    assert last_function(changed.train()) != "_Linear"
    assert last_function(changed.eval()) == "_Linear"


def test_fp32_under_autocast_takes_the_own_forward():
    own, changed = pair("llama")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert last_function(changed) != "_Linear"
    found, expected = compute(changed, autocast=torch.bfloat16), compute(own, autocast=torch.bfloat16)
    assert_close(found, expected, 1e-1)


def test_trained_base_weights_keep_their_layers():
    own = tiny().unload().requires_grad_(True)
    changed = copy.deepcopy(own)
    patch_layers(changed)
    assert classes(changed) == {"PatchedLlamaMLP", "PatchedLlamaAttention"}
    assert_close(compute(changed), compute(own), 1e-5)


def test_an_fp32_adapter_on_16_bits_counts_in_fp32_without_autocast():
    own = tiny(dtype=torch.bfloat16)
    for layer in lora_layers(own):
        layer.lora_A.float()
        layer.lora_B.float()
    changed = copy.deepcopy(own)
    patch_layers(changed)
    assert last_function(changed) != "_Linear"
    assert_close(compute(changed), compute(own), 1e-2)


def test_16_bits_do_not_round_the_update_away():
    _, changed = pair("llama", torch.bfloat16, attention_bias=False)
    layer = lora_layers(changed)[0]
    signs = torch.tensor([1.0, -1.0]).repeat(16)
    with torch.no_grad():
        layer.base_layer.weight.fill_(1.0)
        layer.lora_A["default"].weight.copy_(signs.expand(4, 32))
        layer.lora_B["default"].weight.fill_(2.0**-13)  # times 4 ranks and a scaling of 2: 2**-10 beside weights of 1
    found = layer(signs.expand(*MANY, 32).bfloat16())
    assert torch.equal(found, torch.full_like(found, 32 * 2.0**-10))


def test_an_adapter_that_is_switched_off_has_no_part():
    own, changed = pair("llama")
    x = 8 * torch.randn(*MANY, 32, generator=torch.Generator().manual_seed(5))
    with changed.disable_adapter():
        found = changed(inputs_embeds=x).logits
    assert torch.allclose(found, own.unload()(inputs_embeds=x).logits, rtol=1e-4, atol=1e-5)


def test_some_layers_without_an_adapter():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    own = get_peft_model(tiny().unload(), LoraConfig(r=4, target_modules=["v_proj", "down_proj"]))
    for layer in lora_layers(own):
        torch.nn.init.normal_(layer.lora_B["default"].weight)
    changed = copy.deepcopy(own)
    patch_layers(changed)
    assert classes(changed) == PATCHED["llama"]
    assert_close(compute(changed), compute(own), 1e-5)


def test_another_activation_keeps_its_mlp():
    own, changed = pair("llama", hidden_act="relu")
    assert classes(changed) == PATCHED["llama"] - {"PatchedLlamaMLP"}
    assert_close(compute(changed), compute(own), 1e-5)


def test_a_norm_output_that_was_written_to_is_kept_as_it_is():
    own, changed = pair("llama")
    gradients = []
    for model in (own, changed):
        layer = model.base_model.model.model.layers[0]
        x = torch.randn(3, 32, generator=torch.Generator().manual_seed(7)).requires_grad_()
        layer.self_attn.q_proj(layer.input_layernorm(x).mul_(3)).square().sum().backward()
        gradients.append(layer.self_attn.q_proj.lora_A["default"].weight.grad)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["input_layernorm", "self_attn.q_proj", "mlp"])
def test_outputs_can_be_written_to(name):
    _, changed = pair("llama")
    module = changed.base_model.model.model.layers[0].get_submodule(name)
    x = torch.randn(3, 32, requires_grad=True)
    module(x).mul_(3).sum().backward()
    (found,) = torch.autograd.grad(module(x).sum(), x)
    assert torch.allclose(x.grad, 3 * found, rtol=1e-4, atol=1e-5)


def test_a_class_whose_forward_does_something_else_is_left_alone(caplog):
    own = tiny()
    with caplog.at_level("INFO"):
        plain = type(own.base_model.model.model.layers[0].mlp)
        loud = type("LoudMLP", (plain,), {"forward": lambda self, x: 3 * plain.forward(self, x)})
        for module in own.modules():
            if type(module) is plain:
                module.__class__ = loud
        changed = copy.deepcopy(own)
        patch_layers(changed)
    assert classes(changed) == PATCHED["llama"] - {"PatchedLlamaMLP"}
    messages = [r.message for r in caplog.records]
    assert messages == ["LoudMLP keeps its own forward: the faster one gives other values here."]
    assert_close(compute(changed), compute(own), 1e-5)


# Everything around


def test_once_and_again_and_the_random_state_are_untouched():
    model = tiny()
    state = torch.get_rng_state()
    patch_layers(model)
    names, kinds = list(model.state_dict()), [type(m) for m in model.modules()]
    patch_layers(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [type(m) for m in model.modules()] == kinds
    plain = tiny()
    assert names == list(plain.state_dict())
    assert all(m.training is plain.training for m in model.modules())


def test_identity_is_the_same():
    own, changed = pair("qwen3", nf4=True)
    assert policy_identity(own)[0] == policy_identity(changed)[0]


def test_an_update_of_zero_is_the_base_to_the_last_bit():
    for nf4 in (False, True):
        _, changed = pair("llama", nf4=nf4)
        for layer in lora_layers(changed):
            layer.lora_B["default"].weight.data.zero_()
        with_adapter = compute(changed)["logits"]
        with changed.disable_adapter():
            x = 8 * torch.randn(*MANY, 32, generator=torch.Generator().manual_seed(5))
            assert torch.equal(changed(inputs_embeds=x, use_cache=False).logits, with_adapter)


def test_the_frozen_start_stays_while_the_policy_moves():
    _, changed = pair("llama")
    ids = torch.arange(40)[None]
    before = changed(input_ids=ids).logits
    start = FrozenPolicy(changed)
    for layer in lora_layers(changed):
        layer.lora_B["default"].weight.data.mul_(2)
    with torch.no_grad(), start.active() as reference:
        assert torch.allclose(reference(input_ids=ids).logits, before, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(changed(input_ids=ids).logits, before, rtol=1e-2)
    assert last_function(changed) == "_Linear"


def test_checkpointing_gives_the_same_gradients():
    own, changed = pair("qwen3")
    changed.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_close(compute(changed.train()), compute(own), 1e-5)


def test_generation_and_merging_agree():
    own, changed = pair("llama")
    ids = torch.arange(12)[None] % 61
    texts = [m.generate(input_ids=ids, max_new_tokens=8, do_sample=False, pad_token_id=0) for m in (own, changed)]
    assert torch.equal(*texts)
    logits = changed(input_ids=ids).logits
    assert torch.allclose(changed.merge_and_unload()(input_ids=ids).logits, logits, rtol=1e-4, atol=1e-5)


def test_a_trained_adapter_loads_in_plain_peft(tmp_path):
    from peft import PeftModel

    own, changed = pair("llama")
    optimizer = torch.optim.SGD([p for p in changed.parameters() if p.requires_grad], lr=1e-3)
    compute(changed)
    optimizer.step()
    changed.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(own.unload(), tmp_path)
    assert not classes(loaded)
    ids = torch.arange(40)[None]
    assert torch.allclose(loaded(input_ids=ids).logits, changed(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


# The parts by themselves


@pytest.mark.parametrize("num_rows", [1, 37, 300, 521])
def test_products_against_float64(num_rows):
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(s, generator=generator) for s in ((num_rows, 19), (19, 23), (num_rows, 23)))
    bias = torch.randn(23, generator=generator)
    exact = a.double() @ b.double()
    assert torch.allclose(matmul(a, b).double(), exact, atol=1e-5)
    assert torch.allclose(matmul(a, b, bias).double(), exact + bias, atol=1e-5)
    assert torch.allclose(matmul(a, b.t().contiguous().t()).double(), exact, atol=1e-5)
    assert torch.allclose(add_matmul(c, a, b).double(), c + exact, atol=1e-5)
    assert torch.allclose(transposed_matmul(a, c).double(), a.double().t() @ c.double(), atol=1e-4)
    assert torch.allclose(matmul(a.double(), b.double(), bias.double()), exact + bias)
    assert torch.allclose(transposed_matmul(a.double(), c.double()), a.double().t() @ c.double())


def test_rows_come_in_few_sizes():
    sizes = set()
    for num_rows in range(1, 5000, 7):
        pieces, padded = zip(*products._pieces(num_rows), strict=True)
        assert [p.start for p in pieces] == [0, *(p.stop for p in pieces[:-1])] and pieces[-1].stop == num_rows
        assert all(0 <= size - (p.stop - p.start) < 32 for p, size in zip(pieces, padded, strict=True))
        sizes |= set(padded)
    assert {size for size in sizes if size >= 16} == {*range(32, 257, 32), 512, 1024}


@pytest.mark.parametrize("shifted", [False, True])
def test_norm_gradients(shifted):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True), torch.randn(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: norm._RMSNorm.apply(x, weight, 1e-2, shifted)[0], x)
    expected = F.rms_norm(x, (5,), weight + shifted, 1e-2)
    assert torch.allclose(norm._RMSNorm.apply(x, weight, 1e-2, shifted)[0], expected)


def test_rotation_gradients():
    torch.manual_seed(0)
    q, k = (torch.randn(1, heads, 3, 4, dtype=torch.float64, requires_grad=True) for heads in (4, 2))
    cos, sin = torch.randn(2, 1, 1, 3, 4, dtype=torch.float64)  # no two halves alike
    assert torch.autograd.gradcheck(lambda q, k: rotary._Rotary.apply(q, k, cos, sin), (q, k))


def test_blocks_cover_every_row_once():
    rows = torch.zeros(1000, 1)
    covered = torch.cat([torch.arange(1000)[s] for s in base.blocks(rows, 1536)])
    assert torch.equal(covered, torch.arange(1000)) and len(list(base.blocks(rows, 1536))) == 4


def test_an_mlp_in_blocks_gives_the_same(monkeypatch):
    monkeypatch.setattr(base, "_MIN_BLOCK_ROWS", 7)
    monkeypatch.setattr(base, "_BLOCK_VALUES", 1)
    own, changed = pair("gemma")
    assert_close(compute(changed), compute(own), 1e-5)
    with torch.no_grad():
        ids = torch.arange(40)[None]
        assert torch.allclose(changed(input_ids=ids).logits, own(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
