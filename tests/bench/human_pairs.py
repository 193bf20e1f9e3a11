"""A reward model trained on people's choices, as judge of other prompts: its win rates beside those of people.

`python -m tests.bench.human_pairs [--pairs testset-v1.json] [--out FOLDER] [--train 160]` reads PandaLM's test set (999
pairs of answers of six models, each labelled by three people), trains SmolLM2-135M on a part of its prompts, and judges
the pairs of the others. It prints the tables of docs/reward_models.md. Ten minutes on one core; FOLDER keeps the run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alignment.config.compose import load
from alignment.evaluation.intervals import wilson_interval
from alignment.evaluation.judges.agreement import agreement
from alignment.evaluation.judges.base import Item, win_rate
from alignment.evaluation.judges.reward_model import RewardModelJudge
from alignment.evaluation.statistics.length_control import length_controlled
from alignment.evaluation.statistics.prediction_powered import mended_mean
from alignment.stages.chain import Chain

PAIRS = Path(__file__).parents[2] / "shared" / "data" / "pandalm_human" / "testset-v1.json"
SHARE = 0.7
"""Of the prompts, for training."""
POLICY = "llama-7b"
"""Whose answers are asked about: its win rate over the other five models."""
LABELLED, CHOICES = 60, 1000
"""Pairs of it that people label, of which there are so many random choices."""


@dataclass(frozen=True)
class Row:
    """A pair: its prompt, both answers, the models that wrote them, and the majority's outcome for the first one."""

    prompt: str
    answers: tuple[str, str]
    models: tuple[str, str]
    outcome: int

    @property
    def longer(self) -> int:
        """1 where the first answer is longer, -1 where the second is, else 0."""
        first, second = map(len, self.answers)
        return (first > second) - (first < second)

    def led_by(self, model: str) -> Row:
        """With this model's answer first."""
        if self.models[0] == model:
            return self
        return Row(self.prompt, self.answers[::-1], self.models[::-1], -self.outcome)


def rows_of(path: Path) -> list[Row]:
    """The pairs of the file; a few of its answers are true or false, and no texts."""
    rows = []
    for entry in json.loads(path.read_text()):
        votes = [entry[f"annotator{i}"] for i in (1, 2, 3)]
        outcome = next((sign for vote, sign in ((1, 1), (2, -1)) if votes.count(vote) > 1), 0)
        prompt = "\n\n".join(filter(None, (entry["instruction"], entry["input"])))
        answers = str(entry["response1"]).strip(), str(entry["response2"]).strip()
        if all(answers):
            rows.append(Row(prompt, answers, tuple(entry["cmp_key"].split("_")), outcome))
    return rows


def is_trained_on(row: Row) -> bool:
    """By a hash of the prompt, so that no prompt is on both sides."""
    return hashlib.blake2b(row.prompt.encode()).digest()[0] < 256 * SHARE


