"""The loss of a mixture's routers: by its formula, in training where it is asked for, and nowhere else."""

import pytest
import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from alignment.errors import UserError
from alignment.policy.adapter import attach_adapter
from alignment.policy.layers import checkpoint_layers
from alignment.scoring.layout import FlatLayout
from alignment.scoring.logps import score
from alignment.training.router import RouterLoss, load_balance, routers
from tests.conftest import random_groups, tiny_policy
from tests.helpers.mixtures import write_mixture
from tests.helpers.policies import adapter, load
from tests.helpers.steps import make_loss, make_trainer, step_gradient


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    write_mixture(folder)
    return attach_adapter(load(folder), adapter(target_modules=["q_proj", "v_proj"]), 0)


BATCH = next(FlatLayout().batches(random_groups(3), 10**6))


def test_the_formula_is_that_of_transformers():
    """Two layers of five experts, three chosen; even routing has the least value, the number chosen."""
    torch.manual_seed(0)
    logits = [torch.randn(7, 5), torch.randn(7, 5)]
    found = load_balance(logits, 3)
    torch.testing.assert_close(found, load_balancing_loss_func(tuple(logits), 5, 3))
    assert load_balance([torch.zeros(5, 5) + 1e-3 * torch.eye(5)], 1) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("every", [0, 1])
def test_it_is_collected_from_passes_with_gradient(every, policy):
    """Once for each layer, with layers that run again too; its gradient reaches the adapter."""
    checkpoint_layers(policy, every)
    balance = RouterLoss(policy, 0.01, "trainer.router_aux_loss_coef")
    policy.train()
    with balance.collecting():
        score(policy, BATCH)
    loss = balance.take()
    seen = []
    handles = [router.register_forward_hook(lambda m, i, o: seen.append(o[0])) for router, _ in routers(policy)]
    score(policy, BATCH)
    torch.testing.assert_close(loss, load_balance([x.reshape(-1, x.shape[-1]) for x in seen], 2))
    policy.zero_grad()
    loss.backward()
    for handle in handles:
        handle.remove()
    gradients = [p.grad for n, p in policy.named_parameters() if "layers.0" in n and "lora_B" in n]
    assert gradients and all(g.abs().max() > 0 for g in gradients)
    assert balance.take() is None
    checkpoint_layers(policy, 0)


def test_reference_passes_and_other_passes_have_none(policy):
    """Without gradient, outside of the step, and with a coefficient of 0."""
    balance, off = (RouterLoss(policy, c, "trainer.router_aux_loss_coef") for c in (0.01, 0.0))
    score(policy, BATCH)
    with balance.collecting(), torch.no_grad():
        score(policy, BATCH)
    with off.collecting():
        score(policy, BATCH)
    assert balance.take() is None and off.take() is None


def test_a_model_without_routers_is_one_sentence():
    """Which key, what is wrong, what to do."""
    with pytest.raises(UserError, match=r"^trainer.router_aux_loss_coef=0.01: .* has no router .*: set it to 0\.$"):
        RouterLoss(tiny_policy(), 0.01, "trainer.router_aux_loss_coef")


def test_a_step_adds_it_and_logs_it_apart(policy, tmp_path):
    """The step's gradient is the preference loss's plus the coefficient times that of the routers' loss."""
    groups = random_groups(3)
    trainer = make_trainer(policy, groups, make_loss("simpo"), tmp_path, reference=None)
    plain_loss, plain = step_gradient(trainer, groups)
    trainer.passes._router_loss = balance = RouterLoss(policy, 0.5, "trainer.router_aux_loss_coef")
    loss, found = step_gradient(trainer, groups)
    logged = trainer._means.take()
    policy.zero_grad()
    value = 0.0
    for batch in FlatLayout().batches(groups, 10_000):  # pass by pass, each by its share of the groups
        with balance.collecting():
            score(policy, batch)
        value = value + len(batch.indices) / len(groups) * balance.take()
    value.backward()
    assert loss == pytest.approx(plain_loss) and logged["router_loss"] == pytest.approx(value.item(), rel=1e-4)
    for name, p in policy.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(found[name], plain[name] + 0.5 * p.grad, rtol=1e-3, atol=1e-6)
