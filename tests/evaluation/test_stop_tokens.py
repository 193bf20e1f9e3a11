"""The tokens that end an answer come from tokenizer, template and model, never from data."""

from types import SimpleNamespace

import pytest

from alignment.evaluation.generate import stop_tokens
from alignment.policy.load import own_stop_tokens


@pytest.mark.parametrize(
    ("eos", "end_of_turn", "own", "expected"),
    [(1, 2, [3, 1], [1, 2, 3]), (1, None, [], [1]), (None, 2, [], [2]), (None, None, [4], [4])],
)
def test_all_of_them_once(eos, end_of_turn, own, expected):
    assert stop_tokens(SimpleNamespace(eos_token_id=eos), end_of_turn, own) == expected


@pytest.mark.parametrize(
    ("file", "expected"),
    [(None, []), ('{"eos_token_id": 5}', [5]), ('{"eos_token_id": [5, 6]}', [5, 6]), ("{}", []), ("{broken", [])],
)
def test_the_model_s_own_are_in_its_generation_settings(tmp_path, file, expected):
    if file is not None:
        (tmp_path / "generation_config.json").write_text(file)
    assert own_stop_tokens(SimpleNamespace(revision=None), str(tmp_path)) == expected
