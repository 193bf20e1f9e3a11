"""The supervised stage: TRL's SFTTrainer on our own token sequences, with the loss on the answers only."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from alignment.config.schema import RunConfig
from alignment.data.preparation.prepare import SFTData
from alignment.errors import require
from alignment.policy.layers import as_found, checkpoint_layers
from alignment.policy.sharding import in_turn, is_sharded
from alignment.ranks.shares import evenly
from alignment.ranks.team import Post, Team, trained_parameters
from alignment.scoring.layout import FlatLayout, MicroBatch
from alignment.scoring.logps import autocast, keeps_logits
from alignment.scoring.token_scores import TokenScores
from alignment.stages.following import followed
from alignment.stages.stage import StageResult, Workspace
from alignment.stages.store import stage_key
from alignment.training.budget import Plan
from alignment.training.callbacks import (
    LogFunction,
    last_checkpoint,
    prepare_trainer,
    stage_callbacks,
    training_arguments,
)
from alignment.training.elastic import elastic
from alignment.training.optimizers import as_stepped
from alignment.training.passes import used_parameters
from alignment.training.planning import memory_result, plan_stage
from alignment.training.router import require_routers, routers
from alignment.training.stage_trainer import StageTrainer
from alignment.types import Group

log = logging.getLogger(__name__)


def split_step(groups_per_step: int, longest: int, tokens_per_batch: int) -> tuple[int, int]:
    """(rows per forward pass, passes per optimizer step): the largest even split whose passes fit the token budget."""
    fitting = max(1, tokens_per_batch // longest)
    rows = max(d for d in range(1, groups_per_step + 1) if groups_per_step % d == 0 and d <= max(1, fitting))
    return rows, groups_per_step // rows


def _dataset(examples: Sequence[dict[str, list[int]]]) -> Dataset:
    """Token ids with labels, -100 where a token is not scored; an example is made when it is read.

    What the dataset holds itself is the number of each example.
    """

    def read(numbers: dict[str, list[int]]) -> dict[str, list[list[int]]]:
        found = [examples[number] for number in numbers["number"]]
        return {
            "input_ids": [example["input_ids"] for example in found],
            "labels": [
                [t if scored else -100 for t, scored in zip(e["input_ids"], e["completion_mask"], strict=True)]
                for e in found
            ],
        }

    return Dataset.from_dict({"number": np.arange(len(examples))}).with_transform(read)


class SFTStage:
    """The SFT stage of a run, ready to start.

    Args:
        given: puts the final weights into the policy, in place of training.
    """

    name = "sft"
    title = "SFT"
    result_type: type[StageResult] = StageResult

    def __init__(
        self, config: RunConfig, data: SFTData, work: Workspace, given: Callable[[nn.Module], None] | None = None
    ) -> None:
        assert config.sft is not None
        self._run_config = config
        self._config = config.sft
        self._data = data
        self._work = work
        self._given = given
        self._folder = work.folder(self.name)
        self.seed = config.sft.seed
        self.policy = self._folder / "policy"

    def key(self, model: nn.Module) -> str | None:
        """Name of the result that this stage would have, for all runs with the very same one; None if it is given."""
        if self._given is not None:
            return None
        adapter = self._run_config.adapter
        settings = {
            "adapter": adapter and asdict(adapter),
            "spectrum": self._run_config.spectrum,
            "optim": asdict(self._config.optim),
            "trainer": asdict(self._config.trainer),
            "seed": self._config.seed,
            "template": self._work.tokenizer.chat_template,
        }
        if self._data.eval_datasets:  # what else the result holds of the same tokens
            settings["eval_datasets"] = self._data.eval_datasets
        return stage_key(model, self._data.info["tokens_digest"], settings)

    def run(self, model: nn.Module, log_metrics: LogFunction) -> StageResult:
        """Train on the conversations, from the newest checkpoint if there is one."""
        with as_found(model), elastic(model, self._run_config.adapter), followed(self._work.team, self._run_config):
            return self._trained(model, log_metrics)

    def _trained(self, model: nn.Module, log_metrics: LogFunction) -> StageResult:
        started = time.monotonic()
        examples, loop = self._data.train, self._config.trainer
        lengths = np.fromiter((len(example["input_ids"]) for example in examples), np.int64, len(examples))
        longest = int(lengths.max())
        plan = plan_stage(
            model,
            self._run_config,
            supervised=True,
            folder=self._folder,
            device=self._work.device,
            longest=longest,
            widest=_pass_of(examples[int(lengths.argmax())]["input_ids"]),
            team=self._work.team,
        )
        checkpoint_layers(model, plan.checkpoint_every)
        steps_per_epoch = math.ceil(len(examples) / loop.groups_per_step)
        num_steps = loop.max_steps or math.ceil(loop.epochs * steps_per_epoch)
        checkpoint, done = last_checkpoint(self._folder / "checkpoints")

        # before those of the other ranks, which would make the folder of the checkpoints
        trainer = self.trainer(model, plan, longest, num_steps, log_metrics)
        if self._work.team is not None:
            data = self._data
            first = replace(data, train=[data.train[0]], sources=[data.sources[0]], eval=[])
            self._work.team.tell(
                begin_sft, SFTBegun(self._run_config, first, replace(self._work, team=None), plan, longest)
            )
        if self._given is not None:
            num_steps = 0
            self._given(trainer.model)
            if self._data.eval:
                trainer.evaluate()
        else:
            if checkpoint is not None:
                log.info("SFT continues from step %d.", done)
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        trainer.require_finite_weights()

        num_tokens = round((num_steps - done) * loop.groups_per_step * (int(lengths.sum()) / len(lengths)))
        memory = memory_result(plan, self._work.device, plan.tokens_per_batch)
        seconds = time.monotonic() - started
        return StageResult(
            steps=num_steps,
            metrics=_final_metrics(trainer.state.log_history, bool(self._data.eval)),
            memory=memory,
            seconds=seconds,
            tokens_per_second=num_tokens / seconds,
        )

    def trainer(self, model: nn.Module, plan: Plan, longest: int, num_steps: int, log_metrics: LogFunction) -> Any:
        """TRL's trainer of this stage. With a team one item of its loader is a whole step, which the ranks share."""
        from trl import SFTConfig as TRLConfig

        config, device, team = self._config, self._work.device, self._work.team
        rows, passes = split_step(config.trainer.groups_per_step, longest, plan.tokens_per_batch)
        arguments = training_arguments(
            TRLConfig,
            folder=self._folder / "checkpoints",
            optim=config.optim,
            trainer=config.trainer,
            num_steps=num_steps,
            seed=config.seed,
            device=device,
            per_device_train_batch_size=rows if team is None else config.trainer.groups_per_step,
            per_device_eval_batch_size=rows,
            gradient_accumulation_steps=passes if team is None else 1,
            gradient_checkpointing=False,  # the plan has chosen the layers that run again
            bf16=device.type == "cuda" and model.dtype is torch.bfloat16,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        arguments.router_aux_loss_coef = _router_coefficient(model, config.trainer.router_aux_loss_coef)
        weights = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
        trainer = _trainer_class(self._data)(
            model=model,
            args=arguments,
            train_dataset=_dataset(self._data.train),
            eval_dataset=_dataset(self._data.eval) if self._data.eval else None,
            processing_class=self._work.tokenizer,
            callbacks=stage_callbacks(
                "SFT",
                log_metrics,
                config.trainer,
                bool(self._data.eval),
                self._work.slot is None,
                self._run_config.dashboard,
            ),
        )
        trainer.team, trainer.rows_per_pass = team, rows
        if is_sharded(model):
            trainer.accelerator.backward = in_turn(model, trainer.accelerator.backward)
        prepare_trainer(trainer, config.optim)
        if self._run_config.adapter is not None:
            trainer.lr_ratio = self._run_config.adapter.lr_ratio
        # On a quantised base TRL rounds the adapter to bfloat16. Small updates would be lost: keep the adapter's dtype.
        for name, parameter in model.named_parameters():
            if name in weights:
                parameter.data = weights[name]
        return trainer


def _router_coefficient(model: nn.Module, asked: float) -> float | None:
    """What TRL is told: left alone it adds the loss that a mixture was pretrained with; None for any other model.

    Raises:
        UserError: a loss of routers for a model without any.
    """
    require_routers(model, asked, "sft.trainer.router_aux_loss_coef")
    require(
        not asked or _fits_head(model),
        "sft.trainer.router_aux_loss_coef: the SFT stage cannot add a loss of this model's routers: set it to 0.",
    )
    return asked if routers(model) else None


def _fits_head(model: Any) -> bool:
    """Whether TRL's head, which takes the place of the model's own, computes what the model does."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.base_model is not base and not keeps_logits(base)


@contextmanager
def _labelled_alone() -> Iterator[None]:
    """Have TRL's head read the labelled positions alone, as it does on a GPU: of the others it gives zeros anyway.

    Where it does not use Triton it reads all of them, so that devices that compile a program for every number of rows
    have few. A CPU is none of these.
    """
    from trl.trainer import utils

    own = getattr(utils, "_use_triton", None)
    if own is None:  # a TRL that decides elsewhere trains as it does
        yield
        return
    utils._use_triton = lambda device: device.type == "cpu" or own(device)
    try:
        yield
    finally:
        utils._use_triton = own


def _scored_loss(model: nn.Module, ids: torch.Tensor, labels: torch.Tensor, count: Any) -> torch.Tensor:
    """The mean loss of the labelled tokens by the route that scores completions, which is right for every model.

    Args:
        ids, labels: (rows, width), padded on the right; -100 where a token is not scored.
        count: labelled tokens of the step; None: of this pass.
    """
    rows, columns = (labels[:, 1:] != -100).nonzero(as_tuple=True)
    values = model(input_ids=ids, score_positions=rows * ids.shape[1] + columns, targets=labels[rows, columns + 1])
    return -TokenScores(values).logps.sum() / max(1, int(len(rows) if count is None else count))


def _trainer_class(data: SFTData) -> Any:
    """TRL's trainer on these data as a trainer of ours; TRL takes seconds to import, so it waits until it is needed."""
    from trl import SFTTrainer

    class SupervisedTrainer(StageTrainer, SFTTrainer):
        title = SFTStage.title
        settings = "sft.optim"
        _step = -1
        _passes: list[Any]

        team: Team | None = None
        rows_per_pass = 1

        def create_model_card(self, *args: Any, **kwargs: Any) -> None:
            """None: a checkpoint is for resuming, and TRL would load a tracker's library for a link to it."""

        def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
            if self._step != self.state.global_step:
                self._step, self._passes = self.state.global_step, []
            self._passes.append(inputs)
            if self.team is None:
                return super().training_step(model, inputs, num_items_in_batch)
            return self._shared_step(self.team, model, inputs, num_items_in_batch)

        def _shared_step(self, team: Team, model: nn.Module, inputs: Any, count: Any) -> torch.Tensor:
            """Have every rank add the gradients of its rows, and add them up."""
            as_stepped(self.optimizer)
            if count is None:  # the model takes no count, and each pass would divide by its own
                count = (inputs["labels"] != -100).sum()
            inputs = {name: tensor.cpu() for name, tensor in inputs.items()}
            shares = evenly(inputs["attention_mask"].sum(1).tolist(), team.size)
            seeds = np.random.SeedSequence((self.args.seed, self.state.global_step)).generate_state(team.size)
            scaler = None if self.scaler is None else self.scaler.state_dict()
            asked = [
                SFTShare({name: tensor[own] for name, tensor in inputs.items()}, int(count), int(seed), scaler)
                for own, seed in zip(shares, seeds, strict=True)
            ]
            trained = trained_parameters(model)
            done = team.run(add_rows, asked, lambda own: self.add_rows(model, own), trained)
            team.sum_gradients(trained, [any(used) for used in zip(*(one.used for one in done), strict=True)])
            for one in done[1:]:
                for name, values in one.metrics.items():
                    self._metrics["train"][name] += values
            return torch.tensor(sum(one.loss for one in done), device=self.args.device)

        def add_rows(self, model: nn.Module, share: SFTShare) -> SFTDone:
            """Forward and backward of these rows, pass by pass."""
            known = {name: len(values) for name, values in self._metrics["train"].items()}
            loss, lengths = 0.0, share.inputs["attention_mask"].sum(1)
            for rows in lengths.argsort(descending=True, stable=True).split(self.rows_per_pass):
                if not len(rows):  # an empty share
                    continue
                width = int(lengths[rows].max())
                part = {name: tensor[rows, :width] for name, tensor in share.inputs.items()}
                loss += super().training_step(model, part, torch.tensor(share.count)).item()
            metrics = {
                name: values[known.get(name, 0) :]
                for name, values in self._metrics["train"].items()
                if name != "num_tokens"
            }
            return SFTDone(loss, metrics, used_parameters(model))

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            if _fits_head(model):
                # accelerate does this for bfloat16; of float16 it knows on GPUs alone
                precision = autocast(model, self.args.device) if self.scaler is not None else nullcontext()
                with precision, _labelled_alone():
                    return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            loss = _scored_loss(model, inputs["input_ids"], inputs["labels"], num_items_in_batch)
            return (loss, {}) if return_outputs else loss

        def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
            """Of a mixture source by source; the whole loss is the mean over the examples of all of them."""
            if not data.eval_datasets:
                return super().evaluation_loop(dataloader, *args, **kwargs)
            total = 0.0
            found: dict[str, float] = {}
            for name in dict.fromkeys(data.eval_datasets):
                members = [i for i, of in enumerate(data.eval_datasets) if of == name]
                part = self.get_eval_dataloader(dataloader.dataset.select(members))
                output = super().evaluation_loop(part, *args, **kwargs)
                found[f"eval_{name}/loss"] = output.metrics["eval_loss"]
                total += output.metrics["eval_loss"] * len(members)
            output.metrics["eval_loss"] = total / len(data.eval_datasets)
            return output._replace(metrics=output.metrics | found, num_samples=len(data.eval_datasets))

        def step_rows(self) -> Sequence[str]:
            seen = [
                ids[mask.bool()].tolist()
                for inputs in self._passes
                for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
            ]
            return [s for e, s in zip(data.train, data.sources, strict=True) if e["input_ids"] in seen]

    return SupervisedTrainer


# On a rank that follows


@dataclass(frozen=True, slots=True)
class SFTBegun:
    """What a rank needs for its passes of an SFT stage: the trainer's settings, and data that it could begin with."""

    config: RunConfig
    data: SFTData
    work: Workspace
    plan: Plan
    longest: int


@dataclass(frozen=True, slots=True)
class SFTShare:
    """A rank's rows of a step.

    Attributes:
        inputs: (rows, width) each, padded on the right, on the CPU.
        count: scored tokens of the whole step.
        seed: of the dropout masks on a rank that follows.
        scaler: the state of the loss scaler, where there is one.
    """

    inputs: dict[str, torch.Tensor]
    count: int
    seed: int
    scaler: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class SFTDone:
    """What a share came to: its part of the loss, TRL's metrics of each pass, and which tensors have a gradient."""

    loss: float
    metrics: dict[str, list[float]]
    used: list[bool]


def begin_sft(post: Post, begun: SFTBegun) -> None:
    """Be ready for shares of the SFT stage."""
    checkpoint_layers(post.model, begun.plan.checkpoint_every)
    stage = SFTStage(begun.config, begun.data, begun.work)
    post.trainer = stage.trainer(post.model, begun.plan, begun.longest, 1, lambda *_: None)
    post.trainer.accelerator.prepare_model(post.model, evaluation_mode=True)  # computes in bfloat16 where it should


def add_rows(post: Post, share: SFTShare) -> SFTDone:
    """Add the gradients of a share."""
    torch.manual_seed(share.seed)
    if share.scaler is not None:
        post.trainer.scaler.load_state_dict(share.scaler)
    post.model.zero_grad(set_to_none=True)
    done: SFTDone = post.trainer.add_rows(post.model, share)
    post.trainer._metrics["train"].clear()
    return done


def _pass_of(tokens: Sequence[int]) -> MicroBatch:
    """One conversation in a pass of its own, as long as TRL's."""
    row = np.array([*tokens, 0], dtype=np.int32)  # the last token of a row is left out
    [batch] = FlatLayout().batches([Group(row[:1], (row[1:],))], 1)
    return batch


def _final_metrics(history: Sequence[dict[str, float]], has_eval: bool) -> dict[str, float]:
    last = {name: value for row in history for name, value in row.items() if name == "loss" or name.startswith("eval_")}
    final = {"train/loss": last["loss"]} if "loss" in last else {}  # none where the final weights were given
    if has_eval:
        names = [name for name in last if name == "eval_loss" or name.endswith("/loss")]
        final |= {f"eval/{name.removeprefix('eval_')}": last[name] for name in names}
    return final
