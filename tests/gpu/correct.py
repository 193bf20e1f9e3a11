"""Whether an NF4 Qwen3 on this device computes what it should: `python -m tests.gpu.correct SIZE`.

Every line is a difference between two ways to compute the same, or a prediction and what was measured.
"""

from __future__ import annotations

import gc
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from alignment.config.schema import (
    Calibration,
    Device,
    Dtype,
    Planning,
    QuantizationConfig,
    ReferenceMode,
    Shard,
    TrainerConfig,
)
from alignment.kernels.attention import enable_shared_prompts
from alignment.kernels.base import is_patched
from alignment.kernels.patch import patch_layers
from alignment.losses import DPO
from alignment.policy import adapter as adapters
from alignment.policy.layers import checkpoint_layers
from alignment.policy.load import load_base, resolve_device
from alignment.reference.base import comparison_tolerance
from alignment.reference.cached import CachedReference
from alignment.reference.live import LiveReference
from alignment.reference.store import ReferenceStore
from alignment.scoring import prompt_sharing
from alignment.scoring.layout import BatchLayout, FlatLayout, SharedLayout
from alignment.scoring.logps import join_scores, score
from alignment.training.planning import plan_stage
from alignment.training.sampler import StepSampler
from alignment.training.start_check import check_start
from alignment.training.trainer import PreferenceTrainer
from alignment.types import Group
from tests.bench import preparation
from tests.gpu.lines import note, out_folder
from tests.gpu.speed import ADAPTER, STEPS, folder_of, job_of

OUT = out_folder()
DEVICE = resolve_device(Device.auto)
ON_GPU = DEVICE.type == "cuda"
BUDGETS = ((16384, 0), (16384, 1), (8192, 0), (4096, 0))
"""Positions of a pass and `checkpoint_every` of the comparisons of planned and measured memory."""

Result = tuple[Tensor, Tensor]


def policy(size: str, *, patched: bool = True) -> Any:
    """The NF4 base with an adapter that is not zero, with our layers or with peft's own."""
    job = job_of(size, "ours_cold")
    real = adapters.patch_layers
    adapters.patch_layers = patch_layers if patched else lambda model: None
    try:
        quantization = QuantizationConfig(double=True, compute_dtype=Dtype.auto, calibration=Calibration.none)
        base = load_base(preparation.model_config(job.model), quantization, job.model, DEVICE)
        model: Any = adapters.load_adapter(base, Path(job.adapter))
    finally:
        adapters.patch_layers = real
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.01)
    return model.train()


def values_and_gradient(model: nn.Module, groups: list[Group], layout: BatchLayout, budget: int) -> Result:
    """Log-probs of all groups and the gradient of a weighted sum of them."""
    model.zero_grad()
    scored = []
    for batch in layout.batches(groups, budget):
        logps = score(model, batch := batch.to(DEVICE))
        (logps.values * torch.cos(batch.targets.float())).sum().backward()
        scored.append((batch, logps.detach().to("cpu")))
    return join_scores(groups, scored).values, gradient_of(model)


def gradient_of(model: nn.Module) -> Tensor:
    """All gradients, one after another."""
    return torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])


def compare(size: str, what: str, found: Result, wanted: Result) -> None:
    """One line: the difference of log-probs in nats per token, of the gradient as a share of its norm."""
    difference = (found[0] - wanted[0]).abs()
    gradient = ((found[1] - wanted[1]).norm() / wanted[1].norm()).item()
    note(OUT, "correct", size=size, what=what, mean=difference.mean().item(), max=difference.max().item(),
         gradient=gradient)  # fmt: skip


def attempt(size: str, what: str, function: Callable[[], None]) -> None:
    """Do one thing; what goes wrong is a line, and the next thing follows."""
    try:
        function()
    except Exception as error:  # the whole point is to see it
        import traceback

        note(OUT, "failed", size=size, what=what, error=f"{type(error).__name__}: {error}"[:500],
             where=traceback.format_exc()[-1500:])  # fmt: skip


def main() -> None:
    """All comparisons at one size."""
    size = sys.argv[1]
    pairs = job_of(size, "ours_cold").read_pairs(np.int32)[: STEPS[size][0]]
    groups = [Group(p, (c, r)) for p, c, r in pairs]
    layout, shared = our_layers(size, groups)
    gc.collect()

    def own_layers() -> None:
        own = policy(size, patched=False)
        if isinstance(layout, SharedLayout):
            enable_shared_prompts(own.get_base_model())
        compare(size, "peft's own layers", values_and_gradient(own, groups, layout, 4096), shared)

    attempt(size, "peft's own layers", own_layers)


