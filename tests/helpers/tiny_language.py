"""Answers of up to three tokens over a vocabulary of three, the last of which ends one: every answer can be listed."""

from itertools import product

import torch

WORDS, LONGEST, STOP = 3, 3, 2
ANSWERS = [
    answer
    for length in range(1, LONGEST + 1)
    for answer in product(range(WORDS), repeat=length)
    if STOP not in answer[:-1] and (answer[-1] == STOP or length == LONGEST)
]
PREFIXES = sorted({answer[:t] for answer in ANSWERS for t in range(len(answer))})


def tables(seed):
    """(prefixes, words) logits of a language model with a number of its own for each prefix and word."""
    return torch.randn(len(PREFIXES), WORDS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logps(logits, answer):
    """(tokens,) log-probs of an answer."""
    rows = torch.stack([logits[PREFIXES.index(answer[:t])] for t in range(len(answer))]).log_softmax(-1)
    return rows.gather(-1, torch.tensor(answer)[:, None]).squeeze(-1)
