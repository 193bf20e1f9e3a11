"""One round: the policy answers prompts, a judge says what the answers are worth, and groups are made of them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import numpy as np

from alignment.config.judging import Judge as JudgeName
from alignment.config.rounds import OnPolicyConfig, renamed
from alignment.data.tokens.token_store import GROUPS, Column, Kind, Stored, write_anew
from alignment.data.tokens.units import as_rows
from alignment.errors import UserError
from alignment.evaluation.judges.base import Judge
from alignment.evaluation.sampling.answer import Answer, Sampling, as_text
from alignment.evaluation.sampling.draw import Engine, draw
from alignment.files import atomic_write_bytes, damaged, read_sealed, to_json_lines, write_sealed
from alignment.onpolicy.counts import Counts
from alignment.onpolicy.held_out import HeldOutPrompts
from alignment.onpolicy.pairs import Drawn, build, win_matrix
from alignment.onpolicy.prompts import Prompt, Prompts, shuffled
from alignment.onpolicy.shaping import balanced_penalty, shaped
from alignment.types import Group, MadeOnDemand

log = logging.getLogger(__name__)

_WHOLE = "round.json"
_FIRST = 8
"""Prompts of the first draw of a training, which tells how many groups a prompt gives."""
_SAMPLED = 64
"""Answers by which the policy's way is measured."""
_AT_MOST = 4096
"""Answers that are drawn before they are judged."""


@dataclass(frozen=True, slots=True, eq=False)
class Round:
    """What the steps of a round train on.

    Attributes:
        groups: in the order of the steps, as the loss takes them.
        logps: (tokens,) fp32 of each completion that the policy has drawn, by `Group.key`: under the policy itself.
        sample: some answers that it has drawn, one to a prompt, whatever has become of them.
        position: how many prompts of the training's order were passed, this round's with them.
        rate: groups that a prompt has given on average.
        metrics: of the round, by the names under which they are logged.
    """

    groups: Sequence[Group]
    logps: Mapping[bytes, np.ndarray]
    sample: Sequence[Group]
    position: int
    rate: float
    metrics: dict[str, float]


