"""The engine that asks a server: vLLM, SGLang or llama.cpp, behind an OpenAI-compatible address."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alignment.errors import UserError, require
from alignment.evaluation.endpoint import Endpoint, NoReply, Refused
from alignment.evaluation.sampling.answer import Answer, Finish, Sampling, Wanted
from alignment.evaluation.sampling.choice import answer_seed
from alignment.files import to_json

log = logging.getLogger(__name__)


@dataclass(slots=True)
class ServerEngine:
    """Draws from a model that a server has: each answer by a request of its own, with a seed of its own.

    The prompt goes there as token ids, and the answer comes back as token ids with their log-probs: vLLM and SGLang
    send them as `token_ids`, llama.cpp beside each log-prob. The server's own generation settings are switched off.

    A server is another policy: it computes in another precision, and often from another base. So an answer that trains
    needs a scoring pass of our own; `drift` says how far the two are apart.

    Attributes:
        endpoint: the address, such as http://localhost:8000/v1, with its patience.
        model: the name under which the server has the policy; see `load_adapter`.
        policy: identity of the policy that it has under this name.
        concurrency: requests at once.
    """

    endpoint: Endpoint
    model: str
    policy: str
    concurrency: int = 16

    def identity(self) -> tuple[str, dict[str, Any]]:
        """64 hex digits of the policy and of what draws, and a description for people."""
        description = {"model": self.model, "engine": "server", "policy": self.policy}
        return hashlib.blake2b(to_json(["server", self.policy]), digest_size=32).hexdigest(), description

    def decisive(self, how: Sampling) -> dict[str, Any]:
        """What of the settings decides an answer."""
        return how.decisive()

    def draw(self, wanted: Sequence[Wanted], how: Sampling) -> list[list[Answer]]:
        """The answers that are wanted of each prompt, in order.

        Raises:
            UserError: the server refuses a request, or gives no answer after all attempts.
        """
        require(
            not how.presets,
            f"The server {self.endpoint.address} draws from the policy's plain distribution, and the model's own "
            f"generation settings are asked for: draw with the model in this process instead.",
        )
        ones = [(prompt, index) for prompt, indices in wanted for index in indices]
        with ThreadPoolExecutor(self.concurrency) as pool:
            asked = [pool.submit(self._ask, prompt, index, how) for prompt, index in ones]
            try:
                found = iter([each.result() for each in asked])
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        if self.endpoint.troubles:
            troubles = ", ".join(f"{kind} {count} times" for kind, count in self.endpoint.troubles.items())
            log.info("The server %s had to be asked again: %s.", self.endpoint.address, troubles)
        return [[next(found) for _ in indices] for _, indices in wanted]

    def _ask(self, prompt: np.ndarray, index: int, how: Sampling) -> Answer:
        body = {
            "model": self.model,
            "prompt": prompt.tolist(),
            "n": 1,
            "max_tokens": how.max_new_tokens,
            "seed": answer_seed(prompt, index, how.seed) % 2**31,
            "stop_token_ids": list(how.stops),
            "temperature": how.temperature,
            "top_k": how.top_k or -1,
            "top_p": how.top_p,
            "min_p": how.min_p,
            "repetition_penalty": 1.0,
            "repeat_penalty": 1.0,  # llama.cpp's word for it, whose files may have a penalty of their own
            "logprobs": 1,
            "return_token_ids": True,
        }
        try:
            return self.endpoint.post("completions", body, lambda reply: read_answer(reply, how))
        except _EndsByItself as why:
            raise UserError(
                f"The server {self.endpoint.address} ends answers of {self.model} at its model's own token {why}, "
                f"which is none of the stop tokens {list(how.stops)}: add it to Sampling.stops."
            ) from None
        except _LacksTokens as why:
            raise UserError(
                f"The server {self.endpoint.address} sent an answer of {self.model} without {why} of its tokens: "
                f"llama.cpp leaves out those that end within a character, such as parts of an emoji; draw from vLLM or "
                f"SGLang, or with the model in this process."
            ) from None
        except Refused as why:
            raise UserError(
                f"The server {self.endpoint.address} refuses to draw answers of {self.model} ({why}): see that it has "
                f"a model of this name, and that its key is in the environment."
            ) from None
        except NoReply as why:
            raise UserError(
                f"The server {self.endpoint.address} gave no answer with token ids and log-probs ({why}), asked up to "
                f"{self.endpoint.retries + 1} times: look into its log, and see that it is vLLM, SGLang or llama.cpp "
                f"in a version that sends token ids."
            ) from None


class _EndsByItself(Exception):
    """An answer ends at a token of the server's model that is not asked for, which the message names."""


class _LacksTokens(Exception):
    """A reply that lacks some of its answer's tokens; the message is how many."""


def read_answer(reply: Any, how: Sampling) -> Answer:
    """The answer in a reply of /v1/completions.

    Raises:
        KeyError, TypeError, ValueError: it is no whole answer.
    """
    (choice,) = reply["choices"]
    logprobs = choice["logprobs"]
    if "content" in logprobs:  # llama.cpp
        tokens = [entry["id"] for entry in logprobs["content"]]
        logps = [entry["logprob"] for entry in logprobs["content"]]
        if lacking := reply["usage"]["completion_tokens"] - len(tokens):
            raise _LacksTokens(lacking)
    else:
        tokens, logps = choice["token_ids"], logprobs["token_logprobs"]
    finish = Finish(choice["finish_reason"])
    answer = Answer(np.array(tokens, np.int32), np.array(logps, np.float32), finish)
    if answer.tokens.ndim != 1 or answer.tokens.shape != answer.logps.shape or not np.isfinite(answer.logps).all():
        raise ValueError("tokens without log-probs")
    stops = np.isin(answer.tokens, how.stops)
    own_end = finish is Finish.stop and "stop_reason" in choice and choice["stop_reason"] is None  # vLLM's word for it
    if own_end and len(stops) and not stops.any():
        raise _EndsByItself(tokens[-1])
    if not len(stops) or stops[:-1].any() or bool(stops[-1]) is not (finish is Finish.stop):
        raise ValueError("an answer that does not end with its stop token")
    return answer


def load_adapter(endpoint: Endpoint, identity: str, folder: Path) -> str:
    """Have vLLM load an adapter under the policy's identity; returns the name that stands for it in requests.

    Args:
        identity: of the policy with this adapter.
        folder: of the saved adapter, which the server must be able to read.

    Raises:
        UserError: the server does not load it.
    """
    name = identity[:16]
    body = {"lora_name": name, "lora_path": str(folder), "load_inplace": True}
    try:
        endpoint.post("load_lora_adapter", body, lambda _: None, parse=bytes.decode)
    except (NoReply, Refused) as why:
        raise UserError(
            f"The server {endpoint.address} did not load the adapter {folder} ({why}): start vLLM with --enable-lora "
            f"and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, where it can read this folder."
        ) from None
    return name
