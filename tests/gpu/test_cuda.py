"""What only a GPU can show: the same numbers on CUDA, in 32 and 16 bits, and the quantised chain there."""

import math
import shutil

import pytest
import torch

from alignment.config.compose import as_plain, compose_node, to_run_config
from alignment.config.registry import register
from alignment.config.schema import Calibration, Dtype, ModelConfig, QuantizationConfig
from alignment.data.tokens.units import as_rows
from alignment.kernels.patch import patch_layers
from alignment.policy.adapter import attach_adapter
from alignment.policy.identity import policy_identity
from alignment.policy.load import load_base
from alignment.reference.base import comparison_tolerance
from alignment.reference.cached import CachedReference
from alignment.reference.live import LiveReference
from alignment.reference.store import ReferenceStore
from alignment.scoring.layout import FlatLayout, SharedLayout
from alignment.scoring.logps import join_scores, score
from alignment.scoring.prompt_sharing import choose_layout
from alignment.training.start_check import check_start
from tests.conftest import random_groups
from tests.helpers.policies import adapter, train_adapter
from tests.helpers.precision import assert_step_is_plain, in_float64, policy_on, trainer_on
from tests.helpers.steps import SETTINGS, make_loss, step_gradient

DEVICE = torch.device("cuda")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = pytest.mark.skipif(
    DEVICE.type == "cuda" and not torch.cuda.is_available(),
    reason="NO GPU: torch sees no CUDA device, so nothing in this file was checked",
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_step_equals_a_plain_computation(name, dtype, tmp_path):
    """Loss and whole gradient of one step against one sequence at a time in float64."""
    assert_step_is_plain(name, DEVICE, dtype, tmp_path)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cached_equals_live(dtype, tmp_path):
    """Scored in one batch and one by one; and both are what the CPU says in float64."""
    groups = random_groups(12, seed=8)
    model = policy_on(DEVICE, dtype)
    assert policy_identity(model)[0] == policy_identity(policy_on(torch.device("cpu"), dtype))[0]
    store = ReferenceStore(tmp_path / "reference.sqlite")
    cached = CachedReference(store, model, FlatLayout(), 10_000, DEVICE, spot_checks=0)
    cached.prepare(groups)
    exact = LiveReference(in_float64(model), FlatLayout(), 1, torch.device("cpu")).logps(groups).values
    live = LiveReference(model, FlatLayout(), 1, DEVICE)
    stored = cached.logps(groups).values
    tolerance = comparison_tolerance(model, len(stored))
    computed = live.logps(groups).values.cpu()
    for found in (stored, computed):
        assert (found.double() - exact).abs().mean() <= tolerance
    assert (stored - computed).abs().mean() <= tolerance
    for name in sorted(SETTINGS):
        rows = as_rows(groups) if name == "kto" else groups
        trainer = trainer_on(DEVICE, model, rows, make_loss(name), tmp_path, live, tokens_per_batch=200)
        check_start(trainer, rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("patched", [False, True], ids=["peft", "patched"])
def test_shared_prompts(dtype, patched):
    """The same log-probs and gradient as one row per completion: by masks in fp32, by flash attention in 16 bits."""
    model = policy_on(DEVICE, dtype).train()
    if patched:
        patch_layers(model)
    groups = random_groups(8, k=3, seed=6)

    def scores_and_gradient(layout, tokens_per_batch):
        model.zero_grad()
        scored = []
        for batch in layout.batches(groups, tokens_per_batch):
            logps = score(model, batch := batch.to(DEVICE))
            (logps.values * torch.cos(batch.targets.float())).sum().backward()
            scored.append((batch, logps.detach().to("cpu")))
        gradient = torch.cat([p.grad.double().flatten() for p in model.parameters() if p.requires_grad])
        return join_scores(groups, scored).values, gradient

    values, gradient = scores_and_gradient(FlatLayout(), 10_000)
    layout = choose_layout(model, DEVICE)
    assert isinstance(layout, SharedLayout)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}[dtype]
    for tokens_per_batch in (60, 10_000):
        found, found_gradient = scores_and_gradient(layout, tokens_per_batch)
        assert (found - values).abs().mean() <= tolerance
        assert (found_gradient - gradient).norm() <= 2 * tolerance * gradient.norm()


def quantised(folder, compute):
    config = ModelConfig(
        name=str(folder),
        revision=None,
        dtype=compute,
        attention="sdpa",
        chat_template=None,
        eos_token=None,
        trust_remote_code=False,
    )
    quantization = QuantizationConfig(double=True, compute_dtype=compute, calibration=Calibration.none)
    return attach_adapter(load_base(config, quantization, str(folder), DEVICE), adapter(), 0)


@pytest.mark.parametrize("compute", [Dtype.float32, Dtype.bfloat16, Dtype.float16], ids=lambda dtype: dtype.name)
def test_a_quantised_policy_has_one_identity_and_one_gradient(compute, tiny_model_folder, tmp_path):
    """Loaded twice: the same fingerprint; evaluated first or not: the same gradient, up to the order of atomics."""
    groups = random_groups(4, seed=9)
    gradients, identities = [], []
    for evaluate_first in (False, True):
        model = train_adapter(quantised(tiny_model_folder, compute))
        identities.append(policy_identity(model)[0])
        live = LiveReference(model, FlatLayout(), 10_000, DEVICE)
        trainer = trainer_on(DEVICE, model, groups, make_loss("dpo"), tmp_path, live, tokens_per_batch=10_000)
        if evaluate_first:
            model.eval()
            trainer.held_out_metrics(groups)
        _, gradient = step_gradient(trainer, groups)
        gradients.append(torch.cat([g.flatten().double() for g in gradient.values()]))
    assert identities[0] == identities[1]
    assert gradients[0].norm() > 0
    assert (gradients[0] - gradients[1]).norm() <= 1e-3 * gradients[0].norm()


@pytest.mark.parametrize("dtype", ["auto", "float16"])
def test_the_quantised_chain(dtype, tiny_model_folder, tmp_path):
    """SFT, then DPO, on an NF4 base; a second run over the same SFT policy finds its whole reference."""
    from alignment.stages.chain import Chain

    def run(folder, *overrides):
        register()
        node = compose_node(
            [
                "recipe=quickstart", "tracking=none", "quantization=nf4", f"device={DEVICE.type}",
                f"model.dtype={dtype}", f"quantization.compute_dtype={dtype}",
                f"model.name={tiny_model_folder}", "adapter.r=4", f"reference.path={tmp_path / 'cache'}",
                "sft.data.limit=24", "sft.optim.lr=1e-2", "sft.trainer.max_steps=6", "sft.trainer.save_every=0",
                "data.limit=24", "data.eval_limit=8", "optim.lr=5e-3", "trainer.max_steps=12",
                "trainer.save_every=0", "evaluation.prompts=2", "evaluation.max_new_tokens=4", "evaluation.judge=none",
                *overrides,
            ]
        )  # fmt: skip
        return Chain(to_run_config(node), folder, "quickstart", as_plain(node)).run()

    summary = run(tmp_path / "first")
    stage = summary["stages"]["preference"]
    assert stage["start"]["loss"] == pytest.approx(math.log(2), abs=0.05)
    assert stage["metrics"]["train/loss"] < 0.65
    assert summary["reference"]["misses"] > 0
    shutil.copytree(tmp_path / "first" / "stages" / "sft", tmp_path / "second" / "stages" / "sft")
    shutil.copy(tmp_path / "first" / "metrics.jsonl", tmp_path / "second")
    second = run(tmp_path / "second", "loss.beta=0.5", "trainer.max_steps=2")
    assert second["reference"]["identity"] == summary["reference"]["identity"]
    assert (second["reference"]["misses"], second["reference"]["spot_checks"]) == (0, 4)
