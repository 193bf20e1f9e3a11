"""Where rows come from, and what tells before the reading whether they are those of the last time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alignment.data.preparation import prepared
from alignment.data.sources.hub import at_commits
from alignment.data.sources.loading import origins
from alignment.data.sources.remote import RemoteFile

COMMIT = "0123456789abcdef" * 2 + "01234567"


def test_a_hub_set_at_a_commit_is_known_and_one_at_a_branch_is_not(config: Callable[..., Any], tmp_path: Path) -> None:
    """A branch, and a set to compare with at whatever it is today, may be others tomorrow."""
    known = origins(config("owner/name", revision=COMMIT, eval_split="test"))
    assert known == [f"owner/name@{COMMIT}, None, train", f"owner/name@{COMMIT}, None, test"]
    assert origins(config("owner/name", revision="main")) is None
    assert origins(config("owner/name", revision=COMMIT, decontaminate=["owner/other"])) is None


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str | None, str]:
    """A hub that knows the commits of these branches of owner/name; it does not answer for others."""
    commits: dict[str | None, str] = {None: COMMIT, "v2": COMMIT[::-1]}

    class Api:
        def dataset_info(self, name: str, revision: str | None, timeout: float) -> Any:
            assert name == "owner/name" and timeout
            return type("Info", (), {"sha": commits[revision]})

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    return commits


def test_a_branch_of_a_hub_set_is_read_at_its_commit(
    hub: dict[str | None, str], config: Callable[..., Any], mixture: Callable[..., Any], tiny: Any, tmp_path: Path
) -> None:
    """So that a second start finds it, and none after the branch has moved; the rows are those of the commit."""
    for revision, commit in hub.items():
        asked = config("owner/name", revision=revision, eval_split="test")
        assert at_commits(asked) == replace(asked, revision=commit)
    parts = mixture({"a": {"source": "owner/name", "revision": "v2"}, "b": {"source": "rows.jsonl"}})
    assert [source.revision for source in at_commits(parts).sources.values()] == [COMMIT[::-1], None]

    def read(revision: str | None) -> tuple[str | None, bool]:
        asked = config("owner/name", revision=revision)
        with prepared.prepared(asked, "preference", tiny, None, tmp_path) as (pinned, place):
            return pinned.revision, place._entry is not None

    assert read("v2") == (COMMIT[::-1], True)
    assert read("gone") == ("gone", False)


@pytest.mark.parametrize(
    "fields", [{"revision": COMMIT}, {"eval_source": "owner/other"}, {"source": ["owner/name", "owner/other"]}]
)
def test_what_the_hub_is_not_asked_about(
    fields: dict[str, Any], config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit is one already, one revision of several sets is none of each, and files are not on the hub."""
    monkeypatch.setattr("huggingface_hub.HfApi", None)
    for asked in (config(**({"source": "owner/name"} | fields)), config("rows.jsonl")):
        assert at_commits(asked) == asked


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
    key = prepared._key(config("https://host/rows.jsonl"), "preference", tiny, None, "")
    assert (key is None) == (stamp is None)
    info["size"] = 6
    assert key is None or prepared._key(config("https://host/rows.jsonl"), "preference", tiny, None, "") != key
