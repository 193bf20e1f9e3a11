"""Where rows come from, and what tells before the reading whether they are those of the last time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignment.data.preparation import prepared
from alignment.data.sources.loading import origins
from alignment.data.sources.remote import RemoteFile

COMMIT = "0123456789abcdef" * 2 + "01234567"


def test_a_hub_set_at_a_commit_is_known_and_one_at_a_branch_is_not(config: Callable[..., Any], tmp_path: Path) -> None:
    """A branch, and a set to compare with at whatever it is today, may be others tomorrow."""
    known = origins(config("owner/name", revision=COMMIT, eval_split="test"))
    assert known == [f"owner/name@{COMMIT}, None, train", f"owner/name@{COMMIT}, None, test"]
    assert origins(config("owner/name", revision="main")) is None
    assert origins(config("owner/name", revision=COMMIT, decontaminate=["owner/other"])) is None


@pytest.mark.parametrize(
    ("info", "stamp"),
    [
        ({"size": 5, "ETag": '"ab"'}, '5 "ab"'),
        ({"size": 5, "blob_id": "ab"}, "5 ab"),
        ({"size": 5, "ETag": 'W/"ab"'}, None),
        ({"size": 5, "LastModified": "today"}, None),
    ],
)
def test_a_file_behind_an_address_is_known_by_what_its_place_says_of_its_content(
    info: dict[str, Any], stamp: str | None, config: Callable[..., Any], tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes and times alone do not tell, nor does a weak ETag: then every start reads it."""
    monkeypatch.setattr("fsspec.core.url_to_fs", lambda url: (type("FS", (), {"info": lambda self, path: info})(), url))
    assert RemoteFile("https://host/rows.jsonl").stamp() == stamp
    key = prepared._key(config("https://host/rows.jsonl"), "preference", tiny, None)
    assert (key is None) == (stamp is None)
    info["size"] = 6
    assert key is None or prepared._key(config("https://host/rows.jsonl"), "preference", tiny, None) != key
