"""What both stages share around transformers' Trainer: arguments, records, progress, complete checkpoints."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from alignment.config.schema import OptimConfig, TrainerConfig, View
from alignment.errors import UserError
from alignment.files import digests, read_sealed, write_sealed
from alignment.training.dashboard import Dashboard, has_room
from alignment.training.elastic import ElasticSteps
from alignment.training.optimizers import resumes, trainer_settings
from alignment.training.stop_signal import CheckpointAtStop

log = logging.getLogger(__name__)

_COMPLETE = "complete"
# TRL's count of tokens starts anew in every process, so that a resumed run would log other numbers.
_NOT_METRICS = {"epoch", "total_flos", "num_input_tokens_seen", "num_tokens", "step"}
_RUNTIME = ("runtime", "samples_per_second", "steps_per_second")

Arguments = TypeVar("Arguments", bound=TrainingArguments)


class LogFunction(Protocol):
    """Writes down the rows of one stage."""

    def __call__(
        self, step: int, split: str, metrics: Mapping[str, float], items: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        """Take one row.

        Args:
            split: "train" or "eval".
            items: of an evaluation the metrics of each held-out item, if known.
        """


def training_arguments(
    kind: type[Arguments],
    *,
    folder: Path,
    optim: OptimConfig,
    trainer: TrainerConfig,
    num_steps: int,
    seed: int,
    device: torch.device,
    **extra: Any,
) -> Arguments:
    """Arguments of one stage of exactly `num_steps` optimizer steps."""
    arguments = kind(
        output_dir=str(folder),
        max_steps=num_steps,
        learning_rate=optim.lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        **trainer_settings(optim),
        lr_scheduler_type=optim.schedule,
        warmup_steps=math.ceil(optim.warmup_ratio * num_steps),
        max_grad_norm=optim.max_grad_norm,
        logging_steps=trainer.log_every,
        logging_nan_inf_filter=False,
        save_strategy="steps" if trainer.save_every and resumes(optim.name) else "no",
        save_steps=trainer.save_every or num_steps,
        seed=seed,
        data_seed=seed,
        use_cpu=device.type == "cpu",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        fp16=False,
        **extra,
    )
    if arguments.n_gpu > 1:
        # Without a launcher one process sees several GPUs. The Trainer would split its inputs among them by their
        # first dimension (DataParallel), which a row of shared prompts does not have; TRL refuses to start.
        arguments._n_gpu = 1
    return arguments


class RecordCallback(TrainerCallback):
    """Hands the Trainer's logs to the run's record, without the Trainer's own bookkeeping.

    Attributes:
        held_out: the metrics of each held-out item in the last evaluation, where the trainer keeps them.
    """

    held_out: Sequence[Mapping[str, Any]] = ()

    def __init__(self, log: LogFunction) -> None:
        self._log = log

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Tell training logs from evaluations, and keep the metrics."""
        if not logs or not state.is_world_process_zero or "train_runtime" in logs:
            return
        split = "eval" if any(name.startswith("eval_") for name in logs) else "train"
        named = {name.removeprefix("eval_"): value for name, value in logs.items()}
        metrics = {
            name: float(value)
            for name, value in named.items()
            if name not in _NOT_METRICS and not name.endswith(_RUNTIME) and isinstance(value, int | float)
        }
        if metrics:
            self._log(state.global_step, split, metrics, self.held_out if split == "eval" else ())


