"""Small runs of a reward model."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.commands import pair, write_lines


def settings(folder: Path, model: Path, *others: str) -> list[str]:
    """A small run on pairs of sums, half of them held out."""
    write_lines(folder / "pairs.jsonl", [pair(number) for number in range(1, 41)])
    parts = ["data"] if "sft=none" in others else ["data", "sft.data"]
    sources = [f"{part}.source={folder / 'pairs.jsonl'}" for part in parts]
    nulls = [f"{part}.{key}=null" for part in parts for key in ("eval_source", "system", "limit", "eval_limit")]
    sft = ["sft=quickstart", "sft.data.eval_size=2", "sft.trainer.max_steps=1", "sft.trainer.groups_per_step=4"]
    return [
        *("recipe=reward_quickstart", "tracking=none", "device=cpu", f"model.name={model}"),
        *([] if "adapter=none" in others else ["adapter.r=2"]),
        *("data.eval_size=20", "optim.lr=0.01", "trainer.max_steps=4", "trainer.groups_per_step=4"),
        *("trainer.save_every=2", *sources, *nulls, *([] if "sft=none" in others else sft), *others),
    ]
