"""What a run would make of its data: rows left out, lengths, overlap, cuts, likely mistakes, and some rows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from alignment.config.data import DataConfig
from alignment.data.conversations.writer import Writer
from alignment.data.inspection.mistakes import Mistake, likely_mistakes
from alignment.data.inspection.template_verdict import Trait, template_verdict
from alignment.data.inspection.token_view import TokenView, kept_tokens, view_conversation, view_group
from alignment.data.inspection.words import overlaps
from alignment.data.layouts.recognition import Stage
from alignment.data.preparation.mixture import of_source, place_of
from alignment.data.preparation.prepare import fit_preferences, load_conversations, read_preferences
from alignment.data.rows.findings import FINDINGS
from alignment.data.rows.reasons import WORDS
from alignment.data.rows.row import BadRow, Row, count_reasons
from alignment.data.sources.loading import load_rows
from alignment.data.tokens.tokenization import tokenize_groups, tokenize_sft
from alignment.errors import UserError
from alignment.losses import Loss

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from alignment.types import Group

UNLIMITED = 2**30
"""More tokens than a row has, and more bad rows than a file."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LeftOut:
    """The rows that are left out for one reason, and what is wrong with the first of them."""

    count: int
    reason: str
    first: str


@dataclass(frozen=True, slots=True)
class Cut:
    """What one setting cuts: how many of how many texts, and how many of their tokens."""

    setting: str
    what: str
    count: int
    of: int
    tokens: int
    of_tokens: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """One data set, as one stage of a run would take it. Statistics are of its training rows.

    Attributes:
        stage: `preference` or `sft`.
        source: its name in a mixture.
        overview: what a run's log says of the data, without what the other parts say.
        refusal: why a run would stop; None where it would train.
        lengths: tokens before any cut, by name: of each prompt, and of the scored part of the answers.
        needed: tokens of each row before any cut, its prompt with its longest answer.
        overlaps: for each pair, the words that both answers share over the words of either.
        mistakes: sentences, those of the run's own checks first.
    """

    stage: Stage
    config: DataConfig
    overview: list[str]
    refusal: str | None
    rows: int
    left_out: list[LeftOut]
    lengths: dict[str, list[int]]
    needed: list[int]
    overlaps: list[float]
    cuts: list[Cut]
    mistakes: list[str]
    traits: list[Trait]
    views: list[TokenView]
    source: str = ""


def inspect(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, loss: Loss | None, *, views: int
) -> list[Inspection]:
    """Inspect the data of a stage, each source of a mixture by itself.

    Args:
        loss: that of the preference stage; None for SFT.
        views: rows of each data set that are shown by their tokens.

    Raises:
        UserError: nothing of the data can be read.
    """

    def one(settings: DataConfig) -> Inspection:
        if loss is None:
            return _inspect_conversations(settings, tokenizer, views)
        return _inspect_preferences(settings, tokenizer, loss, views)

    if not config.sources:
        return [one(config)]
    refused = None
    with _listening() as said:
        try:
            if loss is None:
                load_conversations(config, tokenizer)
            else:
                fit_preferences(read_preferences(config, tokenizer), config, loss)
        except UserError as error:
            refused = error
    parts = [replace(part, train_where=config.sources[name].where) for name, part in config.parts.items()]
    try:
        first, *others = (_of_source(one(part), name) for name, part in zip(config.parts, parts, strict=True))
    except UserError as error:
        raise refused or error from None  # a run's own sentence names the source
    # What is said of all of them together stands at the first.
    refusal = first.refusal if refused is None else str(refused)
    return [replace(first, overview=[*said, *first.overview], refusal=refusal), *others]


def _of_source(found: Inspection, name: str) -> Inspection:
    """The inspection of a source of a mixture, with its name."""

    def said(text: str) -> str:
        return of_source(text, found.config, place_of(name, found.stage))

    refusal = None if found.refusal is None else said(found.refusal)
    return replace(found, source=name, refusal=refusal, mistakes=[said(sentence) for sentence in found.mistakes])


