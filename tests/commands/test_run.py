"""The command line: what is wrong is one sentence and leaves nothing behind; what is right runs to the end."""

import copy
import functools
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from alignment.config.arguments import check_arguments
from alignment.config.compose import as_plain, compose_node, load, to_run_config
from alignment.config.overrides import parse_overrides
from alignment.config.preflight import check_machine
from alignment.config.registry import register
from alignment.errors import UserError
from alignment.stages.chain import Chain
from tests.helpers.commands import Ended, command, pair, write_lines
from tests.helpers.patience import patience
from tests.helpers.tiny_runs import project, tiny

__all__ = ["project", "tiny"]


def assert_refused(ended: Ended, cwd: Path, *said: str, left: tuple[str, ...] = ()) -> None:
    """The command ends in one sentence, and leaves no file but those named."""
    assert ended.code == 1
    [line] = ended.err.splitlines()
    assert line.startswith("Error: ") and line.endswith(".")
    assert all(part in line for part in said), line
    assert "Traceback" not in ended.out
    assert [path.name for path in cwd.rglob("*") if path.is_file()] == list(left)
    assert left or not list(cwd.iterdir())


# Refused before Hydra starts: in this process, for speed.

WRONG = [
    # Keys and options that do not exist
    (["loss.bta=1"], ["bta", "beta", "label_smoothing"]),
    (["loss=nope"], ["nope", "simpo"]),
    (["sft.loss=dpo"], ["loss"]),
    (["hydra.foo=1"], ["foo"]),
    # Wrong types
    (["trainer.epochs=many"], ["many", "trainer.epochs"]),
    (["data.limit=1.5"], ["1.5", "data.limit"]),
    (["evaluation.judge=gpt"], ["gpt", "rules"]),
    (["model.dtype=int8"], ["int8", "bfloat16"]),
    (["adapter.target_modules=null"], ["adapter.target_modules", "a name or a list of names"]),
    (["data.columns=[prompt]"], ["data.columns"]),
    (["tracking.mode=sometimes"], ["tracking.mode", "sometimes", "offline"]),
    # Out of range; more of this in OUT_OF_RANGE
    (["adapter.r=0"], ["adapter.r", "0"]),
    (["adapter.init=nope"], ["adapter.init", "nope", "orthogonal"]),
    (["sft.trainer.log_every=0"], ["sft.trainer.log_every"]),
    # What does not go together
    (["loss=kto", "trainer.groups_per_step=1"], ["trainer.groups_per_step", "kto"]),
    (["loss=none", "sft=none"], ["SFT stage", "loss"]),
    (["quantization=nf4", "adapter=none"], ["quantised base"]),
    (["adapter=none", "export.merge=true"], ["export.merge"]),
    # What would have no effect
    (["loss=orpo", "loss.beta=0.1"], ["loss.beta", "loss orpo", "accepted are lam"]),
    (["loss=simpo", "loss.gamma=1"], ["loss.gamma", "gamma_beta_ratio"]),
    (["adapter=none", "adapter.r=8"], ["adapter.r", "adapter=none"]),
    (["recipe=dpo_qwen3", "quantization=none", "quantization.double=true"], ["quantization.double", "no effect"]),
    (["sft=none", "sft.optim.lr=1e-5"], ["sft.optim.lr", "sft=none"]),
    (["loss=none", "loss.beta=1"], ["loss.beta", "loss=none"]),
    (["tracking=none", "tracking.project=mine"], ["tracking.project", "tracking=none"]),
    (["loss=none", "optim.lr=1e-5"], ["optim.lr", "no preference stage", "sft.optim.lr"]),
    (["loss=none", "data.limit=5"], ["data.limit", "sft.data.limit"]),
    (["loss=none", "reference=live"], ["reference has no effect", "no preference stage."]),
    (["loss=orpo", "reference.for_metrics=false", "reference=live"], ["reference", "orpo", "for_metrics"]),
    (["loss=orpo", "reference.for_metrics=false", "reference.mode=live"], ["reference.mode", "orpo", "for_metrics"]),
    (["loss=orpo", "reference.for_metrics=false", "reference.spot_checks=9"], ["reference.spot_checks", "orpo"]),
    (["reference=live", "reference.spot_checks=9"], ["reference.spot_checks", "live"]),
    (["trainer.max_steps=5", "trainer.epochs=2"], ["trainer.epochs", "trainer.max_steps=5"]),
    (["sft.trainer.max_steps=5", "sft.trainer.epochs=2"], ["sft.trainer.epochs", "sft.trainer.max_steps=5"]),
    (["evaluation.prompts=0", "evaluation.temperature=1"], ["evaluation.temperature", "evaluation.prompts=0"]),
    (["evaluation.prompts=0", "evaluation.max_new_tokens=9"], ["evaluation.max_new_tokens"]),
    (["export.dtype=float32"], ["export.dtype", "export.merge"]),
    (["-m", "trainer.max_steps=null,5", "trainer.epochs=2"], ["trainer.epochs", "trainer.max_steps=5"]),
    # Settings that cannot be read
    (["loss.beta"], ["'loss.beta'", "key=value"]),
    (["=3"], ["'=3'", "key=value"]),
    (["a b"], ["'a b'", "key=value"]),
    ([""], ["''", "key=value"]),
    (["loss.beta=[1"], ["loss.beta=[1 cannot be read"]),
    (["loss.beta=???"], ["loss.beta"]),
    (["loss.beta=0.1,0.2"], ["loss.beta", "-m starts one run for each value"]),
    # Options of the command
    (["--multi-run"], ["--multi-run", "did you mean --multirun?"]),
    (["--confg-dir", "x"], ["did you mean --config-dir?"]),
    (["--config-name", "other"], ["--config-name"]),
    (["--cfg"], ["--cfg", "job"]),
    (["--cfg", "loss.beta=1"], ["--cfg", "job"]),
    (["--cfg", "job", "loss.bta=1"], ["bta"]),
    (["-m", "--cfg", "job"], ["--cfg", "-m"]),
    (["--resolve"], ["--resolve", "--cfg job"]),
    (["data=null"], ["data=null", "name of an option"]),
    (["--config-dir"], ["--config-dir"]),
    (["--config-dir", "absent"], ["--config-dir", "absent"]),
    # A sweep is looked at as a whole
    (["-m", "loss.beta=0.1,-0.1"], ["loss.beta", "-0.1"]),
    (["-m", "loss=dpo,nope"], ["nope"]),
    (["-m", "loss=dpo,kto", "trainer.groups_per_step=4,1"], ["trainer.groups_per_step", "kto"]),
    (["-m", "loss.beta=0.1,0.2", "resume=true"], ["resume"]),
    (["-m", "loss.beta"], ["'loss.beta'"]),
    # Nothing to resume
    (["hydra.mode=MULTIRUN"], ["hydra.mode", "-m"]),
    (["resume=true"], ["resume=true", "quickstart"]),
    (["recipe=quickstart", "resume=True"], ["resume=true", "quickstart"]),
    (["resume=tru"], ["resume=tru", "config.yaml"]),
    (["resume=."], ["resume=.", "config.yaml"]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "said"), WRONG, ids=[" ".join(arguments) or "nothing" for arguments, _ in WRONG])
