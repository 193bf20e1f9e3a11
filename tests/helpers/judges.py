"""Judges for tests: settings of a chat model that judges, and a server in this process that plays one."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from alignment.config.judging import LLMJudgeConfig, Verdicts

KEY = "sk-planted-key-of-a-judge"


def llm_settings(address: str | None = None, **changes: Any) -> LLMJudgeConfig:
    """A judge's settings; as in conf/, but without pauses to speak of."""
    settings: dict[str, Any] = {
        "address": address, "model": "judge-1", "auth_env": "OPENAI_API_KEY", "verdicts": Verdicts.mt_bench,
        "rubric": None, "temperature": 0.0, "max_tokens": 64, "body": {}, "timeout": 20.0, "retries": 3,
        "concurrency": 4, "budget_calls": None, "budget_tokens": None, "price_in": None, "price_out": None,
    }  # fmt: skip
    return LLMJudgeConfig(**(settings | changes))


def said(text: str, tokens: dict[str, float] | None = None, finish: str = "stop") -> dict[str, Any]:
    """The JSON of a reply; `tokens` are the likeliest first ones with their log-probs."""
    choice: dict[str, Any] = {"message": {"role": "assistant", "content": text}, "finish_reason": finish}
    if tokens is not None:
        top = [{"token": token, "logprob": logp} for token, logp in tokens.items()]
        choice["logprobs"] = {"content": [{"token": text, "logprob": 0.0, "top_logprobs": top}]}
    return {"choices": [choice], "usage": {"prompt_tokens": 100, "completion_tokens": 10}}


def shown(body: dict[str, Any]) -> list[str]:
    """The question and the answers of a request, taken out as a careful reader would: by the code of its guard."""
    [code] = set(re.findall(r"lines with the code ([0-9a-f]{16})", body["messages"][0]["content"]))
    found = re.findall(rf"^<([\w ]+) {code}>\n(.*?)\n</\1 {code}>$", body["messages"][1]["content"], re.M | re.S)
    return [text for _, text in found]


class Server:
    """What a server was asked, and how it answers.

    Attributes:
        answer: makes the reply of a request's body: JSON, bytes, a status, or (status, headers, bytes); a number of
            seconds is waited first where it is a float.
        bodies: of all requests, in their order.
        headers: of all requests.
    """

    def __init__(self, answer: Callable[[dict[str, Any]], Any]) -> None:
        self.answer = answer
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.address = ""


@contextmanager
def serving(answer: Callable[[dict[str, Any]], Any]) -> Iterator[Server]:
    """A server on a port of its own, in a thread."""
    server = Server(answer)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.bodies.append(body)
            server.headers.append(dict(self.headers))
            found = server.answer(body)
            if isinstance(found, float):
                time.sleep(found)
                found = said("[[A]]")
            if isinstance(found, int):
                found = found, {}, b"{}"
            if isinstance(found, dict):
                found = json.dumps(found).encode()
            status, headers, content = (200, {}, found) if isinstance(found, bytes) else found
            try:
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)
            except OSError:
                pass  # whoever asked has gone

        def do_GET(self) -> None:
            server.headers.append(dict(self.headers))
            self.send_error(404)

        def log_message(self, *_: Any) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.daemon_threads = True
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    server.address = f"http://127.0.0.1:{running.server_address[1]}/v1"
    try:
        yield server
    finally:
        running.shutdown()
        running.server_close()
        thread.join()
