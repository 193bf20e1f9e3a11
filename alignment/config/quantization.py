"""The settings of a quantised base, and of numbers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Dtype(Enum):
    """Dtype of weights and compute; `auto` is bfloat16 on a GPU that has it, float16 on an older one, else float32."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float64 = "float64"


class Calibration(Enum):
    """By what the constants of calibrated NF4 are chosen: the entropy of the codes, or the error of the weights."""

    none = "none"
    entropy = "entropy"
    mse = "mse"


@dataclass(kw_only=True)
class QuantizationConfig:
    """bitsandbytes NF4 of the frozen base; the group's option `none` sets the whole node to null."""

    double: bool
    compute_dtype: Dtype
    calibration: Calibration
