"""Which rank a process is, by the environment of each launcher; how many ranks a setting means; even shares."""

import json

import numpy as np
import pytest

from alignment.errors import UserError
from alignment.ranks.launch import rank_count
from alignment.ranks.place import Place, take_place
from alignment.ranks.shares import evenly, families, in_rounds, share_groups
from alignment.types import Group
from tests.conftest import random_groups, shared_data

ADDRESS = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", **ADDRESS}
SRUN = {
    "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    **ADDRESS,
}  # fmt: skip


@pytest.mark.parametrize("environment", [TORCHRUN, SRUN], ids=["torchrun", "srun"])
def test_a_rank_knows_its_place_and_hides_it(environment):
    """Libraries that would begin a process group of their own find no sign of one; one GPU is left to see."""
    known = {**environment, "GROUP_RANK": "1", "CUDA_VISIBLE_DEVICES": "4,5,6,7"}
    assert take_place(known) == Place(5, 8, 1, 4)
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK"} & known.keys()
    assert known["CUDA_VISIBLE_DEVICES"] == "5" and known["MASTER_PORT"] == "29500"


@pytest.mark.parametrize(
    ("environment", "address", "place"),
    [
        ({"SLURM_STEP_NODELIST": "gpu[03-05,9],cpu1", "SLURM_JOB_ID": "15001", "SLURM_STEP_ID": "0"},
         ("gpu03", "15001"), Place(5, 8, 1, 4)),
        ({"SLURM_STEP_NODELIST": "a-1,a-2", "SLURM_JOB_ID": "2", "SLURM_STEP_ID": "3", "MASTER_PORT": "29500"},
         ("a-1", "29500"), Place(5, 8, 1, 4)),
    ],
)  # fmt: skip
def test_slurm_says_where_ranks_meet(environment, address, place):
    """On the first machine of the step, at a port of the job's number, unless you have said where."""
    known = {**{name: value for name, value in SRUN.items() if name not in ADDRESS}, **environment}
    assert take_place(known) == place
    assert (known["MASTER_ADDR"], known["MASTER_PORT"]) == address


def test_the_tasks_of_submitit_on_this_machine_meet_here():
    """submitit_local, with which jobs are tried without a cluster."""
    known = {f"SUBMITIT_LOCAL_{name}": "1" for name in ("GLOBALID", "LOCALID")}
    known |= {"SUBMITIT_LOCAL_NTASKS": "2", "SUBMITIT_LOCAL_JOB_ID": "7"}
    assert take_place(known) == Place(1, 2, 1, 2)
    assert (known["MASTER_ADDR"], known["MASTER_PORT"]) == ("127.0.0.1", "15007")


@pytest.mark.parametrize(("given", "visible"), [({}, "1"), ({"CUDA_VISIBLE_DEVICES": "3"}, "3")])
def test_each_rank_sees_one_gpu(given, visible):
    """That of its local rank; a cluster may have hidden the others already."""
    known = {**TORCHRUN, **given}
    take_place(known)
    assert known["CUDA_VISIBLE_DEVICES"] == visible


@pytest.mark.parametrize(
    "environment", [{}, {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, {"SLURM_NTASKS": "4"}]
)
def test_a_process_alone_has_no_place(environment):
    """Without a launcher, alone under torchrun, or in a Slurm job's script, which is one process of it."""
    assert take_place(environment) is None and "RANK" not in environment


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"MASTER_PORT": None}, "MASTER_PORT is not set"),
        ({"RANK": "8"}, "RANK=8 must be below WORLD_SIZE=8"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE in the environment must be a whole number, not 'many'"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK in the environment must be a whole number, not '-1'"),
    ],
)
def test_half_an_environment_is_refused(changed, said):
    known = {name: value for name, value in (TORCHRUN | changed).items() if value is not None}
    with pytest.raises(UserError, match=said):
        take_place(known)


def test_more_ranks_than_gpus_are_refused():
    with pytest.raises(UserError, match=r"this machine has 4 ranks: start at most one for each"):
        take_place({**TORCHRUN, "LOCAL_RANK": "2", "CUDA_VISIBLE_DEVICES": "0,1"})
    with pytest.raises(UserError, match=r"trainer.devices=3, and this machine shows 1 GPU: set it to auto"):
        rank_count(3, 1, wants_gpu=True)
    assert [rank_count(*asked) for asked in (("auto", 4, True), ("auto", 0, False), (2, 0, False))] == [4, 1, 2]


def test_the_completions_of_a_prompt_stay_together():
    """Every group has one rank, shares may be empty, and rounds keep families whole too."""
    groups = [Group(g.prompt, (c,)) for g in random_groups(9, k=3) for c in g.completions]
    home = {index: number for number, (_, family) in enumerate(families(groups)) for index in family}
    for count in (1, 2, 5, 40):
        shares = share_groups(groups, count)
        assert sorted(index for share in shares for index in share) == list(range(len(groups)))
        assert sum(len({home[i] for i in share}) for share in shares) == len(families(groups))
        assert len(shares) == count
    rounds = list(in_rounds(groups, 60))
    assert len(rounds) > 2 and sorted(i for members in rounds for i in members) == list(range(len(groups)))
    assert sum(len({home[i] for i in members}) for members in rounds) == len(families(groups))
    assert evenly([], 2) == [[], []]


def test_shares_of_real_lengths_are_even():
    """The mean load by the largest: at least 0.95 for 64 pairs on 8 ranks, and for 512 on 64."""
    lines = (shared_data("pandalm_human") / "pairs.jsonl").read_text().splitlines()
    lengths = [
        [sum(len(message["content"]) for message in row[key]) // 4 + 1 for key in ("prompt", "chosen", "rejected")]
        for row in map(json.loads, lines)
    ]
    rng = np.random.default_rng(0)
    for per_step, ranks in ((64, 8), (512, 64)):
        balance = []
        for step in range(5):
            drawn = rng.choice(len(lengths), per_step)
            groups = [
                Group(np.full(p, step * per_step + i, np.int32), (np.zeros(c, np.int32), np.zeros(r, np.int32)))
                for i, (p, c, r) in enumerate(lengths[n] for n in drawn)
            ]
            loads = [
                sum(len(groups[i].prompt) + sum(map(len, groups[i].completions)) for i in share)
                for share in share_groups(groups, ranks)
            ]
            balance.append(sum(loads) / ranks / max(loads))
        assert np.mean(balance) >= 0.95, (per_step, ranks, balance)
