"""Answers from an OpenAI-compatible server: what is asked for, and what a server that misbehaves comes to."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch

from alignment.errors import UserError
from alignment.evaluation.endpoint import Endpoint
from alignment.evaluation.sampling.answer import Finish, Sampling
from alignment.evaluation.sampling.draw import draw
from alignment.evaluation.sampling.drift import measure_drift
from alignment.evaluation.sampling.local import LocalEngine
from alignment.evaluation.sampling.server import ServerEngine, load_adapter
from alignment.scoring.layout import FlatLayout
from tests.conftest import random_groups, tiny_policy

STOP = 96
PROMPTS = [group.prompt for group in random_groups(3, seed=7)]
HOW = Sampling(stops=(STOP,), max_new_tokens=6, temperature=0.7, top_k=5, seed=3)
POLICY = "ab" * 32


class Stub:
    """A server whose answers follow from prompt and seed; `faults` come first, one for each request."""

    def __init__(self):
        self.faults, self.asked, self.keys = [], [], []
        self.like = "vllm"
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stub.asked.append((self.path, body))
                stub.keys.append(self.headers["Authorization"])
                stub.reply(self, body)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_port}/v1"

    def tokens(self, body):
        rng = np.random.default_rng([body["seed"], *body["prompt"]])
        tokens = rng.integers(0, STOP, body["max_tokens"]).tolist()
        return [*tokens[:3], STOP] if body["seed"] % 2 else tokens

    def choice(self, body):
        tokens = self.tokens(body)
        finish = "stop" if tokens[-1] == STOP else "length"
        logps = [-0.5 - position for position in range(len(tokens))]
        if self.like == "llama.cpp":
            content = [{"id": t, "token": "?", "logprob": p} for t, p in zip(tokens, logps, strict=True)]
            return {"finish_reason": finish, "text": "?", "logprobs": {"content": content}}
        logprobs = {"token_logprobs": logps, "tokens": ["?"] * len(tokens)}
        return {"finish_reason": finish, "text": "?", "token_ids": tokens, "logprobs": logprobs}

    def reply(self, handler, body):
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, int):
            handler.send_response(fault)
            handler.end_headers()
            return
        if fault == "slow":
            time.sleep(0.3)
        if handler.path == "/v1/load_lora_adapter":
            text = b"Success: LoRA adapter added successfully."
        else:
            choices = {"two choices": 2, "no choice": 0}.get(fault, 1) * [self.choice(body)]
            if fault == "no ids":
                choices[0].pop("token_ids")
            if fault == "cut answer":
                choices[0]["finish_reason"] = "stop" if choices[0]["finish_reason"] == "length" else "length"
            if fault == "own end":
                choices[0] |= {"finish_reason": "stop", "stop_reason": None, "token_ids": [7, 2]}
                choices[0]["logprobs"]["token_logprobs"] = [-0.5, -0.5]
            usage = {"completion_tokens": sum(len(self.tokens(body)) for _ in choices)}
            if fault == "part of a character":
                choices[0]["logprobs"]["content"].pop(1)
            text = json.dumps({"choices": choices, "usage": usage}).encode()
        handler.send_response(200)
        if fault == "cut":
            handler.send_header("Content-Length", str(2 * len(text)))
        handler.end_headers()
        handler.wfile.write(b"{" if fault == "malformed" else text)


@pytest.fixture
def stub():
    made = Stub()
    yield made
    made.server.shutdown()
    made.server.server_close()


def engine(stub, retries=3, timeout=5.0, **settings):
    return ServerEngine(Endpoint(stub.address, None, timeout, retries, pause=0.001), "policy", POLICY, **settings)


def tokens_of(answers):
    return [[answer.tokens.tolist() for answer in each] for each in answers]


def test_each_answer_is_asked_for_by_itself(stub):
    """Token ids there and back, a seed of its own, and none of the server's own generation settings."""
    two = draw(engine(stub), PROMPTS, 2, HOW)
    path, body = stub.asked[0]
    assert path == "/v1/completions" and body["prompt"] in [prompt.tolist() for prompt in PROMPTS]
    assert body["model"] == "policy" and body["n"] == 1 and body["max_tokens"] == 6 and body["stop_token_ids"] == [STOP]
    assert (body["temperature"], body["top_k"], body["top_p"], body["min_p"]) == (0.7, 5, 1.0, 0.0)
    assert body["repetition_penalty"] == body["repeat_penalty"] == 1.0
    assert len({body["seed"] for _, body in stub.asked}) == 6
    assert [each[:2] for each in tokens_of(draw(engine(stub, concurrency=1), PROMPTS, 4, HOW))] == tokens_of(two)
    answers = [answer for each in two for answer in each]
    assert {answer.finish for answer in answers} == {Finish.stop, Finish.length}
    assert all((answer.tokens[-1] == STOP) == (answer.finish is Finish.stop) for answer in answers)
    assert answers[0].logps.tolist() == [-0.5 - position for position in range(len(answers[0].tokens))]
    stub.like = "llama.cpp"
    assert tokens_of(draw(engine(stub), PROMPTS, 2, HOW)) == tokens_of(two)


