"""TRL's head in the SFT stage: it reads the labelled positions alone, and gives what it gives when it reads all."""

from types import SimpleNamespace

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer import utils

from alignment.stages.sft import _labelled_alone

IDS = torch.tensor([[5, 6, 7, 8, 9], [3, 4, 2, 0, 0]])
LABELS = torch.tensor([[-100, -100, 7, 8, 9], [-100, 4, 2, -100, -100]])


def test_only_labelled_positions_reach_the_head(monkeypatch):
    torch.manual_seed(0)
    sizes = {"vocab_size": 12, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    apply, rows = utils._ChunkedLogProbFunction.apply, []
    noting = SimpleNamespace(apply=lambda hidden, *rest: (rows.append(len(hidden)), apply(hidden, *rest))[1])
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", noting)

    def found() -> list[torch.Tensor]:
        model.zero_grad()
        outputs = model(input_ids=IDS, labels=LABELS, fused_lm_head=True)
        outputs.log_probs.sum().backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        return [outputs.log_probs, outputs.entropy, outputs.is_top1, outputs.label_mask, *gradients]

    expected = found()
    with _labelled_alone():
        alone = found()
    assert rows == [8, 5]
    for one, other in zip(alone, expected, strict=True):
        torch.testing.assert_close(one, other)
    found()
    assert rows[2:] == [8]  # TRL's own are as they were


def test_a_trl_that_decides_elsewhere_is_left_alone(monkeypatch):
    monkeypatch.delattr(utils, "_use_triton")
    with _labelled_alone():
        assert not hasattr(utils, "_use_triton")
    assert not hasattr(utils, "_use_triton")