class ProgressBar(TrainerCallback):
    """One bar for the stage, with its most important numbers."""

    _SHOWN = (("loss", "loss"), ("rewards/margins", "margin"), ("rewards/accuracies", "accuracy"))

    def __init__(self, title: str) -> None:
        self._title = title
        self._bar: tqdm | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar at the step from which the stage starts or resumes."""
        if state.is_world_process_zero:
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self._title, unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance."""
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the newest training numbers."""
        if self._bar is not None and logs and "loss" in logs:
            self._bar.set_postfix({short: f"{logs[name]:.3g}" for name, short in self._SHOWN if name in logs})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        self.close()

    def close(self) -> None:
        """End the bar's line, also where the training ends early: what is said next begins on a line of its own."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class Rhythm(TrainerCallback):
    """Decides when a stage logs, evaluates and saves, in addition to the Trainer's own rules.

    A log precedes every checkpoint, so that a resumed run loses no sum over steps. The last step is logged and
    evaluated but not checkpointed: the policy itself is saved next, and the Trainer would take one step more if asked
    to continue after the last step of a stage that ends within an epoch.
    """

    def __init__(self, eval_every: int | None) -> None:
        """`eval_every` as in the configuration (0: at the end only); None if nothing is held out."""
        self._eval_every = eval_every

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Runs after the Trainer's own callback and after early stopping, and adjusts their flags."""
        last = control.should_training_stop
        if self._eval_every is not None and (last or (self._eval_every and state.global_step % self._eval_every == 0)):
            control.should_evaluate = True
        control.should_save = control.should_save and not last
        control.should_log = control.should_log or control.should_save or last


class Checkpoints(TrainerCallback):
    """Marks a checkpoint once all of it is written, and only then removes old ones.

    So a kill at any moment leaves a complete checkpoint if there ever was one: the newest that is marked.
    """

    def __init__(self, keep: int) -> None:
        self._keep = keep

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Runs after the checkpoint is written."""
        if state.is_world_process_zero:
            folder = Path(args.output_dir)
            checkpoint = folder / f"checkpoint-{state.global_step}"
            write_sealed(checkpoint / _COMPLETE, digests(checkpoint))
            for path in sorted(folder.glob("checkpoint-*"), key=_step)[: -self._keep]:
                shutil.rmtree(path)


def stage_callbacks(
    title: str,
    log_metrics: LogFunction,
    trainer: TrainerConfig,
    evaluate: bool,
    alone: bool = True,
    view: View = View.off,
) -> list[Any]:
    """The callbacks of a stage.

    Args:
        evaluate: whether anything is held out.
        alone: whether this process trains nothing else meanwhile.
        view: what a terminal shows of it.
    """
    return [
        ElasticSteps(),
        RecordCallback(log_metrics),
        Rhythm(trainer.eval_every if evaluate else None),
        Checkpoints(trainer.keep_checkpoints),
        Dashboard(title) if view is View.auto and alone and has_room() else ProgressBar(title),
        *([CheckpointAtStop()] if alone else []),
    ]


def prepare_trainer(trainer: Any, optim: OptimConfig | None) -> None:
    """Our progress bar in place of the Trainer's, and the stage's optimizer; None leaves that to the arguments."""
    trainer.optim = optim
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def complete_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of all complete checkpoints of a stage, in order."""
    return sorted((_step(path), path) for path in folder.glob("checkpoint-*") if (path / _COMPLETE).exists())


def remove_damaged(folder: Path) -> None:
    """Remove the checkpoints of a stage of which a byte has changed since they were written."""
    for path in folder.glob(f"checkpoint-*/{_COMPLETE}"):
        checkpoint = path.parent
        try:
            expected = read_sealed(path)
        except UserError:
            expected = None
        if expected != {name: digest for name, digest in digests(checkpoint).items() if name != _COMPLETE}:
            log.warning("%s is damaged: it is removed, and the stage goes on from an earlier step.", checkpoint)
            shutil.rmtree(checkpoint)


def last_split(checkpoint: Path) -> str:
    """What was logged last before a checkpoint: "train" or "eval"."""
    history = json.loads((checkpoint / "trainer_state.json").read_bytes())["log_history"]
    return "eval" if "eval_loss" in history[-1] else "train"


def last_checkpoint(folder: Path) -> tuple[Path | None, int]:
    """The newest complete checkpoint of a stage and its step; incomplete ones are removed."""
    for path in folder.glob("checkpoint-*"):
        if not (path / _COMPLETE).exists():
            shutil.rmtree(path)
    step, newest = max(complete_checkpoints(folder), default=(0, None))
    return newest, step
