"""What a training keeps of its rows: a few bytes each, however many there are."""

from __future__ import annotations

import gc
import itertools
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alignment.data.tokens.units import as_rows
from alignment.reference import cached as cached_module
from alignment.reference.cached import CachedReference
from alignment.scoring.layout import FlatLayout
from alignment.stages.sft import _dataset
from alignment.training.objective import groups_to_reference
from alignment.training.sampler import StepSampler
from alignment.training.schedule import consecutive_parts
from alignment.types import Group
from tests.conftest import tiny_policy
from tests.helpers.references import cached
from tests.helpers.steps import make_loss

EPOCHS = 2
DPO, KTO = make_loss("dpo"), make_loss("kto")


class Made(Sequence[Any]):
    """Items that are made when they are read, as those of a large set are."""

    def __init__(self, count: int, item: Callable[[int], Any]) -> None:
        self._count = count
        self._item = item

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        return self._item(range(self._count)[index])


def pair(number: int) -> Group:
    tokens = np.array([number % 90, number // 90, 1, 2, 3], dtype=np.int32)
    return Group(tokens, (tokens[:4], tokens[1:]), source=f"rows.jsonl:{number + 1}")


def conversation(number: int) -> dict[str, list[int]]:
    return {"input_ids": [number % 90, number // 90, *range(9)], "completion_mask": [0] * 6 + [1] * 5}


def bytes_per_row(
    work: Callable[[Sequence[Any]], Any], few: int, item: Callable[[int], Any] = pair
) -> tuple[float, float]:
    """How many bytes each further row takes at the peak of the work, and while its result is there.

    The middle one of three times: the first also takes what stays in the process, and threads of other tests allocate.
    """
    found = []
    for count in 3 * (few, 4 * few):
        tracemalloc.start()
        result = work(Made(count, item))
        peak = tracemalloc.get_traced_memory()[1]
        gc.collect(1)  # what is young: the rest of the process is large
        found.append(np.array([peak, tracemalloc.get_traced_memory()[0]]))
        tracemalloc.stop()
        del result
    peak, kept = np.median(np.diff(found, axis=0)[::2], axis=0) / (3 * few)
    return float(peak), float(kept)


def steps_of(rows: Sequence[Group]) -> Sequence[list[int]]:
    sampler = StepSampler(len(rows), 50, 0)
    return sampler.first_steps(EPOCHS * len(sampler))


def test_steps_are_made_when_they_are_asked_for() -> None:
    """There is never more than the order of one epoch, a number for each row."""

    def work(rows: Sequence[Group]) -> Any:
        steps = steps_of(rows)
        assert sum(map(len, steps)) == EPOCHS * len(rows)
        return steps

    peak, kept = bytes_per_row(work, 10_000)
    assert 7 < kept <= peak <= 8 + 1


def test_parts_of_the_data_are_numbers() -> None:
    """Groups are told apart by a short hash of their rows, not by the texts that name these."""
    peak, kept = bytes_per_row(lambda rows: consecutive_parts(rows, 3), 500)
    assert peak <= 9 * 8 and kept <= 8 + 1


def test_groups_for_the_reference_are_numbers() -> None:
    """One for each group, beside the one of the last epoch's order; none for what is only passed on."""

    def work(pairs: Sequence[Group]) -> Any:
        asked = groups_to_reference(DPO, pairs, steps_of(pairs), ())
        assert sum(1 for _ in asked) == len(asked)
        return asked

    assert bytes_per_row(work, 60)[1] <= 8 + 8 + 1


def test_mismatched_groups_for_the_reference_are_three_numbers() -> None:
    """They differ from epoch to epoch; a pair is two rows. As objects they would take more than 600 bytes."""

    def work(pairs: Sequence[Group]) -> Any:
        rows = as_rows(pairs)
        asked = groups_to_reference(KTO, rows, steps_of(rows), ())
        assert len(asked) == (1 + EPOCHS) * len(rows)
        return asked

    assert bytes_per_row(work, 250)[1] <= 200


@pytest.mark.parametrize("is_stored", [False, True], ids=["computed", "found"])
def test_a_reference_keeps_the_places_of_its_values(
    is_stored: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The values themselves stand in files: what stays takes fewer bytes than the keys of the two answers have."""

    def score(self: CachedReference, groups: Sequence[Group]) -> Iterator[Any]:
        for batch in FlatLayout().batches(groups, 2000):
            yield batch.indices, batch.offsets.diff().tolist(), -torch.ones(1, int(batch.offsets[-1]))

    for name in ("_LOOKED_UP", "_COMPUTED"):
        monkeypatch.setattr(cached_module, name, 64)
    monkeypatch.setattr(CachedReference, "_score", score)
    model, number = tiny_policy(torch.float32), itertools.count()

    def work(pairs: Sequence[Group]) -> Any:
        (folder := tmp_path / ("all" if is_stored else str(next(number)))).mkdir(exist_ok=True)
        reference = cached(model, folder, spot_checks=2)
        reference.prepare(pairs)
        assert reference.logps([pairs[len(pairs) - 1]]).values.tolist() == [-1.0] * 8
        return reference

    few = 500
    if is_stored:
        work(Made(4 * few, pair)).close()
    peak, kept = bytes_per_row(work, few)
    assert peak <= 2 * 72 and kept <= 2 * 24


def test_the_examples_of_sft_are_made_when_they_are_read() -> None:
    """The dataset holds a number for each, also where some are selected; what it gives is right."""

    def work(examples: Sequence[Any]) -> Any:
        dataset = _dataset(examples)
        for start in range(0, len(examples), 100):
            dataset.__getitems__(list(range(start, start + 100)))
        return dataset, dataset.select(range(1, len(examples), 2))

    assert bytes_per_row(work, 500, conversation)[1] <= 2 * 8 + 1
    dataset, odd = work(Made(100, conversation))
    example = conversation(7)
    labels = [-100] * 6 + example["input_ids"][6:]
    assert dataset[7] == odd[3] == {"input_ids": example["input_ids"], "labels": labels}
