"""No setting becomes another value than the one that is written, wherever it is written."""

import math
import types
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf.errors import OmegaConfBaseException

from alignment.config import registry
from alignment.config.compose import load
from alignment.config.data import SourceConfig
from alignment.config.judging import LLMJudgeConfig
from alignment.config.members import sweep_members
from alignment.config.messages import sentence
from alignment.config.overrides import parse_overrides
from alignment.config.schema import RunConfig
from alignment.config.typed_text import as_text
from alignment.errors import UserError
from alignment.losses import LOSSES, Mixture
from tests.conftest import recommended_loss


def sections_of(section: type) -> list[type]:
    """A section with all that are in it."""
    inner = [
        part for hint in get_type_hints(section).values() for part in (hint, *get_args(hint)) if is_dataclass(part)
    ]
    return [section, *(deeper for part in inner for deeper in sections_of(part))]


SECTIONS = [*dict.fromkeys(sections_of(RunConfig)), SourceConfig, *LOSSES.values()]
TRUTHS = {"true": True, "yes": True, "on": True, "y": True, "false": False, "no": False, "off": False, "n": False}
VALUES = (
    True,
    False,
    0,
    1,
    2,
    -1,
    3.0,
    1e3,
    2.5,
    "3",
    "2",
    "1e3",
    "0012",
    "yes",
    "Off",
    "maybe",
    "",
    [1],
    ["a"],
    {"a": 1},
)


def kinds_of(section: type) -> dict[str, Any]:
    """Every field with a value, and its type without null."""
    hints = get_type_hints(section)
    found = {}
    for field in fields(section):
        kind = hints[field.name]
        if isinstance(kind, types.UnionType):
            [kind] = [part for part in get_args(kind) if part is not types.NoneType]
        if kind is not Any and not is_dataclass(kind):
            found[field.name] = kind
    return found


def is_as_written(kind: Any, written: Any, value: Any) -> bool:
    """Whether a setting of this type holds what was written."""
    if get_origin(kind) is list:
        return isinstance(written, list) and all(map(is_as_written, get_args(kind) * len(written), written, value))
    if get_origin(kind) is dict:
        inner = get_args(kind)[1]
        return isinstance(written, dict) and all(is_as_written(inner, written[key], value[key]) for key in written)
    if kind is Any:
        return value == written and type(value) is type(written)
    if kind is bool:
        return value is written or (isinstance(written, str) and value is TRUTHS.get(written.lower()))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return written == value.name or (isinstance(written, bool) and TRUTHS.get(value.name) is written)
    if isinstance(written, bool) or not isinstance(written, str | int | float):
        return False
    if kind is int:
        return not isinstance(written, float) and value == int(written)
    if kind is float:
        return value == float(written)
    return kind is str and not isinstance(written, float) and value == str(written)


def set_to(node: Any, name: str, value: Any) -> Any:
    """The value that a setting has then; None where it is refused."""
    try:
        node[name] = value
    except OmegaConfBaseException:
        return None
    found = node[name]
    return registry.OmegaConf.to_container(found) if isinstance(value, list | dict) else found


@pytest.fixture(scope="module")
def nodes():
    registry.register()
    return {section: registry._schema(section) for section in SECTIONS}


def test_every_setting_holds_what_is_written_or_refuses_it(nodes):
    """All fields of all sections and losses, each with values of every kind."""
    wrong, accepted = [], 0
    for section, node in nodes.items():
        for name, kind in kinds_of(section).items():
            for value in VALUES:
                found = set_to(node, name, value)
                accepted += found is not None
                if found is not None and not is_as_written(kind, value, found):
                    wrong.append(f"{section.__name__}.{name} = {value!r} is {found!r}")
    assert not wrong
    assert accepted > 1000


def numbers(section: Any) -> list[str]:
    return [name for name, kind in kinds_of(type(section)).items() if kind is float]


def values_in(section: Any) -> list[Any]:
    """The sections inside a section, at any depth."""
    inner = [value for field in fields(section) if is_dataclass(value := getattr(section, field.name))]
    return [*inner, *(deeper for part in inner for deeper in values_in(part))]


@pytest.mark.slow
def test_no_number_is_nan_or_infinite():
    """Of a section or a loss; only the norm to which gradients are cut may be infinite, which cuts none."""
    config = load("sft=none")
    sections = [
        config,
        *values_in(config),
        *(recommended_loss(name) for name in LOSSES if name != Mixture.name),
    ]
    tried, taken = 0, set()
    for section in sections:
        for name in numbers(section):
            for value in (math.nan, math.inf, -math.inf):
                tried += 1
                try:
                    changed = replace(section, **{name: value})
                    if isinstance(changed, LLMJudgeConfig):  # what holds it checks it, and knows its place
                        changed.check_values("evaluation.llm")
                except UserError:
                    continue
                taken.add((type(section).__name__, name, value))
    assert taken == {("OptimConfig", "max_grad_norm", math.inf)}
    assert tried > 200


BOOLEANS = [(section, name) for section in SECTIONS for name, kind in kinds_of(section).items() if kind is bool]


