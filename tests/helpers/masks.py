"""Masks of shared rows, written out token by token."""

import torch


def dense_mask(row, window=None):
    """(T, T) bool, written out token by token."""
    owner, position = [], []
    for number, span in enumerate(row):
        owner += [(number, None)] * span.prompt
        position += list(range(span.prompt))
        for k, length in enumerate(span.completions):
            owner += [(number, k)] * length
            position += list(range(span.prompt, span.prompt + length))
    size = len(owner)
    mask = torch.zeros(size, size, dtype=torch.bool)
    for q in range(size):
        for k in range(size):
            seen = owner[k] == owner[q] or owner[k] == (owner[q][0], None)
            mask[q, k] = seen and 0 <= position[q] - position[k] < (window or size)
    return mask
