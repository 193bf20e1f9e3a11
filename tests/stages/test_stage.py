"""The result of a stage: what is written is read again, and a file that is damaged is refused in one sentence."""

from __future__ import annotations

import json

import pytest

from alignment.errors import UserError
from alignment.files import write_sealed
from alignment.stages.stage import PreferenceResult, StageResult, read_result, require_whole, write_result

SFT = {"steps": 8, "metrics": {"train/loss": 0.5}, "memory": {"measured": 1}, "seconds": 2.0, "tokens_per_second": 9.0}
PREFERENCE = SFT | {
    **{"loss": "dpo", "settings": {"beta": 0.1}, "start": {"loss": 0.7}, "reference": {"mode": "cache"}},
    **{"kl": None, "cohort": {"size": 2}},
}


@pytest.mark.parametrize(("kind", "values"), [(StageResult, SFT), (PreferenceResult, PREFERENCE)])
def test_a_result_is_read_as_it_was_written(kind, values, tmp_path):
    assert read_result(tmp_path, kind) is None
    write_result(tmp_path, kind(**values), tmp_path / "policy")
    assert json.loads((tmp_path / "done.json").read_text())["content"]["result"] == values
    assert read_result(tmp_path, kind) == kind(**values)


def test_the_summary_has_reference_kl_and_cohort_in_places_of_their_own():
    found = PreferenceResult(**PREFERENCE, stopped={"step": 4}).summary()
    assert found == {k: v for k, v in PREFERENCE.items() if k not in ("reference", "kl", "cohort")} | {
        "stopped": {"step": 4}
    }


@pytest.mark.parametrize("values", [{}, {"steps": 8}, SFT | {"unknown": 1}])
def test_a_file_of_another_version_is_refused(values, tmp_path):
    write_sealed(tmp_path / "done.json", {"result": values, "policy": {}})
    with pytest.raises(UserError, match=r"done\.json is damaged, or of another version") as caught:
        read_result(tmp_path, StageResult)
    assert str(caught.value).endswith(".")


def test_a_policy_of_which_a_byte_has_changed_is_refused(tmp_path):
    """Its weights can still be read, so nothing else would notice."""
    policy = tmp_path / "policy"
    policy.mkdir()
    (policy / "adapter_model.safetensors").write_bytes(b"weights")
    write_result(tmp_path, StageResult(**SFT), policy)
    require_whole(tmp_path, policy)
    (policy / "adapter_model.safetensors").write_bytes(b"weighty")
    with pytest.raises(UserError, match="policy is damaged"):
        require_whole(tmp_path, policy)
