"""Rounds whose answers a server draws: with the adapter as it is then, scored by the policy itself, its drift told."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from alignment.config.compose import load
from alignment.errors import UserError
from alignment.evaluation.sampling.answer import Finish, Sampling
from alignment.evaluation.sampling.local import LocalEngine
from tests.helpers.policies import CPU
from tests.helpers.rounds import Project, write_pairs
from tests.helpers.runs import assert_same, metric_rows

pytestmark = pytest.mark.slow


class Server:
    """Draws from a base with adapters that are loaded by their names, as vLLM does; from another base if it `errs`."""

    def __init__(self, base: Path) -> None:
        self.loaded, self.asked, self.errs = [], 0, False
        self._models = {}
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server._lock:
                    text = server.load(body) if self.path.endswith("load_lora_adapter") else server.complete(body)
                self.send_response(200)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *args):
                pass

        self._base = base
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        self.address = f"http://127.0.0.1:{self._http.server_port}/v1"

    def load(self, body) -> str:
        name, path = body["lora_name"], Path(body["lora_path"])
        model = AutoModelForCausalLM.from_pretrained(self._base)
        if self.errs:
            model.get_output_embeddings().weight.data.mul_(20)
        self._models[name] = PeftModel.from_pretrained(model, str(path))
        self.loaded.append(name)
        return "Success: LoRA adapter added successfully."

    def complete(self, body) -> str:
        self.asked += 1
        how = Sampling(
            stops=tuple(body["stop_token_ids"]), max_new_tokens=body["max_tokens"], temperature=body["temperature"],
            top_p=body["top_p"], seed=body["seed"],
        )  # fmt: skip
        prompt = np.array(body["prompt"], np.int32)
        [[answer]] = LocalEngine(self._models[body["model"]].eval(), CPU, 4).draw([(prompt, range(1))], how)
        choice = {
            "finish_reason": "stop" if answer.finish is Finish.stop else "length", "text": "?",
            "token_ids": answer.tokens.tolist(),
            "logprobs": {"token_logprobs": [float(x) for x in answer.logps], "tokens": ["?"] * len(answer.tokens)},
        }  # fmt: skip
        return json.dumps({"choices": [choice], "usage": {"completion_tokens": len(answer.tokens)}})

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def server(tiny_model_folder):
    made = Server(tiny_model_folder)
    yield made
    made.stop()


@pytest.fixture
def project(tmp_path, tiny_model_folder, monkeypatch):
    return Project(tmp_path, tiny_model_folder, write_pairs(tmp_path), monkeypatch)


def settings(server: Server) -> tuple[str, ...]:
    return f"onpolicy.server.address={server.address}", "onpolicy.server.retries=0", "onpolicy.server.concurrency=2"


def test_a_server_draws_with_the_adapter_of_each_round(project, server):
    """Three rounds, three policies; their log-probs are our own, and a second run asks the server for nothing."""
    found = project.run("first", *settings(server))
    assert len(set(server.loaded)) == len(server.loaded) == 3 and server.asked > 0
    rounds = found["stages"]["preference"]["rounds"]
    assert all(0 < one["onpolicy/server_drift"] <= one["onpolicy/server_drift_max"] < 1e-4 for one in rounds)
    rows = [row for row in metric_rows(project.folder / "first") if "onpolicy/round" in row]
    assert [row["onpolicy/server_drift"] for row in rows] == [one["onpolicy/server_drift"] for one in rounds]
    assert not any(key.startswith(("onpolicy/kl", "onpolicy/stale")) for row in rows for key in row)
    assert found["reference"]["misses"] == 8, "the held-out pairs alone: rounds bring their log-probs"
    preference = project.folder / "first" / "stages" / "preference"
    assert not (preference / "served").exists()
    asked = server.asked
    project.run("second", *settings(server))
    assert server.asked == asked and len(server.loaded) == 3 and project.judge.asked == 0
    assert_same(project.folder / "second", project.folder / "first")


def test_another_policy_in_the_server_is_told(project, server, caplog):
    """Planted: it has another base. What is trained on has the policy's log-probs all the same."""
    server.errs = True
    found = project.run("run", *settings(server), "trainer.max_steps=1", "evaluation.prompts=0")
    [one] = found["stages"]["preference"]["rounds"]
    assert one["onpolicy/server_drift"] > 0.2
    assert any("draws from another policy" in message for message in caplog.messages)
    assert found["stages"]["preference"]["start"]["max_token_difference"] < 1e-5


def test_a_server_that_is_not_there_is_one_sentence(project):
    with pytest.raises(UserError, match=r"did not load the adapter .* \(no connection\)"):
        project.run("run", "onpolicy.server.address=http://127.0.0.1:9/v1", "onpolicy.server.retries=0")


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["onpolicy.server.address=localhost:8000"], r"^onpolicy\.server\.address must begin with http"),
        (["onpolicy.server.timeout=0"], r"^onpolicy\.server\.timeout must be a finite number above 0"),
        (["onpolicy.server.address=http://h/v1", "adapter=none"], r"^onpolicy\.server\.address draws with a base"),
        (["onpolicy.server.address=http://h/v1", "adapter=pissa"], r"^onpolicy\.server\.address draws with a base"),
        (["onpolicy=distill", "loss=opd", "onpolicy.server.address=http://h/v1"], "and a loss without a teacher"),
    ],
)
def test_what_no_server_can_draw_is_refused_when_it_is_composed(typed, said):
    first = () if any(one.startswith("onpolicy=") for one in typed) else ("onpolicy=rounds",)
    with pytest.raises(UserError, match=said):
        load("recipe=quickstart", *first, *typed)


def test_the_key_of_the_server_must_be_there(project, monkeypatch):
    monkeypatch.delenv("NO_KEY", raising=False)
    typed = ("onpolicy.server.address=http://h/v1", "onpolicy.server.auth_env=NO_KEY")
    with pytest.raises(UserError, match=r"^onpolicy\.server\.auth_env=NO_KEY names an environment variable"):
        project.chain("run", *typed)
