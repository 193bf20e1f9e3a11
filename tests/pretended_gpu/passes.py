"""A pass of a tiny policy on the pretended GPU, beside the same pass on the CPU, and what must hold inside it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alignment.kernels.patch import patch_layers
from alignment.policy.layers import decoder_layers
from alignment.scoring.layout import BatchLayout, FlatLayout, ForkedLayout, SharedLayout
from alignment.scoring.logps import join_scores, score
from alignment.scoring.prompt_sharing import choose_layout
from tests.conftest import random_groups, tiny_policy
from tests.pretended_gpu.device import GPU, WAITS, module_to_gpu, to_host
from tests.pretended_gpu.machine import pretended_gpu

CPU = torch.device("cpu")
GROUPS = random_groups(6, k=3, seed=6)
TOKENS_PER_BATCH = 60

MAY_WAIT = {
    FlatLayout: {("item", "scoring/logps.py"): 1},  # transformers looks for packed sequences
    SharedLayout: {},
    ForkedLayout: {},
}
"""How often the host may wait in one pass: kind and file. All else is asked of the device after the last pass."""


def policy_on(device: torch.device, dtype: torch.dtype) -> Any:
    """A trained adapter in fp32 on a base in `dtype`, as a run has it, with its layers patched."""
    model = tiny_policy(torch.float32, trained=True).to(dtype)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if device.type == "cuda":
        module_to_gpu(model)
    patch_layers(model)
    return model.train()


@dataclass(frozen=True, slots=True)
class Passes:
    """What a few passes over `GROUPS` gave.

    Attributes:
        logps: per token, in the order of the groups.
        gradient: of all trained tensors, in float64 on the CPU.
        hidden: dtypes of the outputs of all decoder layers and of the last norm.
        dtypes: of the log-probs, and of the gradients.
        waits: kind and file of the waits inside the passes.
        count: number of passes.
    """

    logps: Tensor
    gradient: Tensor
    hidden: set[torch.dtype]
    dtypes: tuple[torch.dtype, set[torch.dtype]]
    waits: dict[tuple[str, str], int]
    count: int


def run_passes(model: Any, layout: BatchLayout, device: torch.device) -> Passes:
    """Score and differentiate all groups, pass by pass."""
    hidden: set[torch.dtype] = set()

    def note(module: nn.Module, args: Any, output: Any) -> None:
        hidden.add((output[0] if isinstance(output, tuple) else output).dtype)

    base = model.get_base_model().get_decoder()
    hooks = [part.register_forward_hook(note) for part in (*decoder_layers(model), base.norm)]
    model.zero_grad()
    scored, waits = [], dict[tuple[str, str], int]()
    for batch in layout.batches(GROUPS, TOKENS_PER_BATCH):
        on_device = batch.to(device)
        weights = torch.cos(on_device.targets.float())
        WAITS.clear()
        logps = score(model, on_device)
        (logps.values * weights).sum().backward()
        for (kind, line), number in WAITS.items():
            key = kind, line.rpartition(":")[0]
            waits[key] = waits.get(key, 0) + number
        scored.append((batch, type(logps)(to_host(logps.values), batch.offsets)))
    for hook in hooks:
        hook.remove()
    gradients = [to_host(p.grad) for p in model.parameters() if p.requires_grad]
    return Passes(
        logps=join_scores(GROUPS, scored).values,
        gradient=torch.cat([g.double().flatten() for g in gradients]),
        hidden=hidden,
        dtypes=(logps.values.dtype, {g.dtype for g in gradients}),
        waits=waits,
        count=len(scored),
    )


@functools.cache
def on_the_cpu(dtype: torch.dtype) -> Passes:
    """The passes on the CPU."""
    return run_passes(policy_on(CPU, dtype), FlatLayout(), CPU)


def check_pass(layout: BatchLayout, dtype: torch.dtype) -> None:
    """Raise unless a pass on the GPU is that of the CPU, never waits for the host, and keeps its dtypes."""
    expected = on_the_cpu(dtype)
    with pretended_gpu():
        model = policy_on(GPU, dtype)
        assert isinstance(choose_layout(model, GPU), SharedLayout), "the probe refuses to share prompts"
        found = run_passes(model, layout, GPU)
    exact = dtype is torch.float32
    difference = (found.logps - expected.logps).abs().mean()
    assert difference <= (1e-6 if exact else 5e-3), f"log-probs differ by {difference:.2g} nats per token"
    relative = (found.gradient - expected.gradient).norm() / expected.gradient.norm()
    assert relative <= (1e-5 if exact else 0.08), f"the gradient differs by {relative:.2g} of its norm"
    assert found.hidden == {dtype}, f"hidden states are {found.hidden}"
    assert found.dtypes == (torch.float32, {torch.float32}), f"log-probs and gradients are {found.dtypes}"
    may = MAY_WAIT[type(layout)]
    too_often = {key: number for key, number in found.waits.items() if number > found.count * may.get(key, 0)}
    assert not too_often, f"the host waits in {found.count} passes: {too_often}"
