"""The policy of a round as a server has it: with the adapter as it is then, loaded under the policy's identity."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from alignment.config.judging import AddressConfig
from alignment.evaluation.endpoint import Endpoint
from alignment.evaluation.sampling.answer import Answer, Sampling, Wanted
from alignment.evaluation.sampling.server import ServerEngine, load_adapter
from alignment.policy.identity import policy_identity
from alignment.policy.reward_model import save_trained

log = logging.getLogger(__name__)


def endpoint_of(config: AddressConfig) -> Endpoint:
    """The server of the rounds.

    Raises:
        UserError: its key is not in the environment.
    """
    assert config.address is not None, "there is a server"
    endpoint = Endpoint(config.address, config.auth_env, config.timeout, config.retries)
    endpoint.require_key("onpolicy.server.auth_env")
    return endpoint


@dataclass(slots=True)
class _Served:
    """An engine that has the server load the adapter before the first answer that nobody has drawn yet."""

    engine: ServerEngine
    model: nn.Module
    tokenizer: Any
    folder: Path
    is_loaded: bool = False

    def identity(self) -> tuple[str, dict[str, Any]]:
        """That of the server's engine."""
        return self.engine.identity()

    def decisive(self, how: Sampling) -> dict[str, Any]:
        """What the server's engine says of the settings."""
        return self.engine.decisive(how)

    def draw(self, wanted: Sequence[Wanted], how: Sampling) -> list[list[Answer]]:
        """The answers that are wanted of each prompt, in order.

        Raises:
            UserError: the server does not load the adapter, or does not answer.
        """
        if not self.is_loaded:
            save_trained(self.model, self.tokenizer, self.folder)
            load_adapter(self.engine.endpoint, self.engine.policy, self.folder)
            self.is_loaded = True
        return self.engine.draw(wanted, how)


@contextmanager
def served(endpoint: Endpoint, concurrency: int, model: nn.Module, tokenizer: Any, folder: Path) -> Iterator[_Served]:
    """The policy as it is now, behind a server.

    Args:
        folder: where the server finds the adapter while answers are drawn; it is removed afterwards.
    """
    policy = policy_identity(model)[0]
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield _Served(ServerEngine(endpoint, policy[:16], policy, concurrency), model, tokenizer, folder.absolute())
    finally:
        shutil.rmtree(folder, ignore_errors=True)
