"""Settings of a draw are checked where they are made."""

import pytest

from alignment.errors import UserError
from alignment.evaluation.sampling.answer import Sampling


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"stops": ()}, "needs a token that ends it"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ({"temperature": -1.0}, "temperature must be a finite number, at least 0, not -1.0"),
        ({"top_k": -1}, "top_k must be at least 0, not -1"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], not 0.0"),
        ({"min_p": 1.5}, r"min_p must be in \[0, 1\], not 1.5"),
    ],
)
def test_a_wrong_setting_is_one_sentence(settings, said):
    """Which setting, what is wrong, and what is accepted."""
    with pytest.raises(UserError, match=said):
        Sampling(**{"stops": (1,), "max_new_tokens": 4} | settings)
