"""The command on finished runs: every form that it makes is the policy, as other programs load it."""

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from alignment.errors import UserError
from alignment.export import exporting
from alignment.export.__main__ import main, run
from alignment.export.gguf_check import load_gguf, probe_prompts
from alignment.export.opened import open_policy
from alignment.files import digests
from tests.helpers.commands import command, write_project
from tests.helpers.policies import CPU
from tests.helpers.runs import same_code

pytestmark = pytest.mark.slow
FAST = ("sft=none", "trainer.max_steps=3", "trainer.eval_every=0", "evaluation.prompts=0", "optim.lr=0.05")


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_model_folder):
    """The configuration folder, and a place for runs with their cache."""
    root = tmp_path_factory.mktemp("exported")
    return write_project(root / "project", tiny_model_folder), root


def ran(project, name, *settings):
    config, root = project
    words = ["--config-dir", str(config), "recipe=tiny", *FAST, *settings, f"hydra.run.dir=runs/{name}"]
    ended = command(*words, cwd=root, cache=root / "cache", patch=same_code)
    assert ended.code == 0, ended.err
    return root / "runs" / name


@pytest.fixture(scope="module")
def finished(project):
    return ran(project, "lora")


@pytest.fixture
def export(project, monkeypatch):
    config, root = project
    monkeypatch.setenv("ALIGNMENT_CACHE", str(root / "cache"))
    return lambda folder, *words: run([str(folder), *words, "--config-dir", str(config)])


@torch.no_grad()
def next_logps(model, tokenizer) -> torch.Tensor:
    """The log-probs after each token of a few prompts."""
    ids = [torch.from_numpy(prompt.astype(np.int64))[None] for prompt in probe_prompts(tokenizer)]
    return torch.cat([model.eval()(input_ids=one).logits[0].double().log_softmax(-1) for one in ids])


def adapted(base: Path, folder: Path):
    from peft import PeftModel

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)


def expected(folder) -> tuple[torch.Tensor, object]:
    opened = open_policy(folder)
    return next_logps(opened.load(), opened.asked.tokenizer), opened.asked.tokenizer


def test_every_form_is_the_policy(finished, export, tmp_path, tiny_model_folder):
    """Loaded by peft, by transformers, and from GGUF; each with the template and the ends that the run had."""
    made = export(finished, "to=adapter,merged,gguf,vllm,ollama", "type=q8_0,f32", f"out={tmp_path}")
    names = ["adapter", "merged", "tiny-lora-q8_0.gguf", "tiny-lora-f32.gguf", "vllm.sh", "Modelfile"]
    assert made == [tmp_path / name for name in names]
    assert {path.name for path in tmp_path.iterdir()} - {".export.lock"} == {*names, "export.json"}
    logps, tokenizer = expected(finished)
    base = next_logps(AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32), tokenizer)
    assert (logps - base).abs().max() > 0.1

    for model in (
        adapted(tiny_model_folder, tmp_path / "adapter"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32),
        load_gguf(tmp_path / "tiny-lora-f32.gguf", CPU),
    ):
        assert (next_logps(model, tokenizer) - logps).abs().max() < 1e-3
    rounded = next_logps(load_gguf(tmp_path / "tiny-lora-q8_0.gguf", CPU), tokenizer)
    assert 1e-4 < (rounded - logps).abs().max() < 0.5
    stops = open_policy(finished).asked.stops
    for name in ("adapter", "merged"):
        assert AutoTokenizer.from_pretrained(tmp_path / name).chat_template == tokenizer.chat_template
        assert GenerationConfig.from_pretrained(tmp_path / name).eos_token_id == stops

    told = json.loads((tmp_path / "export.json").read_text())
    assert list(told["exports"]) == names
    assert told["exports"]["tiny-lora-f32.gguf"]["drift"] < 1e-5 < told["exports"]["tiny-lora-q8_0.gguf"]["drift"]
    assert told["exports"]["merged"]["max_logp_difference"] < 1e-3
    assert (tmp_path / "Modelfile").read_text().startswith("FROM ./tiny-lora-q8_0.gguf\nTEMPLATE")
    script = (tmp_path / "vllm.sh").read_text()
    words = shlex.split(script[script.index("exec") :].replace("\\\n", " "))
    assert words[3] == str(tiny_model_folder) and "tiny-lora=./adapter" in words
    assert words[words.index("--dtype") + 1] == "float32"
    assert (tmp_path / "vllm.sh").stat().st_mode & 0o111

    # Another form joins those that are there, and what is made again takes the place of what was
    (tmp_path / ".partial-of-a-kill").mkdir()
    export(finished / "adapter", "to=gguf", "type=f16", f"out={tmp_path}")
    assert list(json.loads((tmp_path / "export.json").read_text())["exports"]) == [*names, "tiny-lora-f16.gguf"]
    there = {path.name for path in tmp_path.iterdir()} - {".export.lock"}
    assert there == {*names, "export.json", "tiny-lora-f16.gguf"}


