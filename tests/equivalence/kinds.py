"""The kinds of runs that are compared: their command lines, and where a process is killed on the way."""

from __future__ import annotations

from dataclasses import dataclass

PAIRS = ("sft=none", "evaluation.prompts=0", "evaluation.kl_prompts=0", "trainer.max_steps=4", "trainer.save_every=0")
"""A preference stage alone, four steps of it."""
ROWS = ("data.source={data}/rows.jsonl", "data.eval_source={data}/held_out.jsonl")
LISTS = ("data.source={data}/lists.jsonl", "data.eval_source={data}/held_out_lists.jsonl")
SCORED = ("data.source={data}/scored.jsonl", "data.eval_source={data}/held_out_scored.jsonl")


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of run.

    Attributes:
        commands: one or more commands, run in order in one folder with one cache; "{data}" is the folder of data files.
        killed_at: optimizer step of the preference stage after whose checkpoint the first command's process is killed.
    """

    commands: tuple[tuple[str, ...], ...]
    killed_at: int | None = None


def _one(*arguments: str) -> Kind:
    return Kind((arguments,))


KINDS: dict[str, Kind] = {
    # The chain
    "sft_dpo": _one(),
    "sft_alone": _one("loss=none", "evaluation.prompts=0"),
    "sft_reused": Kind(
        (
            ("hydra.run.dir=first", "trainer.max_steps=2"),
            ("hydra.run.dir=second", "loss=ipo", "trainer.max_steps=2"),
        )
    ),
    "killed_and_resumed": Kind((("hydra.run.dir=run",), ("resume=run",)), killed_at=4),
    "merged": _one(*PAIRS, "export.merge=true"),
    # The policy
    "nf4": _one(*PAIRS, "quantization=nf4"),
    "no_adapter": _one(*PAIRS, "adapter=none"),
    "checkpointed": _one(*PAIRS, "trainer.checkpoint_every=1"),
    # The reference
    "live_reference": _one(*PAIRS, "reference=live"),
    "tr_dpo": _one(*PAIRS, "reference=tr_dpo", "reference.sync_every=2"),
    "sdpo": _one(*PAIRS, "reference=sdpo"),
    # Losses, one of each family
    "ipo": _one(*PAIRS, "loss=ipo"),
    "simpo": _one(*PAIRS, "loss=simpo"),
    "orpo": _one(*PAIRS, "loss=orpo"),
    "cpo": _one(*PAIRS, "loss=cpo"),
    "gpo": _one(*PAIRS, "loss=gpo"),
    "sampo": _one(*PAIRS, "loss=sampo"),
    "aot": _one(*PAIRS, "loss=aot"),
    "wpo": _one(*PAIRS, "loss=wpo"),
    "tdpo2": _one(*PAIRS, "loss=tdpo2", "reference.mode=live"),
    "alpha_dpo": _one(*PAIRS, "loss=alpha_dpo"),
    "beta_dpo": _one(*PAIRS, "loss=beta_dpo"),
    "mpo": _one(*PAIRS, "loss=mpo"),
    "kto": _one(*PAIRS, *ROWS, "loss=kto"),
    "bco": _one(*PAIRS, *ROWS, "loss=bco", "loss.density_weights=true"),
    "odpo": _one(*PAIRS, *SCORED, "loss=odpo"),
    "plackett_luce": _one(*PAIRS, *LISTS, "loss=plackett_luce"),
    "pairs_of_lists": _one(*PAIRS, *LISTS, "data.list_pairs=all_pairs"),
    # Sweeps
    "sweep": _one("-m", *PAIRS, "hydra.sweep.dir=sweep", "trainer.cohort=1", "loss.beta=0.05,0.3"),
    "cohort": _one("-m", *PAIRS, "hydra.sweep.dir=sweep", "trainer.cohort=2", "loss=dpo,simpo,orpo"),
    "stopped_early": _one(
        *("-m", *PAIRS, "hydra.sweep.dir=sweep", "trainer.max_steps=8", "stopping=asha", "stopping.rungs=1"),
        *("trainer.cohort=1", "stopping.eta=2", "optim.lr=1e-2,1e-6,1e-7"),
    ),
}
"""By name, in the order in which they run."""
