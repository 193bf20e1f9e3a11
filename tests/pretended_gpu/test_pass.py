"""A pass on a GPU: devices never mix, the host never waits, dtypes stay, and the numbers are those of the CPU."""

import pytest
import torch

from alignment.scoring.layout import FlatLayout, SharedLayout
from tests.pretended_gpu.device import GPU, MixedDevices
from tests.pretended_gpu.machine import pretended_gpu
from tests.pretended_gpu.passes import check_pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("layout", [FlatLayout(), SharedLayout()], ids=["flat", "shared"])
def test_a_pass_is_that_of_the_cpu(layout, dtype):
    check_pass(layout, dtype)


def test_devices_that_mix_are_found():
    with pretended_gpu(), pytest.raises(MixedDevices, match=r"a CPU tensor of \(3,\)"):
        torch.zeros(3, device=GPU) + torch.zeros(3)
