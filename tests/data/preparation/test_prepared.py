"""Large data: made by several processes into files, kept in the cache, and the same as in memory."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from alignment.config.data import DataConfig
from alignment.data.conversations import writer
from alignment.data.preparation import prepared
from alignment.data.preparation.prepare import fit_preferences, load_conversations, read_preferences
from alignment.data.rows import sequences
from alignment.data.tokens import batches, progress
from alignment.data.tokens.token_store import StoreWriter
from alignment.errors import UserError
from alignment.files import CacheKind
from alignment.types import Group
from tests.conftest import each, recommended_loss
from tests.helpers.chat_templates import CHATML

TOOLS = "{% for t in tools or [] %}{{ t.name }}{% endfor %}"
CASES: dict[str, dict[str, Any]] = {
    "pairs": {"eval_size": 9},
    "a limit": {"eval_size": 9, "limit": 50, "eval_limit": 4},
    "rows that are chosen": {"train_where": {"kind": ["a", "c"]}, "eval_size": 5},
    "variables of the template": {"template_kwargs": {"unread": 1}},
    "cut": {"max_length": 30, "max_prompt_length": 12},
}


def records(count: int = 120) -> list[dict[str, Any]]:
    """Pairs of messages; every few of them have something else that is worth a word, or are bad."""
    made = []
    for i in range(count):
        record: dict[str, Any] = {
            "prompt": [{"role": "user", "content": f"{'long ' * (i % 7)}question {i // 2}"}],
            "chosen": [{"role": "assistant", "content": f"yes {i}"}],
            "rejected": [{"role": "assistant", "content": f"no {'x' * (i % 5)}"}],
            "kind": "abc"[i % 3],
            "weight": 1 + i % 4,
        }
        if i > 60:
            record |= {"score_chosen": 2 + i % 3, "score_rejected": 1.25}
        if i % 40 == 39:
            record["tools"] = [{"name": "search"}]
        if i % 9 == 8:
            record["prompt"][0]["name"] = "somebody"
        if i == 77:
            record["chosen"][0]["content"] = "yes <|im_end|>"
        if i % 33 == 32:
            record["rejected"] = record["chosen"]
        made.append(record)
    return made


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows count as many, and three processes share them."""
    monkeypatch.setattr(batches, "ROWS_PER_BATCH", 8)
    monkeypatch.setattr(sequences, "KEPT_ROWS", 20)
    monkeypatch.setattr(prepared, "KEPT_ROWS", 20)
    monkeypatch.setattr(prepared, "_SMALL", 0)
    monkeypatch.setattr(writer, "TRIES", 6)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2})


@pytest.fixture
def chat(tiny: Any) -> Any:
    """The tiny tokenizer with a template that writes tools."""
    tiny.chat_template = TOOLS + CHATML
    return tiny


def plain(value: Any) -> Any:
    """A value to compare, arrays with their types."""
    if isinstance(value, Group):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, np.ndarray):
        return (value.dtype.str, value.tolist())
    return tuple(plain(item) for item in value) if isinstance(value, tuple) else value


def preferences(config: DataConfig, tokenizer: Any, cache: Path | None, loss: str = "dpo") -> tuple[Any, ...]:
    """All that a run gets of its preference data."""
    data, bad = fit_preferences(read_preferences(config, tokenizer, cache=cache), config, recommended_loss(loss))
    return [plain(g) for g in data.train], [plain(g) for g in data.eval], list(data.eval_rows), data.info, bad


def conversations(config: DataConfig, tokenizer: Any, cache: Path | None) -> tuple[Any, ...]:
    """All that a run gets of its SFT data."""
    data, bad = load_conversations(config, tokenizer, cache=cache)
    return list(data.train), list(data.eval), list(data.sources), data.info, bad


def entries(cache: Path) -> list[Path]:
    return [path for path in CacheKind.tokens.under(cache).glob("[!.]*") if path.is_dir()]


def unread(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("the rows were read again")


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
    monkeypatch.setattr("alignment.data.preparation.prepare.load_rows", unread)
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
    monkeypatch.setattr("alignment.data.preparation.prepare.load_rows", unread)
    with caplog.at_level("INFO"):
        assert preferences(settings, chat, tmp_path) == in_memory
    assert "Another run is preparing these data" in caplog.text


@pytest.fixture
def large_mixture(mixture: Any, jsonl: Any, small_limits: None) -> DataConfig:
    """A source in files beside one in memory, each with held-out rows."""
    sources = {
        "large": {"source": jsonl(records(), "large.jsonl"), "eval_size": 9, "weight": 5, "max_bad_rows": 9},
        "small": {"source": jsonl(records(12), "small.jsonl"), "eval_size": 2, "weight": 1},
    }
    return mixture(sources)


@pytest.mark.parametrize("prepare", [preferences, pytest.param(conversations, marks=pytest.mark.slow)])
def test_a_second_start_finds_a_mixture(
    prepare: Callable[..., Any], large_mixture: DataConfig, chat: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gives the mixture that memory gives, and reads no text."""
    in_memory = prepare(large_mixture, chat, None)
    assert prepare(large_mixture, chat, tmp_path) == in_memory
    (entry,) = entries(tmp_path)
    assert {path.name for path in entry.iterdir()} == {"train", "eval", "texts", "entry.json"}
    assert not list(entry.parent.glob(".*"))
    monkeypatch.setattr("alignment.data.preparation.prepare.mixed", unread)
    assert prepare(large_mixture, chat, tmp_path) == in_memory


def test_every_change_of_a_mixture_makes_new_tokens(large_mixture: DataConfig, chat: Any) -> None:
    """The content of any source, and any share."""

    def key() -> str | None:
        return prepared._key(large_mixture, "preference", chat, None)

    keys = [key()]
    small = Path(large_mixture.sources["small"].source)
    small.write_text(small.read_text().replace("question 1", "question one"))
    keys.append(key())
    large_mixture.sources["small"].weight = 2
    keys.append(key())
    large_mixture.sources["bundled"] = replace(large_mixture.sources["small"], source="bundled:quickstart")
    keys.append(key())
    assert None not in keys and len(set(keys)) == len(keys)


def test_a_killed_preparation_of_a_mixture_goes_on(
    large_mixture: DataConfig, chat: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """The sources that were tokenised are not tokenised again, and what was written of the mixture is written anew."""
    in_memory = preferences(large_mixture, chat, None, "kto")
    write = StoreWriter.close

    def end(writer: StoreWriter) -> Any:
        if writer._folder.parent.name.startswith(".") and writer._folder.name == "eval":
            raise KeyboardInterrupt
        return write(writer)

    with monkeypatch.context() as patched:
        patched.setattr(StoreWriter, "close", end)
        with pytest.raises(KeyboardInterrupt):
            preferences(large_mixture, chat, tmp_path, "kto")
    assert not entries(tmp_path)
    with caplog.at_level("INFO"):
        assert preferences(large_mixture, chat, tmp_path, "kto") == in_memory
    done = [record.args for record in caplog.records if "were tokenised before" in record.message]
    assert done and done[0][0] == done[0][1]
    assert len(entries(tmp_path)) == 1


def test_a_mixture_with_a_source_that_may_change_is_for_one_start(
    large_mixture: DataConfig, chat: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """The log says so, and nothing of it stays."""
    monkeypatch.setattr(prepared, "origins", lambda config: None)
    with caplog.at_level("INFO"):
        there = preferences(large_mixture, chat, tmp_path / "cache")
    assert "for this start alone: nothing tells before the reading whether a source of the mixture has" in caplog.text
    assert there == preferences(large_mixture, chat, None)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]
