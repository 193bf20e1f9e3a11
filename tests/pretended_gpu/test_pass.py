"""A pass on a GPU: devices never mix, the host never waits, dtypes stay, and the numbers are those of the CPU."""

import pytest
import torch

from alignment.kernels import attention
from alignment.scoring.layout import FlatLayout, ForkedLayout, SharedLayout
from alignment.scoring.prompt_sharing import choose_layout
from tests.pretended_gpu.device import GPU, MixedDevices
from tests.pretended_gpu.machine import pretended_gpu
from tests.pretended_gpu.passes import check_pass, policy_on


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "layout", [FlatLayout(), SharedLayout(), ForkedLayout(60, 0)], ids=["flat", "shared", "forked"]
)
def test_a_pass_is_that_of_the_cpu(layout, dtype):
    check_pass(layout, dtype)


@pytest.mark.parametrize(
    ("error", "level"),
    [(RuntimeError("CUDA error: invalid argument"), "WARNING"), (NotImplementedError("no kernel for it"), "INFO")],
    ids=["unexpected", "expected"],
)
def test_a_kernel_that_fails_in_the_probe(error, level, monkeypatch, caplog):
    """The model trains without shared rows; an error that nobody expects is shown whole, not in one line."""

    def fail(*args):
        raise error

    with pretended_gpu(), monkeypatch.context() as patch, caplog.at_level("INFO", "alignment.scoring.prompt_sharing"):
        patch.setattr(attention, "_flash_forward", fail)
        assert isinstance(choose_layout(policy_on(GPU, torch.bfloat16), GPU), ForkedLayout)
    lines = [record for record in caplog.records if record.name == "alignment.scoring.prompt_sharing"]
    assert {record.levelname for record in lines} == {"INFO", level}
    assert str(error) in lines[-1].getMessage() and lines[-1].levelname == "INFO"
    if level == "WARNING":
        assert lines[0].exc_info is not None and lines[0].exc_info[1] is error


def test_devices_that_mix_are_found():
    with pretended_gpu(), pytest.raises(MixedDevices, match=r"a CPU tensor of \(3,\)"):
        torch.zeros(3, device=GPU) + torch.zeros(3)
