"""A reference store on a file system that several machines share."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from alignment import files
from alignment.files import network_file_system
from alignment.reference.store import ReferenceStore
from tests.helpers.stores import A, assert_only_right, sequences

TABLE = """\
/dev/sda1 / ext4 rw 0 0
server:/home /home nfs4 rw,relatime 0 0
/dev/sdb1 /home/me/local\\040disk xfs rw 0 0
scratch@tcp:/s /scratch lustre rw,flock 0 0
me@far: /far fuse.sshfs rw 0 0
overlay /over fuse.fuse-overlayfs rw 0 0
auto /data autofs rw 0 0
server:/data /data nfs rw 0 0
"""


@pytest.fixture
def mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A table of mounts in place of this machine's."""
    path = tmp_path / "mounts"
    path.write_text(TABLE)
    monkeypatch.setattr(files, "_MOUNTS", path)
    return path


@pytest.mark.parametrize(
    ("place", "kind"),
    [
        ("/home/me/cache", "nfs4"), ("/homes", None), ("/home/me/local disk/cache", None), ("/scratch", "lustre"),
        ("/far/away", "sshfs"), ("/over/lay", None), ("/data/cache", "nfs"), ("/tmp", None),
    ],
)  # fmt: skip
def test_the_table_of_mounts_tells_network_file_systems(place: str, kind: str | None, mounts: Path) -> None:
    """The mount that is nearest to the path counts, and the last one of a place; without a table nothing is known."""
    assert network_file_system(Path(place)) == kind
    mounts.unlink()
    assert network_file_system(Path(place)) is None


def test_a_store_there_needs_no_memory_that_machines_share(mounts: Path, tmp_path: Path) -> None:
    """Also one that was begun with it: two processes write and read, and nothing lies beside the file but its lock."""
    path, values = tmp_path / "cache" / "store.sqlite", sequences(range(4))
    first, second = (dict(list(values.items())[start : start + 2]) for start in (0, 2))
    with ReferenceStore(path) as store:
        store.put(A, first)
        assert path.with_name("store.sqlite-wal").exists()
    mounts.write_text(f"server:/cache {path.parent} nfs4 rw 0 0\n")
    with ReferenceStore(path) as store, ReferenceStore(path) as other:
        other.put(A, second)
        found = store.get(A, list(values))
        assert found.keys() == values.keys()
        assert_only_right(found, values)
        assert sorted(p.name for p in path.parent.iterdir()) == ["store.sqlite", "store.sqlite.lock"]
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
