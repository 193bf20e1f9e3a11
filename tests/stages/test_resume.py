"""A run that is killed anywhere and resumed ends as if nothing had happened."""

import os
import re
import shlex
import shutil
import signal
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from alignment.run import main
from tests.helpers.commands import command, write_project
from tests.helpers.runs import TINY, assert_same, at_row, contents, only_run, run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_model_folder):
    """The configuration folder with the recipe `tiny`."""
    return write_project(tmp_path_factory.mktemp("project"), tiny_model_folder)


def finish(project: Path, cwd: Path, *arguments: str) -> Path:
    ended = run(project, cwd, *arguments)
    assert ended.code == 0, ended.err
    return only_run(cwd)


@pytest.fixture(scope="module")
def uninterrupted(project, tmp_path_factory) -> Path:
    return finish(project, tmp_path_factory.mktemp("uninterrupted"), *TINY)


# What happens in the process that is to be interrupted. Each is called in it before the command starts.


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def in_checkpoint(step):
    """When the weights are written, the optimizer's state by half, and all else is not."""
    from transformers import Trainer

    save = Trainer._save_optimizer_and_scheduler

    def patched(self, output_dir):
        if output_dir.endswith(f"checkpoint-{step}"):
            (Path(output_dir) / "optimizer.pt").write_bytes(b"PK")
            die()
        save(self, output_dir)

    Trainer._save_optimizer_and_scheduler = patched


def in_rotation(step):
    """When the first file of the old checkpoint is removed and the others are not."""
    import alignment.training.callbacks

    def patched(path):
        if (path.parent / f"checkpoint-{step}").exists():
            next(path.glob("*.safetensors")).unlink()
            die()
        shutil.rmtree(path)

    alignment.training.callbacks.shutil = SimpleNamespace(rmtree=patched)


def in_reference():
    """When a few reference log-probs are stored and the others are not."""
    from alignment.reference import cached
    from alignment.reference.cached import CachedReference

    flush = CachedReference._flush
    compute = CachedReference._compute

    def patched_compute(self, missing):
        self._tokens_per_batch = 400
        compute(self, missing)

    def patched(self, pending):
        flush(self, pending)
        die()

    cached._SEQUENCES_PER_WRITE = 1
    CachedReference._compute, CachedReference._flush = patched_compute, patched


def before_done(stage):
    from alignment.stages import chain

    write = chain.write_result

    def patched(folder, *arguments):
        if folder.name == stage:
            die()
        write(folder, *arguments)

    chain.write_result = patched


def in_final_policy():
    """When the weights of the final policy are written by half."""
    from alignment.stages import chain as stages

    save = stages.save_trained

    def patched(model, tokenizer, folder):
        save(model, tokenizer, folder)
        if folder.name == "adapter.partial":
            weights = folder / "adapter_model.safetensors"
            weights.write_bytes(weights.read_bytes()[:1000])
            die()

    stages.save_trained = patched


def before_answers(name):
    from alignment.stages.answers import HeldOutAnswers

    collect = HeldOutAnswers.collect

    def patched(self, at_name, model):
        if at_name == name:
            die()
        collect(self, at_name, model)

    HeldOutAnswers.collect = patched


def before_summary():
    from alignment.runs.record import RunRecord

    RunRecord.write_summary = lambda self, summary: die()


CHAIN = [
    # Where the process is killed, and what the next one says of where it goes on. The rows of SFT, 8 steps in 2 epochs,
    # are at the steps 2, 3, 4, 6, 8, its checkpoints at 3, 6; those of DPO, 8 steps in 3 epochs, are at 2, 3, 4, 6, 8,
    # its checkpoints at 2, 4, 6, of which one is kept.
    (partial(at_row, "sft", 2), "Loading"),
    (partial(in_checkpoint, 6), "SFT continues from step 3."),
    (partial(before_done, "sft"), "SFT continues from step 6."),
    (partial(before_answers, "sft"), "Stage sft is done already."),
    (in_reference, "of 28 completions stored"),
    (partial(at_row, "preference", 3), "The preference stage continues from step 2."),
    (partial(in_rotation, 6), "The preference stage continues from step 6."),
    (in_final_policy, "The preference stage continues from step 6."),
    (partial(before_answers, "final"), "Stage preference is done already."),
    (before_summary, "Stage preference is done already."),
]


def test_a_run_killed_everywhere_ends_like_one_that_was_not(project, uninterrupted, tmp_path):
    arguments, expected = TINY, "Answering 2 held-out prompts (start)"
    output = ""
    for patch, then in CHAIN:
        ended = run(project, tmp_path, *arguments, patch=patch)
        assert ended.code == -signal.SIGKILL, ended.err
        assert expected in ended.out, (patch, ended.out)
        output += ended.out
        # Both ways to ask for it, by turns.
        arguments = ("recipe=tiny", "resume=true") if then.startswith("SFT") else (f"resume={only_run(tmp_path)}",)
        expected = then
    ended = run(project, tmp_path, *arguments)
    assert ended.code == 0, ended.err
    assert expected in ended.out
    assert_same(only_run(tmp_path), uninterrupted)
    # The killed computation of the reference had stored a part, which the next process found.
    stored = [int(n) for n in re.findall(r"Reference \w+: (\d+) of 28 completions stored", output)]
    assert stored[0] == 0 and 0 < stored[1] < 28 and set(stored[2:]) == {28}


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("settings", "kills"),
    [
        (["adapter=none"], [partial(before_answers, "sft"), partial(at_row, "preference", 6)]),
        (["loss=beta_dpo", "sft=none", "reference=live"], [partial(at_row, "preference", 6)]),
        (
            ["loss=bco", "loss.density_weights=true", "sft=none", "quantization=nf4"],
            [partial(at_row, "preference", 3), partial(at_row, "preference", 8)],
        ),
    ],
    ids=["full fine-tuning", "running state and draws, live reference", "prompt weights, nf4, without sft"],
)
def test_other_kinds_of_runs(settings, kills, project, tmp_path):
    expected = finish(project, tmp_path / "expected", *TINY, *settings)
    cwd, arguments = tmp_path / "killed", (*TINY, *settings)
    for patch in kills:
        ended = run(project, cwd, *arguments, patch=patch)
        assert ended.code == -signal.SIGKILL, ended.err
        arguments = (f"resume={only_run(cwd)}",)
    assert_same(finish(project, cwd, *arguments), expected)


