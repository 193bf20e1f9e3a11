"""Whatever a policy is made of, it starts at its reference, goes on to the last bit, and is saved as what it is."""

import functools
from dataclasses import dataclass, field, replace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from alignment.config.adapters import AdapterConfig
from alignment.config.compose import load as compose
from alignment.config.schema import Calibration, Dtype
from alignment.policy.adapter import attach_adapter, load_adapter, starts_at_base
from alignment.policy.adapter_start import StartSources
from alignment.policy.float_weights import FloatWeights
from alignment.policy.identity import policy_identity
from alignment.policy.load import save_policy
from alignment.policy.merge import _merged_weights, _put_weights
from alignment.policy.spectrum import choose_trained
from alignment.training.cohort import share
from alignment.training.elastic import elastic
from alignment.training.start_check import check_start
from tests.conftest import each
from tests.helpers.mixtures import TARGETS, write_mixture
from tests.helpers.policies import NF4, adapter, load, scores
from tests.helpers.short_stages import PAIRS, WAYS, prepared, trained
from tests.helpers.wide_model import save_wide_model

ERROR, ENTROPY = (replace(NF4, calibration=objective) for objective in (Calibration.mse, Calibration.entropy))
EXPERTS = adapter(target_modules=TARGETS["qwen3_moe"])
MASTERS = compose("recipe=quickstart", "adapter=none", "optim.lr=0.01").optim


@dataclass(frozen=True)
class Policy:
    """How a policy is made.

    Attributes:
        model: folder of its base.
        quantization: None keeps the base as it is stored.
        adapter: None trains the whole model.
        spectrum: share of the matrices that train.
        dtype: of the base.
    """

    model: str = "wide"
    quantization: object = None
    adapter: AdapterConfig | None = field(default_factory=adapter)
    spectrum: float | None = None
    dtype: Dtype = Dtype.float32


POLICIES = {
    "ICQ by error": Policy(quantization=ERROR),
    "ICQ by entropy": Policy(quantization=ENTROPY),
    "IEC": Policy(adapter=adapter(iec=True)),
    "IR-QLoRA": Policy(quantization=ENTROPY, adapter=adapter(iec=True)),
    "Spectrum": Policy(spectrum=0.5),
    "Spectrum on NF4": Policy(quantization=NF4, spectrum=0.5),
    "Spectrum with DoRA": Policy(adapter=adapter(kind="dora"), spectrum=0.5),
    "Spectrum of a whole model": Policy(adapter=None, spectrum=0.5),
    "whole model": Policy(adapter=None),
    "whole model in 16 bits": Policy(adapter=None, dtype=Dtype.bfloat16),
    "experts": Policy("qwen3_moe", adapter=EXPERTS),
    "experts in NF4": Policy("qwen3_moe", NF4, EXPERTS),
    "experts of mixtral in NF4": Policy("mixtral", NF4, adapter(target_modules=TARGETS["mixtral"])),
    "a checkpoint in NF4": Policy("stored in 4 bits"),
    "a checkpoint in int8": Policy("stored in 8 bits"),
}
CORE = {
    "IR-QLoRA": WAYS[3], "Spectrum on NF4": WAYS[2], "experts in NF4": WAYS[1], "a checkpoint in int8": WAYS[0],
    "whole model in 16 bits": WAYS[1],
}  # fmt: skip