@pytest.mark.parametrize(
    ("fault", "counted"),
    [
        (429, "429"), (500, "500"), ("slow", "time-out"), ("malformed", "malformed"), ("cut", "no connection"),
        ("two choices", "malformed"), ("no choice", "malformed"), ("no ids", "malformed"), ("cut answer", "malformed"),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_counted_and_asked_again(stub, fault, counted):
    """The answers are the same; where it goes on, one sentence says what to look for."""
    expected = tokens_of(draw(engine(stub), PROMPTS[:1], 2, HOW))
    stub.faults = [fault] * 2
    asking = engine(stub, timeout=0.1 if fault == "slow" else 5.0, concurrency=1)
    assert tokens_of(draw(asking, PROMPTS[:1], 2, HOW)) == expected
    assert asking.endpoint.troubles == {counted: 2}
    stub.faults = [fault] * 2
    with pytest.raises(UserError, match=rf"gave no answer .* \({counted}\), asked up to 2 times: look into its log"):
        draw(engine(stub, retries=1, timeout=0.1 if fault == "slow" else 5.0), PROMPTS[:1], 1, HOW)


def test_a_refusal_is_final(stub):
    """It would not help to ask again, nor to ask for the rest."""
    stub.faults = [400]
    with pytest.raises(UserError, match=r"gave no answer .* \(400 Bad Request"):
        draw(engine(stub, concurrency=1), PROMPTS, 4, HOW)
    stub.faults = [404]
    with pytest.raises(UserError, match=r"refuses to draw answers of policy \(404 Not Found"):
        draw(engine(stub, concurrency=1), PROMPTS, 4, HOW)
    assert len(stub.asked) < 24
    with pytest.raises(UserError, match="own generation settings"):
        draw(engine(stub), PROMPTS, 1, Sampling(stops=(STOP,), max_new_tokens=2, presets=True))


def test_an_end_that_nobody_asked_for_is_named(stub):
    """vLLM also stops at the EOS of its model, whatever the stop tokens; the same answer would come again."""
    stub.faults = ["own end"]
    with pytest.raises(UserError, match=r"own token 2, which is none of the stop tokens \[96\]: add it"):
        draw(engine(stub, concurrency=1), PROMPTS[:1], 1, HOW)
    assert len(stub.asked) == 1


def test_an_answer_that_lacks_tokens_is_refused(stub):
    """llama.cpp sends no log-prob for a token that ends within a character, and no id either."""
    stub.like, stub.faults = "llama.cpp", ["part of a character"]
    with pytest.raises(UserError, match=r"an answer of policy without 1 of its tokens: llama\.cpp leaves out"):
        draw(engine(stub, concurrency=1), PROMPTS[:1], 1, HOW)
    assert len(stub.asked) == 1


def test_the_adapter_is_loaded_under_its_identity(stub, tmp_path):
    """So a server that has another policy under the name cannot answer for this one."""
    assert load_adapter(engine(stub).endpoint, POLICY, tmp_path) == POLICY[:16]
    path, body = stub.asked[0]
    assert path == "/v1/load_lora_adapter" and body["lora_name"] == POLICY[:16] and body["lora_path"] == str(tmp_path)


def test_the_key_comes_from_the_environment(stub, monkeypatch):
    """And goes nowhere but into the request."""
    monkeypatch.setenv("MY_KEY", "secret")
    asking = engine(stub)
    asking.endpoint.auth_env = "MY_KEY"
    draw(asking, PROMPTS[:1], 1, HOW)
    assert stub.keys == ["Bearer secret"] and "secret" not in repr(asking) + str(asking.identity())


def test_drift_is_measured_by_a_scoring_pass():
    """Of the policy itself there is none; where log-probs are off, by how much."""
    model = tiny_policy(torch.float32, trained=True)
    answers = draw(LocalEngine(model, torch.device("cpu"), 8), PROMPTS, 2, HOW)
    passes = FlatLayout(), 1000, torch.device("cpu")
    none, scores = measure_drift(model, PROMPTS, answers, *passes)
    assert none.largest < 5e-5 and none.tokens == len(scores.values)
    answers[1][0].logps[:] += 0.25
    some, _ = measure_drift(model, PROMPTS, answers, *passes)
    share = len(answers[1][0].tokens) / none.tokens
    assert some.largest == pytest.approx(0.25, abs=1e-4) and some.mean == pytest.approx(0.25 * share, abs=1e-4)
