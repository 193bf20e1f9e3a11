"""`trainer.devices`: what it may be, where it has no effect, and that it may change when a run goes on."""

from types import SimpleNamespace

import pytest
import torch

from alignment.config.arguments import check_arguments
from alignment.config.compose import load
from alignment.errors import UserError
from alignment.ranks.launch import idle_gpus
from alignment.ranks.place import Place
from alignment.run import require_team
from alignment.stages import sharing
from alignment.stages.sharing import shares_base
from tests.conftest import tiny_config

SMALL = ("recipe=quickstart",)
JOBS = ["hydra/launcher=submitit_slurm"]


def needs_submitit(arguments: list[str]) -> None:
    if JOBS[0] in arguments:
        pytest.importorskip(
            "hydra_plugins.hydra_submitit_launcher",
            reason="PLUGIN ABSENT: hydra_submitit_launcher is not installed: this did not run",
        )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trainer.devices=0"], "trainer.devices must be auto or at least 1, not 0"),
        (["trainer.devices=all"], "trainer.devices must be auto or at least 1, not all"),
        (["sft.trainer.devices=2"], "the SFT stage has the ranks of the run: set trainer.devices"),
        (["sft.trainer.shard=node"], "the SFT stage has the ranks of the run: set trainer.shard"),
        (["-m", "trainer.shard=node", "loss.beta=0.1,0.2"], "a sweep trains each member in one process"),
        (["-m", "trainer.devices=2", "loss.beta=0.1,0.2"], "give each a job with hydra/launcher=submitit_slurm"),
        (["-m", "trainer.devices=2", *JOBS, "hydra.launcher.tasks_per_node=4"], "starts 4 tasks for each member"),
        (["-m", "trainer.devices=1,2", *JOBS], "trainer.devices=1 and trainer.devices=2 in one sweep"),
        (JOBS, "hydra/launcher=submitit_slurm starts the jobs of a sweep: add -m"),
    ],
)
def test_what_cannot_be_is_refused(arguments, said):
    """One sentence says which key, and what to do."""
    needs_submitit(arguments)
    with pytest.raises(UserError, match=said):
        check_arguments([*SMALL, *arguments])


def test_the_launcher_decides_how_many_ranks_there_are():
    """A number of one's own may be left out, be auto or be right."""
    for value in ("1", "auto", "4"):
        require_team(load(*SMALL, f"trainer.devices={value}"), SimpleNamespace(size=4))
    with pytest.raises(UserError, match=r"trainer.devices=2, and the launcher has started 4 ranks: leave it out"):
        require_team(load(*SMALL, "trainer.devices=2"), SimpleNamespace(size=4))


@pytest.mark.parametrize(
    ("arguments", "ranks", "said"),
    [
        ([], 1, "trainer.shard=node shares the base among the ranks of a machine, and there is one"),
        (["adapter=none", "optim.name=muon"], 2, "optim.name=muon needs whole weights or saves states of another form"),
        (["adapter=none", "reference=live"], 2, "a live reference would be a second whole model"),
    ],
)
def test_a_base_that_cannot_be_shared_is_refused_before_it_is_loaded(arguments, ranks, said):
    team = SimpleNamespace(place=Place(0, ranks, 0, ranks)) if ranks > 1 else None
    config = load(*SMALL, "trainer.shard=node", *arguments)
    with pytest.raises(UserError, match=said):
        shares_base(config, team, torch.device("cpu"), None, None)


@pytest.mark.parametrize(("memory", "shared"), [(24 * 2**30, False), (2**28, True)])
def test_a_base_is_shared_where_the_plan_finds_a_gpu_too_small(memory, shared, monkeypatch, caplog):
    """By the GPU that has the least memory of all ranks; one line says which and why."""
    monkeypatch.setattr(sharing, "read_config", lambda *_: tiny_config())
    team = SimpleNamespace(place=Place(0, 2, 0, 2), size=2, run=lambda *_: [2**40, memory])
    caplog.set_level("INFO", "alignment.stages.sharing")
    assert sharing.shares_base(load(*SMALL), team, torch.device("cuda"), None, None) == shared
    [line] = caplog.messages
    said = (
        "share one base (trainer.shard=auto: a run with a whole one does not fit into" if shared else "holds the whole"
    )
    assert said in line


def test_a_base_is_whole_on_cpus_and_where_that_is_set():
    team = SimpleNamespace(place=Place(0, 2, 0, 2))
    for value, device in (("auto", "cpu"), ("off", "cuda")):
        config = load(*SMALL, f"trainer.shard={value}")
        assert not shares_base(config, team, torch.device(device), None, None)
    assert shares_base(load(*SMALL, "trainer.shard=node"), team, torch.device("cpu"), None, None)


def test_a_run_without_preference_stage_has_ranks_too():
    assert load("recipe=sft_qwen3", "trainer.devices=2").trainer.devices == 2


@pytest.mark.parametrize(
    ("devices", "nodes", "tasks"),
    [("2", 1, "hydra.launcher.tasks_per_node=2"), ("auto", 1, None), ("16", 2, None), ("1", 2, None)],
)
def test_the_jobs_of_a_sweep_have_a_task_for_each_rank(devices, nodes, tasks):
    """The number asks for tasks, unless the launcher is told of them already."""
    needs_submitit(JOBS)
    given = [] if nodes == 1 else ["hydra.launcher.nodes=2", "hydra.launcher.tasks_per_node=8"]
    found = check_arguments([*SMALL, "-m", f"trainer.devices={devices}", *JOBS, *given]).for_hydra
    asked = [argument for argument in found if argument.startswith("hydra.launcher.tasks_per_node")]
    assert asked == ([tasks] if tasks else given[1:])


@pytest.mark.parametrize(("gpus", "is_said"), [(0, False), (1, False), (8, True)])
def test_idle_gpus_are_named(gpus, is_said):
    """A run on one of several GPUs learns how to use all."""
    assert (idle_gpus(gpus) is not None) == is_said
