"""The settings of an adapter, and which of them go together."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from alignment.errors import UserError, as_names, did_you_mean, require

KINDS = ("lora", "dora", "vera", "oft", "boft")
INITS = ("default", "gaussian", "orthogonal", "zero_a", "eva", "pissa", "olora", "corda", "loftq")
RESIDUAL_INITS = ("pissa", "olora", "corda")
"""They begin with a part of the base, which the base loses."""
DATA_INITS = ("eva", "corda")
"""They look at the inputs that the layers have on training data."""

_PRODUCTS = ("lora", "dora")
_QA_LORA = ("qalora", "qa_lora")


@dataclass(kw_only=True)
class AdapterConfig:
    """What trains on a frozen base, by peft; `adapter=none` trains the whole model.

    Attributes:
        kind: lora, dora (with a magnitude for each output), vera (two vectors between random matrices that all layers
            share), oft and boft (a rotation of the inputs, in blocks).
        r: rank; null for oft and boft.
        alpha: with r the factor of a LoRA's update; null for other kinds.
        block_size: of the rotations of oft and boft; null for other kinds.
        dropout: of a LoRA's or a VeRA's input, or the share of blocks that oft and boft do not rotate.
        target_modules: names, or [auto] (see `alignment.policy.targets`), or [all-linear], as peft has it.
        exclude_modules: names that get no adapter.
        layers_to_transform: numbers of the decoder layers that get one, counted from 0; null: all.
        rank_pattern, alpha_pattern: other ranks and alphas by the name of a module, or a regular expression for its
            end, e.g. {down_proj: 32}.
        modules_to_save: modules that train whole beside the adapter.
        trainable_tokens: tokens, or their ids as numbers, whose embeddings train beside the adapter.
        init: how it starts, see `INITS`; pissa_niter_<n> is PiSSA by n iterations of a randomised SVD.
        rslora: scale a LoRA by alpha / sqrt(r).
        lr_ratio: learning rate of B by that of A.
        iec: train a LoRA with IR-QLoRA's elastic connection, which is folded into it.
    """

    kind: str
    r: int | None
    alpha: float | None
    block_size: int | None
    dropout: float
    target_modules: Any  # names, or one name: unions of types break where configurations are merged
    exclude_modules: Any
    layers_to_transform: list[int] | None
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    modules_to_save: Any
    trainable_tokens: Any
    init: str
    rslora: bool
    lr_ratio: float
    iec: bool

    def __post_init__(self) -> None:
        require(
            self.kind not in _QA_LORA,
            "adapter.kind=qa_lora is not there: it folds into the zero points of a GPTQ base, which NF4 has none of, "
            "so use lora, which trains on both.",
        )
        require(
            self.kind in KINDS,
            f"adapter.kind must be one of {', '.join(KINDS)}, not '{self.kind}'{did_you_mean(self.kind, KINDS)}.",
        )
        self._check_numbers()
        self._check_names()
        self._check_init()

    @property
    def is_product(self) -> bool:
        """Whether its update is B A in every layer and nothing else trains, so that updates can be mixed exactly."""
        return self.kind == "lora" and not self.modules_to_save and not self.trainable_tokens

    @property
    def moves_the_start(self) -> bool:
        """Whether it has an effect from the start."""
        return self.init_family in (*RESIDUAL_INITS, "loftq")

    def _check_numbers(self) -> None:
        for key, kinds in (
            ("r", ("lora", "dora", "vera")),
            ("alpha", _PRODUCTS),
            ("block_size", ("oft", "boft")),
        ):
            value = getattr(self, key)
            if self.kind in kinds:
                require(value is not None, f"adapter.{key} must be a number for adapter.kind={self.kind}, not null.")
            else:
                require(
                    value is None,
                    f"adapter.{key}={value} means nothing to adapter.kind={self.kind}: set adapter.{key}=null.",
                )
        for key in ("r", "block_size"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"adapter.{key} must be at least 1, not {value}.")
        alpha = self.alpha
        require(
            alpha is None or 0 < alpha < math.inf, f"adapter.alpha must be a finite number above 0, not {self.alpha}."
        )
        require(0 <= self.dropout < 1, f"adapter.dropout must be in [0, 1), not {self.dropout}.")
        ratio = self.lr_ratio
        require(0 < ratio < math.inf, f"adapter.lr_ratio must be a finite number above 0, not {ratio}.")
        for key, patterns in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            wrong = next((name for name, value in patterns.items() if not 0 < value < math.inf), None)
            require(wrong is None, f"adapter.{key}: {wrong} must have a number above 0.")
        layers = self.layers_to_transform
        require(
            layers is None or (len(layers) > 0 and min(layers) >= 0),
            f"adapter.layers_to_transform must be null or numbers of layers, counted from 0, not {layers}.",
        )
        if self.kind not in _PRODUCTS:
            chosen = [key for key in ("rank_pattern", "alpha_pattern", "trainable_tokens") if getattr(self, key)]
            chosen += ["exclude_modules"] if self.kind == "vera" and self.exclude_modules else []
            chosen += ["rslora"] if self.rslora else []
            chosen += ["lr_ratio"] if ratio != 1 else []
            chosen += ["iec"] if self.iec else []
            require(
                not chosen,
                f"adapter.{chosen[0] if chosen else ''} means nothing to adapter.kind={self.kind}: leave it out, or "
                f"use lora.",
            )

    def _check_names(self) -> None:
        self.target_modules = as_names("adapter.target_modules", self.target_modules)
        require(bool(self.target_modules), "adapter.target_modules must name at least one module, or be auto.")
        for key in ("exclude_modules", "modules_to_save"):
            setattr(self, key, as_names(f"adapter.{key}", getattr(self, key)))
        tokens = self.trainable_tokens
        self.trainable_tokens = tokens if isinstance(tokens, list) else [tokens]
        require(
            all(isinstance(token, str | int) and not isinstance(token, bool) for token in self.trainable_tokens),
            f"adapter.trainable_tokens must be tokens, or their ids as numbers, not {tokens}.",
        )

    def _check_init(self) -> None:
        init, kind = self.init, self.kind
        iterations = re.fullmatch(r"pissa_niter_([1-9]\d*)", init)
        require(
            init in INITS or iterations is not None,
            f"adapter.init must be one of {', '.join(INITS)} or pissa_niter_<n>, not '{init}'"
            f"{did_you_mean(init, INITS)}.",
        )
        if kind not in _PRODUCTS and init != "default":
            raise UserError(
                f"adapter.init={init} is for lora and dora: adapter.kind={kind} has the init default alone."
            )
        if kind == "dora" and (self.init_family in RESIDUAL_INITS or init == "loftq"):
            raise UserError(
                f"adapter.init={init} takes a part of the base away, and the magnitudes of adapter.kind=dora are those "
                f"of the whole: use lora, or an init like default or eva."
            )
        if init == "orthogonal":
            odd = next((r for r in (self.r, *self.rank_pattern.values()) if r is not None and r % 2), None)
            require(odd is None, f"adapter.init=orthogonal needs even ranks, not {odd}.")

    @property
    def init_family(self) -> str:
        """The init without the number of its iterations."""
        return self.init.partition("_niter_")[0]
