"""Every kind of adapter: where it starts, what is saved of it, and that the reference is the policy as it starts."""

import copy
import functools
from dataclasses import replace

import pytest
import torch
from peft import PeftModel

from alignment.errors import UserError
from alignment.files import CacheKind
from alignment.policy import adapter_start
from alignment.policy.adapter import attach_adapter, continue_adapter, load_adapter, starts_at_base
from alignment.policy.adapter_kinds import is_product_update, lora_layers
from alignment.policy.adapter_names import with_token_ids
from alignment.policy.adapter_start import StartSources
from alignment.policy.architecture import build_model
from alignment.policy.float_weights import FloatWeights
from alignment.policy.identity import policy_identity
from alignment.policy.layer_inputs import input_moments
from alignment.policy.load import save_policy
from alignment.policy.merge import _merged_weights, _put_weights
from alignment.policy.model_merging import MergeSettings, merge_adapters
from alignment.policy.residual_start import residual_start
from alignment.policy.saved_adapter import require_same_form
from alignment.reference.frozen import FrozenPolicy
from alignment.training.cohort import Cohort, share
from alignment.training.memory import count_weights, plan_policy
from tests.conftest import each, random_groups, tiny_config
from tests.helpers.adapter_options import OPTIONS, each_case, start_sources
from tests.helpers.adapters import adapter
from tests.helpers.mixtures import TARGETS, write_mixture
from tests.helpers.policies import CPU, NF4, load, scores

GROUPS = random_groups(3, seed=7)
MOVED = {"pissa", "pissa_niter_2", "olora", "corda", "loftq", "orthogonal"}
"""They have an update from the start; orthogonal's is zero up to rounding."""
RESIDUAL = {"pissa", "pissa_niter_2", "olora", "corda"}


class Tokenizer:
    """It has nothing to save."""

    def save_pretrained(self, folder):
        pass


@pytest.fixture(scope="module")
def bases(tiny_model_folder):
    """A base on tensors that all tests of this module share: none may write to them."""
    loaded = functools.cache(lambda bits: load(tiny_model_folder, NF4 if bits else None))
    before = {}

    def base(bits=None):
        model = loaded(bits)
        before.setdefault(bits, policy_identity(model)[0])
        return share(model)

    yield base
    assert all(policy_identity(loaded(bits))[0] == identity for bits, identity in before.items())


@pytest.fixture(scope="module")
def sources(tiny_model_folder, tmp_path_factory):
    """Float weights, data and a cache."""
    return start_sources(tiny_model_folder, tmp_path_factory.mktemp("starts"))


def identity(model):
    return policy_identity(model)[0]


