"""Every optimizer that transformers lists trains and goes on as if uninterrupted, or is refused in one sentence."""

import copy
from dataclasses import replace
from functools import cache

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments
from transformers.training_args import OptimizerNames

from alignment.config.compose import load
from alignment.errors import UserError
from alignment.policy.adapter import attach_adapter
from alignment.scoring.layout import FlatLayout
from alignment.training import stage_trainer
from alignment.training.budget import step_needs
from alignment.training.callbacks import Checkpoints, prepare_trainer, training_arguments
from alignment.training.memory import count_weights, sizes_of
from alignment.training.optimizers import (
    OPTIMIZERS,
    check_optimizer,
    make_optimizer,
    muon,
    optimizer_estimate,
    projected_bytes,
    resumes,
)
from alignment.training.sampler import StepSampler
from alignment.training.schedule import FollowPolicy
from alignment.training.trainer import PreferenceTrainer
from tests.conftest import each, random_groups, recommended_loss, tiny_policy
from tests.helpers.peak import step_peak
from tests.helpers.policies import adapter

CPU = torch.device("cpu")
NAMES = [*(str(name.value) for name in OptimizerNames), "muon"]
CORE = ("adamw_torch_fused", "adafactor", "paged_adamw_8bit", "muon", "schedule_free_adamw", "galore_adamw", "lomo")
"""One of each kind."""
GROUPS = random_groups(4, seed=3)


@cache
def quickstart():
    return load("recipe=quickstart", "tracking=none", "optim.schedule=constant", "optim.warmup_ratio=0")


def settings(name, **changes):
    """The settings of `optim` under which this optimizer can train."""
    low_rank = name in OPTIMIZERS and OPTIMIZERS[name].low_rank
    return replace(quickstart().optim, name=name, target_modules=["all-linear"] if low_rank else None, **changes)


def whole(dtype=torch.float32):
    """A policy that trains with all its weights."""
    return attach_adapter(tiny_policy(dtype, r=None), None, 0)


def trainer_of(model, optim, folder, steps=4, save_every=2, callbacks=(), eval_groups=()):
    loop = replace(quickstart().trainer, groups_per_step=len(GROUPS), save_every=save_every)
    arguments = training_arguments(
        TrainingArguments, folder=folder, optim=optim, trainer=loop, num_steps=steps, seed=0, device=CPU,
        per_device_train_batch_size=len(GROUPS),
    )  # fmt: skip
    trainer = PreferenceTrainer(
        model=model, args=arguments, groups=GROUPS, eval_groups=eval_groups, loss=recommended_loss("simpo"),
        reference=None, layout=FlatLayout(), tokens_per_batch=10_000,
        sampler=StepSampler(len(GROUPS), len(GROUPS), 0, epochs=steps), callbacks=[*callbacks, Checkpoints(9)],
    )  # fmt: skip
    prepare_trainer(trainer, optim)
    return trainer


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def equal(found, expected):
    return found.keys() == expected.keys() and all(found[name].equal(expected[name]) for name in expected)


def assert_resumes(make_model, optim, folder, **options):
    """Train, then train again from the middle; returns what was trained, before and after."""
    model = make_model()
    before = trained(model)
    trainer_of(model, optim, folder, **options).train()
    after = trained(model)
    other = make_model()
    resumed = trainer_of(other, optim, folder, **options)
    checkpoint = folder / "checkpoint-2"
    resumed.load_state(checkpoint)
    # As a run does: the policy of the checkpoint is loaded by the Trainer, the states by the optimizer
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert equal(trained(other), after)
    return before, after


def refusal(optim, lora):
    try:
        check_optimizer("optim", optim, lora, "cpu")
    except UserError as error:
        return str(error)


@pytest.mark.slow
@pytest.mark.parametrize("name", each(NAMES, CORE))
def test_an_optimizer_trains_and_resumes_or_is_refused_in_a_sentence(name, tmp_path):
    """A LoRA trains, or the whole model where the optimizer asks for that; no name ends in a traceback."""
    optim = settings(name, lr=1e-2)
    low_rank = optim.target_modules is not None
    if (said := refusal(optim, None if low_rank else adapter())) is not None:
        assert said.startswith(f"optim.name={name} ")
        assert "choose another optimizer." in said
        assert OPTIMIZERS[name].refused or OPTIMIZERS[name].on_gpu or "pip install" in said
        return

    def policy():
        return whole() if low_rank else tiny_policy(torch.float32, trained=True)

    steps = 8 if "radam" in name else 4  # RAdam begins with five steps that do nothing
    if not resumes(name):
        model = policy()
        before = trained(model)
        trainer_of(model, optim, tmp_path, steps=steps).train()
        after = trained(model)
        assert not list(tmp_path.glob("checkpoint-*"))
    else:
        before, after = assert_resumes(policy, optim, tmp_path, steps=steps)
    assert all(weight.isfinite().all() for weight in after.values())
    assert not any(after[name].equal(before[name]) for name in before)


