"""Stages that are done are kept under all that they depend on, and taken over without a trace but the time."""

from __future__ import annotations

import json
import logging
import re
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch

from alignment.data.preparation.digests import sequences_digest
from alignment.stages import store as stage_store
from alignment.stages.store import StageStore, StoredStage, stage_key
from tests.conftest import tiny_policy
from tests.helpers.commands import command, write_project
from tests.helpers.patience import patience
from tests.helpers.runs import at_row, metric_rows, same_code

KEY = "0123456789abcdef" * 2
TOKENS = [[{"input_ids": [1, 2, 3], "completion_mask": [0, 1, 1]}], []]


@pytest.fixture
def policy(tmp_path) -> Path:
    folder = tmp_path / "policy"
    (folder / "deep").mkdir(parents=True)
    (folder / "weights").write_bytes(bytes(range(256)))
    (folder / "deep" / "config.json").write_text("{}")
    return folder


def test_a_result_is_kept_whole(policy, tmp_path):
    store = StageStore(tmp_path / "cache" / "stages")
    assert store.take(KEY, tmp_path / "taken") is None
    store.put(KEY, policy, {"loss": float("nan"), "identity": "abc"})
    content = store.take(KEY, tmp_path / "taken")
    assert (content["identity"], content["loss"]) == ("abc", "NaN")
    taken = {path.relative_to(tmp_path / "taken").as_posix(): path for path in (tmp_path / "taken").rglob("*.*")}
    assert (tmp_path / "taken" / "weights").read_bytes() == bytes(range(256))
    assert taken["deep/config.json"].read_text() == "{}"
    assert not list((tmp_path / "cache" / "stages").glob(".*")) and not list(tmp_path.glob("*.partial"))
    [stored] = store.stored()
    assert stored.key == KEY and stored.bytes > 258 and abs(stored.last_used - time.time()) < 60


