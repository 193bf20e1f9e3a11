"""A stand-in of the hub: what its API says of models, on this machine, so that its own client runs through."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import yaml

TOKEN = "hf_" + "t" * 34
CUT = -1
"""A status that stands for a connection that ends before its answer."""


@dataclass
class Repo:
    """A repository: its files, and how many commits it has had."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0

    @property
    def sha(self) -> str:
        return f"{self.commits:040x}"


@dataclass
class Hub:
    """What the stand-in holds and has seen.

    Attributes:
        faults: (pattern of "METHOD path", status) in their order: the first request that fits one takes it out.
        requests: "METHOD path" of each.
        licenses: by "models/<id>" and "datasets/<id>".
    """

    repos: dict[str, Repo] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    faults: list[tuple[str, int]] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    licenses: dict[str, str] = field(default_factory=dict)
    owner: str = "me"
    address: str = ""

    def asked(self, pattern: str) -> int:
        """How many requests there were of a kind."""
        return sum(re.search(pattern, request) is not None for request in self.requests)

    # One method for each kind of request; a status and what is said

    def answer(self, method: str, path: str, body: bytes, logged_in: bool) -> tuple[int, Any]:
        if method == "GET" and (found := re.fullmatch(r"/api/((?:models|datasets)/[\w.-]+/[\w.-]+)", path)):
            return self._info(found[1])
        if method in ("GET", "HEAD") and (found := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/[^/]+/(.+)", path)):
            repo = self.repos.get(found[1], Repo(True))
            return (200, repo.files[found[2]]) if found[2] in repo.files else (404, {"error": "Entry not found"})
        if method == "PUT" and path.startswith("/lfs/"):  # an address that the hub has signed: no token goes there
            if hashlib.sha256(body).hexdigest() != path.removeprefix("/lfs/"):
                return 400, {"error": "another file than its digest says"}
            self.blobs[path.removeprefix("/lfs/")] = body
            return 200, {}
        if path == "/api/validate-yaml":
            return self._metadata(json.loads(body)["content"])
        if not logged_in:
            return 401, {"error": "Invalid username or password."}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        for pattern, method_of in (
            (r"/api/models/([\w.-]+/[\w.-]+)/preupload/main", self._modes),
            (r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", self._batch),
            (r"/api/models/([\w.-]+/[\w.-]+)/commit/main", self._commit),
        ):
            if method == "POST" and (found := re.fullmatch(pattern, path)):
                return method_of(found[1], body)
        return 404, {"error": f"the stand-in has no {method} {path}"}

    def _info(self, name: str) -> tuple[int, Any]:
        kind, _, repo = name.partition("/")
        if name in self.licenses:
            return 200, {"id": repo, "cardData": {"license": self.licenses[name]}, "siblings": [], "tags": []}
        if kind != "models" or repo not in self.repos:
            return 404, {"error": "Repository not found"}
        found = self.repos[repo]
        files = [{"rfilename": file} for file in found.files]
        return 200, {"id": repo, "private": found.private, "sha": found.sha, "siblings": files, "tags": []}

    def _metadata(self, card: str) -> tuple[int, Any]:
        found = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
        ok = found is not None and isinstance(yaml.safe_load(found[1]), dict)
        return (200 if ok else 400), {"errors": [] if ok else [{"message": "no metadata"}], "warnings": []}

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        owner = asked.get("organization") or self.owner
        repo = f"{owner}/{asked['name']}"
        if repo in self.repos:
            return 409, {"error": "You already created this model repo", "url": f"{self.address}/{repo}"}
        if owner != self.owner:
            return 403, {"error": "You don't have the rights to create a model under this namespace"}
        self.repos[repo] = Repo(asked.get("visibility") == "private" or bool(asked.get("private")))
        self.repos[repo].files[".gitattributes"] = b"*.safetensors filter=lfs\n"
        return 200, {"url": f"{self.address}/{repo}", "name": repo}

    def _modes(self, repo: str, body: bytes) -> tuple[int, Any]:
        def mode(file: dict[str, Any]) -> dict[str, Any]:
            large = file["path"].endswith((".safetensors", ".png"))
            return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}

        return 200, {"files": [mode(file) for file in json.loads(body)["files"]]}

    def _batch(self, repo: str, body: bytes) -> tuple[int, Any]:
        def action(blob: dict[str, Any]) -> dict[str, Any]:
            todo = {"upload": {"href": f"{self.address}/lfs/{blob['oid']}"}}
            return blob if blob["oid"] in self.blobs else {**blob, "actions": todo}

        return 200, {"objects": [action(blob) for blob in json.loads(body)["objects"]]}

    def _commit(self, repo: str, body: bytes) -> tuple[int, Any]:
        found = self.repos[repo]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                found.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                found.files[value["path"]] = self.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del found.files[value["path"]]
        found.commits += 1
        oid = found.sha
        return 200, {"commitUrl": f"{self.address}/{repo}/commit/{oid}", "commitOid": oid}

    def fault(self, request: str) -> int | None:
        for number, (pattern, status) in enumerate(self.faults):
            if re.search(pattern, request):
                del self.faults[number]
                return status
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def _any(self) -> None:
        path = urlsplit(self.path).path
        request = f"{self.command} {path}"
        self.hub.requests.append(request)
        fault = self.hub.fault(request)
        length = int(self.headers.get("Content-Length") or 0)
        if fault == CUT:
            self.rfile.read(length // 2)
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        body = self.rfile.read(length)
        logged_in = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        answer = (fault, {"error": "as planted"}) if fault else self.hub.answer(self.command, path, body, logged_in)
        status, said = answer
        data = said if isinstance(said, bytes) else json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if isinstance(said, bytes):
            self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0" * 40)
        else:
            self.send_header("Content-Type", "application/json")
        if status == 404 and "resolve" in path:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_HEAD = do_POST = do_PUT = _any

    def log_message(self, *_: Any) -> None:
        """Tests read what the command says."""


@contextmanager
def standing_in() -> Iterator[Hub]:
    """A hub on this machine; its `address` is what HF_ENDPOINT is set to."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
