"""What a stage asks of the machine before it starts."""

import pytest
import torch
from transformers import TrainingArguments
from trl import SFTConfig

from alignment.config.compose import load
from alignment.evaluation.sampling.answer import Sampling
from alignment.evaluation.sampling.draw import draw
from alignment.evaluation.sampling.local import LocalEngine
from alignment.training.callbacks import training_arguments
from tests.conftest import random_groups, tiny_policy
from tests.pretended_gpu.device import GPU, module_to_gpu
from tests.pretended_gpu.machine import pretended_gpu


@pytest.mark.parametrize("kind", [TrainingArguments, SFTConfig])
def test_one_process_uses_one_of_two_gpus(kind, tmp_path):
    """The Trainer would split a row of shared prompts between them; TRL refuses to start."""
    config = load("recipe=quickstart")
    with pretended_gpu(count=2):
        assert kind(output_dir=str(tmp_path), report_to="none").n_gpu == 2
        arguments = training_arguments(
            kind, folder=tmp_path, optim=config.optim, trainer=config.trainer, num_steps=1, seed=0, device=GPU
        )
        assert arguments.n_gpu == 1
        assert arguments.device == GPU
        assert arguments.train_batch_size == arguments.per_device_train_batch_size


def test_no_gpu_is_asked_for_its_random_state(monkeypatch):
    """Answers are drawn with numbers of their own: the state of another GPU would cost half a GiB of its memory."""
    asked = []
    with pretended_gpu(count=2):
        model = module_to_gpu(tiny_policy(torch.float32))
        monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: asked.append(device) or torch.get_rng_state())
        prompts = [group.prompt for group in random_groups(2)]
        answers = draw(LocalEngine(model, GPU, at_once=2), prompts, 2, Sampling(stops=(96,), max_new_tokens=3))
    assert [len(each) for each in answers] == [2, 2]
    assert asked == []
