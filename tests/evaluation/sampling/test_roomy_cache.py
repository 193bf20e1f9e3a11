"""A cache with room holds what transformers' own cache holds, and moves only the rows that take another's place."""

import torch
from transformers import DynamicCache

from alignment.evaluation.sampling.roomy_cache import make_roomy

ROWS, HEADS, WIDTH = 4, 2, 8


def caches():
    roomy = DynamicCache()
    make_roomy(roomy)
    return roomy, DynamicCache()


def read(both, rows, tokens):
    """Both caches take the same new keys and values, and hold the same."""
    new = torch.randn(2, rows, HEADS, tokens, WIDTH)
    found, expected = (cache.update(new[0], new[1], 0) for cache in both)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert len({cache.get_seq_length() for cache in both}) == 1


def reorder(both, rows):
    for cache in both:
        cache.reorder_cache(torch.tensor(rows))


def test_it_holds_what_the_usual_cache_holds():
    """Through more steps than there is room for, repeated rows, rows that leave, and others that put in new tensors."""
    torch.manual_seed(0)
    both = caches()
    read(both, 2, 5)
    reorder(both, [0, 0, 1, 1])
    for _ in range(40):
        read(both, ROWS, 1)
    reorder(both, [0, 3, 2])
    read(both, 3, 1)
    reorder(both, [0, 1])
    read(both, 2, 1)
    for cache in both:
        cache.batch_select_indices(torch.tensor([1, 0]))
    read(both, 2, 1)
    for cache in both:
        cache.crop(-3)
    read(both, 2, 2)
    reorder(both, [1])
    read(both, 1, 1)


def test_a_step_and_a_row_that_leaves_copy_nothing_else():
    """The keys stay where they are in memory, as long as there is room."""
    both = caches()
    read(both, ROWS, 3)
    (layer,) = both[0].layers
    start = layer.keys.data_ptr()
    read(both, ROWS, 1)
    reorder(both, [0, 3, 2])
    read(both, 3, 1)
    assert layer.keys.data_ptr() == start
    reorder(both, [2, 1, 0])
    read(both, 3, 1)
    assert layer.keys.data_ptr() != start, "rows that change places need new memory"