def test_every_name_of_transformers_is_known():
    """A name that a newer transformers adds must be looked at: until then its memory is said to be an estimate."""
    assert set(NAMES) <= OPTIMIZERS.keys()
    assert optimizer_estimate("adamw_torch") == ""
    assert "is not known here" in optimizer_estimate("adamw_of_tomorrow")
    assert optimizer_estimate("galore_adamw") == ""


def test_projected_gradients_are_counted_by_their_rank():
    """128, or a matrix's smaller side where singular directions are taken; what is not projected keeps two states."""
    assert projected_bytes("galore_adamw", (300, 200), 4) == 4 * (2 * 128 * 300 + 128 * 200)
    assert projected_bytes("galore_adamw", (50, 300), 4) == 4 * (2 * 50 * 300 + 50 * 50)
    assert projected_bytes("apollo_adamw", (50, 300), 4) == 4 * (2 * 128 * 300 + 128 * 50)
    assert projected_bytes("galore_adafactor", (300, 200), 4) == 4 * 128 * 200
    model = whole()
    weights = count_weights(model)
    count, chosen = weights.count, [p for name, p in model.named_parameters() if "q_proj" in name]
    settings = {"value": 4, "optimizer": "galore_adamw", "device": "cpu"}
    assert sizes_of(model, weights, **settings).optimizer == 8 * count
    found = sizes_of(model, weights, projected=["q_proj"], **settings).optimizer
    own = sum(projected_bytes("galore_adamw", p.shape, 4) for p in chosen)
    assert len(chosen) == 2 and found == 8 * (count - sum(p.numel() for p in chosen)) + own


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["galore_adamw", "galore_adafactor", "apollo_adamw"])
def test_a_step_with_projected_gradients_is_planned(name, tmp_path):
    """As the packages keep them, where they are installed."""
    pytest.importorskip(OPTIMIZERS[name].module)
    model = whole()

    def make(parameters):
        trainer = trainer_of(model, settings(name), tmp_path)
        return trainer.create_optimizer()

    peak, batch = step_peak(model, make)
    sizes = sizes_of(
        model, count_weights(model), value=4, optimizer=name, device="cpu", projected=settings(name).target_modules
    )
    needs = step_needs(sizes, 0, batch.positions, 0)
    assert needs.total - needs.weights == pytest.approx(peak, rel=0.15)