@pytest.mark.parametrize("damage", ["flipped", "missing", "extra", "cut", "changed content", "no entry"])
def test_a_damaged_result_is_dropped(damage, policy, tmp_path, caplog):
    store = StageStore(tmp_path / "stages")
    store.put(KEY, policy, {"identity": "abc"})
    kept = tmp_path / "stages" / KEY
    if damage == "flipped":
        (kept / "policy" / "weights").write_bytes(bytes(reversed(range(256))))
    elif damage == "missing":
        (kept / "policy" / "deep" / "config.json").unlink()
    elif damage == "extra":
        (kept / "policy" / "more").touch()
    elif damage == "cut":
        (kept / "entry.json").write_bytes((kept / "entry.json").read_bytes()[:-9])
    elif damage == "changed content":
        (kept / "entry.json").write_text((kept / "entry.json").read_text().replace("abc", "abd"))
    else:
        (kept / "entry.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert store.take(KEY, tmp_path / "taken") is None
    [record] = caplog.records
    assert KEY[:12] in record.getMessage() and "computed again" in record.getMessage()
    assert not kept.exists() and not (tmp_path / "taken").exists() and not list(tmp_path.glob("*.partial"))


def test_verify_drops_what_is_damaged(policy, tmp_path):
    store = StageStore(tmp_path / "stages")
    other = KEY[::-1]
    for key in (KEY, other):
        store.put(key, policy, {})
    (tmp_path / "stages" / other / "policy" / "weights").write_bytes(b"")
    assert store.verify() == (1, [other])
    assert [stage.key for stage in store.stored()] == [KEY]


def test_the_key_changes_with_everything_that_counts(monkeypatch):
    """Also with what was drawn for an adapter that has no effect yet."""
    settings = {"seed": 0}
    model = tiny_policy()
    key = stage_key(model, sequences_digest(*TOKENS), settings)
    assert key == stage_key(tiny_policy(), sequences_digest(*TOKENS), settings)
    more = [[{"input_ids": [1, 2, 4], "completion_mask": [0, 1, 1]}], []]
    moved = [[], TOKENS[0]]
    masked = [[{"input_ids": [1, 2, 3], "completion_mask": [0, 0, 1]}], []]
    others = [stage_key(model, sequences_digest(*tokens), settings) for tokens in (more, moved, masked)]
    others.append(stage_key(model, sequences_digest(*TOKENS), {"seed": 1}))
    others.append(stage_key(tiny_policy(r=2), sequences_digest(*TOKENS), settings))
    others.append(stage_key(tiny_policy(r=None), sequences_digest(*TOKENS), settings))
    others.append(stage_key(tiny_policy(dtype=torch.float32), sequences_digest(*TOKENS), settings))
    drawn = next(p for name, p in model.named_parameters() if "lora_A" in name)
    with torch.no_grad():
        drawn[0, 0] += 1e-12
    others.append(stage_key(model, sequences_digest(*TOKENS), settings))
    for name, value in (("_code", lambda: "other"), ("versions", lambda: {"torch": "1.0"})):
        with monkeypatch.context() as patched:
            patched.setattr(stage_store, name, value)
            others.append(stage_key(tiny_policy(), sequences_digest(*TOKENS), settings))
    assert len({key, *others}) == len(others) + 1
    assert key == stage_key(tiny_policy(), sequences_digest(*TOKENS), settings)


def test_the_key_changes_with_the_code_of_every_wing(tmp_path, monkeypatch):
    """A result of another version is never reused: its key is another one, whichever wing has changed."""
    root = Path(stage_store.__file__).parents[1]
    package = tmp_path / "alignment"
    shutil.copytree(root, package, ignore=shutil.ignore_patterns("__pycache__", "bundled"))
    monkeypatch.setattr(stage_store.alignment, "__file__", str(package / "__init__.py"))
    code = stage_store._code.__wrapped__
    found = {code()}
    wings = sorted(path.parent for path in package.glob("*/__init__.py"))
    assert {"stages", "losses", "kernels", "data"} <= {wing.name for wing in wings}
    for changed in [package / "files.py", *(min(wing.rglob("*.py")) for wing in wings)]:
        text = changed.read_bytes()
        changed.write_bytes(text + b"\n")
        found.add(code())
        changed.write_bytes(text)
    assert len(found) == 2 + len(wings)

    store = StageStore(tmp_path / "stages")
    monkeypatch.setattr(stage_store, "_code", code)
    old = stage_key(tiny_policy(), sequences_digest(*TOKENS), {})
    store.put(old, None, {})
    (package / "losses" / "dpo.py").write_text("pass\n")
    assert store.take(stage_key(tiny_policy(), sequences_digest(*TOKENS), {})) is None
    assert store.take(old) is not None


def test_a_second_process_waits(policy, tmp_path, caplog):
    store, order = StageStore(tmp_path / "stages"), []

    def second():
        with StageStore(tmp_path / "stages").locked(KEY):
            order.append(store.take(KEY, tmp_path / "taken"))

    thread = threading.Thread(target=second)
    with caplog.at_level(logging.INFO), store.locked(KEY):
        thread.start()
        while not caplog.records:
            time.sleep(0.01)
        order.append("first")
        store.put(KEY, policy, {"identity": "abc"})
    thread.join(patience(30))
    assert order[0] == "first" and order[1]["identity"] == "abc"
    assert "waiting" in caplog.text


# Through the command


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_model_folder) -> Path:
    return write_project(tmp_path_factory.mktemp("project"), tiny_model_folder)


def counting_loads():
    from alignment.stages import policy as stages

    same_code()
    load = stages.load_base

    def patched(*arguments):
        print("A base model is read.")
        return load(*arguments)

    stages.load_base = patched


def run(project: Path, cwd: Path, cache: Path, *arguments: str, patch=same_code):
    cwd.mkdir(exist_ok=True)
    config = ("--config-dir", str(project), "recipe=tiny", "evaluation.prompts=2")
    ended = command(*config, "hydra.run.dir=out", *arguments, cwd=cwd, cache=cache, patch=patch)
    return ended, cwd / "out"


def results(cache: Path, stage: str) -> list[StoredStage]:
    return [kept for kept in StageStore(cache / "stages").stored() if kept.content["description"]["stage"] == stage]