def test_wrong_settings(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        check_arguments(["recipe=quickstart", *arguments] if "-m" in arguments else arguments)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    assert all(part in message for part in said), message
    assert not list(tmp_path.iterdir())


OUT_OF_RANGE = [
    "adapter.alpha=inf",
    "adapter.dropout=1",
    "adapter.target_modules=[]",
    "data.max_length=1",
    "data.max_prompt_length=256",
    "data.max_bad_rows=-1",
    "data.limit=0",
    "optim.lr=0",
    "optim.lr=inf",
    "optim.lr=nan",
    "optim.warmup_ratio=1",
    "optim.beta2=1",
    "sft.optim.lr=-1",
    "trainer.epochs=inf",
    "trainer.max_steps=0",
    "trainer.groups_per_step=0",
    "trainer.eval_every=-1",
    "reference.spot_checks=-1",
    "evaluation.temperature=-1",
    "evaluation.max_new_tokens=0",
    "loss.beta=0",
]


@functools.cache
def composed() -> DictConfig:
    register()
    return compose_node(["recipe=quickstart"])


@pytest.mark.parametrize("argument", OUT_OF_RANGE)
def test_a_value_out_of_its_range_is_named(argument):
    """In each section, and without composing the others for each: what `check_arguments` does with a whole run."""
    node = copy.deepcopy(composed())
    [override] = parse_overrides([argument])
    OmegaConf.update(node, override.key_or_group, override.value())
    with pytest.raises(UserError) as caught:
        to_run_config(node)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    assert all(part in message for part in argument.split("=")[: 1 if "[" in argument else 2]), message


# What else a file can have wrong: tests/config/test_recipes.py.
WRONG_FILES = [
    ("recipe/mine.yaml", b"# @package _global_\ntrainer: {epoch: 1}\n", ["epoch", "epochs"]),
    ("recipe/mine.yaml", b"# @package _global_\noptim: {lr: -1}\n", ["optim.lr", "-1"]),
    ("model/mine.yaml", b"defaults: [/schema/model]\nname: x\n", ["No value", "model.attention", "model.revision"]),
    ("recipe/mine.yaml", b"# @package _global_\ndefaults: [{override /loss: nope}]\n", ["nope"]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "content", "said"), WRONG_FILES, ids=range(len(WRONG_FILES)))
def test_wrong_files(name, content, said, tmp_path, monkeypatch):
    path = tmp_path / name
    path.parent.mkdir()
    path.write_bytes(content)
    monkeypatch.chdir(tmp_path.parent)
    before = sorted(Path.cwd().iterdir())
    with pytest.raises(UserError) as caught:
        check_arguments([f"--config-dir={tmp_path}", "model=mine" if "model/" in name else "recipe=mine"])
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    assert all(part in message for part in said), message
    assert sorted(Path.cwd().iterdir()) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["loss=orpo", "reference=live", "reference.for_metrics=true"],
        ["loss=orpo", "reference.for_metrics=false", "reference=cache", "reference.path=x"],
        ["loss=tdpo1", "reference=live"],
        ["reference.spot_checks=9", "trainer.epochs=2"],
        ["trainer.max_steps=5", "sft.trainer.epochs=2"],
        ["evaluation.prompts=0", "evaluation.judge=none"],
        ["export.merge=true", "export.dtype=float32"],
        ["loss=none", "sft.optim.lr=1e-5", "sft.trainer.epochs=2", "evaluation.prompts=0", "seed=3"],
        ["adapter=none", "quantization=none", "tracking=none", "loss.beta=1"],
    ],
    ids=" ".join,
)
def test_what_has_an_effect_is_accepted(arguments):
    load("recipe=quickstart", *arguments)


