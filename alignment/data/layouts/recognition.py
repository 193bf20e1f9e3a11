"""The layouts of preference and SFT data, and how a record of each becomes a `Row`."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeGuard

from alignment.data.conversations.messages import (
    TURN,
    WRITTEN_MESSAGES,
    asking,
    dialogue_of,
    found,
    list_in,
    meaning,
    messages_of,
    text_of,
)
from alignment.data.conversations.trajectories import require_answer, shared_turns, split_conversations
from alignment.data.layouts.columns import Numbered, Reading, Record, cased
from alignment.data.layouts.comparisons import Verdicts, compared
from alignment.data.layouts.named_pairs import named_pairs
from alignment.data.layouts.prompts import VARIABLES, framed, variables_of
from alignment.data.layouts.ratings import (
    asked,
    is_rated,
    list_scores,
    listed,
    rated,
    scores_of,
    thumb,
    thumbs,
    weight_of,
    with_rating,
)
from alignment.data.rows.row import BadRow, Message, Rejected, Row, Text
from alignment.errors import UserError

log = logging.getLogger(__name__)

Stage = Literal["preference", "sft"]

OUR_COLUMNS = (
    *("prompt", "chosen", "rejected", "completion", "label", "messages", "conversations", "system"),
    *("score_chosen", "score_rejected", "completions", "scores", "steps", "weight", *VARIABLES),
    *("response_a", "response_b", "winner", "score", "ranks"),
)

SAMPLE = 32
"""Number of records whose values tell apart layouts with the same columns."""


class NotPreferences(UserError):
    """Data of SFT where preferences are wanted."""


@dataclass(frozen=True, slots=True)
class Layout:
    """One accepted layout: its columns, what must hold for a sample record, and its converter.

    `steps` is the column with the beginning of the answer, which both completions continue by one step. `reading` says
    how records under other names become records of this layout, None where they are some.
    """

    name: str
    columns: tuple[str, ...]
    convert: Callable[[Record], tuple[Text, list[Text]]]
    fits: Callable[[Record], bool] = lambda record: True
    steps: str | None = None
    reading: Reading | None = None

    @property
    def family(self) -> str:
        """What its rows are: "pairs", "lists", "labelled" or "sft"."""
        for column, family in (("chosen", "pairs"), ("completions", "lists"), ("label", "labelled")):
            if column in self.columns:
                return family
        return "sft"


def _split(dialogue: list[Message]) -> tuple[list[Message], list[Message]]:
    if dialogue and dialogue[-1]["role"] != "assistant":
        raise Rejected(
            "bad_roles",
            f"the conversation ends with a turn of {dialogue[-1]['role']}, and the last one must be the assistant's",
        )
    return dialogue[:-1], dialogue[-1:]


def _is_whole(answer: Text) -> TypeGuard[list[Message]]:
    return isinstance(answer, list) and bool(answer) and answer[0]["role"] != "assistant"


def _pair(record: Record) -> tuple[Text, list[Text]]:
    prompt = text_of(record["prompt"], "prompt")
    chosen, rejected = text_of(record["chosen"], "chosen"), text_of(record["rejected"], "rejected")
    if not (_is_whole(chosen) and _is_whole(rejected)):
        return prompt, [chosen, rejected]
    whole, answers = split_conversations([chosen, rejected])
    turns = [m for m in whole if m["role"] != "system"]
    if isinstance(prompt, str):  # UltraFeedback repeats the first question; others the last one
        if prompt.strip() not in {m["content"].strip() for m in (*turns[:1], *turns[-1:])}:
            raise _other_prompt()
        return whole, [*answers]
    asked = [m for m in prompt if m["role"] != "system"]
    if not asked or meaning(turns[: len(asked)]) != meaning(asked):
        raise _other_prompt()
    # What both answers begin with beyond the prompt belongs to it; the longer of the two has the system message.
    prompt = [*prompt, *turns[len(asked) :]]
    return (prompt if len(prompt) > len(whole) else whole), [*answers]


def _other_prompt() -> Rejected:
    return Rejected("prompts_differ", "column 'prompt' is not what the conversations in chosen and rejected share")


def _conversation_pair(record: Record) -> tuple[Text, list[Text]]:
    prompt = messages_of(record["conversations"], "conversations")
    return prompt, [text_of(record["chosen"], "chosen"), text_of(record["rejected"], "rejected")]


def _split_pair(read: Callable[[Any, str], list[Message]]) -> Callable[[Record], tuple[Text, list[Text]]]:
    def convert(record: Record) -> tuple[Text, list[Text]]:
        prompt, answers = split_conversations([read(record[column], column) for column in ("chosen", "rejected")])
        return prompt, [*answers]

    return convert


def _list(prompt: str) -> Callable[[Record], tuple[Text, list[Text]]]:
    def convert(record: Record) -> tuple[Text, list[Text]]:
        completions = list_in(record["completions"], "completions")
        if not isinstance(completions, list):
            raise Rejected("wrong_type", f"column 'completions' holds {found(completions)}, not a list")
        answers = [c["response"] if is_rated(c) else with_rating(c)[0] for c in completions]
        return text_of(record[prompt], prompt), [text_of(answer, "completions") for answer in answers]

    return convert


def _completion(record: Record) -> tuple[Text, list[Text]]:
    return text_of(record["prompt"], "prompt"), [text_of(record["completion"], "completion")]


def _conversation(column: str) -> Callable[[Record], tuple[Text, list[Text]]]:
    def convert(record: Record) -> tuple[Text, list[Text]]:
        prompt, answer = _split(messages_of(record[column], column))
        return prompt, [answer]

    return convert


def _holds_steps(column: str) -> Callable[[Record], bool]:
    return lambda record: isinstance(record[column], str)


def _holds_list(record: Record) -> bool:
    """Alternative completions. With a column `labels` they would be the labelled steps of one answer."""
    return isinstance(list_in(record["completions"], "completions"), list) and record.get("labels") is None


def _holds_messages(record: Record) -> bool:
    chosen = record["chosen"]
    return isinstance(chosen, list) or (isinstance(chosen, str) and WRITTEN_MESSAGES.match(chosen) is not None)


def _holds_whole_conversations(record: Record) -> bool:
    try:
        return _is_whole(text_of(record["chosen"], "chosen"))
    except Rejected:
        return False


def _holds_dialogue(record: Record) -> bool:
    return isinstance(record["chosen"], str) and TURN.search(record["chosen"]) is not None


LAYOUTS = (
    *(
        Layout("step pairs", ("prompt", column, "chosen", "rejected"), _pair, _holds_steps(column), column)
        for column in ("steps", "initial_reason_steps")
    ),
    Layout("ShareGPT pairs", ("conversations", "chosen", "rejected"), _conversation_pair),
    Layout("UltraFeedback pairs", ("prompt", "chosen", "rejected"), _pair, _holds_whole_conversations),
    Layout("pairs", ("prompt", "chosen", "rejected"), _pair),
    Layout("HH dialogue pairs", ("chosen", "rejected"), _split_pair(dialogue_of), _holds_dialogue),
    Layout("implicit-prompt pairs", ("chosen", "rejected"), _split_pair(messages_of), _holds_messages),
    Layout("ranked lists", ("prompt", "completions"), _list("prompt"), _holds_list),
    Layout("UltraFeedback lists", ("instruction", "completions"), _list("instruction"), _holds_list),
    Layout("labelled messages", ("messages", "label"), _conversation("messages")),
    Layout("labelled ShareGPT", ("conversations", "label"), _conversation("conversations")),
    Layout("labelled completions", ("prompt", "completion", "label"), _completion),
    Layout("messages", ("messages",), _conversation("messages")),
    Layout("ShareGPT", ("conversations",), _conversation("conversations")),
    Layout("completions", ("prompt", "completion"), _completion),
)


def rename(record: Record, columns: Mapping[str, str]) -> Record:
    """The record with its columns under our names. A column of the file that already has such a name is dropped."""
    theirs = set(columns.values())
    kept = {name: value for name, value in record.items() if name not in theirs and name not in columns}
    return kept | {ours: record[name] for ours, name in columns.items() if name in record}


def recognise(
    records: Sequence[Record], columns: Mapping[str, str], stage: Stage, source: str, verdicts: Verdicts | None = None
) -> Layout:
    """The layout that most records have. `columns` maps our names to the file's.

    Raises:
        UserError: the layout is unknown or does not serve the stage, or `columns` names a column that does not exist.
    """
    found = Counter(name for record in records for name in record)
    listed_columns = ", ".join(sorted(found)) or "none"
    for ours, theirs in columns.items():
        if ours not in OUR_COLUMNS:
            raise UserError(f"data.columns has the key '{ours}', and the keys are {', '.join(OUR_COLUMNS)}.")
        if theirs not in found:
            raise UserError(
                f"data.columns maps {ours} to '{theirs}', but the columns of {source} are {listed_columns}."
            )
        if theirs != ours and ours in found and ours not in columns.values():
            log.warning(
                "data.columns takes %s from '%s': the column '%s' of %s is not read.", ours, theirs, ours, source
            )
    renamed = [rename(record, columns) for record in records]
    layout = _known(renamed)
    if layout is None or (stage == "preference" and layout.family == "sft"):
        layout = _under_other_names(renamed, verdicts or Verdicts(), stage, source) or layout
    if layout is None:
        accepted = "; ".join(
            f"{known.name} ({', '.join(known.columns)})" for known in LAYOUTS if stage == "sft" or known.family != "sft"
        )
        raise UserError(
            f"The layout of {source} is not known: its columns are {listed_columns}, and accepted are {accepted}; "
            "compared pairs (prompt, response_a, response_b, winner); rated answers (prompt, completion, score); "
            "data.columns maps our names to the file's."
        )
    if stage == "preference" and layout.family == "sft":
        raise NotPreferences(
            f"Preference data is wanted, but {source} has SFT data (columns {listed_columns}): "
            "pairs need the columns chosen and rejected, ranked lists completions, labelled rows a label."
        )
    if stage == "sft" and layout.steps is not None:
        raise UserError(f"SFT learns whole answers, and {source} has single steps of them (layout {layout.name}).")
    return layout


def _usual(records: Sequence[Record]) -> set[str]:
    """The columns that at least half of the records fill."""
    filled = Counter(name for record in records for name, value in record.items() if value is not None)
    return {name for name, count in filled.items() if 2 * count >= len(records)}


def _known(records: Sequence[Record]) -> Layout | None:
    """The first layout that the records have as they are."""
    usual = _usual(records)
    for layout in LAYOUTS:
        if usual.issuperset(layout.columns):
            sample = [r for r in records if all(r.get(name) is not None for name in layout.columns)][:SAMPLE]
            if any(layout.fits(record) for record in sample):
                return layout
    return None


def _under_other_names(records: Sequence[Record], verdicts: Verdicts, stage: Stage, source: str) -> Layout | None:
    """The layout that the records have under the names of the field."""
    usual = _usual(records)
    readings = [lambda: asked(usual)]
    if not usual >= {"chosen", "rejected"}:
        ranked = [lambda: rated(records, usual)] if stage == "preference" else []
        compares = [lambda: compared(records, usual, verdicts, source), lambda: listed(records, usual)]
        readings = [*compares, lambda: named_pairs(records, usual), lambda: thumbs(records, usual), *ranked, *readings]
    for read in [*readings, lambda: cased(usual, OUR_COLUMNS)]:
        if (reading := read()) is None:
            continue
        recast = [record for _, _, record in reading.each((source, 0, r) for r in records)]
        good = [record for record in recast if isinstance(record, dict)]
        if not good:
            raise UserError(f"No row of {source} can be used: {recast[0].message}.")
        if (layout := _known(good)) is not None:
            return replace(layout, name=reading.name or layout.name, reading=reading)
    return None


def rows_of(
    records: Iterable[Numbered], layout: Layout, columns: Mapping[str, str], folder: Path | None = None
) -> Iterator[Row | BadRow]:
    """Every record as a checked row, or as a bad row with the first thing that is wrong.

    A layout under other names may make several rows of a record, or one of several records.

    Args:
        folder: for records that have to be gathered and are too many for memory; None: they stay there.
    """
    if layout.reading is None:
        renamed = columns
    else:
        named = ((file, number, rename(r, columns) if isinstance(r, dict) else r) for file, number, r in records)
        records, renamed = layout.reading.ready(named, folder), {}
    for file, number, record in records:
        yield record if isinstance(record, BadRow) else to_row(record, layout, renamed, file, number)


def to_row(record: Any, layout: Layout, columns: Mapping[str, str], file: str, number: int) -> Row | BadRow:
    """The record as a checked row, or as a bad row with the first thing that is wrong."""
    try:
        if not isinstance(record, dict):
            raise Rejected("wrong_type", f"the row is {found(record)}, not an object")
        return _to_row(rename(record, columns), layout, f"{file}:{number}")
    except Rejected as rejected:
        return BadRow(rejected.reason, str(rejected), file, number)


def _to_row(record: Record, layout: Layout, source: str) -> Row:
    # Convert, with the system message and earlier turns in front
    for name in layout.columns:
        if record.get(name) is None:
            raise Rejected("missing_field", f"column '{name}' is absent or null")
    prompt, answers = layout.convert(record)
    asked = asking(prompt) or [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    framing, used = framed(asked, record)
    if framing != asked or isinstance(prompt, list) or any(isinstance(answer, list) for answer in answers):
        prompt = framing
        answers = [[{"role": "assistant", "content": a}] if isinstance(a, str) else a for a in answers]

    # Check the texts
    _check_prompt(prompt)
    for answer in answers:
        _check_answer(answer)
    if len(answers) > 1 and all(answer == answers[0] for answer in answers):
        raise Rejected("identical_answers", "the answers are the same")
    turns = [answer for answer in answers if isinstance(answer, list)]
    if isinstance(prompt, list) and len(turns) > 1 and shared_turns(turns):
        prompt, shared = split_conversations([[*prompt, *answer] for answer in turns])
        answers = [*shared]

    # Labels, scores, weight, steps; all other columns are metadata
    used |= {*layout.columns, "system"}
    labels = scores = None
    if layout.family == "labelled":
        labels = (thumb(record["label"]),)
    if layout.family == "pairs":
        scores = scores_of([record.get("score_chosen"), record.get("score_rejected")])
        used |= {"score_chosen", "score_rejected"}
    if layout.family == "lists":
        if len(answers) < 2:
            raise Rejected("too_few_answers", f"a ranked list has at least two completions, not {len(answers)}")
        scores = list_scores(record)
        used |= {"scores", "ranks"}
        if scores is not None:
            order = sorted(range(len(answers)), key=scores.__getitem__, reverse=True)  # stable, also in reverse
            answers, scores = [answers[i] for i in order], tuple(scores[i] for i in order)
    weight = 1.0
    if layout.family != "sft":
        weight = weight_of(record.get("weight"))
        used.add("weight")
    steps = None
    if layout.steps is not None:
        steps = record[layout.steps]
        if not isinstance(steps, str):
            raise Rejected("wrong_type", f"column '{layout.steps}' holds {found(steps)}, not text")
        _check_text(steps)
        if any(isinstance(answer, list) and len(answer) > 1 for answer in answers):
            raise Rejected("bad_roles", "a step is one text or one assistant message, and this one has several turns")
    variables = variables_of(record)
    used.update(VARIABLES)
    meta = {name: value for name, value in record.items() if name not in used}
    return Row(prompt, tuple(answers), labels, scores, meta, source, weight, steps, variables)


def _check_prompt(prompt: Text) -> None:
    if isinstance(prompt, str):
        _check_text(prompt)
        if not prompt.strip():
            raise Rejected("empty_prompt", "the prompt is empty")
        return
    if not prompt:
        raise Rejected("empty_prompt", "the prompt has no messages")
    previous = ""
    for message in prompt:
        _check_text(message["content"])
        if message["role"] == "tool" and previous not in ("assistant", "tool"):
            raise Rejected("bad_roles", "a tool turn stands where no assistant turn is before it")
        previous = message["role"]
    if previous == "assistant":
        raise Rejected("bad_roles", "another turn of assistant stands right before the answer")
    if previous not in ("user", "tool"):
        raise Rejected(
            "bad_roles", f"a turn of {previous} stands right before the answer, and there belongs one of user or tool"
        )
    if previous == "user" and not prompt[-1]["content"].strip():
        raise Rejected("empty_prompt", "the last user turn is empty")


def _check_answer(answer: Text) -> None:
    if isinstance(answer, list):
        if not answer:
            raise Rejected("empty_answer", "the answer has no message")
        require_answer(answer)
        for message in answer:
            _check_text(message["content"])
        if answer[-1].get("tool_calls"):
            return
    text = answer if isinstance(answer, str) else answer[-1]["content"]
    _check_text(text)
    if not text.strip():
        raise Rejected("empty_answer", "the answer is empty")


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Rejected("lone_surrogate", f"character {error.start} is half of a surrogate pair") from None
