"""A loss by itself is the one that a run gets; settings that nothing reads and values of another kind are refused."""

import functools
from dataclasses import dataclass, field, replace

import pytest
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from alignment.config.compose import load, load_loss, refuse_unknown
from alignment.config.data import Keep
from alignment.config.messages import sentence
from alignment.config.overrides import refuse_without_effect
from alignment.config.typed_text import as_text
from alignment.errors import UserError, did_you_mean


@functools.cache
def quickstart():
    return load("recipe=quickstart", "sft=none")


@dataclass
class Inner:
    rate: float = 1.0
    number: int = 1
    merge: bool = False
    keep: Keep = Keep.end


@dataclass
class Section:
    """One setting of each kind that the schema has."""

    inner: Inner = field(default_factory=Inner)
    words: list[str] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    text: str = ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"), [("dpo", ()), ("simpo", ("gamma_beta_ratio=0.3",)), ("mpo", ("settings.dpo.beta=0.4",))]
)
def test_a_loss_by_itself_is_that_of_a_run(name, settings):
    alone = load_loss(name, *settings)
    assert alone == load("recipe=quickstart", f"loss={name}", *(f"loss.{setting}" for setting in settings)).loss


@pytest.mark.parametrize(
    ("name", "setting", "right"),
    [
        ("dop", "beta=1", "There is no loss dop (did you mean dpop?)"),
        ("dpo", "bta=1", "did you mean loss.beta?"),
        ("dpo", "beta=-1", "loss.beta must be a finite number above 0, not -1"),
        ("mpo", "weights.xx=1", "loss.weights.xx: no single loss has this name"),
        ("mpo", "settings.dpo.beta=-1", "loss.settings.dpo.beta must be"),
    ],
)
def test_one_sentence_says_what_is_wrong(name, setting, right):
    with pytest.raises(UserError) as refused:
        load_loss(name, setting)
    assert right in str(refused.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "right"),
    [
        ("+data.foo=1", "There is no setting data.foo; accepted are source, "),
        ("++trainer.max_step=1", "There is no setting trainer.max_step (did you mean trainer.max_steps?)"),
        ("+loss.bta=1", "There is no setting loss.bta of loss dpo (did you mean loss.beta?)"),
        ("+foo=1", "There is no setting foo; accepted are seed, "),
    ],
)
def test_a_setting_that_is_added_must_exist(setting, right):
    """Hydra's `+` adds what no section has, and nothing would read it."""
    with pytest.raises(UserError) as refused:
        load(setting)
    assert str(refused.value).startswith(right)


def test_what_is_added_is_an_entry_of_a_mapping():
    node = OmegaConf.structured(Section)
    node.names.x = "y"
    refuse_unknown(node, "of.")
    with open_dict(node.inner):
        node.inner.number_ = 3
    with pytest.raises(
        UserError, match=r"no setting of\.inner\.number_ \(did you mean of\.inner\.number\?\); accepted are"
    ):
        refuse_unknown(node, "of.")


@pytest.mark.parametrize(
    ("key", "value", "right"),
    [
        ("inner.rate", "abc", "inner.rate takes a number, not 'abc'."),
        ("inner.rate", None, "inner.rate must have a value, and null is none."),
        ("inner.number", 1e2, "inner.number takes a whole number, not '100.0'."),
        ("inner.merge", "maybe", "inner.merge takes true or false, not 'maybe'."),
        ("inner.keep", "middle", "inner.keep must be one of start, end, not 'middle'."),
        ("words", "a", "words takes a list, such as [a,b]."),
        ("names", "prompt", "names takes values by name, such as {name: value}, not a text."),
        ("text", "${HOME}", r"text: ${HOME} names no other setting; in a text type \${HOME}."),
    ],
)
@pytest.mark.parametrize("causes", ["0", "1"])
def test_a_value_of_another_kind_is_refused_in_plain_words(key, value, right, causes, monkeypatch):
    """OmegaConf would say it in names of its classes; with causes, as a debugger asks for them, it is said too."""
    monkeypatch.setenv("OC_CAUSE", causes)
    node = OmegaConf.structured(Section)

    def give() -> None:
        OmegaConf.update(node, key, value)
        OmegaConf.to_container(node, resolve=True)

    with pytest.raises(OmegaConfBaseException) as refused:
        give()
    assert sentence(refused.value) == right


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "right"),
    [
        ("loss.beta=0,1", "loss.beta=0,1 may be several values: a decimal number has a point, "),
        (
            "data.system=range(1,3)",
            "data.system=range(1,3) stands for several values, one for each member of a sweep: ",
        ),
        ("~data.source", "data.source cannot be taken out: give it another value."),
    ],
)
def test_what_the_grammar_takes_for_something_else_is_said_in_plain_words(setting, right):
    """As Hydra's sentences are changed with its versions, the command's own are compared."""
    with pytest.raises(UserError) as refused:
        load(setting)
    assert str(refused.value).startswith(right)


@pytest.mark.parametrize(
    ("key", "value", "is_refused"),
    [
        ("split", "other", True),
        ("name", "default", True),
        ("revision", "main", True),
        ("split", "train", False),
        ("limit", 3, False),
    ],
)
def test_a_file_has_no_splits(key, value, is_refused, tmp_path):
    """Nor a configuration, nor a revision: what you type for it would be read by nothing. A recipe's may stay."""
    (tmp_path / "rows.jsonl").write_text("{}\n")
    data = replace(quickstart().data, source=str(tmp_path / "rows.jsonl"), eval_source=None, **{key: value})
    config = replace(quickstart(), data=data)
    if is_refused:
        with pytest.raises(UserError, match=rf"^data\.{key} has no effect: .*rows\.jsonl is a file, and only folders"):
            refuse_without_effect([f"data.{key}={value}"], config)
        folder = replace(config, data=replace(data, source=str(tmp_path)))
        refuse_without_effect([f"data.{key}={value}"], folder)
    else:
        refuse_without_effect([f"data.{key}={value}"], config)
    refuse_without_effect([], config)


@pytest.mark.parametrize("key", ["data.allow", "sft.data.allow", "data.decontaminate"])
@pytest.mark.parametrize(
    ("value", "read"),
    [("unwritten", "['unwritten']"), ("'a b'", "['a b']"), ("1e3", "['1e3']"), ("[x]", "[x]"), ("null", "null")],
)
def test_one_word_is_a_list_where_a_list_of_texts_is_wanted(key, value, read):
    assert as_text([f"{key}={value}"], sweeps=False) == [f"{key}={read}"]


def test_the_word_that_was_meant_may_be_in_another_case():
    assert did_you_mean("Q_proj", ["v_proj", "k_proj", "q_proj"]) == " (did you mean q_proj?)"
    assert did_you_mean("DPO", ["ipo", "dpo"]) == " (did you mean dpo?)"
    assert did_you_mean("x", ["dpo"]) == ""
