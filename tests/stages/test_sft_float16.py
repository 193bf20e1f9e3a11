"""SFT in float16: the gradient of a pass is that of float64, scaled."""

import types
from dataclasses import replace

import torch
from transformers import AutoTokenizer

from alignment.config.compose import load
from alignment.data.preparation.prepare import SFTData
from alignment.stages.sft import SFTStage, _scored_loss
from alignment.stages.stage import Workspace
from tests.conftest import random_groups
from tests.helpers.precision import in_float64, policy_on, whole

CPU = torch.device("cpu")


def test_a_pass_is_as_right_as_its_dtype(tiny_model_folder, tmp_path):
    """TRL's head and the backward pass, with the factor that the scaler has."""
    config = load("recipe=quickstart", "sft=quickstart", "tracking=none")
    config.sft.trainer = replace(config.sft.trainer, groups_per_step=4)
    rows = [
        {"input_ids": [*g.prompt.tolist(), *g.completions[0].tolist()],
         "completion_mask": [0] * len(g.prompt) + [1] * len(g.completions[0])}
        for g in random_groups(4, seed=5)
    ]  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)  # the policy knows 97 tokens
    work = Workspace(tmp_path, tmp_path, CPU, tokenizer, None, tmp_path / "final")
    model = policy_on(CPU, torch.float16).train()
    exact = in_float64(model)
    seen = set()
    down = next(module for name, module in model.named_modules() if name.endswith("lora_A.default"))
    down.register_forward_hook(lambda module, given, result: seen.add(result.dtype))
    stage = SFTStage(config, SFTData(rows, [], ["a"] * 4, {}), work)
    plan = types.SimpleNamespace(tokens_per_batch=10_000)
    trainer = stage.trainer(model, plan, max(len(row["input_ids"]) for row in rows), 1, lambda *_: None)
    (inputs,) = trainer.get_train_dataloader()
    count = (inputs["labels"] != -100).sum()
    loss = _scored_loss(exact, inputs["input_ids"], inputs["labels"], count)
    loss.backward()
    found = trainer.training_step(model, dict(inputs), count)
    assert seen == {torch.float16}, "the adapter, in float32, takes part in 16 bits"
    assert abs(found.item() - loss.item()) < 1e-3 * loss.item()
    scale = trainer.scaler.get_scale()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    gradient, total = (
        whole({name: p.grad / by for name, p in each.named_parameters() if p.requires_grad}, names)
        for each, by in ((model, scale), (exact, 1))
    )
    assert scale == 2.0**16 and (gradient - total).norm() < 0.02 * total.norm()