@pytest.mark.matrix
def test_a_member_of_a_sweep_is_resumed_on_its_own(project, uninterrupted, tmp_path):
    ended = run(project, tmp_path, *TINY, "-m", "loss.beta=0.1,0.2", patch=partial(at_row, "preference", 6))
    assert ended.code == -signal.SIGKILL, ended.err
    [member] = tmp_path.glob("outputs/sweeps/*/0-tiny")
    ended = run(project, tmp_path, f"resume={member}")
    assert ended.code == 0, ended.err
    assert_same(member, uninterrupted)


def interrupted_once_it_trains():
    """Ctrl-C, wherever the process is by then."""

    def interrupt():
        while not any(path.stat().st_size for path in Path().glob("outputs/tiny/*/metrics.jsonl")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()


def test_ctrl_c_says_how_to_go_on(project, uninterrupted, tmp_path):
    ended = run(project, tmp_path, *TINY, patch=interrupted_once_it_trains)
    assert ended.code == 1
    assert "Traceback" not in ended.err
    [said] = (line for line in ended.err.splitlines() if line.startswith("Interrupted; "))
    assert said.startswith("Interrupted; continue with: python -m alignment.run --config-dir ")
    ended = command(*shlex.split(said)[6:], cwd=tmp_path, cache=tmp_path / "cache")
    assert ended.code == 0, ended.err
    assert_same(only_run(tmp_path), uninterrupted)


def _damaged(run_dir, folder):
    """Copies of an unfinished run with a record of its overrides that was cut, or is none, and what is said of each."""
    text = (run_dir / ".hydra" / "overrides.yaml").read_text()
    some = text.splitlines(keepends=True)[:-1]
    for number, cut in enumerate(
        [text[:-2], "".join(some), "", "a: 1\n", "- [1]\n", "3\n", "- trainer.max\n", "- :\n"]
    ):
        copy = shutil.copytree(run_dir, folder / f"damaged{number}")
        (copy / ".hydra" / "overrides.yaml").write_text(cut)
        yield copy, [str(copy), "overrides.yaml"]


def test_what_cannot_be_resumed_is_left_as_it_is(project, uninterrupted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    unfinished = tmp_path / "outputs" / "tiny" / "2026-01-01_00-00-00"
    shutil.copytree(uninterrupted, unfinished)
    (unfinished / "summary.json").unlink()
    for arguments, said in (
        ([f"resume={unfinished}", "optim.lr=0.5"], ["optim.lr", "0.01 then", "0.5 now"]),
        ([*TINY, "resume=true", "seed=1"], ["seed", "0 then", "1 now"]),
        ([f"resume={unfinished}", "loss=ipo"], ["loss", "differs"]),
        ([f"resume={uninterrupted}"], ["finished", "summary.json"]),
        ([f"resume={unfinished}/stages"], ["no run folder"]),
        (["recipe=quickstart", "resume=true"], ["no unfinished run", "quickstart"]),
        *(([f"resume={folder}"], said) for folder, said in _damaged(unfinished, tmp_path)),
    ):
        before = contents(tmp_path / "outputs"), contents(uninterrupted)
        with pytest.raises(SystemExit) as caught:
            main(["--config-dir", str(project), *arguments])
        [line] = str(caught.value).splitlines()
        assert line.startswith("Error: ") and line.endswith(".") and all(part in line for part in said), line
        assert (contents(tmp_path / "outputs"), contents(uninterrupted)) == before
    # The same settings once more are no change.
    ended = run(project, tmp_path, *TINY, f"resume={unfinished}", "optim.lr=0.01")
    assert ended.code == 0, ended.err
    assert_same(unfinished, uninterrupted)


def test_a_run_whose_data_have_changed_is_not_resumed(tmp_path, tiny_model_folder):
    project = write_project(tmp_path / "project", tiny_model_folder)
    cwd = tmp_path / "run"
    assert run(project, cwd, *TINY, "sft=none", patch=partial(at_row, "preference", 3)).code == -signal.SIGKILL
    pairs = tmp_path / "project" / "data" / "pairs.jsonl"
    lines = pairs.read_text(encoding="utf-8")
    pairs.write_text(lines.replace("Perhaps", "Possibly", 1), encoding="utf-8")
    ended = run(project, cwd, f"resume={only_run(cwd)}")
    assert ended.code == 1
    assert ended.err.splitlines()[-1].startswith(
        "Error: A resumed run keeps its data and its policy, but the rows of the preference data have"
    )
    pairs.write_text(lines, encoding="utf-8")
    assert run(project, cwd, f"resume={only_run(cwd)}").code == 0
