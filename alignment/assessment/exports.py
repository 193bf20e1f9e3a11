"""Answers in the forms of AlpacaEval and Arena-Hard, for their own programs."""

from __future__ import annotations

import hashlib
import re
import time
from typing import Any

from alignment.assessment.entrants import Entrants
from alignment.files import to_json, to_json_lines

FORMS = ("alpaca_eval", "arena")


def exported(form: str, field: Entrants) -> dict[str, bytes]:
    """The first answer of every policy to each prompt, a file for each policy, by the file's name."""
    files = {}
    for number, name in enumerate(field.names):
        plain = f"{number}-{re.sub(r'[^A-Za-z0-9._-]+', '_', name).strip('_.')}"
        pairs = [(i, several[0]) for i, several in enumerate(field.answers[number])]
        if form == "alpaca_eval":
            rows = [_alpaca(field, i, name, text) for i, text in pairs]
            files[f"alpaca_eval/{plain}.json"] = to_json(rows, 2)
        else:
            files[f"arena/{plain}.jsonl"] = to_json_lines(_arena(field, i, name, text) for i, text in pairs)
    return files


def _alpaca(field: Entrants, place: int, name: str, answer: str) -> dict[str, Any]:
    asked = field.policies[0].questions
    dataset = asked.rows[place].meta.get("dataset") or "held_out"
    return {"dataset": dataset, "instruction": asked.texts[place], "output": answer, "generator": name}


def _arena(field: Entrants, place: int, name: str, answer: str) -> dict[str, Any]:
    """A row of Arena-Hard v2; a prompt without its `uid` is named by its text."""
    asked = field.policies[0].questions
    text = asked.texts[place]
    uid = asked.rows[place].meta.get("uid") or hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": {"answer": answer}}]
    return {"uid": uid, "ans_id": f"{uid}-{place}", "model": name, "messages": messages, "tstamp": time.time()}
