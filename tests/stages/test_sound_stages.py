"""Stages of whole runs in this process: nothing stays on the model after one, and none goes on from NaN."""

from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from alignment.config.compose import load
from alignment.errors import NotFinite, UserError
from alignment.policy.layers import as_found, decoder_layers
from alignment.runs.record import RunRecord
from alignment.stages import sft as sft_module
from alignment.stages.chain import Chain
from alignment.stages.store import StageStore
from tests.conftest import tiny_policy
from tests.helpers.commands import pair, write_lines

pytestmark = pytest.mark.slow


@pytest.fixture
def chain_of(tmp_path, tiny_model_folder, monkeypatch):
    """The chain of a run on small pairs, SFT before DPO, with these settings besides."""
    write_lines(tmp_path / "pairs.jsonl", [pair(number) for number in range(1, 11)])
    monkeypatch.setenv("ALIGNMENT_CACHE", str(tmp_path / "cache"))

    def chain(*settings):
        config = load(
            *("recipe=quickstart", "sft=quickstart", "tracking=none", f"model.name={tiny_model_folder}", "adapter.r=2"),
            *(
                "evaluation.judge=none",
                "evaluation.prompts=2",
                "evaluation.max_new_tokens=2",
                "evaluation.kl_prompts=0",
            ),
            *(f"{part}.source={tmp_path / 'pairs.jsonl'}" for part in ("data", "sft.data")),
            *(f"{part}.{key}=null" for part in ("data", "sft.data") for key in ("eval_source", "system", "limit")),
            *("data.eval_size=2", "sft.data.eval_size=2", "data.eval_limit=null", "sft.data.eval_limit=null"),
            *(f"{part}.groups_per_step=4" for part in ("trainer", "sft.trainer")),
            *(f"{part}.max_steps=3" for part in ("trainer", "sft.trainer")),
            *(f"{part}.save_every=1" for part in ("trainer", "sft.trainer")),
            *("device=cpu", *settings),
        )
        return Chain(config, tmp_path / "run", "quickstart", {})

    return chain


def wrapped_by(model):
    """Everything that a trainer may leave on a model."""
    names = ("forward", "_original_forward", "gradient_checkpointing")
    hooks = [
        (module, name, len(own)) for module in model.modules() for name, own in vars(module).items() if "_hooks" in name
    ]
    own = [(module, name, vars(module)[name]) for module in model.modules() for name in names if name in vars(module)]
    return hooks, own, [p.requires_grad for p in model.parameters()], model.config.use_cache


@pytest.mark.parametrize(("every", "bf16"), [(0, False), (1, False), (0, True)])
def test_nothing_stays_on_the_model_after_a_stage(every, bf16, chain_of, monkeypatch):
    """Neither TRL's head, nor hooks, nor autocast, nor checkpointing; while SFT trains, its layers are the plan's."""
    if bf16:  # as on a GPU
        arguments = sft_module.training_arguments
        monkeypatch.setattr(sft_module, "training_arguments", lambda *a, **k: arguments(*a, **k | {"bf16": True}))
    stayed, flags = [], []
    train, logged = Chain._train, RunRecord.log

    def watched(self, stage, model, tracker):
        before = wrapped_by(model)

        def log(record, *row):
            flags.extend(layer.gradient_checkpointing for layer in decoder_layers(model))
            logged(record, *row)

        monkeypatch.setattr(RunRecord, "log", log)
        result = train(self, stage, model, tracker)
        stayed.append((stage.name, before == wrapped_by(model)))
        return result

    monkeypatch.setattr(Chain, "_train", watched)
    both = ("trainer", "sft.trainer")
    plan = (f"checkpoint_every={every}", "plan=off", "tokens_per_batch=1000")
    settings = [f"{part}.{setting}" for part in both for setting in plan]
    chain_of(*settings).run()
    assert stayed == [("sft", True), ("preference", True)]
    assert set(flags) == {bool(every)}


def test_as_found_undoes_whatever_was_done():
    """And hooks from before the block can still be removed."""
    model = tiny_policy(torch.float32)
    embedding = model.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda *a: None)
    before = wrapped_by(model)
    with as_found(model):
        embedding.register_forward_hook(lambda *a: None)
        embedding.register_full_backward_hook(lambda *a: None)
        embedding.register_forward_pre_hook(lambda *a: None)
        model.forward = partial(nn.Module.forward, model)
        model._original_forward = model.forward
        decoder_layers(model)[0].gradient_checkpointing = True
        embedding.weight.requires_grad_(True)
        model.config.use_cache = not model.config.use_cache
    assert wrapped_by(model) == before
    handle.remove()
    assert not embedding._forward_hooks


@pytest.mark.parametrize("stage", ["sft", "preference"])
def test_a_stage_that_diverges_stops_and_leaves_nothing(stage, chain_of, tmp_path):
    """No result, nothing for other runs; resumed, the run is refused at once, and says why."""
    key = "sft.optim" if stage == "sft" else "optim"
    settings = f"{key}.lr=1e30", f"{key}.max_grad_norm=0"
    with pytest.raises(
        NotFinite, match=rf"stopped at step 2, .*\(rows .*pairs\.jsonl:\d+.*lower {key}\.lr \(now 1e\+30\)"
    ):
        chain_of(*settings).run()
    folder = tmp_path / "run" / "stages" / stage
    assert not (folder / "done.json").exists() and not (tmp_path / "run" / "adapter").exists()
    for path in tmp_path.rglob("adapter_model.safetensors"):
        assert all(value.isfinite().all() for value in load_file(path).values()), path
    kept = StageStore(tmp_path / "cache" / "stages").stored()
    assert [entry.content["description"]["stage"] for entry in kept].count("sft") == (stage != "sft")
    with pytest.raises(
        UserError, match=r"cannot go on, because it would stop where it stopped: .* at step 2, .*Remove"
    ):
        chain_of(*settings)


def test_a_policy_that_no_step_has_looked_at_is_asked(chain_of, tmp_path):
    """The last update may be the one that breaks it, and nothing may be held out."""
    with pytest.raises(NotFinite, match=r"^SFT ended with a policy whose log-probs are not finite; there is no good"):
        chain_of("sft.optim.lr=1e30", "sft.trainer.max_steps=1", "sft.data.eval_size=0").run()
    assert not (tmp_path / "run" / "stages" / "sft" / "policy").exists()


def test_a_run_of_one_step_trains(chain_of, tmp_path):
    """Its only step is a warm-up step."""
    chain_of("sft.trainer.max_steps=1", "trainer.max_steps=1").run()
    for policy in ("stages/sft/policy", "adapter"):
        weights = load_file(tmp_path / "run" / policy / "adapter_model.safetensors")
        assert all(value.any() for name, value in weights.items() if "lora_B" in name)


def test_a_model_that_computes_no_numbers_is_refused(chain_of, tmp_path, monkeypatch):
    """Before its answers are sampled."""
    monkeypatch.setattr(Chain, "_is_finite", lambda self, model: False)
    with pytest.raises(
        UserError, match=r"^model\.name=.* gives log-probs that are not finite: its weights are damaged"
    ):
        chain_of().run()


def test_a_model_with_a_damaged_weight_is_refused(chain_of, monkeypatch):
    """Also where the log-probs of the data are finite: the weight would be in what the run leaves."""
    monkeypatch.setattr("alignment.stages.chain.damaged_weight", lambda model: "embeddings")
    with pytest.raises(UserError, match=r"has a weight with numbers that are not finite \(embeddings\): its files are"):
        chain_of().run()
