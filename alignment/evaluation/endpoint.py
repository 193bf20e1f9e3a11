"""Calls to an OpenAI-compatible server: JSON there and back, repeated when the server asks for patience."""

from __future__ import annotations

import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from email.message import Message
from typing import IO, Any, TypeVar

from alignment.errors import UserError
from alignment.files import to_json

_PATIENCE = frozenset({408, 409, 425, 429})
"""Statuses below 500 that ask to try again."""
_THIS_CALL = frozenset({400, 403, 413, 422})
"""Statuses that may be about one request alone: it is too long, or its text is not allowed."""
_LONGEST_PAUSE = 60.0

T = TypeVar("T")


class NoReply(Exception):
    """A call that stayed without a reply that can be used; the message says why."""


class Refused(Exception):
    """A call that the server refuses, which would not help to repeat; the message has its status and its words."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another address."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        return None


@dataclass
class Endpoint:
    """A server behind an address. Threads may share one.

    Attributes:
        address: its base, such as http://localhost:8000/v1.
        auth_env: name of the environment variable with the key; None: no key is sent.
        timeout: seconds for one attempt.
        retries: attempts after the first.
        pause: seconds before the first of these; each later pause is twice as long.
        troubles: what went wrong in how many attempts: "429", "503", "time-out", "malformed", ...
    """

    address: str
    auth_env: str | None
    timeout: float
    retries: int
    pause: float = 1.0
    troubles: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._opener = urllib.request.build_opener(_NoRedirect)

    def require_key(self, setting: str) -> None:
        """Refuse an environment without a usable key; `setting` names it.

        Raises:
            UserError: the variable is not set, or holds what no header can.
        """
        key = self._key()
        if self.auth_env is not None and not (key and key.isascii() and key.isprintable()):
            problem = "holds no key" if key else "is not set"
            raise UserError(
                f"{setting}={self.auth_env} names an environment variable that {problem}: export the key of "
                f"{self.address} there, or set {setting}=null for a server that asks for none."
            )

    def _key(self) -> str:
        return os.environ.get(self.auth_env or "", "").strip()

    def post(
        self,
        path: str,
        body: Mapping[str, Any],
        read: Callable[[Any], T],
        parse: Callable[[bytes], Any] = json.loads,
    ) -> T:
        """Send a request and read its reply.

        Args:
            path: behind the address, such as chat/completions.
            read: makes the result of the reply's JSON; what it raises of KeyError, IndexError, TypeError and
                ValueError says that the reply is malformed.
            parse: makes the JSON of the reply's bytes; a few calls are answered by plain text.

        Raises:
            NoReply: no attempt had a reply that can be used, or the server does not take this request.
            Refused: the server takes no request: a wrong key, an unknown model, no money left, another address.
        """
        request = self._request(path, to_json(body))
        for attempt in range(self.retries + 1):
            trouble, wait = "", None
            try:
                with self._opener.open(request, timeout=self.timeout) as response:
                    return read(parse(response.read()))
            except urllib.error.HTTPError as error:
                trouble, wait = str(error.code), error.headers.get("Retry-After")
                said = self._without_key(error)
                if error.code in _THIS_CALL:
                    self._count(trouble)
                    raise NoReply(f"{trouble} {error.reason}: {said}") from None
                if error.code < 500 and error.code not in _PATIENCE:
                    raise Refused(f"{trouble} {error.reason}: {said}") from None
            except TimeoutError:
                trouble = "time-out"
            except urllib.error.URLError as error:
                trouble = "time-out" if isinstance(error.reason, TimeoutError) else "no connection"
            except (OSError, http.client.HTTPException):
                trouble = "no connection"
            except (KeyError, IndexError, TypeError, ValueError):
                trouble = "malformed"
            self._count(trouble)
            if attempt < self.retries:
                time.sleep(self._pause(attempt, wait))
        raise NoReply(trouble)

    def _count(self, trouble: str) -> None:
        with self._lock:
            self.troubles[trouble] += 1

    def _request(self, path: str, data: bytes) -> urllib.request.Request:
        headers = {"Content-Type": "application/json"}
        if key := self._key():
            headers["Authorization"] = f"Bearer {key}"
        return urllib.request.Request(f"{self.address.rstrip('/')}/{path}", data=data, headers=headers)

    def _pause(self, attempt: int, asked: str | None) -> float:
        """Seconds to wait: what the server asks for, else a pause that doubles; 60 at most."""
        own = self.pause * 2**attempt
        with suppress(ValueError):  # a date
            own = max(own, float(asked or 0))
        return min(own, _LONGEST_PAUSE)

    def _without_key(self, error: urllib.error.HTTPError) -> str:
        """The beginning of what a server says; some repeat the key that they refuse."""
        try:
            said = error.read(2000).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            said = ""
        key = self._key()
        return " ".join((said.replace(key, "***") if key else said).split())[:300]