def test_an_adapter_that_left_its_run_is_exported_too(finished, export, tmp_path):
    """And it is the same policy."""
    logps, tokenizer = expected(finished)
    alone = tmp_path / "mine"
    shutil.copytree(finished / "adapter", alone)
    before = sorted(alone.rglob("*"))
    [path] = export(alone, "to=gguf", "type=f32")
    assert path == tmp_path / "mine-export" / "mine-f32.gguf" and sorted(alone.rglob("*")) == before
    assert (next_logps(load_gguf(path, CPU), tokenizer) - logps).abs().max() < 1e-3


@pytest.mark.parametrize("settings", [("quantization=nf4",), ("adapter=dora",), ("adapter=none",)], ids=lambda s: s[0])
def test_other_policies(settings, project, export, tmp_path):
    """On a base in NF4 the merged weights are those that trained; what vLLM takes as no adapter is served merged."""
    folder = ran(project, settings[0], *settings)
    to = "gguf,vllm" if settings == ("quantization=nf4",) else "merged,gguf,vllm"
    export(folder, f"to={to}", "type=f32", f"out={tmp_path}")
    logps, tokenizer = expected(folder)
    [path] = tmp_path.glob("*.gguf")
    assert (next_logps(load_gguf(path, CPU), tokenizer) - logps).abs().max() < 1e-3
    script = (tmp_path / "vllm.sh").read_text()
    if settings == ("quantization=nf4",):
        assert "--quantization bitsandbytes" in script and not (tmp_path / "merged").exists()
        return
    assert "--enable-lora" not in script and "exec vllm serve \\\n  ./merged" in script
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert (next_logps(merged, tokenizer) - logps).abs().max() < 1e-3


def test_what_cannot_be_exported_is_one_sentence(finished, export, tmp_path, tiny_model_folder):
    """And nothing is written."""
    out = f"out={tmp_path / 'out'}"
    unfinished = tmp_path / "unfinished"
    shutil.copytree(finished, unfinished)
    (unfinished / "summary.json").unlink()
    gone = tmp_path / "gone"
    shutil.copytree(finished, gone, ignore=shutil.ignore_patterns("adapter"))
    for folder, words, problem in (
        (finished, [], r"^to is missing: choose among adapter, merged, gguf, vllm, ollama"),
        (finished, ["to=gguff"], r"^There is no to=gguff \(did you mean gguf\?\)"),
        (finished, ["to=merged", "typ=f16"], r"^There is no setting typ \(did you mean type\?\)"),
        (finished, ["to=merged", "type=f16"], r"^type has no effect without to=gguf or to=ollama"),
        (finished, ["to=gguf", "type=q4_k_m"], r"llama-quantize .* Q4_K_M"),
        (finished, ["to=gguf", "dtype=float32"], r"^dtype has no effect"),
        (finished, ["to=merged", "dtype=float8"], r"^dtype must be one of auto, float32, bfloat16"),
        (finished, ["to=gguf", f"converter={tmp_path}"], r"there is no convert_hf_to_gguf\.py"),
        (unfinished, ["to=merged"], r"cannot be exported, because it is not finished"),
        (gone, ["to=merged"], r"its policy .* is gone"),
        (tmp_path / "nowhere", ["to=merged"], r"^There is no folder .*nowhere"),
        (tiny_model_folder, ["to=adapter"], r"is a whole model, without an adapter: choose to=merged"),
        (finished.parent, ["to=merged"], r"is no run folder"),
    ):
        with pytest.raises(UserError, match=problem):
            export(folder, *words, out)
        assert not (tmp_path / "out").exists(), words
    with pytest.raises(UserError, match="inside the policy"):
        export(finished, "to=merged", f"out={finished / 'adapter' / 'out'}")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "export.json").write_text('{"policy": {}, "exports": {}}')
    with pytest.raises(UserError, match="holds exports of another policy"):
        export(finished, "to=merged", f"out={tmp_path / 'other'}")
    whole = digests(finished / "adapter")
    with pytest.raises(UserError, match="holds adapter already, which no export of this policy has made"):
        export(finished, "to=adapter", f"out={finished}")
    assert digests(finished / "adapter") == whole, "the run's own"
    (tmp_path / "mine" / "merged").mkdir(parents=True)
    with pytest.raises(UserError, match="holds merged already"):
        export(finished, "to=merged", f"out={tmp_path / 'mine'}")
    assert (tmp_path / "mine" / "merged").is_dir()
    with pytest.raises(SystemExit, match=r"^Error: Name one folder of a finished run, .* and not 2\.$"):
        main([str(finished), str(gone), "to=merged"])


