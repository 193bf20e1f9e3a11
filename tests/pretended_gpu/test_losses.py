"""Every loss: its start, a step and an evaluation on a GPU are those of the CPU, and no device is mixed."""

import pytest
import torch

from alignment.losses import LOSSES
from tests.conftest import CORE_LOSSES, each, recommended_loss
from tests.pretended_gpu.machine import pretended_gpu
from tests.pretended_gpu.steps import Side

METRICS = "copy to the host", "training/metrics.py"
NAMES = [*(name for name in LOSSES if name != "mixture"), "mpo"]


@pytest.fixture(scope="module")
def cpu(tmp_path_factory) -> Side:
    return Side(torch.device("cpu"), tmp_path_factory.mktemp("cpu"))


@pytest.fixture(scope="module")
def gpu(tmp_path_factory) -> Side:
    with pretended_gpu() as device:
        side = Side(device, tmp_path_factory.mktemp("gpu"))
    return side


@pytest.mark.slow
@pytest.mark.parametrize("name", each(NAMES, CORE_LOSSES))
def test_a_step_is_that_of_the_cpu(name, cpu, gpu, tmp_path):
    loss = recommended_loss(name)
    if loss.requirements().rewards:
        cpu = Side(torch.device("cpu"), tmp_path / "cpu", rewards=True)
        with pretended_gpu() as device:
            gpu = Side(device, tmp_path / "gpu", rewards=True)
    expected = cpu.step(cpu.trainer(loss))
    with pretended_gpu():
        found = gpu.step(gpu.trainer(loss))
    assert found.loss == pytest.approx(expected.loss, rel=1e-5, abs=1e-6)
    assert (found.gradient - expected.gradient).norm() <= 1e-4 * expected.gradient.norm()
    assert found.metrics == pytest.approx(expected.metrics, rel=1e-4, abs=1e-4)
    assert found.held_out == pytest.approx(expected.held_out, rel=1e-4, abs=1e-4)
    # The step's metrics are read once, at its end; what a loss must know to go on it asks in its own lines, seldom.
    assert {key for key in found.waits if not key[1].startswith(("losses/", "types"))} == {METRICS}
    assert found.waits[METRICS] == 1
    assert sum(found.waits.values()) <= 10
