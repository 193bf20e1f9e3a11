"""What travels in a step: the collectives and bytes of the docs' model, and what many ranks hold."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from alignment.ranks.shares import share_groups
from alignment.training.trainer import PreferenceTrainer
from alignment.types import Group
from tests.conftest import each, shared_data
from tests.helpers.played_ranks import PlayedTeam
from tests.helpers.rank_steps import steps
from tests.helpers.ranks import in_ranks

RANKS = Path(__file__).parents[2] / "docs" / "ranks.md"
LOSSES = {"dpo": "most", "kto": "mismatched", "beta_dpo": "derived"}
"""A loss for each row of the table of collectives, and a word of the row."""
NAMES = ("scatter", "broadcast", "reduce", "gather")


def table(mark: str) -> list[list[str]]:
    """The cells of a table of the docs behind a mark, without its head."""
    found = re.search(rf"<!-- {mark} -->\n((?:\|.*\n)+)", RANKS.read_text())[1].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in found]


def told(word: str) -> dict[str, int]:
    """The collectives of a step by the docs, with one bucket of weights."""
    [row] = [row for row in table("collectives") if word in row[0]]
    return {name: int(cell.replace("n", "").strip() or 1) for name, cell in zip(NAMES, row[1:], strict=True)}


def counted(team, folder: Path) -> None:
    """Count, on rank 0, what a training step asks of torch."""
    import torch.distributed as dist

    calls, sent = Counter(), Counter()

    def counting(name, call):
        def counted_call(first, *arguments, **settings):
            calls[name] += 1
            sent[name] += first.nbytes if isinstance(first, torch.Tensor) else 0
            return call(first, *arguments, **settings)

        return counted_call

    for name, attribute in zip(NAMES, ("scatter_object_list", "broadcast", "reduce", "gather_object"), strict=True):
        setattr(dist, attribute, counting(name, getattr(dist, attribute)))
    found = {}
    step = PreferenceTrainer.training_step

    def training_step(self, model, *arguments, **settings):
        calls.clear(), sent.clear()
        result = step(self, model, *arguments, **settings)
        trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        found[self.loss.name] = {"calls": dict(calls), "sent": dict(sent), "trained": trained}
        return result

    PreferenceTrainer.training_step = training_step
    for name in LOSSES:
        part = folder / name
        part.mkdir()
        steps(team, part, name, live=False, num_steps=1)
    (folder / "found.json").write_text(json.dumps(found))


@pytest.mark.slow
def test_a_step_of_two_ranks_travels_as_the_docs_say(tmp_path):
    """The collectives of each kind of loss, and the bytes of weights and gradients."""
    assert in_ranks(2, tmp_path / "output", counted, tmp_path) == [0, 0]
    found = json.loads((tmp_path / "found.json").read_text())
    for name, word in LOSSES.items():
        expected, step = told(word), found[name]
        assert step["calls"] == expected, name
        for kind in ("broadcast", "reduce"):
            assert step["sent"][kind] == expected[kind] * step["trained"], (name, kind)


def real_pairs(count: int) -> list[Group]:
    """Pairs of random tokens with the lengths of real ones, four characters a token."""
    lines = (shared_data("pandalm_human") / "pairs.jsonl").read_text().splitlines()
    rng = np.random.default_rng(0)
    groups = []
    for number in rng.choice(len(lines), count):
        row = json.loads(lines[number])
        prompt, *completions = (
            rng.integers(0, 97, sum(len(message["content"]) for message in row[key]) // 4 + 1).astype(np.int32)
            for key in ("prompt", "chosen", "rejected")
        )
        groups.append(Group(prompt[-300:], tuple(completion[:300] for completion in completions)))
    return groups


ROWS = [tuple(row) for row in table("ranks")]


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "count", "even", "largest", "share", "calls"), each(ROWS, ROWS[1:2]))
def test_many_ranks_hold_their_share(ranks, count, even, largest, share, calls, monkeypatch, tmp_path):
    """Balance, the largest share and the collectives of a step, as the docs' table has them."""
    ranks, count = int(ranks), int(count)
    team, found = PlayedTeam(ranks), {}
    step = PreferenceTrainer.training_step

    def training_step(self, model, inputs, *arguments, **settings):
        before = team.calls.copy()
        result = step(self, model, inputs, *arguments, **settings)
        found["calls"] = (team.calls - before).total()
        return result

    monkeypatch.setattr(PreferenceTrainer, "training_step", training_step)
    groups = real_pairs(count)
    steps(team, tmp_path, "dpo", live=False, num_steps=1, groups=groups, per_step=count)
    sizes = team.shares["add_share"]
    loads = [
        sum(len(groups[i].prompt) + sum(map(len, groups[i].completions)) for i in own)
        for own in share_groups(groups, ranks)
    ]
    balance = sum(loads) / ranks / max(loads)
    assert balance >= 0.95 and balance == pytest.approx(float(even), abs=0.001)
    assert max(sizes) / 1024 == pytest.approx(float(largest), abs=1)
    total = sum(sizes) * ranks / (ranks - 1)  # rank 0 keeps its own
    assert 100 * max(sizes) / total == pytest.approx(float(share.rstrip("%")), rel=0.05)
    assert found["calls"] == int(calls)
