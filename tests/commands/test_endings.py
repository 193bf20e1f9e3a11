"""How commands end where you can mend something: with one sentence, and never with a traceback."""

import errno
import importlib
import os

import pytest

from alignment.console import COMMANDS, source_of
from alignment.errors import UserError
from tests.helpers.endings import refusal_of

WITH_RUN = [name for name in COMMANDS if name != "run" and "\ndef run(" in source_of(name).read_text()]
"""`run` says how the training goes on; the others, which have all in `main`, are tried by their own tests."""


def module_of(name):
    return importlib.import_module(f"alignment.{name}{'.__main__' * (source_of(name).name == '__main__.py')}")


@pytest.mark.parametrize("name", WITH_RUN)
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UserError("No."), "Error: No."),
        (OSError(errno.EROFS, os.strerror(errno.EROFS), "/a/b"), "Error: /a/b: Read-only file system; free the disk "),
        (FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), "a"), "Error: a: File exists; name another file or "),
    ],
)
def test_what_you_can_mend_is_one_sentence(name, error, said, monkeypatch):
    def fails(*_):
        raise error

    module = module_of(name)
    monkeypatch.setattr(module, "run", fails)
    assert refusal_of(module.main, []).startswith(said)


@pytest.mark.parametrize("name", WITH_RUN)
def test_ctrl_c_is_no_traceback_and_a_bug_is_one(name, monkeypatch, capsys):
    errors = [KeyboardInterrupt(), ZeroDivisionError()]

    def fails(*_):
        raise errors.pop(0)

    module = module_of(name)
    monkeypatch.setattr(module, "run", fails)
    with pytest.raises(SystemExit) as end:
        module.main([])
    assert end.value.code == 130 and capsys.readouterr().err == "\nInterrupted.\n"
    with pytest.raises(ZeroDivisionError):
        module.main([])
