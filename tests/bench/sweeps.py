"""A sweep of beta: our command for all of it, one after the other or as a cohort, beside one run of TRL's for each.

Everything is counted, from the start of the first process to the end of the last: imports, the model, the data, the
reference, which no cache holds, saving, and on our side plots, reports and the comparison of the members.
"""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alignment.runs.folder import dig, read_run, series
from tests.bench.job import MAX_LENGTH, MAX_PROMPT_LENGTH, ROOT, Case, Job, environment
from tests.bench.slices import SECONDS, Side, Spent, run_sides
from tests.bench.summary import Goal, check_losses
from tests.bench.tables import SWEEP_BASELINE
from tests.bench.turns import Command

CONF = Path(__file__).parent / "conf"

BETAS = (0.01, 0.05, 0.1, 0.5)
QUICK_BETAS = (0.05, 0.5)

TRL, MULTIRUN, COHORT = SWEEP_BASELINE, "ours, multirun", "ours, cohort"
ONE_CHECKPOINTED, COHORT_CHECKPOINTED = "ours, one run, checkpointed", "ours, cohort, checkpointed"
COHORT_TOLERANCE = {"exact": 1e-4, "rounded": 3e-2}
"""Between the losses of a member in a cohort and by itself. Sums of log-probs are some hundreds of nats, of which
float32 keeps a few 1e-5; Adam makes more of that where a gradient is almost nothing."""

COMPARISONS = (
    (MULTIRUN, TRL),
    (COHORT, TRL),
    (COHORT, MULTIRUN),
    (COHORT_CHECKPOINTED, ONE_CHECKPOINTED),
)


@dataclass(frozen=True, slots=True)
class Ended:
    """One process of a side.

    Attributes:
        side: whose.
        spent: what it took.
        losses: of every step, by the beta of the run.
        gpu_bytes: the most memory that torch had of a GPU, if there is one.
    """

    side: str
    spent: Spent
    losses: dict[str, list[float]]
    gpu_bytes: int | None


class Sweep:
    """The commands of a sweep over `betas`, and what they leave.

    Args:
        case: pairs of a step, and whether the base model is quantised.
        prepared: what `preparation.prepare` returned for this case.
        betas: of the members.
        lr: learning rate.
        tokens_per_batch: positions of one of our forward passes, those of all members of a cohort together; None for
            what the command plans by itself.
        folder: for all that the runs write.
    """

    def __init__(
        self,
        case: Case,
        prepared: Mapping[str, Any],
        betas: Sequence[float],
        lr: float,
        tokens_per_batch: int | None,
        folder: Path,
    ) -> None:
        self.betas = betas
        self._case = case
        self._prepared = prepared
        self._lr = lr
        self._tokens_per_batch = "null" if tokens_per_batch is None else tokens_per_batch
        self._folder = folder
        self._on_gpu = prepared["machine"]["device"] == "cuda"

    def run(self) -> Iterator[Ended]:
        """Run all sides, in slices; on a GPU, whose memory each would keep, one after the other.

        Raises:
            RuntimeError: when all have ended, where one has failed.
        """
        sides = [
            self._trl(),
            self._ours(MULTIRUN, self.betas, "trainer.cohort=1"),
            self._ours(COHORT, self.betas, f"trainer.cohort={len(self.betas)}"),
        ]
        return self._run(sides, math.inf if self._on_gpu else SECONDS)

    def run_checkpointed(self) -> Iterator[Ended]:
        """Two steps, of half the pairs each, of one run and of a cohort, every layer checkpointed.

        In a pass of either there is room for as many of the largest pair as there are members.
        """
        lengths = self._prepared["lengths"][self._case.name]
        settings = (
            "trainer.checkpoint_every=1",
            f"trainer.groups_per_step={len(lengths) // 2}",
            f"trainer.tokens_per_batch={len(self.betas) * max(sum(pair) for pair in lengths)}",
        )
        for name, betas in ((ONE_CHECKPOINTED, self.betas[:1]), (COHORT_CHECKPOINTED, self.betas)):
            yield from self._run([self._ours(name, betas, f"trainer.cohort={len(betas)}", *settings)], math.inf)

    def _run(self, sides: Sequence[Side], seconds: float) -> Iterator[Ended]:
        for name, number, spent in run_sides(sides, seconds):
            losses, gpu_bytes = self._trl_results(number) if name == TRL else self._our_results(name)
            yield Ended(name, spent, losses, gpu_bytes)

    def _path(self, side: str) -> Path:
        return self._folder / side.replace(", ", "-").replace(" ", "-")

    def _command(self, log: Path, *words: str) -> Command:
        return Command((sys.executable, "-m", *words), log, ROOT, environment())

    def _trl(self) -> Side:
        commands = []
        for number, beta in enumerate(self.betas):
            stem = self._folder / f"trl-{number}"
            job = Job(
                run=stem.name,
                model=self._prepared["model"],
                adapter=self._prepared["adapter"],
                pairs=self._prepared["pairs"][self._case.name],
                pairs_per_step=self._case.pairs_per_step,
                nf4=self._case.nf4,
                cache=str(self._folder),
                beta=beta,
                lr=self._lr,
                tokens_per_batch=None,
                profile=False,
            )
            task, result, log = (stem.with_suffix(suffix) for suffix in (".json", ".result", ".log"))
            task.write_text(json.dumps(asdict(job)))
            commands.append(self._command(log, "tests.bench.trl_side", str(task), str(result)))
        return Side(TRL, tuple(commands), share=len(commands))

    def _trl_results(self, number: int) -> tuple[dict[str, list[float]], int | None]:
        found = json.loads((self._folder / f"trl-{number}.result").read_text())
        return {str(self.betas[number]): found["losses"]}, found["gpu_bytes"]

    def _ours(self, name: str, betas: Sequence[float], *settings: str) -> Side:
        path = self._path(name)
        overrides = {
            "recipe": "bench_sweep",
            "model.name": self._prepared["model"],
            "quantization": "nf4" if self._case.nf4 else "none",
            "data.source": self._prepared["rows"][self._case.name],
            "data.max_length": MAX_LENGTH,
            "data.max_prompt_length": MAX_PROMPT_LENGTH,
            "optim.lr": self._lr,
            "trainer.groups_per_step": self._case.pairs_per_step,
            "trainer.tokens_per_batch": self._tokens_per_batch,
            "reference.path": f"{path}-cache",
            "hydra.sweep.dir": path,
            "loss.beta": ",".join(map(str, betas)),
        } | dict(setting.split("=", 1) for setting in settings)
        words = ("alignment.run", "-m", "--config-dir", str(CONF), *(f"{k}={v}" for k, v in overrides.items()))
        return Side(name, (self._command(path.with_suffix(".log"), *words),))

    def _our_results(self, name: str) -> tuple[dict[str, list[float]], int | None]:
        runs = [read_run(path.parent) for path in sorted(self._path(name).glob("*/config.yaml"))]
        losses = {
            str(run.config["loss"]["beta"]): series(run.metrics, "preference", "train", "loss")[1] for run in runs
        }
        if not self._on_gpu:
            return losses, None
        return losses, max(dig(run.summary, "stages", "preference", "memory", "measured") for run in runs)


