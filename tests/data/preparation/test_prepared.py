"""Large data: made by several processes into files, kept in the cache, and the same as in memory."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from alignment.config.data import DataConfig
from alignment.data.preparation import prepared
from alignment.data.tokens import batches, progress
from alignment.errors import UserError
from alignment.files import CacheKind
from tests.conftest import each
from tests.helpers.prepared import chat, conversations, entries, preferences, records, small_limits, unread

__all__ = ["chat", "small_limits"]

CASES: dict[str, dict[str, Any]] = {
    "pairs": {"eval_size": 9},
    "a limit": {"eval_size": 9, "limit": 50, "eval_limit": 4},
    "rows that are chosen": {"train_where": {"kind": ["a", "c"]}, "eval_size": 5},
    "variables of the template": {"template_kwargs": {"unread": 1}},
    "cut": {"max_length": 30, "max_prompt_length": 12},
}


@pytest.mark.slow
@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("prepare", [preferences, conversations])
def test_many_rows_give_what_few_rows_give(
    case: str,
    prepare: Callable[..., Any],
    chat: Any,
    config: Callable[..., DataConfig],
    jsonl: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tokens, order, held-out rows, findings, counts, digests and bad rows: made by processes, found, and in memory."""
    settings = config(jsonl(records()), max_bad_rows=5, **CASES[case])
    in_memory = prepare(settings, chat, None)
    assert prepare(settings, chat, tmp_path) == in_memory
    assert len(entries(tmp_path)) == 1
    monkeypatch.setattr("alignment.data.preparation.making.load_rows", unread)
    assert prepare(settings, chat, tmp_path) == in_memory