@pytest.mark.slow
@pytest.mark.skipif(platform.system() != "Linux", reason="other systems have another OpenMP")
@pytest.mark.parametrize(
    ("own", "spins"),
    [
        ({}, "1000"),
        pytest.param({"GOMP_SPINCOUNT": "7"}, "7", marks=pytest.mark.matrix),
        pytest.param({"OMP_WAIT_POLICY": "PASSIVE"}, "0", marks=pytest.mark.matrix),
    ],
)
def test_openmp_hears_how_long_threads_spin(own, spins):
    """It says itself what it has read: too late a setting would not be in it."""
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    said = subprocess.run(
        [sys.executable, "-c", "import alignment.run, torch"],
        env=environment | own | {"OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    assert f"GOMP_SPINCOUNT = '{spins}'" in said


def test_mappings_take_new_keys_without_a_plus():
    config = load("data.columns={prompt: question}", "data.template_kwargs.enable_thinking=false")
    assert (config.data.columns, config.data.template_kwargs) == ({"prompt": "question"}, {"enable_thinking": False})


def test_a_folder_that_holds_a_run_is_not_used_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yaml").touch()
    with pytest.raises(UserError, match="holds a run already: continue it with resume=mine"):
        check_arguments(["hydra.run.dir=mine"])


# Refused by the run itself, on the tiny model: one of each kind in a process of its own.


def hide_gpus():
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


REJECTED = "rejected_rows.jsonl"


def refusal(project: Path, folder: Path, *overrides: str) -> str:
    """What a run of the recipe `tiny` in this process says, which has trained nothing by then."""
    register(project)
    node = compose_node(["recipe=tiny", *overrides])
    config = to_run_config(node)

    def run() -> None:
        check_machine(config)
        Chain(config, folder, "tiny", as_plain(node)).run()

    with pytest.raises(UserError) as caught:
        run()
    assert not (folder / "stages").exists()
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    return message


def broken_data(folder: Path, name: str) -> Path:
    """One of the ways in which a data file can be wrong, in its second row where it is a matter of rows."""
    path = folder / f"{name}.jsonl"
    rows = [pair(number) for number in range(1, 7)]
    if name == "no_file":
        return path
    if name == "empty_folder":
        path = folder / name
        path.mkdir()
        return path
    if name == "empty_answer":
        rows[1]["chosen"] = [{"role": "assistant", "content": " "}]
    if name == "unknown_layout":
        rows = [{"question": "a", "warm": "b", "cold": "c"}]
    if name == "unpaired":
        rows = [{"prompt": "a", "completion": f"b{i}", "label": i % 2 == 0} for i in range(4)]
    if name == "no_answers":
        rows = [{key: value for key, value in row.items() if key != "answer"} for row in rows]
    write_lines(path, rows)
    lines = path.read_bytes().splitlines()
    if name == "broken_line":
        lines[1] = lines[1][:-5]
    if name == "not_utf8":
        lines[1] = lines[1].replace(b"Add", b"\xe4")
    path.write_bytes(b"\n".join(lines))
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("not_utf8", [], ["not_utf8.jsonl", "row 2: the line is not UTF-8", REJECTED]),
        ("empty_answer", [], ["empty_answer.jsonl", "row 2: the answer is empty", REJECTED]),
        ("no_file", [], ["no_file.jsonl"]),
        ("empty_folder", [], ["empty_folder", ".jsonl"]),
        ("unknown_layout", [], ["unknown_layout.jsonl", "question", "chosen", "data.columns"]),
        ("unpaired", ["data.eval_source=null"], ["dpo", "unpaired.jsonl:1", "kto"]),
        ("no_answers", ["evaluation.judge=rules", "data.eval_source=null", "data.eval_size=2"], ["judge", "answer"]),
    ],
)
def test_wrong_data(name, arguments, said, project, tmp_path):
    source = broken_data(tmp_path, name)
    message = refusal(project, tmp_path / "run", f"data.source='{source}'", *arguments)
    assert all(part in message for part in said), message
    assert (tmp_path / "run" / REJECTED).exists() == (REJECTED in said)


