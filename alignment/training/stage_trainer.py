"""What the trainers of both stages add to transformers' Trainer: every step has a rate, none goes on from NaN."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer
from transformers.trainer_utils import SchedulerType

from alignment.config.schema import OptimConfig
from alignment.errors import NotFinite
from alignment.policy.part_files import PartFiles
from alignment.policy.weight_parts import load_weights, load_whole, weight_parts
from alignment.training.callbacks import ProgressBar, complete_checkpoints
from alignment.training.dashboard import Dashboard
from alignment.training.loss_scaler import LossScaler, loss_scaler
from alignment.training.master_weights import MasterWeights, load_states
from alignment.training.optimizers import as_policy, make_optimizer, scale_rate_of_b
from alignment.training.sharded_optimizer import ShardedOptimizer
from alignment.training.stop_signal import CheckpointAtStop

_SHOWN_ROWS = 5


def warmed_rate(rate: Callable[[int], float], warmup: int, num_steps: int, step: int) -> float:
    """The factor of the learning rate at a step, counted from 0: transformers' own, but with no warm-up step at 0.

    Args:
        rate: of transformers, which gives step i of w warm-up steps i/w.
        warmup: number of warm-up steps, w. Step i of them has (i+1)/w here, and all later steps keep their factor.
        num_steps: of the training. Its end asks for one factor more, which no step uses and not every schedule has.
        step: number of the step.
    """
    return (step + 1) / warmup if step < warmup else rate(min(step, num_steps - 1))


def last_good(checkpoints: Path, sound: float = math.inf) -> str:
    """Names the newest complete checkpoint in a folder that was made after fewer than `sound` steps."""
    good = [path for step, path in complete_checkpoints(checkpoints) if step < sound]
    return f"the last good checkpoint is {good[-1]}" if good else "there is no good checkpoint"


class StageTrainer(Trainer):
    """A Trainer that warms up from the first step on, and stops at the first number that is not finite.

    Attributes:
        title: of the stage.
        settings: where its optimizer's settings are: "optim" or "sft.optim".
        optim: these settings; None makes the optimizer that the arguments name, as transformers does.
        lr_ratio: learning rate of a LoRA's B by that of everything else.
    """

    title: ClassVar[str]
    settings: ClassVar[str]
    optim: OptimConfig | None = None
    lr_ratio: float = 1.0
    _masters: MasterWeights | ShardedOptimizer | None = None

    def create_accelerator_and_postprocess(self) -> None:
        """As transformers does; where the model computes in float16, with a loss scaler of ours.

        accelerate's own has a GPU alone, and no count. It steps and clips by whatever stands in these two places.
        """
        super().create_accelerator_and_postprocess()
        accelerator: Any = self.accelerator
        if (scaler := loss_scaler(self.model, self.args.device)) is not None:
            accelerator.scaler = scaler
            accelerator.unscale_gradients = self._unscale

    def _unscale(self, *_: Any) -> None:
        wrapped: Any = self.optimizer
        assert self.scaler is not None
        self.scaler.unscale_(wrapped.optimizer)

    @property
    def scaler(self) -> LossScaler | None:
        """That of float16."""
        scaler: LossScaler | None = self.accelerator.scaler
        return scaler

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The optimizer of the settings, on fp32 masters of weights that train in 16 bits."""
        if self.optimizer is None:
            by_name = partial(super().create_optimizer, *args, **kwargs)
            model: Any = self.model
            if self.optim is None:
                self.optimizer = by_name()
            else:
                decayed = self.get_decay_parameter_names(model)
                self.optimizer = make_optimizer(self.settings, self.optim, model, decayed, by_name)
            if self.lr_ratio != 1:
                scale_rate_of_b(model, self.optimizer, self.lr_ratio)
            has_masters = self.optim is not None and self.optim.master_weights
            if (parts := weight_parts(model)) is not None:
                self.optimizer = self._masters = ShardedOptimizer(parts, self.optimizer, has_masters)
                self.accelerator.clip_grad_norm_ = self.optimizer.clip
            elif has_masters:
                self._masters = MasterWeights(self.optimizer)
        return super().create_optimizer(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: Any) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._masters is not None and self.args.should_save:
            self._masters.save(Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self.optimizer is None:
            return
        if self._masters is not None:
            self._masters.load(Path(checkpoint))
        if not isinstance(self._masters, ShardedOptimizer):
            load_states(self.optimizer, PartFiles(Path(checkpoint)))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        own: Any = self.model
        if weight_parts(own) is None:
            super()._save(output_dir, state_dict)
        else:  # the ranks write their parts of the weights with those of the optimizer's states
            Path(output_dir or str(self.args.output_dir)).mkdir(parents=True, exist_ok=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        own: Any = self.model
        folder, parts = Path(resume_from_checkpoint), weight_parts(own)
        is_in_parts = bool(PartFiles(folder))
        if parts is not None:
            parts.load(folder) if is_in_parts else load_whole(own, parts, folder)
        elif is_in_parts:
            load_weights(own.parameters(), folder, lambda _: slice(None))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule of transformers, with a rate above 0 in the first step."""
        if self.lr_scheduler is None:
            scheduler = super().create_scheduler(num_training_steps, optimizer)
            warmup = self.args.get_warmup_steps(num_training_steps)
            if warmup and isinstance(scheduler, LambdaLR) and self.args.lr_scheduler_type != SchedulerType.CONSTANT:
                rates: list[Callable[[int], float]] = [
                    partial(warmed_rate, rate, warmup, num_training_steps) for rate in scheduler.lr_lambdas
                ]
                self.lr_scheduler = LambdaLR(scheduler.optimizer, rates)
        return self.lr_scheduler

    def step_rows(self) -> Sequence[str]:
        """The sources of the rows of the running step, only those at fault where that is known."""
        return ()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers does; the model has the policy's weights at the end."""
        try:
            result = super().train(*args, **kwargs)
            as_policy(self.optimizer)
            return result
        finally:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, ProgressBar | Dashboard | CheckpointAtStop):
                    callback.close()

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The gradient's norm before the update; stops where it, or the loss, is not finite.

        None where the gradient overflows float16, so that there is no update.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        # One number for both: each look makes the host wait for a GPU.
        if not math.isfinite(float(norm + self._tr_loss)):
            is_loss = not math.isfinite(float(self._tr_loss))
            if not is_loss and self.scaler is not None and self.scaler.leave_out(self.state.global_step + 1):
                return None
            rows = list(self.step_rows())
            shown = ", ".join(rows[:_SHOWN_ROWS]) + (f" and {len(rows) - _SHOWN_ROWS} more" * (len(rows) > _SHOWN_ROWS))
            self._stop(
                f"at step {self.state.global_step + 1}, before its update, because its "
                f"{'loss or log-probs are' if is_loss else 'gradient is'} not finite"
                f"{f' (rows {shown})' if rows else ''}",
                sound=self.state.global_step + (not is_loss),
            )
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add to a training log what the loss scaler does."""
        if "loss" in logs and self.scaler is not None:
            logs = {**logs, "loss_scale": self.scaler.get_scale(), "skipped_steps": self.scaler.skipped}
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As transformers does; stops where the held-out loss is not finite."""
        metrics = super().evaluate(*args, **kwargs)
        self.require_finite_evaluation(metrics)
        return metrics

    def require_finite_evaluation(self, metrics: dict[str, float]) -> None:
        """Stop where the held-out loss is not finite."""
        if not math.isfinite(metrics.get("eval_loss", 0.0)):
            step = self.state.global_step
            self._stop(f"after step {step}, because its held-out loss is {metrics['eval_loss']}", sound=step)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        as_policy(self.optimizer)
        self.require_finite_weights()
        super()._save_checkpoint(*args, **kwargs)

    @torch.no_grad()
    def require_finite_weights(self) -> None:
        """Stop where a trained weight is not finite."""
        model: Any = self.model
        if (parts := weight_parts(model)) is not None:
            is_finite = parts.all_finite()
        else:
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            is_finite = bool(torch.stack([parameter.isfinite().all() for parameter in trained]).all())
        if not is_finite:
            step = self.state.global_step
            self._stop(f"after step {step}, because the update left weights that are not finite", sound=step)

    def _stop(self, what: str, sound: int) -> NoReturn:
        """Raise the sentence; checkpoints of fewer than `sound` steps gave finite numbers."""
        last = last_good(Path(str(self.args.output_dir)), sound)
        norm, key = self.args.max_grad_norm, f"{self.settings}.max_grad_norm"
        clipping = f"a lower {key} (now {norm:g})" if norm > 0 else f"with {key}=1 (now 0, which clips nothing)"
        wider = "" if self.scaler is None else " or, as float16 ends at 65504, with model.dtype=float32"
        raise NotFinite(
            f"{self.title} stopped {what}; {last}: start a new run with a lower {self.settings}.lr "
            f"(now {self.args.learning_rate:g}) or {clipping}{wider}."
        )
