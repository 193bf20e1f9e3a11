"""Whole runs on CUDA: every recipe, loss, adapter and optimizer, and every family of models, tiny.

The losses and the families give what the CPU gives in fp32. Many of these run at once: they say nothing of speed.
"""

import json
import math

import pytest
import torch

from alignment.config.compose import as_plain, compose_node, to_run_config
from alignment.config.preflight import check_machine
from alignment.config.registry import register
from alignment.losses import LOSSES
from alignment.scoring.layout import FlatLayout
from alignment.scoring.logps import join_scores, score
from alignment.scoring.prompt_sharing import choose_layout
from alignment.stages.chain import Chain
from tests.conftest import random_groups, recommended_loss
from tests.helpers.commands import pair, write_lines
from tests.helpers.families import FAMILIES, policy, write_model
from tests.helpers.policies import train_adapter
from tests.helpers.rounds import make_easy
from tests.helpers.tiny_recipes import NAMES, OPTIONS, TinyModels, composed, in_tiny

DEVICE = torch.device("cuda")

pytestmark = pytest.mark.skipif(
    DEVICE.type == "cuda" and not torch.cuda.is_available(),
    reason="NO GPU: torch sees no CUDA device, so nothing in this file was checked",
)

TRAINED = [name for name, loss in LOSSES.items() if name != "mixture" and not loss.draws]
OLDER_CARDS = ("dpo_qwen3", "kto_qwen3", "reward_qwen3", "simpo_onpolicy_qwen3", "falcon_h1_1p5b_instruct")
"""Recipes that also run in float16."""

JUMPING = {"alpha_dpo", "beta_dpo", "dpop", "lipo"}
"""Where policy and reference are equal their value or their gradient jumps, so rounding decides the first step."""