def train(rows: Sequence[Row], held_out: Sequence[Row], folder: Path, more: Sequence[str]) -> None:
    """Train a reward model on the decided pairs; its adapter is in `run/adapter`."""
    for name, some in (("train", rows), ("held_out", held_out)):
        lines = [
            {"prompt": row.prompt, "chosen": row.answers[row.outcome < 0], "rejected": row.answers[row.outcome > 0]}
            for row in some
            if row.outcome
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    nulls = [f"data.{key}=null" for key in ("system", "limit")]
    config = load(
        *("recipe=reward_quickstart", "tracking=none", "device=cpu", f"data.source={folder / 'train.jsonl'}", *nulls),
        *(f"data.eval_source={folder / 'held_out.jsonl'}", "data.max_length=256", "data.max_prompt_length=192"),
        "data.eval_limit=32",  # the judge is asked about all of them
        *("optim.lr=2e-4", "trainer.groups_per_step=16", "trainer.save_every=0", "trainer.epochs=1", *more),
    )
    Chain(config, folder / "run", "reward_quickstart", {}).run()


def per_cent(value: float) -> str:
    """Such as 58.9 %."""
    return f"{100 * value:.1f} %"


def told(name: str, rate: float, low: float, high: float) -> None:
    """A line of a table."""
    print(f"| {name} | {per_cent(rate)} | {100 * low:.1f} to {100 * high:.1f} |")


def accuracy(rows: Sequence[Row], verdicts: Sequence[int]) -> tuple[float, float, float]:
    """Of the pairs that people decide: how often a verdict is theirs, half for a tie, with Wilson's interval."""
    right = sum((1 + row.outcome * verdict) / 2 for row, verdict in zip(rows, verdicts, strict=True) if row.outcome)
    n = sum(row.outcome != 0 for row in rows)
    return right / n, *wilson_interval(right / n, n)


def by_mending(people: np.ndarray, judged: np.ndarray, seed: int) -> tuple[Any, float]:
    """PPI++ from a random part of the labels, and the mean of these labels alone."""
    order = np.random.default_rng(seed).permutation(len(people))
    seen, rest = order[:LABELLED], order[LABELLED:]
    return mended_mean(people[seen], judged[seen], judged[rest]), float(people[seen].mean())


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, default=PAIRS)
    parser.add_argument("--out", type=Path, default=Path("outputs/human_pairs"))
    parser.add_argument("--train", type=int, default=160, help="decided pairs at most")
    parser.add_argument("overrides", nargs="*", help="more settings of the training")
    asked = parser.parse_args(arguments)
    asked.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("ALIGNMENT_CACHE", str(asked.out / "cache"))

    # Who is right
    rows = rows_of(asked.pairs)
    own = [row for row in rows if is_trained_on(row) and row.outcome][: asked.train]
    others = [row for row in rows if not is_trained_on(row)]
    started = time.process_time()
    train(own, others, asked.out.absolute(), asked.overrides)
    seconds = time.process_time() - started
    judge = RewardModelJudge(str(asked.out.absolute() / "run" / "adapter"), asked.out / "cache", torch.device("cpu"))
    found = judge.compare([Item(row.prompt, row.answers) for row in others])
    said = [one.outcome for one in found]
    decided = sum(row.outcome != 0 for row in others)
    print(f"\n{len(own)} decided pairs trained on, in {seconds:.0f} s of a core with what it measures on the way.")
    print(f"{len(others)} pairs of other prompts, {decided} of them decided.\n")
    print("| who chooses | right | 95 % |\n|---|---|---|")
    told("the reward model", *accuracy(others, said))
    told("the longer answer", *accuracy(others, [row.longer for row in others]))
    with_length = agreement(said, [row.longer for row in others])
    print(f"\nThe reward model chooses the longer answer in {per_cent(with_length.share)} of all pairs.")

    # Its win rates
    led = [
        (row.led_by(POLICY), one if row.models[0] == POLICY else one.swapped())
        for row, one in zip(others, found, strict=True)
        if POLICY in row.models
    ]
    pairs, verdicts = [row for row, _ in led], [one for _, one in led]
    gaps, prompts = [len(row.answers[0]) - len(row.answers[1]) for row in pairs], [row.prompt for row in pairs]
    print(
        f"\n{POLICY} against the others, {len(pairs)} pairs; its answers are {np.mean(gaps):+.0f} characters longer.\n"
    )
    print("| win rate | | 95 % |\n|---|---|---|")
    human = win_rate([row.outcome for row in pairs], prompts)
    told("people, all pairs", human.rate, human.low, human.high)
    raw = win_rate([one.outcome for one in verdicts], prompts)
    told("the reward model", raw.rate, raw.low, raw.high)
    even = length_controlled([one.share for one in verdicts], gaps, prompts)
    told("the reward model, at equal length", even.rate, even.low, even.high)
    long = win_rate([row.longer for row in pairs], prompts)
    told("the longer answer", long.rate, long.low, long.high)
    people, judged = (
        np.array(values, dtype=float)
        for values in ([(1 + row.outcome) / 2 for row in pairs], [one.share for one in verdicts])
    )
    mended, _ = by_mending(people, judged, 0)
    told(f"PPI++, {LABELLED} labels", mended.mean, mended.low, mended.high)
    many = [by_mending(people, judged, seed) for seed in range(CHOICES)]
    truth = people.mean()
    off = {
        name: np.mean([abs(one - truth) for one in values])
        for name, values in (("PPI++", [m.mean for m, _ in many]), ("the labels alone", [y for _, y in many]))
    }
    inside = np.mean([m.low <= truth <= m.high for m, _ in many])
    print(
        f"\nOver {CHOICES} choices of {LABELLED} labels: "
        + ", ".join(f"{name} off by {100 * value:.1f} points" for name, value in off.items())
    )
    power = np.mean([one.power for one, _ in many])
    print(f"PPI++'s interval has the rate of all labels in {per_cent(inside)}, its power is {power:.2f}.")


if __name__ == "__main__":
    main()