def move(model, seed=5):
    """Change everything that trains."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


# Start, identity, reference, files


@pytest.mark.slow
@each_case
def test_an_adapter_is_the_same_wherever_it_goes(option, bits, bases, sources, tmp_path):
    """It starts at the base or says so; its frozen start stays; saved, loaded, continued and merged it is equal."""
    config = adapter(**OPTIONS[option])
    base = scores(bases(bits), GROUPS)
    model = attach_adapter(bases(bits), config, 3, sources)
    start = scores(model, GROUPS)
    assert starts_at_base(model) == (option not in MOVED)
    assert (identity(model) == identity(bases(bits))) == (option not in MOVED)
    if bits is None or option not in MOVED:
        torch.testing.assert_close(start, base, rtol=0, atol=2e-5)
    else:
        assert (start - base).abs().max() > 1e-3
    if option == "loftq":  # it comes closer to the float base than 4 bits alone
        exact = scores(bases(), GROUPS)
        assert (start - exact).abs().mean() < 0.9 * (base - exact).abs().mean()

    # The reference stays while the policy moves
    frozen = FrozenPolicy(model)
    move(model)
    policy = scores(model, GROUPS)
    assert (policy - start).abs().max() > 1e-3
    assert identity(model) != identity(bases(bits))
    with frozen.active() as reference:
        torch.testing.assert_close(scores(reference, GROUPS), start, rtol=0, atol=0 if option in MOVED else 2e-5)
    frozen.mix(1.0)
    with frozen.active() as reference:
        assert torch.equal(scores(reference, GROUPS), policy)

    # Saved and loaded: by a fresh process, into an adapter that is there, as a start to go on from
    save_policy(model, Tokenizer(), tmp_path)
    loaded = load_adapter(bases(bits), tmp_path, sources.weights)
    into = load_adapter(attach_adapter(bases(bits), config, 3, sources), tmp_path)
    require_same_form(tmp_path, config)
    continued = continue_adapter(bases(bits), tmp_path, config, 9, sources)
    for other in (loaded, into, continued):
        assert torch.equal(scores(other, GROUPS), policy)
        assert identity(other) == identity(model)
        trained = {n for n, p in other.named_parameters() if p.requires_grad}
        assert trained == {n for n, p in model.named_parameters() if p.requires_grad}

    # By peft alone, on the base from the disk: equal, but for what 4 bits round of PiSSA, OLoRA and CorDA
    by_peft = scores(PeftModel.from_pretrained(bases(bits), str(tmp_path)), GROUPS)
    if bits is None or option not in RESIDUAL:
        torch.testing.assert_close(by_peft, policy, rtol=0, atol=1e-4)
    else:
        assert 1e-3 < (by_peft - policy).abs().mean() < (base - policy).abs().mean()

    # Merged
    merged = copy.deepcopy(bases())
    with torch.no_grad():
        _put_weights(merged, _merged_weights(model))
    torch.testing.assert_close(scores(merged, GROUPS), policy, rtol=0, atol=1e-4)


@pytest.mark.parametrize("bits", [None, "nf4"])
@pytest.mark.parametrize("option", each(["pissa", "olora", "corda", "eva"], ["pissa"]))
def test_a_start_is_computed_once(option, bits, bases, sources, monkeypatch):
    """From the cache it is the same to the last bit; another rank, or other data, make another."""
    config = adapter(**OPTIONS[option])
    first = attach_adapter(bases(bits), config, 3, sources)
    monkeypatch.setattr(adapter_start, "_computed", lambda *_: pytest.fail("computed again"))
    second = attach_adapter(bases(bits), config, 3, sources)
    for (name, a), (_, b) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    other = replace(sources, sequences=lambda: [GROUPS[0].prompt]) if option in ("corda", "eva") else sources
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        attach_adapter(bases(bits), config if other is not sources else replace(config, r=3), 3, other)


def test_a_damaged_start_is_computed_anew(bases, tiny_model_folder, tmp_path, caplog):
    """A file that was cut, and one whose numbers changed, are said to be damaged."""
    config, sources = adapter(**OPTIONS["pissa"]), start_sources(tiny_model_folder, tmp_path)
    first = dict(attach_adapter(bases(None), config, 3, sources).named_parameters())
    [file] = CacheKind.adapter_starts.under(tmp_path).glob("*.safetensors")
    whole = file.read_bytes()
    for damaged in (whole[:-8], whole[:-8] + bytes(8)):
        file.write_bytes(damaged)
        caplog.clear()
        again = dict(attach_adapter(bases(None), config, 3, sources).named_parameters())
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert "is damaged: the adapter's start is computed anew" in caplog.text
        assert file.read_bytes() == whole


@pytest.mark.parametrize("option", each(OPTIONS, ("dora", "tokens", "vera")))
def test_the_plan_counts_what_trains(option, bases, sources):
    """By building the adapter on the meta device, of a model that nothing is left on."""
    from transformers import AutoModelForCausalLM

    bits = "nf4" if option == "loftq" else None
    config = adapter(**OPTIONS[option])
    loaded = count_weights(attach_adapter(bases(bits), config, 3, sources))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(len(bases().get_input_embeddings().weight)))
    planned = plan_policy(model, 4, config, NF4 if bits else None)[1]
    assert (planned.trained, planned.adapter) == (loaded.trained, loaded.adapter) and planned.count > 0
    assert not any("lora" in name for name, _ in model.named_parameters())


# Inits


def test_pissa_starts_with_the_largest_directions(bases, sources):
    """s B A is the best approximation of its rank, W - s B A what the base keeps; a randomised SVD comes close."""
    weight = bases().model.layers[0].mlp.up_proj.weight
    u, values, v = torch.linalg.svd(weight)
    best = (u[:, :4] * values[:4]) @ v[:4]
    for init in ("pissa", "pissa_niter_8"):
        model = attach_adapter(bases(), adapter(init=init, rslora=True), 0, sources)
        layer = model.get_base_model().model.layers[0].mlp.up_proj
        update = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        torch.testing.assert_close(layer.base_layer.weight + update, weight, rtol=0, atol=1e-6)
        if init == "pissa":
            torch.testing.assert_close(update, best, rtol=0, atol=1e-5)
        else:
            assert (weight - best).norm() < (weight - update).norm() < 1.02 * (weight - best).norm()


def test_eva_has_as_many_directions_as_a_layer_has_inputs(bases, sources):
    """Other inits stop at the smaller side of a matrix: k_proj has 32 inputs and 16 outputs."""
    layers = lora_layers(attach_adapter(bases(), adapter(init="eva", r=32, target_modules=["k_proj"]), 0, sources))
    a = next(iter(layers.values())).lora_A["default"].weight
    torch.testing.assert_close(a @ a.T, torch.eye(32), rtol=0, atol=1e-4)
    with pytest.raises(UserError, match=r"finds at most 32 directions in \S+k_proj, not 33: lower it"):
        attach_adapter(bases(), adapter(init="eva", r=33, target_modules=["k_proj"]), 0, sources)


def test_eva_starts_with_the_directions_of_the_inputs(bases, sources):
    """The right singular vectors of what goes into the layer, around its mean; B is zero."""
    model = attach_adapter(bases(), adapter(init="eva"), 0, sources)
    rows = []
    plain = bases()
    plain.model.layers[1].self_attn.q_proj.register_forward_pre_hook(lambda module, x: rows.append(x[0].flatten(0, 1)))
    with torch.no_grad():
        for sequence in sources.sequences():
            plain(input_ids=torch.from_numpy(sequence).long()[None])
    x = torch.cat(rows)
    expected = torch.linalg.svd(x - x.mean(0))[2][:4]
    layer = model.get_base_model().model.layers[1].self_attn.q_proj
    a = layer.lora_A["default"].weight
    torch.testing.assert_close((a @ expected.T).abs(), torch.eye(4), rtol=0, atol=1e-3)
    assert not layer.lora_B["default"].weight.any()


def test_corda_keeps_what_the_inputs_use(bases, sources):
    """Of the inputs' energy its rank-4 part of W loses less than PiSSA's, which does not look at them."""
    data = sources.sequences()
    lost = {}
    for init in ("corda", "pissa"):
        model = attach_adapter(bases(), adapter(init=init), 0, sources)
        layer = model.get_base_model().model.layers[1].mlp.down_proj
        rest = layer.base_layer.weight
        ((_, (moment, _)),) = input_moments(model, {"x": layer}, data)
        lost[init] = (rest @ moment).norm().item()
    assert lost["corda"] < 0.99 * lost["pissa"]


def test_a_dora_in_16_bits_starts_at_its_base(tiny_model_folder):
    """Its magnitudes are fp32; peft rounds them to the base's dtype, which moves the start."""
    from alignment.config.schema import Dtype

    model = attach_adapter(load(tiny_model_folder, dtype=Dtype.bfloat16), adapter(kind="dora"), 0)
    magnitudes = [p for name, p in model.named_parameters() if "magnitude" in name]
    assert magnitudes and all(p.dtype is torch.float32 and p.requires_grad for p in magnitudes)
    assert starts_at_base(model)
    rows = torch.randn(4, 32, dtype=torch.bfloat16)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert torch.equal(layer(rows), layer.base_layer(rows))
    layer.lora_magnitude_vector["default"].weight.data[0] *= 1.001
    assert not starts_at_base(model)