def _inspect_preferences(config: DataConfig, tokenizer: PreTrainedTokenizerBase, loss: Loss, views: int) -> Inspection:
    def take(settings: DataConfig) -> tuple[Any, list[BadRow]]:
        read = read_preferences(settings, tokenizer)
        data, bad = fit_preferences(read, settings, loss)
        answers = sum(len(group.completions) for group in (*read.train.groups, *read.held_out.groups))
        return (read.train.groups, answers, data.info), bad

    (used, answers, info), bad, refusal, said = _as_a_run(take, config)
    loaded = load_rows(_lenient(config), stage="preference")
    whole = tokenize_groups(loaded.train, tokenizer, _roomy(config))
    pairs = [row for row in whole.rows if len(row.completions) > 1]
    names = [_names(group) for group in whole.groups]
    lengths: dict[str, list[int]] = {"prompt": [len(group.prompt) for group in whole.groups]}
    for group, (best, *_, worst) in zip(whole.groups, ([*n, n[-1]] for n in names), strict=True):
        for name, tokens in {best: group.scored_lengths[0], worst: group.scored_lengths[-1]}.items():
            lengths.setdefault(name, []).append(tokens)
    writer = Writer(tokenizer, config)
    matched = _matched([group.source for group in whole.groups], used)
    return Inspection(
        stage="preference",
        config=config,
        overview=_without(said, info),
        refusal=refusal,
        rows=len(loaded.train),
        left_out=left_out(bad),
        lengths=lengths,
        needed=[len(group.prompt) + max(map(len, group.completions)) for group in whole.groups],
        overlaps=overlaps(pairs),
        cuts=_cuts_of_groups(whole.groups, matched, config),
        mistakes=_mistakes(info, answers, bad, loaded.train),
        traits=template_verdict(tokenizer, config),
        views=[
            view_group(whole.rows[i], whole.groups[i], matched[i], writer, config.truncate_prompt, names[i])
            for i in range(min(views, len(whole.groups)))
        ],
    )


def _inspect_conversations(config: DataConfig, tokenizer: PreTrainedTokenizerBase, views: int) -> Inspection:
    def take(settings: DataConfig) -> tuple[Any, list[BadRow]]:
        data, bad = load_conversations(settings, tokenizer)
        return (data, data.info), bad

    (used, info), bad, refusal, said = _as_a_run(take, config)
    loaded = load_rows(_lenient(config), stage="sft")
    whole = tokenize_sft(loaded.train, tokenizer, _roomy(config))
    scored = [sum(sequence["completion_mask"]) for sequence in whole.sequences]
    total = [len(sequence["input_ids"]) for sequence in whole.sequences]
    kept = dict(zip(used.sources, used.train, strict=True))
    matched = [kept.get(row.source) for row in whole.rows]
    left = [0 if one is None else len(one["input_ids"]) for one in matched]
    writer = Writer(tokenizer, config, supervised=True)
    return Inspection(
        stage="sft",
        config=config,
        overview=_without(said, info),
        refusal=refusal,
        rows=len(loaded.train),
        left_out=left_out(bad),
        lengths={"conversation": total, "scored": scored},
        needed=total,
        overlaps=[],
        cuts=[_cut("sft.data.max_length", "conversations", total, left)],
        mistakes=_mistakes(info, len(used.train) + len(used.eval), bad, loaded.train),
        traits=template_verdict(tokenizer, config),
        views=[
            view_conversation(whole.rows[i], whole.sequences[i], matched[i], writer)
            for i in range(min(views, len(whole.sequences)))
        ],
    )


# What a run says