@pytest.mark.parametrize(
    ("changes", "whole_model", "said"),
    [
        ({"name": "adamw_torhc"}, False, r"optim\.name must be one of .*\(did you mean adamw_torch\?\)\.$"),
        ({"name": "lomo"}, True, r"optim\.name=lomo cannot be used: it updates each weight inside the backward pass"),
        ({"name": "adamw_torch_xla"}, False, "is made for TPUs only"),
        ({"name": "galore_adamw_8bit", "target_modules": ["q_proj"]}, True, "runs on CUDA GPUs only"),
        ({"target_modules": ["q_proj"]}, True, r"optim\.target_modules has no effect on adamw_torch_fused"),
        ({"name": "galore_adamw", "target_modules": ["q_proj"]}, False, "set adapter=none"),
        ({"name": "apollo_adamw"}, True, r"needs optim\.target_modules"),
        ({"name": "schedule_free_sgd", "schedule": "cosine"}, False, r"optim\.schedule must be constant, not cosine"),
        ({"schedule": "cosin"}, False, r"optim\.schedule must be one of"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together(changes, whole_model, said, monkeypatch):
    """Each is one sentence, whether or not the package of the optimizer is there."""
    monkeypatch.setattr("alignment.training.optimizers.find_spec", lambda name: name)
    with pytest.raises(UserError, match=said):
        check_optimizer("optim", replace(quickstart().optim, **changes), None if whole_model else adapter(), "cpu")


@pytest.mark.parametrize("kind", ["vera", "oft", "boft"])
def test_muon_wants_matrices(kind):
    """The rows of OFT's weight are blocks of angles, whose orthogonal mixture means nothing."""
    other = {"r": None, "block_size": 4} if kind != "vera" else {}
    with pytest.raises(UserError, match=rf"^optim\.name=muon trains matrices, and adapter\.kind={kind} has vectors or"):
        check_optimizer("optim", settings("muon"), adapter(kind=kind, alpha=None, **other), "cpu")


@pytest.mark.slow
def test_settings_without_effect_are_named_once(tmp_path, caplog):
    """An optimizer that does not read beta1 says so in the log; one that does says nothing."""
    for name, count in (("adafactor", 1), ("adamw_torch", 0)):
        caplog.clear()
        with caplog.at_level("INFO", "alignment.training.optimizers"):
            trainer_of(tiny_policy(torch.float32), settings(name), tmp_path / name, steps=2, save_every=0).train()
        said = [record.getMessage() for record in caplog.records]
        assert said == [f"optim.name={name} does not read optim.beta1 and optim.beta2."] * count


# Muon


def test_muon_trains_hidden_matrices_and_adamw_the_rest():
    """Two steps equal those of torch's two optimizers, each on its own weights; so does a reload of the states."""
    optim = settings("muon", weight_decay=0.1)
    ours, reloaded, book = (whole() for _ in range(3))
    decayed = [name for name, parameter in ours.named_parameters() if parameter.ndim > 1]
    named = dict(book.named_parameters())
    matrices = {name for name in named if "proj" in name}
    ends = {name for name in named if "embed" in name or "lm_head" in name}
    norms = named.keys() - matrices - ends
    assert matrices and ends and norms
    by_the_book = [
        torch.optim.Muon([named[n] for n in matrices], lr=optim.lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([named[n] for n in ends], lr=optim.lr, weight_decay=0.1),
        torch.optim.AdamW([named[n] for n in norms], lr=optim.lr, weight_decay=0.0),
    ]
    first, second = muon(ours, optim, decayed), muon(reloaded, optim, decayed)
    for step in range(2):
        for model, optimizers in ((ours, [first]), (reloaded, [second]), (book, by_the_book)):
            torch.manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            for optimizer in optimizers:
                optimizer.step()
        if step == 0:
            second = muon(reloaded, optim, decayed)
            second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert equal(trained(ours), trained(book))
    assert equal(trained(reloaded), trained(book))


# Schedule-free


class Averaging(torch.optim.Optimizer):
    """Steps y by plain descent; the policy is x, which follows at half the distance. Refuses to step x."""

    def __init__(self, weights):
        super().__init__(weights, {"lr": 0.1, "is_training": False})

    def _put(self, key, is_training):
        for group in self.param_groups:
            if group["is_training"] != is_training:
                group["is_training"] = is_training
                for weight in group["params"]:
                    for kept in "xy":
                        self.state[weight].setdefault(kept, weight.detach().clone())
                    weight.data.copy_(self.state[weight][key])

    def train(self):
        self._put("y", True)

    def eval(self):
        self._put("x", False)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            assert group["is_training"], "stepped the average"
            for weight in group["params"]:
                weight.sub_(weight.grad, alpha=group["lr"])
                self.state[weight]["y"].copy_(weight)
                self.state[weight]["x"].lerp_(weight, 0.5)

    def holds(self, key, model):
        """Whether the model has these weights."""
        values = [self.state[weight][key] for group in self.param_groups for weight in group["params"]]
        return all(p.equal(value.to(p.dtype)) for p, value in zip(model.parameters(), values, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_schedule_free_policy_is_its_average_wherever_it_is_used(dtype, tmp_path, monkeypatch):
    """Gradients are taken at y; evaluation, checkpoint, refreshed reference and final policy read x; it resumes."""
    seen = []

    class EverySecondStep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_evaluate = state.global_step % 2 == 0

    class Reference:
        def refresh(self, step, groups):
            seen.append(("refresh", step, optimizer().holds("x", model)))

        def save_state(self, folder):
            pass

    class Refreshed:
        refreshes = (1, 3)

        def until_refresh(self, step):
            return []

    def optimizer():
        return trainer.optimizer.optimizer  # accelerate's wrapper is around it

    def noting(name, key):
        method = getattr(PreferenceTrainer, name)

        def noted(self, *args, **kwargs):
            found = method(self, *args, **kwargs)
            seen.append((name, self.state.global_step, optimizer().holds(key, model)))
            return found

        monkeypatch.setattr(PreferenceTrainer, name, noted)

    monkeypatch.setattr(stage_trainer, "make_optimizer", lambda key, optim, model, *_: Averaging(model.parameters()))
    noting("training_step", "y")
    noting("_evaluated", "x")
    callbacks = [EverySecondStep(), FollowPolicy(Reference(), Refreshed(), lambda steps: [])]
    results = []
    for start in (0, 2):
        model = whole(dtype)
        trainer = trainer_of(model, settings("adamw_torch"), tmp_path, callbacks=callbacks, eval_groups=GROUPS)
        checkpoint = tmp_path / f"checkpoint-{start}"
        trainer.train(resume_from_checkpoint=str(checkpoint) if start else None)
        assert optimizer().holds("x", model) and not optimizer().holds("y", model)
        results.append(trained(model))
        assert equal(load_file(tmp_path / "checkpoint-4" / "model.safetensors"), results[-1])
    assert equal(*results)
    assert all(is_right for *_, is_right in seen), seen
    assert [name for name, *_ in seen] == ["training_step", "refresh", "training_step", "_evaluated"] * 3


# Master weights


@pytest.mark.slow
@pytest.mark.parametrize("masters", [True, False])
def test_a_tiny_rate_moves_a_bf16_policy_by_its_masters(masters, tmp_path):
    """Twelve steps of 1e-5, each a tenth of what bfloat16 can tell apart; without masters each is rounded away."""
    model = whole(torch.bfloat16)
    is_large = {name: p.detach().abs() >= 2**-6 for name, p in model.named_parameters()}
    before = trained(model)
    optim = settings("adamw_torch", lr=1e-5, master_weights=masters)
    trainer_of(model, optim, tmp_path, steps=12, save_every=0).train()
    moved = [(p.detach() != before[name])[is_large[name]] for name, p in model.named_parameters()]
    share = torch.cat(moved).float().mean().item()
    assert all(p.dtype is torch.bfloat16 for p in model.parameters())
    assert share > 0.2 if masters else share == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw_torch_fused", "adagrad", "muon", "paged_adamw_8bit"])
def test_a_bf16_policy_with_masters_resumes_bit_equal(name, tmp_path):
    """The masters are in the checkpoint: from the rounded weights alone the training would go another way."""
    before, after = assert_resumes(lambda: whole(torch.bfloat16), settings(name, lr=1e-4), tmp_path)
    assert (tmp_path / "checkpoint-2" / "master_weights.safetensors").is_file()
    assert not equal(before, after)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw_torch", "muon", "adagrad"])
def test_the_plan_counts_masters_and_states(name, tmp_path):
    """Bytes of states and masters of a whole bf16 policy after a step, as the plan has them."""
    model = whole(torch.bfloat16)
    trainer = trainer_of(model, settings(name), tmp_path, steps=1, save_every=0)
    trainer.train()
    states = [t for state in trainer.optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    masters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert {p.dtype for p in masters} == {torch.float32}
    kept = sum(t.numel() * t.element_size() for t in (*states, *masters) if t.ndim)
    sizes = sizes_of(model, count_weights(model), value=2, optimizer=name, device="cpu")
    assert sizes.optimizer == pytest.approx(kept, rel=0.05)
    assert sizes.update == 2 * sum(p.numel() for p in model.parameters())
    plain = sizes_of(model, count_weights(model), value=2, optimizer=name, device="cpu", master_weights=False)
    assert plain.optimizer < sizes.optimizer and plain.update == 0


@pytest.mark.slow
def test_every_name_of_layers_whose_gradients_are_projected_exists():
    """transformers projects those that match, and says nothing of the others."""
    optim = replace(settings("galore_adamw"), target_modules=["q_proj", "v_porj"])
    with pytest.raises(
        UserError, match=r"^optim\.target_modules: the model has no linear layer v_porj \(did you mean v_"
    ):
        make_optimizer("optim", optim, whole(), [], lambda: None)
    good = replace(optim, target_modules=["q_proj", "layers.1.self_attn.v_proj"])
    assert make_optimizer("optim", good, whole(), [], lambda: "made") == "made"