class Slots(MadeOnDemand[Group]):
    """The groups of a training that are there round by round: `take` adds those of the next one."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._groups: list[Group] = []

    def take(self, groups: Sequence[Group]) -> None:
        """Add the groups of a round."""
        self._groups += groups
        assert len(self._groups) <= self._count, "a round has as many groups as its steps"

    def __len__(self) -> int:
        return self._count

    def item(self, place: int) -> Group:
        """See `MadeOnDemand`; an IndexError for a group of a round to come."""
        return self._groups[place]


@dataclass(slots=True)
class _Found:
    """What the prompts of a round have given so far.

    Attributes:
        seed: of its answers.
        prompts, drawn: its prompts, and their answers as the judge has scored them.
        shaped: the same with the scores that count.
        groups, counts: what is made of these.
        logps: of the groups' completions and of the sample.
        sample: one answer to a prompt.
        penalty: what a token costs, where the scores are shaped.
    """

    seed: int
    prompts: list[Prompt] = field(default_factory=list)
    drawn: list[Drawn] = field(default_factory=list)
    shaped: list[Drawn] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    logps: dict[bytes, np.ndarray] = field(default_factory=dict)
    sample: list[Group] = field(default_factory=list)
    penalty: float | None = None


@dataclass(frozen=True, slots=True)
class RoundMaker:
    """Makes rounds.

    Attributes:
        config: of the rounds.
        prompts: of the training data, each once.
        offline: the training groups of the data, for `mix_offline`.
        judge: of the answers; None for a choice of pairs that needs none, and for the first round of a policy that is
            its own judge.
        held_out: the prompts that are not trained on.
        tokenizer: makes the texts that the judge reads.
        stops: the tokens that end an answer.
        seed: of the run.
        as_rows: whether the loss takes pairs as two rows each.
    """

    config: OnPolicyConfig
    prompts: Prompts
    offline: Sequence[Group]
    judge: Judge | None
    held_out: HeldOutPrompts
    tokenizer: Any
    stops: Sequence[int]
    seed: int
    as_rows: bool

    def make(
        self,
        folder: Path,
        engine: Engine,
        weak: Engine | None,
        number: int,
        count: int,
        least: int,
        before: Round | None,
        filled: bool,
        measured: Callable[[], Mapping[str, float]] = dict,
    ) -> Round:
        """Draw a round, and keep it in a folder.

        Args:
            folder: that `read_round` reads.
            engine: of the policy as it is now.
            weak: of a weaker model, where the choice of pairs asks for its answers.
            number: of the round, from 0 on.
            count: groups that its steps take.
            least: of a step; fewer are refused.
            before: the round before.
            filled: whether groups come again until there are `count`.
            measured: what else is known of the round once it is drawn, for its metrics.

        Raises:
            UserError: too few groups come of all prompts.
        """
        offline = self._offline(number, count, least)
        own = count - len(offline)
        position, rate = (0, 0.0) if before is None else (before.position, before.rate)
        rate = rate or own / _FIRST  # of what is not known, a few prompts first
        if own:
            log.info("Round %d: answers to prompts for %d groups ...", number + 1, own)
        else:
            log.info("Round %d: the data as they are, for a policy that has not moved rewards no answer.", number + 1)
        # A prompt that comes again has other random numbers, or the policy would learn what these ones make of it
        found = _Found(self.seed + (number << 32))
        limit = min(self.config.prompts or len(self.prompts), len(self.prompts))
        order = shuffled(len(self.prompts), self.seed, position)
        while len(found.groups) < own and len(found.prompts) < limit:
            wanted = math.ceil((own - len(found.groups)) / rate)
            wanted = min(max(1, wanted), limit - len(found.prompts), max(1, _AT_MOST // self.config.k))
            taken = list(islice(order, wanted))
            position = taken[-1][1]
            self._add(found, [self.prompts[place] for place, _ in taken], engine, weak)
            rate = max(1, len(found.groups)) / len(found.prompts)
        if len(found.groups) < min(own, least):
            raise UserError(self._too_few(found, number, min(own, least)))

        # In the order of the steps
        groups = found.groups[:own]
        rng = np.random.default_rng((self.seed, number, 1))
        times = math.ceil(own / max(1, len(groups)))
        places = [int(place) for _ in range(times) for place in rng.permutation(len(groups))]
        groups = [groups[place] for place in places[:own]] if filled else groups
        if offline:
            groups = [(groups + offline)[place] for place in rng.permutation(len(groups) + len(offline)).tolist()]
        kept = [*groups, *found.sample]
        logps = {key: found.logps[key] for group in kept for key in group.keys() if key in found.logps}  # noqa: SIM118
        metrics = {"onpolicy/round": number + 1.0}
        metrics |= {f"onpolicy/{name}": value for name, value in found.counts.metrics().items()}
        metrics |= {} if found.penalty is None else {"onpolicy/length_penalty": found.penalty}
        metrics |= {f"onpolicy/{name}": value for name, value in measured().items()}
        made = Round(groups, logps, found.sample, position, rate, metrics)
        lines = [_line(prompt, one) for prompt, one in zip(found.prompts, found.shaped, strict=True)]
        _write_round(folder, made, lines)
        return made

    def _offline(self, number: int, count: int, least: int) -> list[Group]:
        """The groups of the data that are among the `count` of a round: all where the policy cannot judge itself yet.

        They go on where those of the rounds before, which were full ones, have ended.
        """
        own_judge, full = self.config.judge is JudgeName.implicit, (self.config.every or 0) * least
        shares = [1.0 if own_judge and i == 0 else self.config.mix_offline for i in range(number + 1)]
        position, wanted = sum(round(share * full) for share in shares[:-1]), round(shares[-1] * count)
        found: list[Group] = []
        while len(found) < wanted:
            taken = list(islice(shuffled(len(self.offline), self.seed, position), wanted - len(found)))
            position = taken[-1][1]
            found += [self.offline[place] for place, _ in taken]
        return found

    def _add(self, found: _Found, prompts: Sequence[Prompt], engine: Engine, weak: Engine | None) -> None:
        """Draw and judge answers to some more prompts, and make the groups of all that there are."""
        config = self.config
        how = Sampling(
            stops=tuple(self.stops),
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            seed=found.seed,
        )
        tokens = [prompt.group.prompt for prompt in prompts]
        answers = draw(engine, tokens, config.k, how)
        drawn = self._judged(prompts, answers)
        if weak is not None:
            others = self._drawn(prompts, draw(weak, tokens, config.k, how), [{} for _ in prompts])
            drawn = [replace(one, weak=other) for one, other in zip(drawn, others, strict=True)]
        found.prompts += prompts
        found.drawn += drawn
        found.shaped = found.drawn
        if config.judge is JudgeName.implicit:  # the penalty is that of all answers of the round
            fixed = config.implicit.length_penalty
            found.penalty = balanced_penalty(found.drawn) if fixed is None else fixed
            found.shaped = shaped(found.drawn, found.penalty)
        built = build(found.shaped, config.pairs, seed=self.seed, held_out=self.held_out)
        # Row by row of each pair, so that of both labels as many are taken
        found.groups = [row for group in built.groups for row in as_rows([group])] if self.as_rows else built.groups
        found.counts = built.counts
        found.logps |= built.logps
        for prompt, own in zip(tokens, answers, strict=True):
            if len(found.sample) < _SAMPLED:
                found.sample.append(Group(prompt, (own[0].tokens,)))
                found.logps[found.sample[-1].key(0)] = own[0].logps

    def _judged(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[Answer]]) -> list[Drawn]:
        """The answers with what the judge says of them."""
        verdicts: list[dict[str, Any]] = [{} for _ in prompts]
        if self.judge is not None:
            try:
                verdicts = self._verdicts(self.judge, prompts, answers)
            except UserError as error:
                raise renamed(error) from None
        return self._drawn(prompts, answers, verdicts)

    def _texts(self, answers: Sequence[Answer]) -> list[str]:
        return [as_text(self.tokenizer, one.tokens.tolist(), self.stops) for one in answers]

    def _drawn(
        self, prompts: Sequence[Prompt], answers: Sequence[Sequence[Answer]], verdicts: Sequence[dict[str, Any]]
    ) -> list[Drawn]:
        return [
            Drawn(
                prompt=prompt.group.prompt,
                answers=own,
                texts=self._texts(own),
                gold=prompt.gold,
                question=prompt.row.prompt,
                source=prompt.row.source,
                dataset=prompt.group.dataset,
                **verdict,
            )
            for prompt, own, verdict in zip(prompts, answers, verdicts, strict=True)
        ]

    def _verdicts(
        self, judge: Judge, prompts: Sequence[Prompt], answers: Sequence[Sequence[Answer]]
    ) -> list[dict[str, Any]]:
        k, pairs = self.config.k, list(combinations(range(self.config.k), 2))
        asked = [(place,) for place in range(k)] if judge.pointwise else pairs
        items, n = [], len(asked)
        for prompt, own in zip(prompts, answers, strict=True):
            texts = self._texts(own)
            for places in asked:
                group = Group(prompt.group.prompt, tuple(own[i].tokens for i in places))
                items.append(replace(prompt.item(*(texts[i] for i in places)), group=group))
        if judge.pointwise:
            scores = judge.score(items)
            return [{"scores": [one.score for one in scores[i * n : (i + 1) * n]]} for i in range(len(prompts))]
        found = judge.compare(items)
        return [{"wins": win_matrix(k, found[i * n : (i + 1) * n])} for i in range(len(prompts))]

    def _too_few(self, found: _Found, number: int, least: int) -> str:
        counts, k, unit = found.counts, self.config.k, "row" if self.as_rows else self.config.pairs.unit
        dropped = ", ".join(f"{count} {reason}" for reason, count in counts.dropped.items() if count)
        return (
            f"Round {number + 1} has {len(found.groups)} {unit}s to train on, and a step takes {least}: of the "
            f"{counts.drawn} of {counts.prompts} prompts with {k} answers each are dropped {dropped}. Draw more "
            f"(onpolicy.k, onpolicy.temperature, onpolicy.prompts), or choose another onpolicy.judge or onpolicy.pairs."
        )


def _line(prompt: Prompt, drawn: Drawn) -> dict[str, Any]:
    """The answers to a prompt, for people."""
    line: dict[str, Any] = {"source": drawn.source, "prompt": prompt.item().prompt, "answers": list(drawn.texts)}
    if drawn.scores is not None:
        line["scores"] = list(drawn.scores)
    if drawn.wins is not None:
        line["wins"] = drawn.wins.tolist()
    return line


# A round in its folder

_LOGPS: Kind[tuple[bytes, np.ndarray]] = Kind(
    {"key": Column.of(np.ndarray), "logps": Column.of(np.ndarray)},
    lambda one: {"key": np.frombuffer(one[0], np.uint8), "logps": one[1]},
    lambda key, logps: (key.tobytes(), logps),
)


def _write_round(folder: Path, made: Round, lines: Sequence[dict[str, Any]]) -> None:
    """Keep a round; it counts from the moment that its last file is there."""
    _, groups = write_anew(folder / "groups", GROUPS, made.groups)
    _, logps = write_anew(folder / "logps", _LOGPS, made.logps.items())
    _, sample = write_anew(folder / "sample", GROUPS, made.sample)
    atomic_write_bytes(folder / "answers.jsonl", to_json_lines(lines))
    rest = {"position": made.position, "rate": made.rate, "metrics": made.metrics}
    write_sealed(folder / _WHOLE, {"groups": groups, "logps": logps, "sample": sample, **rest})


def read_round(folder: Path) -> Round | None:
    """The round of a folder, bit for bit as it was made; None if it is not whole.

    Raises:
        UserError: a file has changed.
    """
    if not (folder / _WHOLE).exists():
        return None
    kept = read_sealed(folder / _WHOLE)
    try:
        groups = list(Stored(folder / "groups", GROUPS, kept["groups"]))
        logps = dict(Stored(folder / "logps", _LOGPS, kept["logps"]))
        sample = list(Stored(folder / "sample", GROUPS, kept["sample"]))
    except (OSError, ValueError, KeyError):
        raise damaged(folder) from None
    return Round(groups, logps, sample, kept["position"], kept["rate"], kept["metrics"])
