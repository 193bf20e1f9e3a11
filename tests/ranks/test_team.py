"""What passes between ranks, and how the failure of one ends all."""

import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from alignment.errors import UserError
from alignment.ranks.team import Post, RankLost, Team, trained_parameters
from tests.helpers.ranks import in_ranks


def model() -> nn.Module:
    """Parameters of several dtypes; one is frozen, one never has a gradient."""
    found = nn.ModuleDict(
        {"a": nn.Linear(3, 2), "b": nn.Linear(2, 2).bfloat16(), "c": nn.Linear(2, 1), "d": nn.Linear(1, 1)}
    )
    found["c"].requires_grad_(False)
    return found


def hold(post: Post, seed: int) -> None:
    torch.manual_seed(seed)
    post.model = model()


def grow(post: Post, value: float) -> list[float]:
    """Add a gradient to all but the last layer; says which weights this rank has."""
    return gradients(post.model, value)


def gradients(of: nn.Module, value: float) -> list[float]:
    for name, parameter in of.named_parameters():
        if parameter.requires_grad and not name.startswith("d"):
            parameter.grad = torch.full_like(parameter, value)
    return [float(parameter.detach().double().sum()) for parameter in of.parameters()]


def refuse(post: Post, share: str) -> None:
    raise UserError(f"{share} cannot be had: ask for another.")


def stumble(post: Post, share: str) -> None:
    raise KeyError(share)


def end(post: Post, _: None) -> None:
    os._exit(9)


def work(team: Team, folder: Path) -> None:
    said: dict = {}
    team.tell(hold, 1)
    torch.manual_seed(0)
    own = model()
    trained = trained_parameters(own)
    [mine, theirs] = team.run(grow, [1.0, 2.0], lambda value: gradients(own, value), trained)
    said["weights"] = [mine, theirs]
    used = [parameter.grad is not None for parameter in trained]
    team.sum_gradients(trained, used)
    said["sums"] = [None if p.grad is None else sorted(set(p.grad.flatten().tolist())) for p in trained]
    for task in (refuse, stumble):
        try:
            team.tell(task, "this")
        except Exception as error:
            said[task.__name__] = f"{type(error).__name__}: {error}"
    try:
        team.run(grow, [1.0, 2.0], lambda value: refuse(None, "mine"))
    except UserError as error:
        said["own"] = str(error)
    said["still"] = len(team.tell(grow, 1.0))
    try:
        team.tell(end)
    except RankLost as error:
        said["lost"] = str(error)
    (folder / "said.json").write_text(json.dumps(said))


def test_ranks_share_weights_gradients_and_failures(tmp_path):
    """Weights are rank 0's, gradients add up, an error is raised on rank 0 as itself, and a dead rank is noticed."""
    codes = in_ranks(2, tmp_path, work, tmp_path)
    assert codes == [0, 9]
    said = json.loads((tmp_path / "said.json").read_text())
    mine, theirs = said["weights"]
    frozen = (4, 5)  # they came from another seed, and do not travel
    assert all((a == b) == (i not in frozen) for i, (a, b) in enumerate(zip(mine, theirs, strict=True)))
    assert said["sums"] == [[3.0]] * 4 + [None] * 2
    assert said["refuse"] == "UserError: this cannot be had: ask for another."
    assert said["stumble"].startswith("RuntimeError: Rank 1 failed: Traceback")
    assert "KeyError: 'this'" in said["stumble"]
    assert said["own"] == "mine cannot be had: ask for another."
    assert said["still"] == 1
    assert "Rank 1 has ended" in said["lost"] and "resume=true" in said["lost"]
    assert [(tmp_path / f"std{name}1").read_text() for name in ("out", "err")] == ["", ""]


@pytest.mark.slow
def test_missing_ranks_are_named_after_a_while(tmp_path, monkeypatch):
    """A rank alone does not wait for ever."""
    from alignment.ranks import team
    from alignment.ranks.place import Place
    from tests.helpers.ranks import free_port

    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", free_port())
    monkeypatch.setattr(team, "JOIN_SECONDS", 1)
    with pytest.raises(UserError, match=r"Rank 0 has waited 1 seconds for 2 ranks, and not all have come"):
        team.join(Place(0, 2, 0, 2))