@given(st.sampled_from(BOOLEANS), st.one_of(st.integers(), st.text(max_size=4), st.floats()))
@example(BOOLEANS[0], 2)
@example(BOOLEANS[0], 1)
@example(BOOLEANS[0], "0")
@example(BOOLEANS[0], "-1")
def test_only_what_yaml_writes_for_a_truth_value_is_one(nodes, place, value):
    """A number is no truth value, in quotes neither, and the sentence says what is accepted."""
    section, name = place
    node = nodes[section]
    if isinstance(value, str) and value.lower() in TRUTHS:
        assert set_to(node, name, value) is TRUTHS[value.lower()]
        return
    with pytest.raises(OmegaConfBaseException) as refused:
        node[name] = value
    assert "takes true or false, not '" in sentence(refused.value) or "$" in str(value)


def test_there_are_booleans_in_many_sections():
    assert len(BOOLEANS) >= 11
    assert {section.__name__ for section, _ in BOOLEANS} >= {"ExportConfig", "OptimConfig", "AdapterConfig"}


@pytest.mark.slow
@pytest.mark.parametrize(("key", "value"), [("export.merge", "2"), ("sft.optim.master_weights", "1")])
def test_a_number_typed_for_a_truth_value_is_refused(key, value):
    with pytest.raises(UserError, match=rf"^{key} takes true or false, not '{value}'\.$"):
        load(f"{key}={value}", "sft=quickstart")


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ("data.columns={prompt:a,prompt:b}", "prompt"),
        ("data.columns={prompt: a, chosen: c, prompt: a}", "prompt"),
        ("data.sources={a:{source:x,source:y}}", "source"),
        ("data.winner={first:[0],first:[1],second:[2]}", "first"),
        ("+x=[{a:1},{b:1,b:2}]", "b"),
        ("data.columns={prompt:'{a:1,a:2}',prompt:b}", "prompt"),
    ],
)
def test_a_key_that_stands_twice_in_a_mapping_is_refused(setting, key):
    """Hydra would keep the last one without a word."""
    with pytest.raises(UserError, match=f"the key '{key}' stands twice in one mapping"):
        parse_overrides(as_text([setting], sweeps=False))


NAMES = st.text("abc_1", min_size=1, max_size=3)


@given(st.lists(st.tuples(NAMES, st.integers(0, 9)), min_size=1, max_size=5))
def test_a_mapping_has_all_its_keys_or_is_refused(entries):
    written = "+x={" + ", ".join(f"{key}: {value}" for key, value in entries) + "}"
    if len(dict(entries)) < len(entries):
        with pytest.raises(UserError, match="stands twice"):
            parse_overrides([written])
        return
    [override] = parse_overrides([written])
    assert {str(key): value for key, value in override.value().items()} == dict(entries)


def test_text_that_looks_like_a_key_twice_is_text():
    [override] = parse_overrides(["data.system='{a:1,a:2}'"])
    assert override.value() == "{a:1,a:2}"


def test_a_value_given_after_a_sweep_of_it_makes_no_equal_members():
    """The last value of a setting counts, here too."""
    registry.register()
    members = sweep_members(["optim.lr=1e-3,1e-4", "seed=1,2", "optim.lr=5e-4"])
    assert [[s for s in member if not s.startswith("hydra")] for member in members] == [
        ["seed=1", "optim.lr=5e-4"],
        ["seed=2", "optim.lr=5e-4"],
    ]
    assert len(sweep_members(["seed=1,2", "seed=3,4,5"])) == 3


RECIPE = "# @package _global_\ndefaults:\n  - override /tracking: none\n"


def recipe_with(folder, text: str) -> None:
    (folder / "recipe").mkdir()
    (folder / "recipe" / "own.yaml").write_text(RECIPE + text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: {revision: 0012}\n", "line 4: YAML reads 0012 as the number 10: write that, or '0012' in quotes"),
        ("data:\n  system: 1:30\n", "line 5: YAML reads 1:30 as the number 90"),
        ("seed: 0x1F\n", "YAML reads 0x1F as the number 31"),
        ("data: {columns: {prompt: [a, 017]}}\n", "YAML reads 017 as the number 15"),
    ],
)
def test_a_number_that_yaml_reads_otherwise_than_it_looks_is_refused(text, said, tmp_path):
    recipe_with(tmp_path, text)
    with pytest.raises(UserError) as refused:
        registry.register(tmp_path)
    assert said in str(refused.value) and str(refused.value).startswith(f"{tmp_path}/recipe/own.yaml: line")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("data: {system: 1e3}\n", "data.system takes a text: put '1000.0' in quotes if it is one."),
        ("model: {revision: yes}\n", "model.revision takes a text: put 'True' in quotes if it is one."),
        ("export: {merge: 1}\n", "export.merge takes true or false, not '1'."),
    ],
)
def test_a_value_of_a_recipe_is_what_it_is_or_refused(text, said, tmp_path):
    """The sentence names the file."""
    recipe_with(tmp_path, text)
    with pytest.raises(UserError) as refused:
        load("recipe=own", config_dir=tmp_path)
    assert str(refused.value).endswith(said)


@pytest.mark.slow
def test_off_is_the_option_of_that_name(tmp_path):
    """YAML reads `off` as false; `trainer.plan` has an option off, and its own needs."""
    recipe_with(tmp_path, "trainer: {plan: off, tokens_per_batch: 64, checkpoint_every: 0}\nexport: {merge: no}\n")
    config = load("recipe=own", config_dir=tmp_path)
    assert config.trainer.plan.name == "off" and config.export.merge is False
