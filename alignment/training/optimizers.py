"""The optimizers: which of transformers' names work here, what each keeps and ignores, and how one is made.

Muon is torch's; transformers does not list it. Optimizers that update a weight inside the backward pass are refused: a
step here may have several passes, and its gradients are checked and clipped as a whole.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers.trainer_utils import check_target_module_exists
from transformers.training_args import OptimizerNames

from alignment.config.schema import AdapterConfig, OptimConfig
from alignment.errors import UserError, did_you_mean

log = logging.getLogger(__name__)

SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)
"""The schedules of transformers that need no further settings."""
_POLYNOMIAL_END = 1e-7
"""Where transformers' polynomial schedule ends."""
_BETAS = ("beta1", "beta2")
_DECAY = ("weight_decay",)
_IN_BACKWARD = (
    "it updates each weight inside the backward pass, and a step here may have several passes, whose gradients are "
    "checked and clipped as a whole"
)
_OTHER_MACHINE = "it is made for {} only, and this package trains on CPUs and on CUDA GPUs"


@dataclass(frozen=True, slots=True)
class OptimizerKind:
    """What a run must know of an optimizer before it starts.

    Attributes:
        states: how many tensors of the weight's shape it keeps for each weight.
        value: bytes of each of their values; None: as many as the weight has.
        module: the package that it needs, by the name that Python imports it by; empty: none.
        package: the same, by the name that pip installs it by.
        unused: settings of `optim` that it does not read.
        low_rank: whether it projects the gradients of `optim.target_modules`: see `projected_bytes`.
        resumes: whether a checkpoint of it can be read back.
        on_gpu: whether it runs on a CUDA GPU alone.
        by_number: whether it treats each number of a weight by itself, so that ranks can step parts of a weight.
        refused: why it cannot train here; empty: it can.
    """

    states: float = 2
    value: float | None = None
    module: str = ""
    package: str = ""
    unused: tuple[str, ...] = ()
    low_rank: bool = False
    resumes: bool = True
    on_gpu: bool = False
    by_number: bool = False
    refused: str = ""


_8_BITS, _4_BITS = 1 + 4 / 256, 0.5 + 4 / 256
"""Bytes of a state in 8 and in 4 bits, with an fp32 scale for 256 of them."""


def _bnb(states: float, value: float = 4, unused: tuple[str, ...] = ()) -> OptimizerKind:
    return OptimizerKind(states, value, "bitsandbytes", "bitsandbytes", unused)


def _low_rank(method: str, unused: tuple[str, ...], value: float | None = None) -> OptimizerKind:
    # Their projections are Python objects among the states, which torch.load does not read back.
    return OptimizerKind(2, value, f"{method}_torch", f"{method}-torch", unused, low_rank=True, resumes=False)


_ADAMW_BNB = _bnb(2, _8_BITS)
_LAYERWISE = OptimizerKind(refused=_IN_BACKWARD)

OPTIMIZERS: dict[str, OptimizerKind] = {
    "adamw_torch": OptimizerKind(by_number=True),
    "adamw_torch_fused": OptimizerKind(by_number=True),
    "adamw_torch_8bit": OptimizerKind(2, _8_BITS, "torchao", "torchao"),
    "adamw_torch_4bit": OptimizerKind(2, _4_BITS, "torchao", "torchao"),
    "adamw_torch_xla": OptimizerKind(refused=_OTHER_MACHINE.format("TPUs")),
    "adamw_torch_npu_fused": OptimizerKind(refused=_OTHER_MACHINE.format("Ascend NPUs")),
    "adamw_anyprecision": OptimizerKind(2, 4, "torchdistx", "torchdistx"),
    "stable_adamw": OptimizerKind(module="optimi", package="torch-optimi"),
    # Its states are outside of those that a checkpoint of an optimizer holds.
    "grokadamw": OptimizerKind(3, module="grokadamw", package="grokadamw", unused=_BETAS, resumes=False),
    "muon": OptimizerKind(1),
    "adafactor": OptimizerKind(0, unused=_BETAS),
    "sgd": OptimizerKind(0, unused=_BETAS, by_number=True),
    "adagrad": OptimizerKind(1, unused=_BETAS),
    "rmsprop": OptimizerKind(1, unused=_BETAS, by_number=True),
    "adamw_8bit": _ADAMW_BNB,
    "adamw_bnb_8bit": _ADAMW_BNB,
    "paged_adamw_8bit": _ADAMW_BNB,
    "paged_adamw_32bit": _bnb(2),
    "ademamix": _bnb(3),
    "ademamix_8bit": _bnb(3, _8_BITS),
    "paged_ademamix_32bit": _bnb(3),
    "paged_ademamix_8bit": _bnb(3, _8_BITS),
    "lion_32bit": _bnb(1),
    "lion_8bit": _bnb(1, _8_BITS),
    "paged_lion_32bit": _bnb(1),
    "paged_lion_8bit": _bnb(1, _8_BITS),
    "rmsprop_bnb": _bnb(1, unused=_BETAS),
    "rmsprop_bnb_32bit": _bnb(1, unused=_BETAS),
    "rmsprop_bnb_8bit": _bnb(1, _8_BITS, unused=_BETAS),
    "schedule_free_adamw": OptimizerKind(2, module="schedulefree", package="schedulefree"),
    "schedule_free_radam": OptimizerKind(2, module="schedulefree", package="schedulefree"),
    "schedule_free_sgd": OptimizerKind(1, module="schedulefree", package="schedulefree", unused=_BETAS),
    "galore_adamw": _low_rank("galore", _BETAS + _DECAY),
    "galore_adamw_8bit": replace(_low_rank("galore", _BETAS + _DECAY, _8_BITS), on_gpu=True),
    "galore_adafactor": replace(_low_rank("galore", _BETAS + _DECAY), states=0),
    "apollo_adamw": _low_rank("apollo", _DECAY),
    "galore_adamw_layerwise": _LAYERWISE,
    "galore_adamw_8bit_layerwise": _LAYERWISE,
    "galore_adafactor_layerwise": _LAYERWISE,
    "apollo_adamw_layerwise": _LAYERWISE,
    "lomo": _LAYERWISE,
    "adalomo": _LAYERWISE,
}
"""By their names in transformers, and Muon."""