ADAPTERS = (
    "lora", "lora_plus", "rslora", "dora", "vera", "oft", "boft", "pissa", "olora", "eva", "corda", "loftq", "zero_a",
    "none",
)  # fmt: skip
OPTIMIZERS = (
    "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit", "ademamix", "adafactor",
    "muon", "sgd",
)  # fmt: skip
SETTINGS = (
    "reference=live", "reference=tr_dpo reference.sync_every=2", "reference=sdpo", "trainer.checkpoint_every=1",
    "trainer.tokens_per_batch=60", "export.merge=true", "model.attention=eager", "evaluation=judged",
    "trainer.eval_every=1", "model.dtype=float16", "model.dtype=float16 reference=live",
    "model.dtype=float16 adapter=dora trainer.checkpoint_every=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> TinyModels:
    return TinyModels(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Data for losses of pairs, rows and lists."""
    folder = tmp_path_factory.mktemp("files")
    scores = {"score_chosen": 2.0, "score_rejected": 1.0}
    pairs = [pair(number) | scores for number in range(1, 41)]
    write_lines(folder / "pair.jsonl", pairs)
    rows = [
        {"prompt": p["prompt"], "completion": p[side], "label": side == "chosen"}
        for p in pairs
        for side in ("chosen", "rejected")
    ]
    write_lines(folder / "row.jsonl", rows)
    third = [{"role": "assistant", "content": "No idea."}]
    lists = [
        {"prompt": p["prompt"], "completions": [p["chosen"], third, p["rejected"]], "scores": [3.0, 2.0, 1.0]}
        for p in pairs
    ]
    write_lines(folder / "list.jsonl", lists)
    return folder


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "auto") for name in [*NAMES, *OPTIONS]), *((name, "float16") for name in OLDER_CARDS)],
)
def test_a_recipe_runs(name, dtype, models, tmp_path, monkeypatch):
    """In 16 bits, with its quantisation, adapter, optimizer, rounds and sampling."""
    register()
    recipe = composed(name)
    asked = to_run_config(compose_node(recipe))
    node = compose_node([*recipe, *in_tiny(asked, models, (f"device={DEVICE.type}", f"model.dtype={dtype}"))])
    config = to_run_config(node)
    check_machine(config)
    make_easy(monkeypatch)
    stages = Chain(config, tmp_path / "run", name, as_plain(node)).run()["stages"]
    assert all(math.isfinite(stage["metrics"]["train/loss"]) for stage in stages.values())
    if asked.loss is not None:
        start = stages["preference"]["start"]
        ranked = asked.loss.name == "lipo" and asked.onpolicy is not None
        assert math.isclose(start["loss"], start["closed_form"], rel_tol=0.5 if ranked else 0.1, abs_tol=1e-3)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def run(folder, model, files, unit, *settings):
    """What a run's steps log, and its summary."""
    given = [
        *("recipe=quickstart", "sft=none", "tracking=none", f"model.name={model}"),
        f"data.source={files / f'{unit}.jsonl'}", f"reference.path={folder / 'cache'}",
        *("data.eval_source=null", "data.eval_size=4", "data.system=null", "data.limit=null", "data.eval_limit=null"),
        *("optim.lr=1e-2", "trainer.groups_per_step=8", "trainer.max_steps=3", "trainer.log_every=1"),
        *("trainer.save_every=2", "evaluation.prompts=2", "evaluation.max_new_tokens=4", "evaluation.judge=none"),
        *settings,
    ]  # fmt: skip
    register()
    node = compose_node(given)
    summary = Chain(to_run_config(node), folder, "quickstart", as_plain(node)).run()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["split"] == "train"], summary


def assert_moved(rows):
    """Before the first step policy and reference differ by rounding alone; after two they differ by much more."""
    first, *_, last = (abs(row["rewards/margins"]) for row in rows)
    assert last > max(3 * first, 1e-3)


@pytest.mark.parametrize("name", TRAINED)
def test_a_loss_trains_as_on_the_cpu(name, tiny_model_folder, files, tmp_path):
    """Three steps in fp32: losses and gradients' norms are the CPU's."""
    unit = recommended_loss(name).requirements().unit
    found = {}
    for device in (DEVICE.type, "cpu"):
        settings = (f"loss={name}", "model.dtype=float32", f"device={device}", "evaluation.prompts=0", "adapter.r=4")
        found[device], _ = run(tmp_path / device, tiny_model_folder, files, unit, *settings)
    ours, theirs = found[DEVICE.type], found["cpu"]
    assert len(ours) == len(theirs) == 3
    assert all(0 < row["grad_norm"] < math.inf for row in ours)
    for one, other in zip(ours, theirs, strict=True) if name not in JUMPING else ():
        for key in ("loss", "grad_norm"):
            assert math.isclose(one[key], other[key], rel_tol=1e-2, abs_tol=1e-4), (key, one[key], other[key])


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_adapter_trains(adapter, quantization, tiny_model_folder, files, tmp_path):
    """In 16 bits; it moves, and its start is the base."""
    if (adapter, quantization) in (("loftq", "none"), ("none", "nf4")):
        pytest.skip("LoftQ makes up for what 4 bits lose, and weights in 4 bits cannot train")
    settings = [f"adapter={adapter}", f"quantization={quantization}", f"device={DEVICE.type}"]
    rows, summary = run(tmp_path / "run", tiny_model_folder, files, "pair", *settings)
    assert math.isclose(summary["stages"]["preference"]["start"]["loss"], math.log(2), abs_tol=0.05)
    assert all(0 < row["grad_norm"] < math.inf for row in rows)
    assert_moved(rows)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_optimizer_trains(optimizer, tiny_model_folder, files, tmp_path):
    settings = [f"optim.name={optimizer}", "quantization=nf4", f"device={DEVICE.type}"]
    rows, _ = run(tmp_path / "run", tiny_model_folder, files, "pair", *settings)
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert_moved(rows)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_runs(setting, tiny_model_folder, files, tmp_path):
    settings = [*setting.split(), "quantization=nf4", f"device={DEVICE.type}"]
    rows, _ = run(tmp_path / "run", tiny_model_folder, files, "pair", *settings)
    assert all(math.isfinite(row["loss"]) for row in rows)


def scores_and_gradient(model, layout, groups):
    model.zero_grad()
    device = next(model.parameters()).device
    scored = []
    for batch in layout.batches(groups, 10_000):
        found = score(model, batch := batch.to(device))
        (found.values * torch.cos(batch.targets.to(found.values))).sum().backward()
        scored.append((batch, found.detach().to("cpu")))
    gradient = torch.cat([p.grad.flatten().double().cpu() for p in model.parameters() if p.grad is not None])
    return join_scores(groups, scored).values, gradient


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_a_family_is_that_of_the_cpu(family, tmp_path):
    """Log-probs and gradients in fp32, in flat rows and in the layout that shares prompts; in 16 bits it trains."""
    folder = write_model(family, tmp_path / "model")
    # A deep copy's methods would be those of the first
    model, on_gpu, *in_16_bits = (train_adapter(policy(folder, quantization=None)).train() for _ in range(4))
    on_gpu = on_gpu.to(DEVICE)
    groups = random_groups(4, k=3, seed=2)
    layout = choose_layout(on_gpu, DEVICE)
    expected, expected_gradient = scores_and_gradient(model, FlatLayout(10_000), groups)
    for one in (FlatLayout(10_000), layout):
        found, gradient = scores_and_gradient(on_gpu, one, groups)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
        assert (gradient - expected_gradient).norm() <= 1e-3 * expected_gradient.norm()
    for half, dtype in zip(in_16_bits, (torch.bfloat16, torch.float16), strict=True):
        half.to(DEVICE, dtype)
        values, gradient = scores_and_gradient(half, choose_layout(half, DEVICE), groups)
        assert (values - expected).abs().mean() <= 0.1
        assert 0 < gradient.norm() < math.inf
