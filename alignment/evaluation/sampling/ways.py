"""How a model's answers may be drawn: its cache and padding are tried on two small prompts before they are used."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alignment.evaluation.sampling.answer import Sampling
from alignment.evaluation.sampling.loop import Way, draw_batch
from alignment.evaluation.sampling.presets import inner, without_presets
from alignment.kernels.base import in_words
from alignment.scoring.logps import autocast

log = logging.getLogger(__name__)

_WAYS = {
    Way(cached=True, padded=True): "",
    Way(cached=True, padded=False): "without padding, so that a batch has prompts of one length",
    Way(cached=False, padded=True): "without its cache, which takes longer",
    Way(cached=False, padded=False): "without its cache and without padding, which takes longer",
}
_KEPT = "_way_of_drawing"


def way_of(model: Any, device: torch.device) -> Way:
    """The fastest way whose log-probs are those of whole passes over single answers; found once for a model.

    A log line says what a model cannot do.

    Args:
        model: in eval mode.
    """
    base = inner(model)
    if (known := vars(base).get(_KEPT)) is not None:
        return known
    reason = ""
    for way, words in _WAYS.items():
        found = _problem(model, way, device) if way is not list(_WAYS)[-1] else None
        if found is None:
            if words:
                log.info("Answers of %s are drawn %s (%s).", type(base).__name__, words, reason)
            setattr(base, _KEPT, way)
            return way
        reason = reason or found
    raise AssertionError("the last way is taken as it is")


@torch.no_grad()
def _problem(model: Any, way: Way, device: torch.device) -> str | None:
    """What is wrong with a way; None if nothing.

    Of three answers to two prompts the first, to the longer prompt, ends at once, while two go on differently: so rows
    are repeated, dropped and kept apart.
    """
    vocabulary = inner(model).get_input_embeddings().num_embeddings
    tokens = (np.arange(19) * 7919 % vocabulary).astype(np.int32)
    long, short = tokens[:9], tokens[9:14] if way.padded else tokens[5:14]
    ends, *words = tokens[14:].tolist()
    forced = [[ends], words[:3], words[1:]]
    how = Sampling(stops=(ends,), max_new_tokens=3, temperature=0.0)
    steps = iter(range(3))

    def choose(scores: Tensor, rows: Sequence[int]) -> Tensor:
        step = next(steps)
        return torch.tensor([forced[row][step] for row in rows], device=device)

    try:
        with without_presets(model):
            answers = draw_batch(model, [long, short], [0, 1, 1], choose, how, way, device)
        found = np.concatenate([answer.logps for answer in answers])
        expected = [
            _logps(model, np.concatenate([prompt, answer]), len(answer), device)
            for prompt, answer in zip((long, short, short), forced, strict=True)
        ]
    except Exception as error:  # a cache that nobody has seen
        return in_words(error)
    difference = float(np.abs(found - np.concatenate(expected)).mean())
    tolerance = 2e-4 if model.dtype in (torch.float32, torch.float64) else 0.1
    return None if difference <= tolerance else f"log-probs differ by {difference:.2g}"


def _logps(model: Any, tokens: np.ndarray, last: int, device: torch.device) -> np.ndarray:
    """Log-probs of the last tokens of a sequence by a whole pass over it alone."""
    ids = torch.from_numpy(tokens.astype(np.int64)).to(device)
    with autocast(model, device):
        logits = model(input_ids=ids[None, :-1], use_cache=False).logits[0, -last:]
    return logits.float().log_softmax(-1).gather(1, ids[-last:, None]).squeeze(1).cpu().numpy()
