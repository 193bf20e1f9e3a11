import pytest

from tests.helpers.run_folders import make_run, right


@pytest.fixture
def sweep(tmp_path):
    """Two losses, two settings each, two seeds; reward accuracy alone."""
    number = 0
    for loss, settings, counts in (
        ("dpo", {"beta": 0.1}, (16, 18)),
        ("dpo", {"beta": 0.5}, (12, 10)),
        ("simpo", {"beta": 2.0, "gamma_beta_ratio": 0.5}, (15, 13)),
        ("simpo", {"beta": 8.0, "gamma_beta_ratio": 0.5}, (11, 11)),
    ):
        for seed, count in enumerate(counts):
            make_run(tmp_path / "sweep" / f"{number}-made", loss, settings, seed, right=right(count))
            number += 1
    return tmp_path / "sweep"
