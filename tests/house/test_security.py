"""What docs/security.md promises of the code: no remote code unless asked, and pickle in two places alone."""

import ast
from pathlib import Path

import alignment

PACKAGE = Path(alignment.__file__).parent
PICKLED = {"ranks/team.py", "data/layouts/ratings.py"}


def calls():
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                yield path.relative_to(PACKAGE).as_posix(), node


def test_code_of_a_model_runs_by_its_setting_alone():
    """`trust_remote_code` is never true by itself: it is False, or what the setting says."""
    given = [
        (name, ast.unparse(word.value))
        for name, call in calls()
        for word in call.keywords
        if word.arg == "trust_remote_code"
    ]
    assert len(given) > 5
    assert {value.rpartition(".")[2] for _, value in given} <= {"False", "trust_remote_code"}
    files = [path for folder in ("conf", "recipes") for path in (PACKAGE.parent / folder).rglob("*.yaml")]
    assert len(files) > 50 and not [path for path in files if "trust_remote_code: true" in path.read_text()]


def test_nothing_else_is_unpickled_and_nothing_is_evaluated():
    found = {(name, ast.unparse(call.func)) for name, call in calls()}
    readers = {name for name, what in found if what in ("pickle.load", "pickle.loads", "torch.load", "joblib.load")}
    assert readers <= PICKLED
    assert not {name for name, what in found if what in ("eval", "exec", "yaml.load", "yaml.unsafe_load", "os.system")}


def test_a_shell_is_never_asked():
    assert not [name for name, call in calls() for word in call.keywords if word.arg == "shell"]
