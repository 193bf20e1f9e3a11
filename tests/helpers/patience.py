"""How long a test waits for what should happen soon."""

import os

FACTOR = float(os.environ.get("ALIGNMENT_TEST_PATIENCE", "10"))


def patience(seconds: float) -> float:
    """The limit of a wait that takes less than `seconds` on a quiet machine: other work may make it much slower.

    Only a test that fails waits this long. `ALIGNMENT_TEST_PATIENCE` sets how many times longer it is.
    """
    return FACTOR * seconds
