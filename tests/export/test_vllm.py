"""The command line of vLLM: what it says, and that a vLLM of yours takes it (`ALIGNMENT_VLLM` is its Python)."""

import json
import os
import shlex
import subprocess
from dataclasses import replace

import pytest

from alignment.export.vllm import Served, largest_rank, not_served, serve_script, serve_words

PYTHON = os.environ.get("ALIGNMENT_VLLM", "")
SERVED = Served(
    name="quickstart-0",
    model="org/base",
    revision="abc",
    adapter="./adapter",
    rank=12,
    tokenizer="./adapter",
    dtype="bfloat16",
    length=1024,
    packed=True,
    code=False,
)
MERGED = replace(SERVED, model="./merged", revision=None, adapter=None, rank=0, tokenizer="./merged", packed=False)
PARSED = """
import json, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser
found = make_arg_parser(FlexibleArgumentParser()).parse_args(sys.argv[1:])
validate_parsed_serve_args(found)
loras = [[one.name, one.path] for one in found.lora_modules or []]
keys = ("revision", "enable_lora", "max_lora_rank", "tokenizer", "generation_config", "dtype", "max_model_len")
print(json.dumps({key: getattr(found, key) for key in keys} | {"loras": loras, "quantization": found.quantization}))
"""


def test_the_script_says_what_the_policy_needs():
    text = serve_script(SERVED)
    lines = text.splitlines()
    assert lines[0] == "#!/bin/sh" and 'cd "$(dirname "$0")" || exit 1' in lines
    command = text[text.index("exec") :].replace("\\\n", " ")
    assert shlex.split(command) == ["exec", *serve_words(SERVED), "$@"]
    assert serve_words(SERVED) == [
        *("vllm", "serve", "org/base", "--revision", "abc", "--enable-lora", "--lora-modules"),
        *("quickstart-0=./adapter", "--max-lora-rank", "16", "--tokenizer", "./adapter"),
        *("--generation-config", "./adapter", "--dtype", "bfloat16", "--max-model-len", "1024"),
    ]
    assert "#   --quantization bitsandbytes" in text
    assert "bitsandbytes" not in serve_script(MERGED)
    assert serve_words(MERGED)[:5] == ["vllm", "serve", "./merged", "--served-model-name", "quickstart-0"]


def test_names_with_signs_of_the_shell_stay_whole():
    odd = replace(SERVED, model="/models/it's $HOME", name="a b")
    command = serve_script(odd)
    words = shlex.split(command[command.index("exec") :].replace("\\\n", " "))
    assert words[3] == "/models/it's $HOME" and "a b=./adapter" in words
    printed = subprocess.run(
        ["sh", "-c", command.replace("exec vllm", "printf '%s|'"), "sh", "--port", "1"], capture_output=True, text=True
    )
    assert printed.stdout.split("|")[1] == "/models/it's $HOME" and printed.stdout.endswith("|--port|1|")


PLAIN = {"peft_type": "LORA", "r": 12, "use_dora": False, "target_modules": ["q_proj"], "rank_pattern": {}}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({}, None),
        ({"use_dora": True}, "a DoRA"),
        ({"peft_type": "VERA"}, "a VERA"),
        ({"modules_to_save": ["lm_head"]}, "an adapter with modules_to_save"),
        ({"trainable_token_indices": [5]}, "an adapter with trainable_token_indices"),
        ({"target_parameters": ["experts"]}, "an adapter with target_parameters"),
        ({"target_modules": ["q_proj", "model.embed_tokens"]}, "an adapter of embed_tokens"),
        ({"target_modules": "all-linear"}, None),
    ],
)
def test_adapters_that_vllm_does_not_take_are_named(settings, named):
    assert not_served(PLAIN | settings) == named


def test_the_largest_rank_counts():
    assert largest_rank(PLAIN) == 12
    assert largest_rank(PLAIN | {"rank_pattern": {"q_proj": 40, "k_proj": 4}}) == 40


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON, reason="NO SERVER: ALIGNMENT_VLLM names no Python with vLLM, so none was asked")
@pytest.mark.parametrize("served", [SERVED, MERGED, replace(SERVED, rank=500)], ids=["adapter", "merged", "rank"])
def test_a_real_vllm_takes_the_words(served):
    words = ["--model", *serve_words(served)[2:], *(["--quantization", "bitsandbytes"] if served.packed else [])]
    settings = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    done = subprocess.run([PYTHON, "-c", PARSED, *words], capture_output=True, text=True, env=os.environ | settings)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["loras"] == ([[served.name, served.adapter]] if served.adapter else [])
    assert bool(found["enable_lora"]) is (served.adapter is not None)
    assert (found["tokenizer"], found["generation_config"]) == (served.tokenizer, served.tokenizer)
    assert (found["dtype"], found["max_model_len"], found["revision"]) == ("bfloat16", 1024, served.revision)
    if served.adapter is not None:
        assert found["max_lora_rank"] >= served.rank and found["quantization"] == "bitsandbytes"