def test_zero_a_is_the_mirror_image(bases):
    """A is zero, B uniform within 1 / sqrt(r), and in the first step only A learns."""
    from alignment.scoring.layout import FlatLayout
    from alignment.scoring.logps import score

    model = attach_adapter(bases(), adapter(init="zero_a"), 3)
    score(model, next(FlatLayout().batches(GROUPS, 10_000))).sums().sum().backward()
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            assert not parameter.any() and parameter.grad.any(), name
        elif "lora_B" in name:
            assert 0.4 < parameter.abs().max() <= 0.5 and not parameter.grad.any(), name


def test_an_adapter_of_the_embeddings_is_laid_out_planned_and_merged(tiny_model_folder):
    """peft's layer around embeddings hides how many there are, which layout and plan ask."""
    from alignment.scoring.prompt_sharing import choose_layout
    from alignment.training.memory import plan_policy, sizes_of

    settings = adapter(target_modules=["embed_tokens", "q_proj"])
    model = move(attach_adapter(load(tiny_model_folder), settings, 0))
    vocabulary = model.config.vocab_size
    assert model.get_input_embeddings().num_embeddings == vocabulary
    choose_layout(model, CPU)
    merged = load(tiny_model_folder)
    with torch.no_grad():
        _put_weights(merged, _merged_weights(model))
    torch.testing.assert_close(scores(merged, GROUPS), scores(model, GROUPS), rtol=0, atol=1e-4)
    planned, weights = plan_policy(build_model(model.config), 4, settings, None)
    sizes_of(planned, weights, value=4, optimizer="adamw_torch", device="cpu")
    assert weights.trained == {4: sum(p.numel() for p in model.parameters() if p.requires_grad)}


