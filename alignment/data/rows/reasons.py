"""Rows that were left out, in words: how many of which kind, and the first of them with what is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from alignment.data.rows.row import BadRow
from alignment.errors import UserError

SHOWN = 5
"""Number of rows that a message names."""

WORDS = {
    "bad_label": "with a label that is neither true nor false",
    "bad_verdict": "with a verdict that names none of the two answers",
    "both_bad": "whose two answers are both bad",
    "bad_roles": "with roles out of order",
    "bad_score": "with scores that are no numbers",
    "bad_tool_call": "with a tool call that is none, or whose arguments are no JSON",
    "bad_variables": "with variables that no chat template may have",
    "bad_weight": "with a weight that is no number",
    "broken_json": "that are no valid JSON",
    "completion_truncated_away": "whose prompt alone fills max_length",
    "contaminated": "that share words with an evaluation set",
    "duplicate": "that repeat an earlier one",
    "empty_answer": "with an empty answer",
    "empty_prompt": "with an empty prompt",
    "identical_after_tokenising": "with answers that are the same in their first tokens",
    "identical_answers": "with answers that are the same",
    "lone_surrogate": "with half a character",
    "missing_field": "with a column missing or empty",
    "no_completion_tokens": "of whose answer the template leaves nothing",
    "no_prompt_tokens": "of whose prompt no token is left",
    "no_scored_tokens": "none of whose scored turns fits into max_length",
    "no_vote": "without a thumb up or down",
    "not_utf8": "that are not UTF-8",
    "not_text": "with a part that is no text",
    "nothing_to_learn": "none of whose answers is to be learnt",
    "prompts_differ": "with different prompts for the two answers",
    "single_answer": "whose prompt has no second answer",
    "template_error": "that the chat template refuses",
    "template_not_prefix": "that the chat template writes differently with an answer",
    "tie": "that are ties",
    "two_systems": "with two system texts",
    "too_few_answers": "with fewer than two answers",
    "too_many_cells": "with more cells than the header",
    "wrong_type": "with another type of value than text or messages",
    # What the tokens were counted for
    "truncated": "conversations cut at max_length",
    "truncated_prompts": "prompts cut",
    "truncated_completions": "answers cut",
    "duplicate_completions": "answers left out that another one repeats",
    "seam_moves": "prompts whose last token merges with the answer",
    "template_splits": "prompts that the template writes differently before an answer",
    "several_turns": "answers of several turns, of which the assistant's are scored",
    "eos_appended": "answers given an end-of-turn token",
    "last_turn_only": "conversations of which only the last answer is scored",
}
"""What a code counts, to be read after its number."""


class UnusableRows(UserError):
    """Too many rows cannot be used; the message names the first, and `rows` are all of them."""

    def __init__(self, problem: str, rows: Sequence[BadRow], source: str) -> None:
        super().__init__(f"{problem}: {first_rows(rows, source)}.")
        self.rows = list(rows)


def in_words(counts: Mapping[str, int]) -> str:
    """Counts by code as people say them."""
    return ", ".join(f"{count} {WORDS.get(code, code.replace('_', ' '))}" for code, count in counts.items())


def first_rows(bad: Sequence[BadRow], source: str) -> str:
    """The first rows with what is wrong, those with the same fault together; files are named unless it is `source`."""
    faults: dict[tuple[str, str], list[str]] = {}
    for row in bad[:SHOWN]:
        faults.setdefault((row.file, row.message.rstrip(".")), []).append(str(row.row))
    said = []
    for (file, message), numbers in faults.items():
        *others, last = numbers
        rows = f"rows {', '.join(others)} and {last}" if others else f"row {last}"
        said.append(f"{'' if file == source else f'{file} '}{rows}: {message}")
    return "; ".join(said) + (f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else "")