def measure(sweep: Sweep, quick: bool, keep: Callable[[list[Ended]], None]) -> list[Ended]:
    """Run everything; `keep` gets what there is whenever a process has ended.

    Args:
        quick: leave out what shows a cohort's memory, which runs first since it fails first.
    """
    found: list[Ended] = []
    for run in [sweep.run] if quick else [sweep.run_checkpointed, sweep.run]:
        for ended in run():
            found.append(ended)
            keep(found)
            gib, seconds = _peak(ended) / 2**30, ended.spent.seconds
            print(f"sweep: {ended.side}: {seconds:.1f} s, {gib:.2f} GiB", file=sys.stderr, flush=True)
    return found


def _peak(ended: Ended) -> int:
    return ended.spent.peak_bytes if ended.gpu_bytes is None else ended.gpu_bytes


def summarise(found: Sequence[Ended], arithmetic: str, on_gpu: bool) -> dict[str, Any]:
    """Rows, ratios and goals of a sweep.

    Args:
        found: all processes of all sides.
        arithmetic: "exact" or "rounded", see `summary.LOSS_TOLERANCE`.
        on_gpu: where they ran, which decides the goals.

    Raises:
        AssertionError: the sides do not train the same members.
    """
    sides: dict[str, list[Ended]] = defaultdict(list)
    for ended in found:
        sides[ended.side].append(ended)
    losses = {side: {beta: v for e in ended for beta, v in e.losses.items()} for side, ended in sides.items()}
    members = losses[TRL]
    for side in (MULTIRUN, COHORT):
        if losses[side].keys() != members.keys():
            raise AssertionError(f"{side} has trained beta {', '.join(losses[side])} and not {', '.join(members)}")
    for beta in members:
        check_losses({side: losses[side][beta] for side in (TRL, MULTIRUN, COHORT)}, arithmetic)
    rows = {
        side: {
            "seconds": sum(e.spent.seconds for e in ended),
            "seconds_per_member": sum(e.spent.seconds for e in ended) / len(losses[side]),
            "user_seconds": sum(e.spent.user for e in ended),
            "kernel_seconds": sum(e.spent.system for e in ended),
            "peak_gib": max(_peak(e) for e in ended) / 2**30,
        }
        for side, ended in sides.items()
    }
    ratios = {}
    for side, other in COMPARISONS:
        if side not in rows:
            continue
        a, b = rows[side], rows[other]
        ratios[f"{side} : {other}"] = {
            "times_faster": b["seconds"] / a["seconds"],
            "times_less_cpu": (b["user_seconds"] + b["kernel_seconds"]) / (a["user_seconds"] + a["kernel_seconds"]),
            "memory": a["peak_gib"] / b["peak_gib"],
            "loss_difference": max(
                abs(x - y)
                for beta, values in losses[other].items()
                for x, y in zip(losses[side][beta], values, strict=True)
            ),
        }
    case = {"rows": rows, "ratios": ratios}
    goals = [
        Goal("sweep", MULTIRUN, TRL, "times_faster", 3.5),
        Goal("sweep", COHORT, MULTIRUN, "times_faster", 1.5 if on_gpu else 1.0),
        Goal("sweep", COHORT, MULTIRUN, "loss_difference", COHORT_TOLERANCE[arithmetic]),
    ]
    if COHORT_CHECKPOINTED in rows:
        goals.append(Goal("sweep", COHORT_CHECKPOINTED, ONE_CHECKPOINTED, "memory", 1.3))
    return case | {"goals": [goal.judge({"sweep": case}) for goal in goals], "betas": [float(b) for b in members]}
