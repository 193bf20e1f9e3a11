"""The tokens that end an answer come from tokenizer, template and model, never from data."""

import json
from types import SimpleNamespace

import pytest

from alignment.evaluation.sampling.answer import stop_tokens
from alignment.policy.load import end_with, own_stop_tokens


@pytest.mark.parametrize(
    ("eos", "ends", "own", "expected"),
    [(1, [2, 5], [3, 1], [1, 2, 3, 5]), (1, [], [], [1]), (None, [2], [], [2]), (None, [], [4], [4])],
)
def test_all_of_them_once(eos, ends, own, expected):
    assert stop_tokens(SimpleNamespace(eos_token_id=eos), ends, own) == expected


@pytest.mark.parametrize(
    ("file", "expected"),
    [(None, []), ('{"eos_token_id": 5}', [5]), ('{"eos_token_id": [5, 6]}', [5, 6]), ("{}", []), ("{broken", [])],
)
def test_the_model_s_own_are_in_its_generation_settings(tmp_path, file, expected):
    if file is not None:
        (tmp_path / "generation_config.json").write_text(file)
    assert own_stop_tokens(SimpleNamespace(revision=None), str(tmp_path)) == expected


@pytest.mark.parametrize("presets", [{}, {"eos_token_id": 2}, {"eos_token_id": 2, "temperature": 0.9, "top_p": 0.6}])
def test_a_saved_model_ends_its_answers_where_the_run_ended_them(tmp_path, presets):
    """Its base may know no end of turn. Its other generation settings stay, and an adapter gets none."""
    end_with(tmp_path, [2, 7])
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "generation_config.json").write_text(json.dumps(presets))
    end_with(tmp_path, [2, 7])
    assert json.loads((tmp_path / "generation_config.json").read_text()) == presets | {"eos_token_id": [2, 7]}
    assert own_stop_tokens(SimpleNamespace(revision=None), str(tmp_path)) == [2, 7]
