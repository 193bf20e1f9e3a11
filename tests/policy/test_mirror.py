"""A mirror of the hub: HF_ENDPOINT leads to a stand-in of it on this machine, and its cache serves when it is gone."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from alignment.policy.tiny_model import write_tiny_model
from tests.helpers.commands import pair, write_lines
from tests.helpers.patience import patience

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PROGRAM = """
import torch
from alignment.config.compose import load
from alignment.config.preflight import check_machine
from alignment.data.sources.loading import load_rows
from alignment.policy.load import load_base

config = load("model.name=org/tiny", "sft=none", "data.source=org/pairs", "data.eval_source=null", "data.eval_size=2")
check_machine(config)
base = load_base(config.model, None, config.model.name, torch.device("cpu"))
print(sum(p.numel() for p in base.parameters()), len(load_rows(config.data, stage="preference").train))
"""


class Hub(BaseHTTPRequestHandler):
    """What the hub's libraries ask of it for public repositories: facts, lists of files, files and their heads."""

    folders: dict[str, Path]
    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        self.asked.append(path)
        kind, _, rest = path.removeprefix("api/").partition("/") if path.startswith("api/") else ("", "", path)
        if not kind:
            kind, rest = (
                ("datasets", rest.removeprefix("datasets/")) if rest.startswith("datasets/") else ("models", rest)
            )
        owner, name, *more = [*rest.split("/"), ""]
        folder = self.folders.get(f"{kind}/{owner}/{name}")
        if folder is None:
            self.answer(404, b"{}")
        elif more[:1] == ["resolve"]:
            file = folder.joinpath(*more[2:-1])
            self.answer(*((200, file.read_bytes()) if file.is_file() else (404, b"{}")))
        elif more[:1] == ["tree"]:
            inside = folder.joinpath(*more[2:-1])
            listed = [
                {"type": "file", "path": f.relative_to(folder).as_posix(), "size": f.stat().st_size, "oid": COMMIT}
                for f in sorted(inside.glob("*"))
            ]
            self.answer(*((200, json.dumps(listed).encode()) if inside.is_dir() else (404, b"{}")))
        else:
            files = [{"rfilename": file.name} for file in sorted(folder.iterdir())]
            facts = {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": files, "tags": [], "private": False}
            self.answer(200, json.dumps(facts).encode())

    def answer(self, code: int, body: bytes) -> None:
        self.send_response(code)
        if code == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("Content-Type", "application/json" if self.path.startswith("/api") else "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def run(home: Path, **environment: str) -> str:
    cleared = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=cleared | {"HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", **environment},
        capture_output=True,
        text=True,
        timeout=patience(180),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.matrix
def test_a_mirror_serves_a_model_and_a_data_set_and_their_cache_goes_on_without_it(tmp_path):
    model, data = tmp_path / "model", tmp_path / "data"
    write_tiny_model(model)
    data.mkdir()
    write_lines(data / "train.jsonl", [pair(number) for number in range(1, 9)])
    handler = type("Handler", (Hub,), {"folders": {"models/org/tiny": model, "datasets/org/pairs": data}, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        found = run(tmp_path / "home", HF_ENDPOINT=address)
    finally:
        server.shutdown()
        server.server_close()
    assert found.split()[1] == "6"
    assert {"api/models/org/tiny", "api/datasets/org/pairs"} <= set(handler.asked)
    assert any(path.startswith("org/tiny/resolve/") for path in handler.asked)
    assert any(path.startswith("datasets/org/pairs/resolve/") for path in handler.asked)
    assert run(tmp_path / "home", HF_ENDPOINT=address, HF_HUB_OFFLINE="1") == found
