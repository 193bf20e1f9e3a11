"""Where one step of a recipe spends its time: `python -m tests.bench.profile_recipe recipe=<name> [key=value ...]`.

The recipe's preference stage runs for three steps, without SFT, evaluation and tracking, and the last step is taken
under torch's profiler. The table is printed; the trace is written to `outputs/profile/<recipe>/trace.json`, which
chrome://tracing and Perfetto open.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from alignment.run import main as run_command
from alignment.training.trainer import PreferenceTrainer
from tests.bench.profiling import profile_step

STEPS = 3
SHORT = (
    "sft=none",
    "tracking=none",
    f"trainer.max_steps={STEPS}",
    "trainer.save_every=0",
    "evaluation.prompts=0",
    "evaluation.kl_prompts=0",
    "data.limit=64",
    "data.eval_limit=4",
)


class ProfiledTrainer(PreferenceTrainer):
    """The trainer, whose last step goes under the profiler."""

    trace: Path
    found: dict[str, Any] | None = None

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """The step; what the profiler found of the last one is left in `found`."""
        losses = []

        def step() -> None:
            losses.append(super(ProfiledTrainer, self).training_step(model, inputs, num_items_in_batch))

        if self.state.global_step < STEPS - 1:
            step()
        else:
            type(self).found = profile_step(model, step, self.trace)
        return losses[0]


def tables(found: dict[str, Any]) -> list[Table]:
    """The shares of the kinds of work, and the operators that take longest."""
    kinds = Table("work", "share", title=f"One step: {found['seconds']:.2f} s of operators")
    for kind, share in found["shares"].items():
        kinds.add_row(kind, f"{share:.1%}")
    operators = Table("operator", "calls", "share")
    for name, calls, share in found["operators"]:
        operators.add_row(name, str(calls), f"{share:.1%}")
    return [kinds, operators]


def main(overrides: list[str]) -> None:
    """Run the recipe with these overrides, print the tables and say where the trace is."""
    import alignment.stages.preference

    recipe = next((word.partition("=")[2] for word in overrides if word.startswith("recipe=")), "quickstart")
    folder = Path("outputs") / "profile" / recipe.replace("/", "_")
    folder.mkdir(parents=True, exist_ok=True)
    ProfiledTrainer.trace = folder / "trace.json"
    alignment.stages.preference.PreferenceTrainer = ProfiledTrainer  # type: ignore[misc]
    run_command([f"recipe={recipe}", *SHORT, f"hydra.run.dir={folder}/run-${{now:%Y-%m-%d_%H-%M-%S}}", *overrides])
    if ProfiledTrainer.found is None:
        sys.exit(f"Error: recipe {recipe} took no preference step, so there is nothing to profile.")
    console = Console()
    for table in tables(ProfiledTrainer.found):
        console.print(table)
    console.print(f"Trace: {ProfiledTrainer.trace}", markup=False, highlight=False)


if __name__ == "__main__":
    main(sys.argv[1:])