_UNKNOWN = OptimizerKind()
"""For names that a newer transformers lists: taken for an AdamW, and said to be an estimate."""


def accepted_names() -> list[str]:
    """The names that `optim.name` takes on this machine, or would with a package more."""
    listed = [str(known.value) for known in OptimizerNames]
    return [*(name for name in listed if not OPTIMIZERS.get(name, _UNKNOWN).refused), "muon"]


def check_optimizer(key: str, optim: OptimConfig, adapter: AdapterConfig | None, device: str) -> None:
    """Refuse an optimizer or schedule that cannot train this run.

    Args:
        key: the section of the settings, "optim" or "sft.optim".
        adapter: of the run; None where the whole model trains.
        device: "cpu" or "cuda".

    Raises:
        UserError: a name that is not known, lacks its package, or does not go with other settings.
    """
    if optim.schedule == "polynomial" and optim.lr <= _POLYNOMIAL_END:
        raise UserError(
            f"{key}.schedule=polynomial ends at a rate of {_POLYNOMIAL_END:g}, so {key}.lr must be above it, not "
            f"{optim.lr:g}: choose a higher one, or another schedule."
        )
    if optim.schedule not in SCHEDULES:
        raise UserError(f"{key}.schedule must be one of {', '.join(SCHEDULES)}, not '{optim.schedule}'.")
    names = accepted_names()
    kind = OPTIMIZERS.get(optim.name, _UNKNOWN)
    if kind.refused:
        raise UserError(f"{key}.name={optim.name} cannot be used: {kind.refused}; choose another optimizer.")
    if optim.name not in names:
        raise UserError(
            f"{key}.name must be one of {', '.join(names)}, not '{optim.name}'{did_you_mean(optim.name, names)}."
        )
    _check_machine(key, optim, kind, device)
    _check_settings(key, optim, kind, adapter)


def _check_machine(key: str, optim: OptimConfig, kind: OptimizerKind, device: str) -> None:
    if optim.name == "muon" and not hasattr(torch.optim, "Muon"):
        raise UserError(f"{key}.name=muon needs a torch that has torch.optim.Muon, and {torch.__version__} has not.")
    if kind.on_gpu and device != "cuda":
        raise UserError(
            f"{key}.name={optim.name} runs on CUDA GPUs only, and this run is on a CPU: choose another optimizer."
        )
    if kind.module and find_spec(kind.module) is None:
        raise UserError(
            f"{key}.name={optim.name} needs the package {kind.package}, which is not installed: pip install "
            f"{kind.package}, or choose another optimizer."
        )