@pytest.mark.matrix
def test_wrong_data_leave_the_bad_rows_behind_and_nothing_else(tiny, tmp_path, tmp_path_factory):
    source = broken_data(tmp_path_factory.mktemp("data"), "broken_line")
    said = ("broken_line.jsonl", "row 2: the line is not valid JSON", REJECTED)
    assert_refused(tiny(f"data.source='{source}'"), tmp_path, *said, left=(REJECTED,))
    [path] = tmp_path.rglob(REJECTED)
    [row] = [json.loads(line) for line in path.read_text().splitlines()]
    assert row["file"] == str(source) and row["row"] == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["model.name=./absent"], ["model.name", "./absent", "does not exist"]),
        (["model.name='{data}'"], ["model.name", "config.json"]),
        (["model.name='{no_weights}'"], ["model.name", "{no_weights}", "safetensors"]),
        (["model.name=nobody/nothing"], ["nobody/nothing"]),
        (["model.attention=fastest"], ["model.attention", "fastest"]),
        (["model.chat_template=absent.jinja"], ["model.chat_template", "absent.jinja"]),
        (["optim.name=adam_torch"], ["optim.name", "adam_torch", "adamw_torch"]),
        (["sft.optim.schedule=cosin"], ["sft.optim.schedule", "cosin", "cosine"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_wrong_model_or_optimizer(arguments, said, project, tmp_path, tiny_model_folder):
    no_weights = tmp_path / "no_weights"
    shutil.copytree(tiny_model_folder, no_weights, ignore=shutil.ignore_patterns("*.safetensors"))
    places = {"data": project.parent / "data", "no_weights": no_weights}
    message = refusal(project, tmp_path / "run", *(argument.format(**places) for argument in arguments))
    assert all(part.format(**places) in message for part in said), message


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argument", "said"), [("adapter.target_modules=[nope]", ["adapter", "nope"]), ("device=cuda", ["CUDA"])]
)
def test_a_wrong_model_or_machine_leaves_nothing_behind(argument, said, tiny, tmp_path):
    assert_refused(tiny(argument, patch=hide_gpus), tmp_path, *said)


def real_command(cwd: Path, *arguments: str) -> Ended:
    """The command as a user types it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "alignment.run", *arguments]
    ended = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=patience(120))
    return Ended(ended.returncode, ended.stdout, ended.stderr)


@pytest.mark.slow
def test_a_process_of_its_own_ends_with_status_1(project, tmp_path):
    """As it does where the run itself refuses: test_without_the_hub_a_qwen3_recipe_stops_at_once."""
    assert_refused(real_command(tmp_path, f"--config-dir={project}", "loss.bta=1"), tmp_path, "bta")


@pytest.mark.slow
def test_help_and_configuration(tmp_path, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    shown = command("--help", cwd=tmp_path, cache=cache)
    assert shown.code == 0 and not shown.err
    assert all(f"\n  {group}: " in shown.out for group in ("loss", "recipe", "quantization"))
    assert "simpo" in shown.out and "quickstart" in shown.out
    assert "schema" not in shown.out and "@" not in shown.out and "hydra" not in shown.out.lower()
    assert max(map(len, shown.out.splitlines())) <= 80
    commands = [line for line in shown.out.splitlines() if "python -m" in line]
    assert "recipe=quickstart" in commands[0] and "recipe=dpo_qwen3" in commands[1]
    shown = command("--cfg", "job", "loss=ipo", cwd=tmp_path, cache=cache)
    assert shown.code == 0 and not shown.err
    assert "tau: 0.1" in shown.out and "beta:" not in shown.out
    assert not list(tmp_path.iterdir())