def our_layers(size: str, groups: list[Group]) -> tuple[BatchLayout, Result]:
    """All comparisons of the policy with our layers; its layout, log-probs and gradient."""
    model = policy(size)
    base = model.get_base_model()
    note(OUT, "layers", size=size, patched=sum(map(is_patched, model.modules())))
    probe_numbers(size, model, base)
    layout = prompt_sharing.choose_layout(model, DEVICE)
    note(OUT, "layout", size=size, chosen=type(layout).__name__)

    flat = values_and_gradient(model, groups, FlatLayout(), 4096)
    compare(size, "flat, one by one", values_and_gradient(model, groups, FlatLayout(), 1), flat)
    shared = values_and_gradient(model, groups, layout, 16384)
    compare(size, "shared against flat", shared, flat)
    compare(size, "shared, smaller passes", values_and_gradient(model, groups, layout, 2048), shared)
    compare(size, "shared, again", values_and_gradient(model, groups, layout, 16384), shared)
    attempt(size, "syncs", lambda: syncs(size, model, groups, layout))

    def checkpointed() -> None:
        checkpoint_layers(model, 1)
        compare(size, "every layer checkpointed", values_and_gradient(model, groups, layout, 16384), shared)

    attempt(size, "checkpointed", checkpointed)
    checkpoint_layers(model, 0)
    attempt(size, "steps", lambda: steps(size, model, groups, layout))
    return layout, shared


def probe_numbers(size: str, model: Any, base: Any) -> None:
    """What `choose_layout` compares, with its noise."""
    groups = prompt_sharing._probe(base.get_input_embeddings().num_embeddings)
    flat = prompt_sharing._scores_and_gradient(model, groups, FlatLayout(), DEVICE)
    noise = prompt_sharing._distance(
        prompt_sharing._scores_and_gradient(model, groups, FlatLayout(), DEVICE, tokens_per_batch=1), flat
    )
    enable_shared_prompts(base)
    try:
        shared = prompt_sharing._scores_and_gradient(model, groups, SharedLayout(), DEVICE)
        leak = prompt_sharing._leak(model, SharedLayout(), groups, shared[0], DEVICE)
        note(OUT, "probe", size=size, shared=prompt_sharing._distance(shared, flat), noise=noise, leak=leak)
    except Exception as error:  # what `choose_layout` would turn into a log line
        note(OUT, "probe", size=size, error=f"{type(error).__name__}: {error}"[:800])


def syncs(size: str, model: nn.Module, groups: list[Group], layout: BatchLayout) -> None:
    """Where the host waits for the GPU inside a pass."""
    if not ON_GPU:
        return
    count_syncs(size, "pass", lambda: values_and_gradient(model, groups, layout, 16384))


