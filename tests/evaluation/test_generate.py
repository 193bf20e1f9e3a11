"""Sampled answers are those of the policy that is trained and scored."""

import copy

import numpy as np
import peft
import pytest
import torch

from alignment.evaluation.generate import sample
from alignment.kernels.patch import patch_layers
from tests.helpers.patched import tiny


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_answers_come_through_the_layers_that_score(dtype, monkeypatch):
    """An adapter in float32 on a base in 16 bits, as a QLoRA has it: peft's own forward would round in other places."""
    own = tiny("qwen3", dtype)
    for parameter in own.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    patch_layers(model := copy.deepcopy(own))
    forward, calls = peft.tuners.lora.Linear.forward, []
    monkeypatch.setattr(
        peft.tuners.lora.Linear, "forward", lambda *args, **kw: calls.append(args) or forward(*args, **kw)
    )
    prompts = [np.arange(2, 2 + n, dtype=np.int32) for n in (3, 5)]
    settings = {"temperature": 0.0, "max_new_tokens": 4, "batch_size": 2, "device": torch.device("cpu"), "seed": 0}
    answers = sample(model, prompts, [0], **settings)
    assert not calls
    assert [len(answer) for answer in answers] == [len(answer) for answer in sample(own, prompts, [0], **settings)]
    assert calls, "without our layers it is peft's forward, so the list above could have been filled"