def test_an_init_of_linear_layers_is_refused_for_experts(tmp_path):
    """Where peft fails in its own words: orthogonal matrices of a stack."""
    write_mixture(tmp_path, "qwen3_moe")
    with pytest.raises(UserError, match=r"^adapter\.init=orthogonal knows linear layers alone, and"):
        attach_adapter(load(tmp_path), adapter(init="orthogonal", target_modules=TARGETS["qwen3_moe"]), 0)


def test_tokens_train_in_both_ends_of_a_tied_model(tmp_path):
    """The head and the embeddings have the same new rows; SFT's head asks peft's wrapper for a bias."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config(tie_word_embeddings=True)).save_pretrained(tmp_path / "base")
    base = load(tmp_path / "base")
    with pytest.raises(UserError, match=r"^adapter\.trainable_tokens .*has lm_head, a head that shares them, train"):
        attach_adapter(base, adapter(trainable_tokens=[3], modules_to_save=["lm_head"]), 0)
    model = move(attach_adapter(base, adapter(trainable_tokens=[3, 7]), 0))
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.bias is None and (head.out_features, embeddings.num_embeddings) == (97, 97)
    assert torch.equal(head.weight, embeddings.weight) and not torch.equal(
        head.weight[3], head.original_module.weight[3]
    )
    expected = scores(model, GROUPS)
    save_policy(model, Tokenizer(), tmp_path)
    loaded = load_adapter(load(tmp_path / "base"), tmp_path)
    assert torch.equal(scores(loaded, GROUPS), expected) and identity(loaded) == identity(model)
    merged = load(tmp_path / "base")
    with torch.no_grad():
        _put_weights(merged, _merged_weights(model))
    torch.testing.assert_close(scores(merged, GROUPS), expected, rtol=0, atol=1e-4)


# What fits the model, and where it may go


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"exclude_modules": ["q_porj"]},
            r"^adapter\.exclude_modules: the model has no module q_porj \(did you mean q_proj",
        ),
        ({"modules_to_save": ["head"]}, r"^adapter\.modules_to_save: the model has no module head"),
        ({"rank_pattern": {"down": 2}}, r"^adapter\.rank_pattern: down is the name of no module"),
        (
            {"layers_to_transform": [0, 2]},
            r"^adapter\.layers_to_transform: the model has layers 0 to 1, and no layer 2",
        ),
        ({"init": "pissa", "r": 40}, r"^adapter\.r: adapter\.init=pissa finds at most 32 directions in .*q_proj"),
        ({"init": "eva"}, r"^adapter\.init=eva looks at training data"),
        ({"init": "olora", "target_modules": ["embed_tokens"]}, r"^adapter\.init=olora knows linear layers alone"),
        (
            {"trainable_tokens": [3], "modules_to_save": ["embed_tokens"]},
            r"^adapter\.trainable_tokens .*modules_to_save has embed_tokens, the embeddings, train in another way",
        ),
        (
            {"trainable_tokens": [3], "target_modules": ["embed_tokens", "q_proj"]},
            r"^adapter\.trainable_tokens .*target_modules has embed_tokens",
        ),
    ],
)
def test_settings_that_do_not_fit_the_model_are_one_sentence(settings, said, bases):
    """Where peft would pass over them, or fail in its own words."""
    with pytest.raises(UserError, match=said):
        attach_adapter(bases(), adapter(**settings), 0)


def test_what_4_bits_lack_is_said(bases, tmp_path):
    """Float weights for a start, and modules that could train whole."""
    with pytest.raises(UserError, match=r"^adapter\.init=pissa on a 4-bit base needs the base's own weights"):
        attach_adapter(bases("nf4"), adapter(init="pissa"), 0)
    with pytest.raises(UserError, match=r"^adapter\.init needs the float weight of model\.layers\.0\.\S+, and"):
        attach_adapter(bases("nf4"), adapter(init="loftq"), 0, StartSources(FloatWeights(str(tmp_path), None)))
    with pytest.raises(UserError, match=r"^adapter\.modules_to_save: \S+up_proj is in 4 bits"):
        attach_adapter(bases("nf4"), adapter(target_modules=["q_proj"], modules_to_save=["up_proj"]), 0)


@pytest.mark.parametrize("option", ["dora", "vera", "oft", "whole head", "tokens"])
def test_only_a_lora_alone_is_mixed(option, bases, sources):
    """Any other is copied whole, or refused."""
    model = attach_adapter(bases(), adapter(**OPTIONS[option]), 3, sources)
    assert not is_product_update(model)
    with pytest.raises(UserError, match=r"^Only a plain LoRA or a whole model can be mixed"):
        FrozenPolicy(model).mix(0.5)


@pytest.mark.parametrize(("option", "said"), [("pissa", "init=pissa"), ("vera", "kind=vera"), ("tokens", "trainable_")])
def test_only_products_on_one_base_are_merged_with_others(option, said, bases, sources, tmp_path):
    """PiSSA's runs have bases of their own."""
    save_policy(attach_adapter(bases(), adapter(**OPTIONS[option]), 3, sources), Tokenizer(), tmp_path)
    settings = MergeSettings("linear").of(1)
    with pytest.raises(UserError, match=rf"^one cannot be merged, because its adapter has {said}"):
        merge_adapters({"one": tmp_path}, settings, torch.device("cpu"))


