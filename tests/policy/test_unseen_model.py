"""A model class that nobody has seen trains: every faster way falls back."""

import logging
import math

import pytest
import torch

from alignment.errors import UserError
from alignment.policy.adapter import check_adapter_gradients, load_adapter
from alignment.policy.architecture import auto_class
from alignment.reference.live import LiveReference
from alignment.scoring.layout import FlatLayout
from alignment.scoring.logps import score
from alignment.scoring.prompt_sharing import choose_layout
from alignment.training.memory import count_weights, sizes_of
from alignment.training.prompt_density import prompt_embeddings
from tests.conftest import random_groups
from tests.helpers.families import policy
from tests.helpers.odd_model import OddConfig
from tests.helpers.policies import CPU, NF4, load, scores
from tests.helpers.steps import make_loss, make_trainer, sequence_logp

GROUPS = random_groups(4, seed=3)


@pytest.fixture(scope="module")
def odd_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    torch.manual_seed(0)
    config = OddConfig(initializer_range=0.3)
    auto_class(config).from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("quantization", [None, NF4], ids=["float32", "nf4"])
def test_an_unseen_model_trains(odd_folder, quantization, tmp_path, caplog):
    """It is scored by its own logits, flat, with its own layers, and goes the whole way."""
    with caplog.at_level(logging.INFO):
        model = policy(odd_folder, quantization=quantization).train()
        layout = choose_layout(model, CPU)
    assert isinstance(layout, FlatLayout)
    for said in ("all logits of a pass are kept", "Prompts are not shared"):
        assert caplog.text.count(said) == 1, said
    adapted = {name.split(".")[-4] for name, p in model.named_parameters() if p.requires_grad}
    assert adapted == {"inward", "doorway", "outward"}
    expected = torch.cat([sequence_logp(model, g.prompt, c).detach() for g in GROUPS for c in g.completions])
    torch.testing.assert_close(scores(model, GROUPS), expected, rtol=0, atol=2e-5)
    assert sizes_of(model, count_weights(model), value=4, optimizer="adamw_torch", device="cpu").estimate

    reference = LiveReference(model, layout, 10_000, CPU)
    trainer = make_trainer(model, GROUPS, make_loss("dpo"), tmp_path, reference=reference, layout=layout)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        losses.append(trainer.training_step(model, {"groups": GROUPS}).item())
        check_adapter_gradients(model)
        optimizer.step()
    assert math.isclose(losses[0], math.log(2), abs_tol=1e-5) and losses[2] < losses[1] < losses[0]

    model.save_pretrained(tmp_path / "adapter")
    loaded = load_adapter(load(odd_folder, quantization, attention="auto"), tmp_path / "adapter")
    assert torch.equal(scores(model, GROUPS), scores(loaded, GROUPS))


def test_a_divergence_of_an_unseen_model(odd_folder, tmp_path):
    """A loss that needs whole distributions takes them from the same logits."""
    model = policy(odd_folder, quantization=None).train()
    groups = GROUPS
    from tests.conftest import recommended_loss

    trainer = make_trainer(model, groups, recommended_loss("tdpo2"), tmp_path)
    loss = trainer.training_step(model, {"groups": groups})
    assert math.isclose(loss.item(), math.log(2), abs_tol=1e-5)
    [batch] = FlatLayout().batches(groups, 10_000)
    assert score(model, batch).values.requires_grad


def test_prompts_of_an_unseen_model_have_no_density(odd_folder):
    """BCO's weights come from hidden states, which a model that is scored by its logits may not have."""
    model = policy(odd_folder, quantization=None)
    with pytest.raises(UserError, match=r"^loss\.density_weights compares .* and odd gives none: set loss\.density_w"):
        prompt_embeddings(model, [GROUPS[0].prompt], 100, CPU)


def test_sft_takes_the_loss_of_the_models_own_logits(odd_folder):
    """TRL's head knows nothing of what the model does after its own, so it is not asked."""
    from alignment.stages.sft import _trainer_class

    model = policy(odd_folder, quantization=None).train()
    kind = _trainer_class(None)
    trainer = object.__new__(kind)
    ids = torch.tensor([[5, 6, 7, 8, 9], [3, 4, 2, 0, 0]])
    labels = torch.tensor([[-100, -100, 7, 8, 9], [-100, 4, 2, -100, -100]])
    expected = torch.nn.functional.cross_entropy(
        model(input_ids=ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    for count, divisor in ((None, 5), (10, 10)):
        loss = trainer.compute_loss(model, {"input_ids": ids, "labels": labels}, num_items_in_batch=count)
        torch.testing.assert_close(loss, expected / divisor)
    loss.backward()
    check_adapter_gradients(model)