def count_syncs(size: str, what: str, function: Callable[[], Any]) -> None:
    """One line: how often the host waits for the GPU in there, by place in the code."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = Counter(f"{'/'.join(Path(w.filename).parts[-2:])}:{w.lineno}" for w in caught)
    note(OUT, "syncs", size=size, what=what, count=len(caught), where=dict(places.most_common()))


def steps(size: str, model: Any, groups: list[Group], layout: BatchLayout) -> None:
    """Cached against live reference, the gate, a step that ran out of memory, the plan against the peak."""
    folder = folder_of(size)

    def trainer(budget: int, reference: Any) -> PreferenceTrainer:
        arguments = TrainingArguments(
            output_dir=str(folder / "trainer"), max_steps=1, use_cpu=not ON_GPU, report_to="none", disable_tqdm=True,
            max_grad_norm=0.0, remove_unused_columns=False,
        )  # fmt: skip
        return PreferenceTrainer(
            model=model, args=arguments, groups=groups, eval_groups=[], loss=DPO(beta=0.1, label_smoothing=0.0),
            reference=reference, layout=layout, tokens_per_batch=budget,
            sampler=StepSampler(len(groups), len(groups), 0), callbacks=[],
        )  # fmt: skip

    path = folder / "reference.sqlite"
    path.unlink(missing_ok=True)
    cached = CachedReference(ReferenceStore(path), model, layout, 16384, DEVICE, 4)
    cached.prepare(groups)
    again = CachedReference(ReferenceStore(path), model, layout, 16384, DEVICE, 16)
    again.prepare(groups)
    live = LiveReference(model, layout, 2048, DEVICE)
    difference = (cached.logps(groups).values - live.logps(groups).values.cpu()).abs()
    note(
        OUT, "cached", size=size, mean=difference.mean().item(), max=difference.max().item(),
        limit=comparison_tolerance(model, len(difference)), again=again.summary(),
    )  # fmt: skip
    note(OUT, "start", size=size, **check_start(trainer(2048, cached), groups))
    attempt(size, "training step's syncs", lambda: step_syncs(size, trainer(16384, cached), model, groups))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 1e-3)

    def step(t: PreferenceTrainer) -> tuple[float, Tensor]:
        model.zero_grad()
        loss = t.training_step(model, {"groups": groups}).item()
        return loss, gradient_of(model)

    if ON_GPU:
        attempt(size, "out of memory", lambda: out_of_memory(size, step, lambda budget: trainer(budget, cached)))
        for budget, every in BUDGETS:
            attempt(size, "memory", lambda b=budget, e=every: memory(
                size, model, groups, layout, b, e, lambda: step(trainer(b, cached))))  # type: ignore[misc]  # fmt: skip


def step_syncs(size: str, trainer: PreferenceTrainer, model: Any, groups: list[Group]) -> None:
    """Where the host waits in a whole training step."""
    if not ON_GPU:
        return
    trainer.training_step(model, {"groups": groups})
    count_syncs(size, "training step", lambda: trainer.training_step(model, {"groups": groups}))


def out_of_memory(
    size: str, step: Callable[[PreferenceTrainer], tuple[float, Tensor]], trainer: Callable[[int], PreferenceTrainer]
) -> None:
    """A step with six tenths of the memory that it takes: the same gradient as with the budget that it ends with."""
    step(trainer(16384))
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.empty_cache()
    held = torch.cuda.memory_allocated()
    step(trainer(16384))
    peak = torch.cuda.max_memory_allocated()
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((held + 0.6 * (peak - held)) / total)
    try:
        short = trainer(16384)
        loss, gradient = step(short)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    plain_loss, plain = step(trainer(short.tokens_per_batch))
    note(
        OUT, "out of memory", size=size, held_gib=held / 2**30, peak_gib=peak / 2**30, budget=short.tokens_per_batch,
        loss=loss - plain_loss, gradient=((gradient - plain).norm() / plain.norm()).item(),
    )  # fmt: skip


def memory(
    size: str, model: Any, groups: list[Group], layout: BatchLayout, budget: int, every: int, step: Callable[[], Any]
) -> None:
    """The planned peak and the measured one."""
    fullest = max(batch.input_ids.numel() for batch in layout.batches(groups, budget))
    config: Any = SimpleNamespace(
        trainer=TrainerConfig(
            epochs=1, max_steps=1, groups_per_step=len(groups), plan=Planning.auto, tokens_per_batch=fullest,
            checkpoint_every=every, log_every=1, eval_every=0, save_every=0, keep_checkpoints=1, cohort=1,
            router_aux_loss_coef=0.0, devices=1, shard=Shard.off,
        ),
        optim=SimpleNamespace(name="adamw_torch", master_weights=True, target_modules=None), adapter=ADAPTER,
        reference=SimpleNamespace(mode=ReferenceMode.cache),
    )  # fmt: skip
    model.zero_grad(set_to_none=True)
    gc.collect()
    torch.cuda.empty_cache()
    folder = folder_of(size) / f"plan-{budget}-{every}"
    folder.mkdir(parents=True, exist_ok=True)
    plan = plan_stage(model, config, supervised=False, folder=folder, device=DEVICE, longest=fullest)
    checkpoint_layers(model, every)
    try:
        torch.cuda.reset_peak_memory_stats()
        step()
        peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    finally:
        checkpoint_layers(model, 0)
    # No optimizer has stepped here. The context is what torch held beside the policy.
    needs = plan.needs
    predicted = needs.total - needs.optimizer
    note(
        OUT, "memory", size=size, budget=budget, every=every, fullest=fullest, predicted_gib=predicted / 2**30,
        measured_gib=peak / 2**30, reserved_gib=reserved / 2**30, ratio=peak / predicted,
        needs={name: getattr(needs, name) / 2**30 for name in needs.__dataclass_fields__},
    )  # fmt: skip


if __name__ == "__main__":
    main()
