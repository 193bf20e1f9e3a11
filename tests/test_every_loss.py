"""Every loss, with its recommended settings, trains a policy: shared prompts, a cached reference, an NF4 base."""

import pytest
import torch

from alignment.config import AdapterConfig, Dtype, ModelConfig, QuantizationConfig
from alignment.layout import SharedLayout
from alignment.losses import LOSSES
from alignment.objective import as_rows, groups_to_reference
from alignment.policy import attach_adapter, load_base
from alignment.reference import CachedReference
from alignment.reference_store import ReferenceStore
from alignment.shared import choose_layout
from tests.conftest import random_groups, recommended_loss
from tests.test_gradients import make_trainer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tiny_model_folder):
    """Loaded once; every test gets an adapter of its own."""
    config = ModelConfig(
        name=str(tiny_model_folder), revision=None, dtype=Dtype.float32, attention="sdpa", chat_template=None,
        trust_remote_code=False,
    )  # fmt: skip
    quantization = QuantizationConfig(double=True, compute_dtype=Dtype.float32)
    return lambda: load_base(config, quantization, str(tiny_model_folder), CPU)


@pytest.mark.parametrize("name", LOSSES)
def test_training_raises_the_margin_of_its_own_rewards(name, base, tmp_path):
    """On the pairs that it trains on, from the reference on; DiscoPOP lowers it first, since it starts on its hump."""
    loss = recommended_loss(name)
    adapter = AdapterConfig(r=4, alpha=8, dropout=0.0, target_modules=["all-linear"], init="default", rslora=False)
    model = attach_adapter(base(), adapter, 0)
    layout = choose_layout(model, CPU)
    assert isinstance(layout, SharedLayout)
    pairs = random_groups(6, seed=12)
    groups = pairs if loss.requirements().unit == "pair" else as_rows(pairs)
    reference = CachedReference(ReferenceStore(tmp_path / "r.sqlite"), model, layout, 10_000, CPU, spot_checks=0)
    reference.prepare([*groups_to_reference(loss, groups, [range(len(groups))], []), *pairs])
    trainer = make_trainer(model, groups, loss, tmp_path, tokens_per_batch=60, reference=reference, layout=layout)
    before = trainer.held_out_metrics(pairs)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(15):
        optimizer.zero_grad()
        trainer.training_step(model, {"groups": groups})
        optimizer.step()
    after = trainer.held_out_metrics(pairs)
    gain = after["rewards/margins"] - before["rewards/margins"]
    assert gain < 0 if name == "discopop" else gain > 0
    assert after["loss"] < before["loss"]