def assert_same(found: Path, expected: Path) -> None:
    assert metric_rows(found) == metric_rows(expected)
    files = [path.relative_to(expected) for path in expected.rglob("*.safetensors")]
    assert len(files) == 2, "the final policy and that of SFT"
    for file in files:
        assert (found / file).read_bytes() == (expected / file).read_bytes()
    assert (found / "samples.jsonl").read_text() == (expected / "samples.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [(), pytest.param(("adapter=none",), marks=pytest.mark.matrix)], ids=["adapter", "whole model"]
)
def test_sft_is_done_once_and_the_runs_are_the_same(settings, project, tmp_path):
    cache = tmp_path / "cache"
    alone, expected = run(project, tmp_path / "alone", tmp_path / "other", *settings, "loss.beta=0.3")
    ended, first = run(project, tmp_path / "first", cache, *settings)
    assert (alone.code, ended.code) == (0, 0), alone.err + ended.err
    assert "SFT was done before" not in ended.out
    ended, second = run(project, tmp_path / "second", cache, *settings, "loss.beta=0.3", patch=counting_loads)
    assert ended.code == 0, ended.err
    loads = 2 if settings else 1  # an adapter's weights are put into the model that is there
    assert ended.out.count("A base model is read.") == loads
    [stored] = results(cache, "sft")
    assert f"SFT was done before ({stored.key[:12]})." in ended.out
    assert_same(second, expected)
    for name in ("start", "sft", "final"):
        assert f"Answering 2 held-out prompts ({name})" in ended.out
    drawn = re.findall(r"(\d+) answers of \d+ tokens were drawn, (\d+) were there before", ended.out)
    assert drawn == [("0", "2"), ("0", "2"), ("2", "0")], "of the start, after SFT, and at the end"
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (second, expected, first)]
    assert summaries[0]["evaluation"] == summaries[1]["evaluation"]
    assert summaries[0]["stages"]["sft"] == summaries[2]["stages"]["sft"] | {"taken_over": stored.key}
    assert metric_rows(first) != metric_rows(second), "beta is another one"


@pytest.mark.matrix
def test_what_changes_sft_is_trained_and_what_does_not_is_not(project, tmp_path):
    cache = tmp_path / "cache"
    small = ("sft.trainer.max_steps=1", "trainer.max_steps=1", "evaluation.prompts=0")
    for number, (arguments, count) in enumerate(
        [
            ((), 1),
            (("seed=1", "sft.seed=0", "loss=simpo", "optim.lr=1e-3", "trainer.max_steps=2"), 1),
            (("seed=1",), 2),
            (("sft.optim.lr=1e-3",), 3),
            (("adapter.dropout=0.1",), 4),
        ]
    ):
        ended, _ = run(project, tmp_path / str(number), cache, *small, *arguments)
        assert ended.code == 0, ended.err
        assert len(results(cache, "sft")) == count, arguments


@pytest.mark.slow
def test_a_result_that_is_not_what_was_kept_is_trained_again(project, tmp_path):
    cache = tmp_path / "cache"
    _, first = run(project, tmp_path / "first", cache)

    # Its file is damaged.
    [weights_file] = cache.glob("stages/*/policy/adapter_model.safetensors")
    data = bytearray(weights_file.read_bytes())
    data[-1] ^= 1
    weights_file.write_bytes(data)
    ended, second = run(project, tmp_path / "second", cache)
    assert ended.code == 0, ended.err
    assert "is damaged" in ended.out and "SFT was done before" not in ended.out
    assert_same(second, first)

    # It is another policy: SFT begins from the adapter that was drawn, although the other's weights were in its place.
    [kept], store = results(cache, "sft"), StageStore(cache / "stages")
    store.drop(kept.key)
    store.put(kept.key, first / "stages" / "sft" / "policy", kept.content | {"identity": "0" * 64})
    ended, third = run(project, tmp_path / "third", cache)
    assert ended.code == 0, ended.err
    assert "holds another policy than it says: SFT is done again" in ended.out
    assert_same(third, first)


@pytest.mark.matrix
def test_a_run_killed_in_sft_takes_over_what_another_has_done_since(project, tmp_path):
    cache = tmp_path / "cache"
    killed, second = run(project, tmp_path / "second", cache, patch=at_step_6)
    assert killed.code == -9, killed.err
    _, first = run(project, tmp_path / "first", cache)
    ended = command("--config-dir", str(project), "resume=out", cwd=tmp_path / "second", cache=cache, patch=same_code)
    assert ended.code == 0, ended.err
    assert "SFT was done before" in ended.out
    assert_same(second, first)
    assert not list(second.rglob("checkpoint-*"))


def at_step_6():
    same_code()
    at_row("sft", 6)
