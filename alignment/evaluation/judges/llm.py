"""A chat model that judges, behind an OpenAI-compatible address."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from alignment.config.judging import LLMJudgeConfig
from alignment.errors import UserError
from alignment.evaluation.endpoint import Endpoint, NoReply, Refused
from alignment.evaluation.judges.base import SAME, Item, Judge, Judgement, Preference
from alignment.evaluation.judges.store import JudgementStore
from alignment.evaluation.judges.verdicts import Reply, Verdict, form_of

log = logging.getLogger(__name__)

_LIKELIEST = 20
"""Tokens whose log-probs are asked for: the most that OpenAI and vLLM give."""
_NO_REPLY = Verdict(None, 1, "no reply")


class LLMJudge(Judge):
    """Asks a chat model for verdicts; pairs in both orders.

    A verdict that cannot be read, and a call that stays without reply, are counted and no winner: nothing is dropped.

    Args:
        cache: the folder in which replies are kept.
        pause: seconds before a call is repeated the first time.

    Raises:
        UserError: a setting cannot work, or the key is not in the environment.
    """

    kind: ClassVar[str] = "llm"

    def __init__(self, config: LLMJudgeConfig, cache: Path, pause: float = 1.0) -> None:
        config.check_values("evaluation.llm")
        config.check()
        self._config = config
        self._form = form_of(config.verdicts, config.rubric)
        self._cache = cache
        self._endpoint = Endpoint(config.address or "", config.auth_env, config.timeout, config.retries, pause)
        self._endpoint.require_key("evaluation.llm.auth_env")
        self.pointwise = len(self._form.names) == 1
        self._lock = threading.Lock()
        self._last = ""
        self._counts = dict.fromkeys(("calls", "stored", "unanswered", "over_budget", "tokens_in", "tokens_out"), 0)

    def description(self) -> dict[str, Any]:
        """Model, address, words and settings of the request."""
        return {
            "version": 1,
            "model": self._config.model,
            "address": self._config.address,
            "verdicts": self._config.verdicts.name,
            "words": self._form.description(),
            "request": self._settings(),
        }

    def score(self, items: Sequence[Item]) -> list[Judgement]:
        """The grade of each answer, 1 to 10."""
        if not self.pointwise:
            return super().score(items)
        return [Judgement(verdict.value, reasons=(verdict.reason,)) for verdict in self._verdicts(items)]

    def compare(self, items: Sequence[Item]) -> list[Preference]:
        """The preference in each pair; of grades if the form grades single answers. Equal answers tie unasked."""
        if self.pointwise:
            return super().compare(items)
        apart = [item for item in items if not item.is_same]
        found = self._verdicts([shown for item in apart for shown in (item, item.swapped())])
        asked = iter(zip(found[::2], found[1::2], strict=True))
        return [SAME if item.is_same else _preference(*next(asked)) for item in items]

    def usage(self) -> dict[str, Any]:
        """Calls, replies from the store, troubles, tokens and, with prices, the cost."""
        used: dict[str, Any] = {**self._counts, "troubles": dict(self._endpoint.troubles)}
        prices = (("tokens_in", self._config.price_in), ("tokens_out", self._config.price_out))
        known = [self._counts[name] * price / 1e6 for name, price in prices if price is not None]
        return used | ({"cost": sum(known)} if len(known) == len(prices) else {})

    # Calls

    def _verdicts(self, items: Sequence[Item]) -> list[Verdict]:
        """The verdict on each item, from the store or from a call.

        Raises:
            UserError: the server refuses the calls, or none of them got a reply.
        """
        try:
            with JudgementStore(self._cache, self) as store:
                replies = store.replies(items, self._asked)
                self._counts["stored"] += store.found
            if self._last and replies.count(None) == len(replies):
                raise NoReply(f"no call got a reply, the last for {self._last}")
        except (NoReply, Refused) as error:
            raise UserError(
                f"The judge at {self._config.address} gives no verdicts ({error}): mend that and start again with "
                f"resume=true, which asks for what is missing and trains nothing anew."
            ) from None
        log.info("%s", self._in_words())
        return [self._read(reply) for reply in replies]

    def _read(self, kept: dict[str, Any] | None) -> Verdict:
        if kept is None:
            return _NO_REPLY
        tokens = tuple((token, float(logp)) for token, logp in kept["tokens"])
        return self._form.read(Reply(kept["text"], tokens, kept["cut"]))

    def _asked(self, items: Sequence[Item]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Ask about each item, several at once; yields replies as they come.

        Raises:
            Refused: the server takes no calls.
        """
        log.info("Asking %s for %d verdicts ...", self._config.model, len(items))
        places, waiting = iter(enumerate(items)), {}
        with ThreadPoolExecutor(self._config.concurrency) as pool:
            while True:
                # As many calls under way as are allowed at once: the budget is looked at before each
                for place, item in places:
                    if self._is_spent():
                        self._counts["over_budget"] += 1
                        continue
                    self._counts["calls"] += 1
                    future: Future[dict[str, Any]] = pool.submit(self._call, item)
                    waiting[future] = place
                    if len(waiting) == self._config.concurrency:
                        break
                if not waiting:
                    break
                done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    place = waiting.pop(future)
                    try:
                        reply = future.result()
                    except NoReply as error:
                        self._counts["unanswered"] += 1
                        self._last = str(error)
                        continue
                    yield place, reply

    def _is_spent(self) -> bool:
        calls, tokens = self._config.budget_calls, self._config.budget_tokens
        with self._lock:
            used = self._counts["tokens_in"] + self._counts["tokens_out"]
        return (calls is not None and self._counts["calls"] >= calls) or (tokens is not None and used >= tokens)

    def _call(self, item: Item) -> dict[str, Any]:
        """One reply, as it is kept."""
        body = {"model": self._config.model, "messages": self._form.messages(item), **self._settings()}
        reply, used = self._endpoint.post("chat/completions", body, _read_reply)
        with self._lock:
            self._counts["tokens_in"] += used[0]
            self._counts["tokens_out"] += used[1]
        return asdict(reply)

    def _settings(self) -> dict[str, Any]:
        """Everything of a request but the model and the messages."""
        config = self._config
        settings: dict[str, Any] = {"temperature": config.temperature, "max_tokens": config.max_tokens}
        if self._form.one_token:
            settings |= {"max_tokens": 1, "logprobs": True, "top_logprobs": _LIKELIEST}
        return {key: value for key, value in (settings | dict(config.body)).items() if value is not None}

    def _in_words(self) -> str:
        """The line of costs in the log."""
        used = self.usage()
        troubles = ", ".join(f"{count} x {name}" for name, count in used["troubles"].items()) or "no trouble"
        cost = f", cost {used['cost']:.4g}" if "cost" in used else ""
        return (
            f"Judge {self._config.model}: {used['calls']} calls, {used['stored']} replies from the store, "
            f"{used['unanswered']} without reply, {used['over_budget']} over the budget, {troubles}; "
            f"{used['tokens_in']:,} tokens in, {used['tokens_out']:,} out{cost}."
        )


def _read_reply(content: Any) -> tuple[Reply, tuple[int, int]]:
    """The reply in a server's JSON, with its tokens in and out; any error of looking up says that it is malformed."""
    choice = content["choices"][0]
    text = choice["message"]["content"]
    if not isinstance(text, str):
        raise TypeError("no text")
    given = ((choice.get("logprobs") or {}).get("content") or [{}])[0].get("top_logprobs") or []
    tokens = tuple((str(one["token"]), float(one["logprob"])) for one in given)
    used = content.get("usage") or {}
    counts = int(used.get("prompt_tokens") or 0), int(used.get("completion_tokens") or 0)
    return Reply(text, tokens, choice.get("finish_reason") == "length"), counts


def _preference(shown_first: Verdict, shown_second: Verdict) -> Preference:
    """The preference of the two verdicts on a pair and on the pair turned round."""
    turned = None if shown_second.value is None else 1 - shown_second.value
    reasons = (f"shown first: {shown_first.reason}", f"shown second: {shown_second.reason}")
    return Preference((shown_first.value, turned), (shown_first.weight, shown_second.weight), reasons)