def _check_settings(key: str, optim: OptimConfig, kind: OptimizerKind, adapter: AdapterConfig | None) -> None:
    if is_schedule_free(optim.name) and optim.schedule != "constant":
        raise UserError(
            f"{key}.name={optim.name} averages weights in place of a schedule, so {key}.schedule must be constant, not "
            f"{optim.schedule}; {key}.warmup_ratio still counts."
        )
    if adapter is not None and adapter.iec and (optim.name == "muon" or is_schedule_free(optim.name)):
        raise UserError(
            f"{key}.name={optim.name} cannot step the elastic connection beside A and B: choose another optimizer, or "
            f"set adapter.iec=false."
        )
    if optim.name == "muon" and adapter is not None and adapter.lr_ratio != 1:
        raise UserError(
            f"{key}.name=muon trains A and B at one rate, so adapter.lr_ratio must be 1, not {adapter.lr_ratio:g}: "
            f"choose another optimizer, or another adapter."
        )
    if optim.name == "muon" and adapter is not None and adapter.kind in ("vera", "oft", "boft"):
        raise UserError(
            f"{key}.name=muon trains matrices, and adapter.kind={adapter.kind} has vectors or the angles of rotations: "
            f"choose another optimizer, or adapter=lora."
        )
    if not kind.low_rank:
        if optim.target_modules is not None:
            low_rank = [name for name, other in OPTIMIZERS.items() if other.low_rank]
            raise UserError(
                f"{key}.target_modules has no effect on {optim.name}: it is for {', '.join(low_rank)}; leave it null."
            )
        return
    if adapter is not None:
        raise UserError(
            f"{key}.name={optim.name} projects the gradients of whole matrices, which an adapter does not train: set "
            f"adapter=none, or choose another optimizer."
        )
    if optim.target_modules is None:
        raise UserError(
            f"{key}.name={optim.name} needs {key}.target_modules, the linear layers whose gradients it projects: set "
            f"it to all-linear, or to names like [q_proj,v_proj]."
        )


def is_schedule_free(name: str) -> bool:
    """Whether the optimizer steps other weights than those that the policy is used with."""
    return name.startswith("schedule_free")


def steps_parts(name: str) -> bool:
    """Whether ranks can step parts of a weight with it, and get what one process gets."""
    return OPTIMIZERS.get(name, _UNKNOWN).by_number


def resumes(name: str) -> bool:
    """Whether a checkpoint of the optimizer can be read back."""
    return OPTIMIZERS.get(name, _UNKNOWN).resumes


# Memory


def optimizer_bytes(name: str, bytes_per_weight: int, hidden: float = 1.0) -> float:
    """Bytes per trained weight of the optimizer's states.

    Args:
        name: as in `OPTIMIZERS`; any other counts as AdamW.
        bytes_per_weight: of the trained weights, or of their fp32 masters: torch keeps states in their dtype,
            bitsandbytes in fp32 or 8 bit.
        hidden: share of the trained weights that Muon trains as matrices; it trains the others with AdamW.
    """
    kind = OPTIMIZERS.get(name, _UNKNOWN)
    states = kind.states if name != "muon" else hidden + 2 * (1 - hidden)
    return states * (bytes_per_weight if kind.value is None else kind.value)


_RANK = 128
"""Of the projections of GaLore and APOLLO, as transformers has it."""


def projected_bytes(name: str, shape: Sequence[int], bytes_per_weight: int) -> float:
    """Bytes of the projection of a matrix whose gradients are projected, and of the states of what it gives.

    GaLore takes singular directions, of which there are no more than the matrix has; APOLLO's are random.
    """
    kind = OPTIMIZERS[name]
    small, large = sorted(shape)
    rank = _RANK if name.startswith("apollo") else min(_RANK, small)
    return kind.states * rank * large * (kind.value or bytes_per_weight) + rank * small * bytes_per_weight


def projected_matrices(model: nn.Module, name: str, targets: Sequence[str] | None) -> list[nn.Parameter]:
    """The matrices whose gradients the optimizer projects, as transformers finds them; none for most optimizers.

    Args:
        targets: `optim.target_modules`.
    """
    if targets is None or not OPTIMIZERS.get(name, _UNKNOWN).low_rank:
        return []
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    layers = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    chosen = (n for n in layers if [*targets] == ["all-linear"] or check_target_module_exists([*targets], n))
    return [trained[f"{layer}.weight"] for layer in chosen if f"{layer}.weight" in trained]


def optimizer_estimate(name: str) -> str:
    """Why the bytes of the optimizer's states are an estimate; empty if they are counted."""
    return "" if name in OPTIMIZERS else f"{name} is not known here, and is taken for an AdamW with two states"


# Making one


def trainer_settings(optim: OptimConfig) -> dict[str, Any]:
    """The arguments of transformers' `TrainingArguments` for this optimizer."""
    targets = optim.target_modules
    return {
        "optim": "adamw_torch" if optim.name == "muon" else optim.name,  # `make_optimizer` makes Muon
        "optim_target_modules": "all-linear" if targets == ["all-linear"] else targets,
    }