@pytest.mark.slow
@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize("loss", ["kto", "dpo", "lipo"])
def test_lists_give_the_units_of_each_loss(
    loss: str, tiny: Any, config: Callable[..., DataConfig], jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    """Pairs and labelled rows are made of lists when they are asked for, the same as at once."""
    rows = [
        {"prompt": f"q{i}", "completions": ["x", "yy", f"z{i}"][: 2 + i % 2], "scores": [1, i % 3, 2][: 2 + i % 2]}
        for i in range(60)
    ]
    settings = config(jsonl(rows), eval_size=10)
    assert preferences(settings, tiny, tmp_path, loss) == preferences(settings, tiny, None, loss)


@pytest.mark.slow
@pytest.mark.usefixtures("small_limits")
def test_every_change_makes_new_tokens(
    chat: Any, config: Callable[..., DataConfig], jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    """Another byte in the file, another setting, another template or another day that it writes is another entry."""
    path = jsonl(records(32))
    preferences(config(path), chat, tmp_path)
    preferences(config(path), chat, tmp_path)
    assert len(entries(tmp_path)) == 1
    preferences(config(path, max_length=20, max_prompt_length=9), chat, tmp_path)
    assert len(entries(tmp_path)) == 2
    chat.chat_template = "{# another #}" + chat.chat_template
    preferences(config(path), chat, tmp_path)
    assert len(entries(tmp_path)) == 3
    path.write_text(path.read_text().replace("question 1", "question one"))
    data = preferences(config(path), chat, tmp_path)
    assert len(entries(tmp_path)) == 4
    assert data == preferences(config(path), chat, None)


def test_the_code_of_every_room_makes_new_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that another version of the code has made are never served, whichever room has changed."""
    package = tmp_path / "alignment"
    ignored = shutil.ignore_patterns("__pycache__", "bundled")
    shutil.copytree(Path(prepared.__file__).parents[1], package / "data", ignore=ignored)
    (package / "types.py").touch()
    monkeypatch.setattr(prepared.alignment, "__file__", str(package / "__init__.py"))
    rooms = sorted(path.parent for path in package.glob("data/*/__init__.py"))
    found = {prepared._code.__wrapped__()}
    for changed in [package / "data" / "__init__.py", *(max(room.glob("*.py")) for room in rooms)]:
        changed.write_bytes(changed.read_bytes() + b"\n")
        found.add(prepared._code.__wrapped__())
    assert len(rooms) == 7 and len(found) == 2 + len(rooms)


@pytest.mark.slow
@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize("what", ["a byte", "a cut", "a missing file", "the entry"])
def test_damaged_tokens_are_made_again(
    what: str,
    chat: Any,
    config: Callable[..., DataConfig],
    jsonl: Callable[..., Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whatever happens to the files, no other token is trained on, and the log says that they are made again."""
    settings = config(jsonl(records(40)), max_bad_rows=5)
    before = preferences(settings, chat, tmp_path)
    [entry] = entries(tmp_path)
    file = entry / "train" / "completions.values"
    content = bytearray(file.read_bytes())
    if what == "a byte":
        content[100] ^= 1
        file.write_bytes(content)
    elif what == "a cut":
        file.write_bytes(content[:-4])
    elif what == "a missing file":
        file.unlink()
    else:
        (entry / "entry.json").write_text((entry / "entry.json").read_text().replace("pairs", "Pairs"))
    assert preferences(settings, chat, tmp_path) == before
    assert "are damaged" in caplog.text
    caplog.clear()
    assert preferences(settings, chat, tmp_path) == before
    assert "are damaged" not in caplog.text


@pytest.mark.usefixtures("small_limits")
def test_a_process_that_dies_is_one_sentence(
    chat: Any,
    config: Callable[..., DataConfig],
    jsonl: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernel ends processes when memory is short: the run says so, and leaves nothing that could be served."""
    here = os.getpid()
    pack = batches.Kind.pack

    def dying(self: Any, items: Any) -> Any:
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return pack(self, items)

    monkeypatch.setattr(batches.Kind, "pack", dying)
    settings = config(jsonl(records(40)), max_bad_rows=5)
    with pytest.raises(UserError, match="A process that tokenises rows has died"):
        preferences(settings, chat, tmp_path)
    assert not entries(tmp_path)
    monkeypatch.undo()


@pytest.mark.usefixtures("small_limits")
def test_an_error_in_another_process_is_the_same_error(
    tiny: Any, config: Callable[..., DataConfig], jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    """What ends the preparation in memory ends it there, too: here messages without a chat template."""
    plain_rows = [{"prompt": f"q{i}", "chosen": "x", "rejected": "y"} for i in range(40)]
    settings = config(jsonl([*plain_rows, *records(2)]))
    with pytest.raises(UserError, match="41 is a conversation"):
        preferences(settings, tiny, tmp_path)
    assert not [path for path in CacheKind.tokens.under(tmp_path).glob("[!.]*") if path.is_dir()]


@pytest.fixture
def preparing(
    chat: Any, config: Callable[..., DataConfig], jsonl: Callable[..., Path], tmp_path: Path, small_limits: None
) -> Iterator[tuple[DataConfig, multiprocessing.Process]]:
    """Settings, and a process that is in the middle of preparing their data, and slow."""
    settings = config(jsonl(records(400)), max_bad_rows=50)

    def slowly() -> None:
        add = progress.StoreWriter.add_packed

        def wait(self: Any, *args: Any) -> None:
            add(self, *args)
            time.sleep(0.02)

        progress.StoreWriter.add_packed = wait  # type: ignore[method-assign]
        preferences(settings, chat, tmp_path)

    process = multiprocessing.get_context("fork").Process(target=slowly)
    process.start()
    while not list(CacheKind.tokens.under(tmp_path).glob(".*/train/prompt.values")):
        assert process.is_alive()
        time.sleep(0.01)
    yield settings, process
    process.kill()
    process.join()


@pytest.mark.slow
def test_a_killed_preparation_goes_on(
    preparing: tuple[DataConfig, multiprocessing.Process], chat: Any, tmp_path: Path
) -> None:
    """Nothing of it is served or left behind, and the processes that worked for it end with it."""
    settings, process = preparing
    while not (helpers := psutil.Process(process.pid).children()):
        time.sleep(0.01)
    process.kill()
    process.join()
    assert not entries(tmp_path)
    assert preferences(settings, chat, tmp_path) == preferences(settings, chat, None)
    assert len(entries(tmp_path)) == 1
    assert not list(CacheKind.tokens.under(tmp_path).glob(".*"))
    assert not psutil.wait_procs(helpers, timeout=10)[1]


DEATHS = {
    "in the first batch": ("train", 1),
    "before a line": ("train", 5),
    "in a line": ("train", 5),
    "in held-out rows": ("eval", 2),
    "at the end": ("entry", 0),
}
"""Moments: the part, and the number of its batch."""


def die_at(moment: str) -> None:
    """Let this process end at that moment."""

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    part, number = DEATHS[moment]
    if part == "entry":
        prepared.write_sealed = die
    add, seal, writers = progress.JournaledWriter.add, progress._sealed, []

    def added(self: Any, *args: Any) -> None:
        writers.append(self)
        add(self, *args)

    def sealed(text: str) -> bytes:
        folder = writers[-1].folder
        if folder.name == part and sum(writer.folder == folder for writer in writers) == number:
            if moment == "in a line":
                with (folder / progress.JOURNAL).open("ab") as file:
                    file.write(seal(text)[:50])
            die()
        return seal(text)

    progress.JournaledWriter.add = added  # type: ignore[method-assign]
    progress._sealed = sealed


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize("moment", each(DEATHS, ["before a line", "in held-out rows"]))
def test_what_was_done_before_a_kill_is_not_done_again(
    moment: str,
    chat: Any,
    config: Callable[..., DataConfig],
    jsonl: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The store is, to the byte, that of a preparation that was never disturbed; whole batches are not made again."""
    settings = config(jsonl(records()), max_bad_rows=5, eval_size=16)
    whole = preferences(settings, chat, tmp_path / "whole")
    cache = tmp_path / "killed"

    def killed() -> None:
        die_at(moment)
        preferences(settings, chat, cache)

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not entries(cache)

    made: list[str] = []
    add = progress.JournaledWriter.add

    def counted(self: Any, *args: Any) -> None:
        made.append(self.folder.name)
        add(self, *args)

    monkeypatch.setattr(progress.JournaledWriter, "add", counted)
    assert preferences(settings, chat, cache) == whole
    part, number = DEATHS[moment]
    of_train = {"train": 13 - (number - 1), "eval": 0, "entry": 0}[part]
    of_eval = {"train": 2, "eval": 2 - (number - 1), "entry": 0}[part]
    assert (made.count("train"), made.count("eval")) == (of_train, of_eval)
    [found], [undisturbed] = entries(cache), entries(tmp_path / "whole")
    files = {path.relative_to(found): path.read_bytes() for path in found.rglob("*") if path.is_file()}
    assert files == {p.relative_to(undisturbed): p.read_bytes() for p in undisturbed.rglob("*") if p.is_file()}


@pytest.mark.usefixtures("small_limits")
def test_a_batch_that_was_damaged_meanwhile_is_made_again(
    preparing: tuple[DataConfig, multiprocessing.Process], chat: Any, tmp_path: Path
) -> None:
    """A byte of an early batch is another: the batches before it stay, it and what follows are made anew."""
    settings, process = preparing
    [folder] = CacheKind.tokens.under(tmp_path).glob(".*/train")
    while len((folder / progress.JOURNAL).read_bytes().splitlines()) < 4:
        time.sleep(0.01)
    process.kill()
    process.join()
    file = folder / "completions.values"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert preferences(settings, chat, tmp_path) == preferences(settings, chat, None)


@pytest.mark.slow
def test_two_that_prepare_the_same_make_it_once(
    preparing: tuple[DataConfig, multiprocessing.Process],
    chat: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The second one waits, says so, and takes what the first has made."""
    settings, _ = preparing
    in_memory = preferences(settings, chat, None)
    monkeypatch.setattr("alignment.data.preparation.making.load_rows", unread)
    with caplog.at_level("INFO"):
        assert preferences(settings, chat, tmp_path) == in_memory
    assert "Another run is preparing these data" in caplog.text
