"""Chats with tiny policies: two adapters on one base, without a run."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from alignment.chat.opening import open_guests
from alignment.chat.session import Session, Settings
from alignment.evaluation.sampling.answer import Finish

SHORT = Settings(temperature=1.0, top_p=1.0, max_new_tokens=6)


def write_adapter(model: Path, folder: Path, seed: int, r: int = 4, settings=None) -> Path:
    """A saved adapter with an effect, on the model in a folder, without a tokenizer of its own."""
    base = AutoModelForCausalLM.from_pretrained(model)
    torch.manual_seed(seed)
    adapted = get_peft_model(base, settings or LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear"))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.5)
    adapted.save_pretrained(folder)
    return folder


_opened = cache(open_guests)
"""Tests share models: who speaks remembers nothing."""


def chat(*folders: Path, against: str = "start", system: str | None = None, **changed) -> Session:
    """A chat with what is in these folders."""
    settings, seed = changed.pop("settings", SHORT), changed.pop("chance", 0)
    guests = _opened(tuple(map(str, folders)), against, ("device=cpu",))
    return Session(guests, settings, system, chance=random.Random(seed), **changed)


def silent(column: int, text: str) -> None:
    """Shows nothing."""


def finished(session: Session) -> None:
    """Let the last answers be different and whole ones, which tiny policies hardly give."""
    while len({reply.text for reply in session.last.replies}) == 1:
        session.retry(silent)
    turn = session.last
    turn.replies = [replace(reply, finish=Finish.stop) for reply in turn.replies]
