"""The settings of judges."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from enum import Enum
from typing import Any

from alignment.errors import UserError, has_password, not_negative, positive, require


class Judge(Enum):
    """Who judges sampled answers.

    `rules`: against the accepted answers in the data. `ifeval`: by the instructions in the data. `math`: against the
    solution in the data. `reward_model`: a model with one score. `llm`: a chat model behind an address. `implicit`: the
    policy of a round itself, by its implicit reward. `none`: nobody.
    """

    none = "none"
    rules = "rules"
    ifeval = "ifeval"
    math = "math"
    reward_model = "reward_model"
    llm = "llm"
    implicit = "implicit"


LOOKING_UP = ("rules", "ifeval", "math")
"""Judges that look answers up in the data, and so cannot be talked into anything: a policy may learn from them, too."""


class Verdicts(Enum):
    """What a chat model is asked for.

    `mt_bench`: which of two answers is better, or neither, after a few words. `alpaca_eval`: the same in one token,
    whose probability counts. `arena`: the same in five grades. `rubric`: a grade from 1 to 10 for one answer.
    """

    mt_bench = "mt_bench"
    alpaca_eval = "alpaca_eval"
    arena = "arena"
    rubric = "rubric"


@dataclass(kw_only=True)
class AddressConfig:
    """An OpenAI-compatible address such as http://localhost:8000/v1, and the patience with it.

    `auth_env` names the environment variable that holds its key; the key itself is written nowhere. Null sends none. A
    call that fails for now (429, 5xx, a time-out, a reply that is no reply) is repeated `retries` times, with pauses
    that double from one second.
    """

    address: str | None
    auth_env: str | None
    timeout: float
    retries: int
    concurrency: int

    def check_values(self, place: str) -> None:
        """Refuse a value that cannot work.

        Args:
            place: of these settings, for the sentence: the same ones may be those of the evaluation and of the rounds.

        Raises:
            UserError: the first such setting, and what it takes.
        """
        if self.address is not None and not re.match(r"https?://[^/\s]", self.address):
            raise UserError(f"{place}.address must begin with http:// or https://, not '{self.address}'.")
        require(
            self.address is None or not has_password(self.address),
            f"{place}.address has a password in it: put it into an environment variable, and name that with "
            f"{place}.auth_env.",
        )
        require(  # a key that was typed here by mistake is not said again
            self.auth_env is None or re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.auth_env) is not None,
            f"{place}.auth_env must be the name of an environment variable, such as OPENAI_API_KEY, and never "
            "the key itself.",
        )
        positive(f"{place}.timeout", self.timeout)
        for key, least in (("retries", 0), ("concurrency", 1)):
            require(
                getattr(self, key) >= least,
                f"{place}.{key} must be at least {least}, not {getattr(self, key)}.",
            )


@dataclass(kw_only=True)
class LLMJudgeConfig(AddressConfig):
    """A chat model that judges, behind an address.

    `rubric` replaces the built-in one. `body` is merged into every request; a null in it removes a setting.
    `budget_calls` and `budget_tokens` bound what one run asks for; judgements that are stored cost nothing. Prices are
    for a million tokens. `check_values` says what the values may be.
    """

    model: str | None
    verdicts: Verdicts
    rubric: str | None
    temperature: float
    max_tokens: int
    body: dict[str, Any]
    budget_calls: int | None
    budget_tokens: int | None
    price_in: float | None
    price_out: float | None

    def check_values(self, place: str) -> None:
        """See `AddressConfig`."""
        super().check_values(place)
        not_negative(f"{place}.temperature", self.temperature)
        require(self.max_tokens >= 1, f"{place}.max_tokens must be at least 1, not {self.max_tokens}.")
        for key in ("budget_calls", "budget_tokens", "price_in", "price_out"):
            value = getattr(self, key)
            fits = value is None or 0 <= value < math.inf
            require(fits, f"{place}.{key} must be null or at least 0, not {value}.")

    def check(self) -> None:
        """Refuse a judge that has no address or no model.

        Raises:
            UserError: which of them is missing.
        """
        for key, example in (("address", "http://localhost:8000/v1"), ("model", "Qwen/Qwen3-32B")):
            require(
                bool(getattr(self, key)),
                f"evaluation.judge=llm needs evaluation.llm.{key}, such as {example}.",
            )