def _as_a_run(
    take: Callable[[DataConfig], tuple[T, list[BadRow]]], config: DataConfig
) -> tuple[T, list[BadRow], str | None, list[str]]:
    """What a run takes of the data, the rows that it leaves out, why it stops, and what it says.

    If it stops, the data are taken again without the limits on bad rows and findings, so that you can look at them.

    Raises:
        UserError: the run stops, and without the limits it would too.
    """
    with _listening() as said:
        try:
            return *take(config), None, said
        except UserError as error:
            refusal = error
        said.clear()
        try:
            return *take(_lenient(config)), str(refusal), said
        except UserError:
            raise refusal from None


@contextmanager
def _listening() -> Iterator[list[str]]:
    """The lines that the package logs while it works on data, in place of its log."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage().strip())  # type: ignore[method-assign]
    logger = logging.getLogger("alignment.data")
    before = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before


def _without(said: Sequence[str], info: dict[str, Any]) -> list[str]:
    """The lines without those that tell of rows left out and of findings, which have places of their own."""
    return [line for line in said if line not in info["notes"]]


def left_out(bad: Sequence[BadRow]) -> list[LeftOut]:
    """The rows that are left out, by reason, most frequent first."""
    first = {row.reason: row for row in reversed(bad)}
    return [
        LeftOut(
            count,
            WORDS.get(reason, reason),
            f"{Path(first[reason].file).name}:{first[reason].row}: {first[reason].message}",
        )
        for reason, count in count_reasons(bad).items()
    ]


def _mistakes(info: dict[str, Any], answers: int, bad: Sequence[BadRow], rows: Sequence[Row]) -> list[str]:
    """What the run's own checks have found, then what the rules of `alignment.data.inspection.mistakes` find."""
    found = likely_mistakes(rows)
    if endless := info["tokens"].get("eos_appended", 0):
        text = "answers get the tokenizer's EOS, because the chat template ends them with no special token"
        found.insert(0, Mistake(endless, answers, text))
    return [*info["notes"][len(count_reasons(bad)) :], *(mistake.sentence for mistake in found)]


def _lenient(config: DataConfig) -> DataConfig:
    return replace(config, max_bad_rows=UNLIMITED, allow=list(FINDINGS))


def _roomy(config: DataConfig) -> DataConfig:
    return replace(_lenient(config), max_length=UNLIMITED, max_prompt_length=UNLIMITED - 1)


# Lengths and cuts


def _names(group: Group) -> list[str]:
    if group.labels is not None:
        return ["desirable" if group.labels[0] else "undesirable"]
    count = len(group.completions)
    middle = [f"answer {k}" for k in range(2, count)]
    return ["chosen" if count == 2 else "best", *middle, "rejected" if count == 2 else "worst"][:count]


def _matched(sources: Sequence[str], used: Sequence[Group]) -> list[Group | None]:
    """For each row the group that trains, which is of the same place; None if it is left out. Both are in order."""
    rest = iter(used)
    following = next(rest, None)
    matched: list[Group | None] = []
    for source in sources:
        is_same = following is not None and following.source == source
        matched.append(following if is_same else None)
        following = next(rest, None) if is_same else following
    return matched


def _cuts_of_groups(whole: Sequence[Group], used: Sequence[Group | None], config: DataConfig) -> list[Cut]:
    both = [(one, other) for one, other in zip(whole, used, strict=True) if other is not None]
    prompts = _cut(
        "data.max_prompt_length",
        "prompts",
        [len(one.prompt) for one, _ in both],
        [len(other.prompt) for _, other in both],
    )
    answers = [(answer, kept_tokens(answer, other)) for one, other in both for answer in one.completions]
    lengths = [len(answer) for answer, _ in answers]
    return [prompts, _cut("data.max_length", "answers", lengths, [kept for _, kept in answers])]


def _cut(setting: str, what: str, whole: Sequence[int], left: Sequence[int]) -> Cut:
    lost = [all_of_it - kept for all_of_it, kept in zip(whole, left, strict=True)]
    return Cut(setting, what, sum(tokens > 0 for tokens in lost), len(whole), sum(lost), sum(whole))