CONVERTER = """
import shutil, sys
out = sys.argv[sys.argv.index("--outfile") + 1]
if sys.argv[sys.argv.index("--outtype") + 1] == "bf16":
    sys.exit("Model Odd is not supported")
shutil.copy({source!r}, out)
"""


def test_the_converter_of_llama_cpp_is_asked_and_not_trusted(finished, export, tmp_path):
    """What it writes is compared too; what it says is told."""
    [right] = export(finished, "to=gguf", "type=f32", f"out={tmp_path / 'right'}")
    [rounded] = export(finished, "to=gguf", "type=f16", f"out={tmp_path / 'rounded'}")
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text(CONVERTER.format(source=str(right)))
    [path] = export(finished, "to=gguf", "type=f32", f"converter={tmp_path}", f"out={tmp_path / 'by'}")
    assert path.read_bytes() == right.read_bytes()
    with pytest.raises(UserError, match=r"ended with status 1 and said: Model Odd is not supported"):
        export(finished, "to=gguf", "type=bf16", f"converter={script}", f"out={tmp_path / 'by'}")
    with pytest.raises(UserError, match=r"^type=q4_0: llama\.cpp's converter makes f32, f16, bf16, q8_0 alone"):
        export(finished, "to=gguf", "type=q4_0", f"converter={script}", f"out={tmp_path / 'by'}")
    other = tmp_path / "other.gguf"
    from gguf import GGUFReader

    shutil.copy(right, other)
    reader = GGUFReader(other, "r+")
    next(tensor for tensor in reader.tensors if tensor.name == "blk.0.ffn_up.weight").data[:] *= 1.5
    del reader
    script.write_text(CONVERTER.format(source=str(other)))
    with pytest.raises(UserError, match="is not the policy"):
        export(finished, "to=gguf", "type=f32", f"converter={script}", f"out={tmp_path / 'by'}")
    assert {found.name for found in (tmp_path / "by").iterdir()} - {".export.lock"} == {path.name, "export.json"}
    assert path.read_bytes() == right.read_bytes() and rounded.exists()


def test_a_reward_model_writes_no_text(project, export, tmp_path):
    folder = ran(project, "rewards", "loss=bradley_terry")
    for form in ("gguf", "vllm", "ollama"):
        with pytest.raises(UserError, match=rf"^to={form}: .* is a reward model, which writes no text: choose to=mer"):
            export(folder, f"to={form}", f"out={tmp_path / 'out'}")
    export(folder, "to=adapter,merged", f"out={tmp_path / 'out'}")
    told = json.loads((tmp_path / "out" / "export.json").read_text())["exports"]
    assert told["merged"]["max_reward_difference"] < 1e-3 and "adapter" in told


def test_a_failure_leaves_what_was_there(finished, export, tmp_path, monkeypatch):
    [path] = export(finished, "to=gguf", "type=f16", f"out={tmp_path}")
    before = path.read_bytes(), (tmp_path / "export.json").read_bytes()

    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "check_gguf", fails)
    with pytest.raises(OSError, match="No space left"):
        export(finished, "to=gguf", "type=f16", f"out={tmp_path}")
    assert (path.read_bytes(), (tmp_path / "export.json").read_bytes()) == before
    assert {found.name for found in tmp_path.iterdir()} - {".export.lock"} == {path.name, "export.json"}
