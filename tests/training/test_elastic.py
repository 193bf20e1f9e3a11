"""The elastic connection: what it trains to, what it leaves, and how a run with it goes on."""

import copy

import pytest
import torch
from torch import nn

from alignment.errors import UserError
from alignment.training.elastic import ElasticSteps, _connected, elastic
from tests.conftest import random_groups, tiny_policy
from tests.helpers.policies import adapter
from tests.helpers.steps import make_loss, make_trainer


class Explicit(nn.Module):
    """A LoRA with its connections, as the paper's general form writes them."""

    def __init__(self, layer):
        super().__init__()
        self.base, self.scaling = layer.base_layer, layer.scaling["default"]
        self.a = nn.Parameter(layer.lora_A["default"].weight.detach().clone())
        self.b = nn.Parameter(layer.lora_B["default"].weight.detach().clone())
        self.beta = nn.Parameter(torch.zeros(2, dtype=self.a.dtype))

    @staticmethod
    def connect(x, width):
        groups = torch.gcd(torch.tensor(x.shape[-1]), torch.tensor(width)).item()
        return x.unflatten(-1, (groups, -1)).mean(-1).repeat_interleave(width // groups, -1)

    def forward(self, x):
        z = x @ self.a.T + self.beta[0] * self.connect(x, len(self.a))
        return self.base(x) + self.scaling * (z @ self.b.T + self.beta[1] * self.connect(z, len(self.b)))


@pytest.mark.parametrize("r", [4, 6])
def test_the_folded_training_is_that_of_the_explicit_connection(r):
    """Three steps of AdamW with decay and clipping, also where the rank divides neither width."""
    policy = tiny_policy(r=r)
    name = "base_model.model.model.layers.0.mlp.down_proj"
    layer = policy.get_submodule(name)
    for parameter in policy.parameters():
        parameter.requires_grad_(False)
    for part in (layer.lora_A, layer.lora_B):
        part.requires_grad_(True)
    explicit = Explicit(copy.deepcopy(layer))
    x = torch.randn(5, 64, dtype=torch.float64)

    def train(module, call, optimizer):
        for step in range(3):
            optimizer.zero_grad()
            (call(x) * torch.arange(32)).sin().sum().mul(1 + step).backward()
            nn.utils.clip_grad_norm_([p for p in module.parameters() if p.requires_grad], 1.0)
            optimizer.step()

    with elastic(policy, adapter(iec=True)):
        mine = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
        ElasticSteps().on_train_begin(None, None, None, model=policy, optimizer=mine)
        train(policy, layer, mine)
        assert layer.lora_iec["default"].abs().min() > 1e-3
    parts = [explicit.a, explicit.b, explicit.beta]
    train(explicit, explicit, torch.optim.AdamW(parts, lr=0.05, weight_decay=0.1))
    torch.testing.assert_close(layer(x), explicit(x), rtol=1e-9, atol=1e-9)
    assert not any("iec" in key for key in policy.state_dict())


def test_the_connection_is_a_matrix_of_group_averages():
    """P is g / inputs where the groups of output and input agree, and 0 elsewhere."""
    weight = torch.zeros(4, 6)
    entries, value = _connected(weight)
    entries.fill_(value)
    third = 1 / 3
    assert torch.allclose(weight, torch.tensor([[third] * 3 + [0] * 3] * 2 + [[0] * 3 + [third] * 3] * 2))


def stage(folder, steps, resume=None):
    """The adapter after some steps of a preference stage, checkpointed after the second."""
    from transformers import TrainingArguments

    from alignment.training.sampler import StepSampler
    from alignment.training.trainer import PreferenceTrainer

    policy = tiny_policy(torch.float32, trained=True)
    groups = random_groups(8)
    with elastic(policy, adapter(iec=True)):
        like = make_trainer(policy, groups, make_loss("simpo"), folder / "like", reference=None)
        arguments = TrainingArguments(
            output_dir=str(folder), max_steps=steps, use_cpu=True, report_to="none", disable_tqdm=True,
            remove_unused_columns=False, learning_rate=0.02, weight_decay=0.1, save_strategy="steps", save_steps=2,
            lr_scheduler_type="constant",
        )  # fmt: skip
        trainer = PreferenceTrainer(
            model=policy, args=arguments, groups=groups, eval_groups=(), loss=like.loss, reference=None,
            layout=like.layout, tokens_per_batch=10_000, sampler=StepSampler(8, 2, 0), callbacks=[ElasticSteps()],
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        betas = {name: p.detach().clone() for name, p in policy.named_parameters() if "lora_iec" in name}
    assert len(betas) == 14 and all(beta.abs().min() > 0 for beta in betas.values())
    return {name: p.detach().clone() for name, p in policy.named_parameters() if p.requires_grad} | betas


def test_a_resumed_stage_ends_as_the_whole_one(tmp_path):
    """The checkpoint holds the scalars, so that the rest of the steps are the same to the last bit."""
    whole = stage(tmp_path / "whole", 4)
    resumed = stage(tmp_path / "resumed", 4, str(tmp_path / "whole" / "checkpoint-2"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_without_the_setting_nothing_changes():
    """No scalar, no hook."""
    policy = tiny_policy()
    with elastic(policy, adapter()):
        assert not any("lora_iec" in name for name, _ in policy.named_parameters())


@pytest.mark.parametrize("name", ["muon", "schedule_free_adamw"])
def test_optimizers_that_cannot_step_it_are_refused(name):
    """Before the run, in a sentence."""
    from dataclasses import replace

    from alignment.config.compose import compose_node, to_run_config
    from alignment.config.registry import register
    from alignment.training.optimizers import OPTIMIZERS, _check_settings

    register()
    optim = replace(to_run_config(compose_node(["recipe=quickstart"])).optim, name=name, schedule="constant")
    with pytest.raises(UserError, match=rf"optim.name={name} cannot step the elastic connection"):
        _check_settings("optim", optim, OPTIMIZERS[name], adapter(iec=True))


def test_probes_and_references_do_not_see_the_scalars():
    """The layout is probed and a reference is mixed as for the plain LoRA that it is."""
    from alignment.reference.frozen import FrozenPolicy
    from alignment.scoring.layout import SharedLayout
    from alignment.scoring.prompt_sharing import choose_layout

    policy = tiny_policy(torch.float32, trained=True)
    with elastic(policy, adapter(iec=True)):
        assert isinstance(choose_layout(policy, torch.device("cpu")), SharedLayout)
        frozen = FrozenPolicy(policy)
        frozen.mix(0.5)
        assert not any("lora_iec" in name for name in frozen.state())
