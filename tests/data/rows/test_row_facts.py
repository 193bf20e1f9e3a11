"""What is said of all rows: weights that leave nothing to learn are refused."""

import pytest

from alignment.data.rows.row import Row
from alignment.data.rows.row_facts import RowFacts
from alignment.errors import UserError


def weighted(*weights):
    return [Row("p", ("a", "b"), weight=weight) for weight in weights]


def test_weights_that_are_all_0_are_refused():
    """The loss of every row would be 0."""
    with pytest.raises(UserError, match="The column weight is 0 in every row, so that nothing would be learnt: leave"):
        RowFacts.of(weighted(0.0, 0.0)).report()


@pytest.mark.parametrize("weights", [(0.0, 0.5), (1.0, 1.0), (2.0,)])
def test_weights_that_leave_something_are_said(weights, caplog):
    """Some rows may be off; the log names the range, unless all weigh 1."""
    caplog.set_level("INFO")
    RowFacts.of(weighted(*weights)).report()
    said = f"The column weight ({min(weights):g} to {max(weights):g}) multiplies the loss of its row."
    assert (said in caplog.text) == (weights != (1.0, 1.0))