class Tokenizer:
    """It has nothing to save."""

    def save_pretrained(self, folder):
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a base, made when a test first asks for it."""

    @functools.cache
    def made(name):
        path = tmp_path_factory.mktemp("base")
        if name == "wide":
            save_wide_model(path)
        elif name in TARGETS:
            write_mixture(path, name)
        else:
            bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if "4" in name else {"load_in_8bit": True}
            stored = BitsAndBytesConfig(**bits)
            packed = AutoModelForCausalLM.from_pretrained(made("wide"), quantization_config=stored, device_map="cpu")
            packed.save_pretrained(path)
        return path

    return made


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def make(folder, cache):
    """Makes the base of a policy, or the policy: adapters on tensors that they share."""
    loaded = {}

    def base(policy):
        if policy.adapter is None:
            return load(folder(policy.model), None, policy.dtype)
        key = policy.model, repr(policy.quantization)
        if key not in loaded:
            loaded[key] = load(folder(policy.model), policy.quantization)
        return share(loaded[key])

    def fresh(policy, kept):
        model = base(policy)
        settings, modules = choose_trained(model, policy.adapter, policy.spectrum, cache, kept / "spectrum.json")
        return attach_adapter(model, settings, 3, StartSources(FloatWeights(str(folder(policy.model)), None)), modules)

    fresh.base = base
    return fresh


def around(policy, model):
    return functools.partial(elastic, model, policy.adapter)


@pytest.mark.slow
@pytest.mark.parametrize("name", each(POLICIES, CORE))
def test_every_policy_starts_at_its_reference(name, make, tmp_path):
    """Stored or live, for pairs and rows; all that start at one base share its identity."""
    policy = POLICIES[name]
    model = make(policy, tmp_path)
    assert starts_at_base(model) == (policy.adapter is not None)
    assert policy_identity(model)[0] == policy_identity(make.base(policy))[0]
    tolerance = 2e-5 if policy.dtype is Dtype.float32 else 5e-2
    for way in WAYS:
        trainer, groups, reference = prepared(model, way, tmp_path, tmp_path)
        start = check_start(trainer, groups)
        assert start["max_token_difference"] < tolerance, way
        assert start["loss"] == pytest.approx(start["closed_form"], rel=50 * tolerance), way
        reference.close()


def _cases():
    for name in POLICIES:
        for way in WAYS:
            marks = () if CORE.get(name) == way else pytest.mark.matrix
            yield pytest.param(name, way, marks=marks, id="-".join((name, *way)))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "way"), _cases())
def test_every_policy_goes_on_and_is_saved_as_what_it_is(name, way, make, folder, tmp_path):
    """Resumed it ends with the same bits; saved it loads equal; its adapter is peft's, and merged it is equal."""
    policy = POLICIES[name]
    optim = MASTERS if policy.dtype is Dtype.bfloat16 else None
    model = make(policy, tmp_path)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    _, ended = trained(model, way, tmp_path / "whole", tmp_path, optim=optim, around=around(policy, model))
    assert any(not torch.equal(before[key], ended[key]) for key in before)
    other = make(policy, tmp_path)
    checkpoint = tmp_path / "whole" / "checkpoint-1"
    rest = around(policy, other)
    _, resumed = trained(other, way, tmp_path / "resumed", tmp_path, checkpoint, optim=optim, around=rest)
    assert ended.keys() == resumed.keys() and all(torch.equal(ended[key], resumed[key]) for key in ended)

    # Saved
    expected = scores(model, PAIRS)
    save_policy(model, Tokenizer(), tmp_path / "saved")
    if policy.adapter is None:
        loaded = attach_adapter(load(tmp_path / "saved", None, policy.dtype), None, 0)
        torch.testing.assert_close(scores(loaded, PAIRS), expected, rtol=0, atol=1e-5)
        after = dict(loaded.named_parameters())
        assert all(torch.equal(after[key], weight) for key, weight in ended.items())
        return
    loaded = load_adapter(make.base(policy), tmp_path / "saved")
    assert torch.equal(scores(loaded, PAIRS), expected) and policy_identity(loaded)[0] == policy_identity(model)[0]

    # As a plain adapter of peft; it knows no packed experts, so there on the base as it is stored
    is_packed = policy.model in TARGETS and policy.quantization is not None
    plain = load(folder(policy.model)) if is_packed else make.base(policy)
    by_peft = PeftModel.from_pretrained(plain, str(tmp_path / "saved"))
    assert by_peft.peft_config["default"].peft_type == "LORA"
    own = scores(load_adapter(load(folder(policy.model)), tmp_path / "saved"), PAIRS) if is_packed else expected
    torch.testing.assert_close(scores(by_peft, PAIRS), own, rtol=0, atol=1e-4)

    # Merged
    merged = load(folder("wide" if policy.model.startswith("stored") else policy.model))
    with torch.no_grad():
        _put_weights(merged, _merged_weights(model))
    torch.testing.assert_close(scores(merged, PAIRS), expected, rtol=0, atol=1e-4)
