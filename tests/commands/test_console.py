"""`alignment <command>`: the table of commands is that of the modules, and each gets its arguments as they are."""

import importlib
import inspect
import os
import re
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import alignment
from alignment import console, run
from alignment.console import COMMANDS, main, purpose, source_of
from tests.helpers.patience import patience

PACKAGE = Path(alignment.__file__).parent


def test_the_table_is_that_of_the_modules_that_are_commands():
    files = [*PACKAGE.glob("*.py"), *PACKAGE.glob("*/__main__.py")]
    found = {path for path in files if '\nif __name__ == "__main__":' in path.read_text()}
    assert found == set(map(source_of, COMMANDS))


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_says_what_it_does_and_takes_its_arguments(name):
    """The first line of its docstring is "`python -m alignment.NAME ...`: what it does."."""
    source = source_of(name).read_text()
    assert source.startswith(f'"""`python -m alignment.{name}')
    assert re.fullmatch(r"[a-z].*\.", purpose(name)) and "`" not in purpose(name)
    definition = re.search(r"^def main\((\w+): (.*) = None\)", source, re.MULTILINE)
    assert definition is not None, "main() must take the arguments, and sys.argv's without them"


def test_without_a_command_it_lists_all(capsys):
    assert main([]) == 0
    said = capsys.readouterr().out
    assert re.findall(r"^  (\w+) +(.+)$", said, re.MULTILINE) == [(name, purpose(name)) for name in COMMANDS]
    assert max(map(len, said.splitlines())) <= 100
    assert main(["--help"]) == 0 and capsys.readouterr().out == said
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"{alignment.__version__}\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rnu"], "There is no command rnu (did you mean run?); there are run, plan,"),
        (
            ["recipe=quickstart", "seed=1"],
            "There is no command recipe=quickstart: settings follow one, as in alignment",
        ),
        (["-sc"], '-sc needs install=, uninstall= or query= with bash, zsh or fish, as in eval "$(alignment -sc inst'),
        (["-sc", "install=csh"], "-sc needs install="),
    ],
)
def test_what_is_wrong_is_one_sentence(words, said, capsys):
    assert main(words) == 1
    out, err = capsys.readouterr()
    assert not out and err.startswith(f"Error: {said}") and err.count("\n") == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_gets_its_arguments_as_they_are(name, monkeypatch):
    given = ["recipe=quickstart", "data.system=It's short, please.", "-m", "--json"]
    module = importlib.import_module(f"alignment.{name}" + (".__main__" if (PACKAGE / name).is_dir() else ""))
    assert next(iter(inspect.signature(module.main).parameters.values())).default is None
    got = []
    monkeypatch.setattr(module, "main", lambda words: got.append(words) or 3)
    assert main([name, *given]) == 3 and got == [given]
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/alignment", name, *given])
    assert main() == 3 and got[1] == given


def test_ranks_are_started_by_the_module(monkeypatch):
    """Ranks have no need of the installed command, which is not on the path of every machine."""
    started = []

    def launch(count, module, arguments):
        started.append((count, module, arguments))
        raise SystemExit(0)

    monkeypatch.setattr(run, "launch", launch)
    words = ["recipe=quickstart", "device=cpu", "trainer.devices=2"]
    with pytest.raises(SystemExit):
        main(["run", *words])
    assert started == [(2, "alignment.run", words)]


def test_it_is_installed():
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"alignment": f"{console.__name__}:main"}


# Completion


def asked(line, monkeypatch, capsys, shell="bash"):
    monkeypatch.setenv("COMP_LINE", line)
    assert main(["-sc", f"query={shell}"]) == 0
    return capsys.readouterr().out.split()


def test_words_that_may_follow(monkeypatch, capsys):
    for shell in ("bash", "zsh", "fish"):
        assert asked("alignment pl", monkeypatch, capsys, shell) == list(COMMANDS)
    assert asked("alignment report outp", monkeypatch, capsys) == []
    assert asked("alignment  run loss.la", monkeypatch, capsys) == ["loss.label_smoothing="]
    assert asked("alignment plan recipe=kto", monkeypatch, capsys, "fish") == ["recipe=kto_qwen3"]
    assert asked("alignment run loss=nope sf", monkeypatch, capsys, "zsh") == ["sft="]


def test_completion_belongs_to_the_installed_command(capsys):
    with pytest.raises(SystemExit, match="Completion is for the installed command, in front of run"):
        main(["run", "-sc", "install=bash"])


@pytest.mark.slow
def test_a_real_bash_completes(tmp_path):
    script = tmp_path / "alignment"
    script.write_text(f"#!{sys.executable}\nimport sys\nfrom alignment.console import main\nsys.exit(main())\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    typed = "alignment run recipe=dpo_q"
    lines = [
        'eval "$(alignment -sc install=bash)"',
        "complete -p alignment",
        f"COMP_LINE='{typed}' COMP_POINT={len(typed)} COMP_CWORD=2",
        "hydra_bash_completion",
        'echo "${COMPREPLY[@]}"',
    ]
    path = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(
        ["bash", "--norc", "-c", "\n".join(lines)],
        env=os.environ | path,
        capture_output=True,
        text=True,
        timeout=patience(60),
    )
    assert done.stdout.splitlines() == [
        "complete -o default -o nospace -F hydra_bash_completion alignment",
        "recipe=dpo_qwen3",
    ], done.stderr