def make_optimizer(
    key: str, optim: OptimConfig, model: nn.Module, decayed: Sequence[str], by_name: Callable[[], torch.optim.Optimizer]
) -> torch.optim.Optimizer:
    """The optimizer of a stage; logs which settings it does not read.

    Args:
        key: the section of the settings.
        decayed: names of the parameters whose weights decay.
        by_name: makes the optimizers that transformers knows.

    Raises:
        UserError: the model has nothing that the optimizer could train.
    """
    kind = OPTIMIZERS.get(optim.name, _UNKNOWN)
    if kind.unused:
        log.info("%s.name=%s does not read %s.", key, optim.name, " and ".join(f"{key}.{name}" for name in kind.unused))
    if kind.low_rank:
        _require_layers(key, model, optim.target_modules or [])
    if not kind.resumes:
        log.info("With %s.name=%s no checkpoints are written: its states cannot be read back.", key, optim.name)
    try:
        return muon(model, optim, decayed) if optim.name == "muon" else by_name()
    except (ValueError, ImportError, TypeError) as error:
        said = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"{key}.name={optim.name} cannot be used with this model: {said}.") from error


def _require_layers(key: str, model: nn.Module, targets: Sequence[str]) -> None:
    """Refuse a name of no linear layer, which transformers passes over because others match."""
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for target in targets:
        if target != "all-linear" and not any(check_target_module_exists([target], layer) for layer in layers):
            leaves = sorted({layer.rpartition(".")[2] for layer in layers})
            raise UserError(
                f"{key}.target_modules: the model has no linear layer {target}{did_you_mean(target, leaves)}; its "
                f"layers are {', '.join(leaves)}."
            )


def scale_rate_of_b(model: nn.Module, optimizer: torch.optim.Optimizer, ratio: float) -> None:
    """Give every B of a LoRA a multiple of the learning rate, in groups of their own (LoRA+, arXiv:2402.12354)."""
    ups = {id(p) for name, p in model.named_parameters() if ".lora_B." in name}
    for group in list(optimizer.param_groups):
        faster = [p for p in group["params"] if id(p) in ups]
        if faster:
            group["params"] = [p for p in group["params"] if id(p) not in ups]
            optimizer.add_param_group({**group, "params": faster, "lr": ratio * group["lr"]})


def muon(model: Any, optim: OptimConfig, decayed: Sequence[str]) -> MuonWithAdamW:
    """Muon for the hidden matrices that train, AdamW for embeddings, head, norms and all else.

    Raises:
        ValueError: no hidden matrix trains.
    """
    head = model.get_output_embeddings()
    ends = [module for module in model.modules() if isinstance(module, nn.Embedding) or module is head]
    others = {id(parameter) for module in ends for parameter in module.parameters()}
    hidden: list[nn.Parameter] = []
    rest: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        # State-space layers have parameters of two dimensions that are no matrices; they are not called weight.
        if parameter.ndim == 2 and name.endswith("weight") and id(parameter) not in others:
            hidden.append(parameter)
        else:
            rest[name in decayed].append(parameter)
    if not hidden:
        raise ValueError("Muon trains matrices of hidden layers, and none of them trains here")
    groups = [{"params": rest[decays], "weight_decay": optim.weight_decay * decays} for decays in rest if rest[decays]]
    return MuonWithAdamW(hidden, groups, optim)


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for some weights and AdamW for the others, as one optimizer with one state.

    Muon's updates are scaled to the size of AdamW's (Liu et al. 2025, arXiv:2502.16982, section 2.2: 0.2 sqrt(max(m,
    n))), so that one learning rate, and AdamW's usual one, serves both. Its momentum is 0.95, as there.

    Args:
        hidden: matrices.
        groups: of the weights that AdamW trains, each with its weight decay; may be empty.
    """

    def __init__(self, hidden: Sequence[nn.Parameter], groups: list[dict[str, Any]], optim: OptimConfig) -> None:
        self._parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(
                hidden, lr=optim.lr, weight_decay=optim.weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
            )
        ]
        if groups:
            self._parts.append(torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2)))
        self._sizes = [len(part.param_groups) for part in self._parts]
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Both parts read and write the groups and the states of the whole."""
        groups = iter(self.param_groups)
        for part, size in zip(self._parts, self._sizes, strict=True):
            part.state = self.state
            part.param_groups = [next(groups) for _ in range(size)]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called by `load_state_dict`, which puts new groups and states in place of the old ones."""
        super().__setstate__(state)
        self._share()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of both."""
        assert closure is None, "a step here is made from gradients that are there"
        for part in self._parts:
            part.step()


def as_policy(optimizer: Any) -> None:
    """Put the policy's weights into the model, before anything but a training step reads them.

    Schedule-free optimizers (Defazio et al. 2024, arXiv:2405.15682) take gradients at an interpolation y, and the
    policy is the average x. Others have nothing to switch.
    """
    switch = getattr(optimizer, "eval", None)
    if callable(switch):
        switch()


def as_stepped(optimizer: Any) -> None:
    """Put those weights into the model at which the optimizer takes its gradients; undoes `as_policy`."""
    switch = getattr(optimizer, "train", None)
    if callable(switch):
        switch()
