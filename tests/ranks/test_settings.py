"""`trainer.devices`: what it may be, where it has no effect, and that it may change when a run goes on."""

from types import SimpleNamespace

import pytest

from alignment.config.arguments import check_arguments
from alignment.config.compose import load
from alignment.errors import UserError
from alignment.run import require_team

SMALL = ("recipe=quickstart",)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trainer.devices=0"], "trainer.devices must be auto or at least 1, not 0"),
        (["trainer.devices=all"], "trainer.devices must be auto or at least 1, not all"),
        (["sft.trainer.devices=2"], "the SFT stage has the ranks of the run: set trainer.devices"),
        (["-m", "trainer.devices=2", "loss.beta=0.1,0.2"], "a sweep trains its members one after another"),
    ],
)
def test_what_cannot_be_is_refused(arguments, said):
    with pytest.raises(UserError, match=said):
        check_arguments([*SMALL, *arguments])


def test_the_launcher_decides_how_many_ranks_there_are():
    """A number of one's own may be left out, be auto or be right."""
    for value in ("1", "auto", "4"):
        require_team(load(*SMALL, f"trainer.devices={value}"), SimpleNamespace(size=4))
    with pytest.raises(UserError, match=r"trainer.devices=2, and the launcher has started 4 ranks: leave it out"):
        require_team(load(*SMALL, "trainer.devices=2"), SimpleNamespace(size=4))


def test_a_run_without_preference_stage_has_ranks_too():
    assert load("recipe=sft_qwen3", "trainer.devices=2").trainer.devices == 2