def test_an_adapter_goes_on_as_what_it_is(bases, sources, tmp_path):
    """Its kind, ranks, modules and start are those of the settings, or the sentence says which to set."""
    config = adapter(**OPTIONS["patterns"])
    save_policy(attach_adapter(bases(), config, 0, sources), Tokenizer(), tmp_path / "patterns")
    with pytest.raises(UserError, match=r"set adapter\.rank_pattern=\{down_proj:2\} adapter\.alpha_"):
        require_same_form(tmp_path / "patterns", replace(config, rank_pattern={}, alpha_pattern={}))
    save_policy(attach_adapter(bases(), adapter(init="pissa"), 0, sources), Tokenizer(), tmp_path / "pissa")
    with pytest.raises(UserError, match=r"set adapter\.init=pissa, as it has"):
        require_same_form(tmp_path / "pissa", adapter(init="zero_a"))
    with pytest.raises(UserError, match=r"set adapter\.r=4, as it has"):
        require_same_form(tmp_path / "pissa", adapter(init="pissa", r=8))
    save_policy(attach_adapter(bases(), adapter(kind="dora"), 0), Tokenizer(), tmp_path / "dora")
    with pytest.raises(UserError, match=r"set adapter\.kind=dora, as it has"):
        require_same_form(tmp_path / "dora", adapter())
    save_policy(attach_adapter(bases(), adapter(**OPTIONS["vera"]), 0), Tokenizer(), tmp_path / "vera")
    with pytest.raises(UserError, match=r"set adapter\.kind=vera, as it has"):
        require_same_form(tmp_path / "vera", adapter())


def test_tokens_have_names_or_ids(tiny_model_folder):
    """Both become ids; a token that is none is named."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert with_token_ids(adapter(trainable_tokens=["<|im_end|>", 3]), tokenizer).trainable_tokens == [end, 3]
    with pytest.raises(UserError, match=r"has no token <\|im_edn\|> \(did you mean <\|im_end\|>\?\)"):
        with_token_ids(adapter(trainable_tokens=["<|im_edn|>"]), tokenizer)


def test_an_adapter_that_edits_the_base_leaves_the_rest_of_a_cohort_alone(tiny_model_folder, sources):
    """Others go on with the base as it is."""
    cohort = Cohort(2)
    first = cohort.base(lambda: load(tiny_model_folder))
    before = identity(first)
    plain = attach_adapter(first, adapter(), 0)
    edited = attach_adapter(cohort.base(lambda: pytest.fail("loaded twice")), adapter(init="pissa"), 0, sources)
    assert residual_start(edited) is not None and identity(plain) == before
