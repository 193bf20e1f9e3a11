"""Values as people type them: text stays text, and what is not plain is answered with what to type."""

import os
import shlex
from pathlib import Path

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from alignment.config.arguments import check_arguments
from alignment.config.compose import as_plain, compose_node, load
from alignment.config.overrides import parse_overrides
from alignment.config.registry import register
from alignment.config.typed_text import as_text, is_text, quoted, quoted_path, typed, typed_path
from alignment.errors import UserError

CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
TEXTS = st.text(st.one_of(st.sampled_from("',\"=#~{}[]()$\\ :%+-_.0123e\n"), CHARACTERS), max_size=12)


def value_of(setting: str):
    """The value of a setting as the grammar reads it."""
    [override] = parse_overrides([setting])
    return override.value()


def members_of(setting: str) -> list:
    [override] = parse_overrides([setting])
    return [value_of(f"x={text}") for text in override.sweep_string_iterator()]


def said(setting: str, *, sweeps: bool) -> str | None:
    """The setting as the run gets it; None if it is refused in a sentence."""
    try:
        return as_text([setting], sweeps=sweeps)[0]
    except UserError:
        return None


@given(TEXTS)
@example("\\")
@example("a\\'")
@example("'\\\\'")
def test_quotes_give_back_every_text(text):
    """Whatever a text holds, in quotes the grammar reads it as it is; a path names no other setting either."""
    assert value_of(f"data.system={quoted(text)}") == text
    node = OmegaConf.create({"path": value_of(f"data.source={quoted_path(Path('/', text))}")})
    assert node.path == str(Path("/", text))


@given(TEXTS)
@example("1e3")
@example("0012")
@example("true")
@example("1_000")
@example("[a]")
@example("{a: 1}")
@example("Be brief, please.")
@example("f(x)")
@example("~/x,y=#ü")
def test_text_of_a_single_run_stays_text(text):
    """What is typed for a setting of text arrives as it was typed, or is answered with what to type instead."""
    assume(text.strip() == text and "${" not in text and text not in ("", "null") and "\\" not in text)
    assume(not text.endswith(")") or text[:1] in "~f")
    setting = said(f"data.system={text}", sweeps=False)
    if text[0] in "'\"":
        assume(setting is not None)
    else:
        assert value_of(setting) == text
    assert as_text([setting], sweeps=False) == [setting]  # a resumed run reads it again
    assert as_text([setting], sweeps=True) == [setting]


@given(st.lists(TEXTS, min_size=2, max_size=4))
def test_members_of_a_sweep_are_the_texts_between_commas(texts):
    """With -m, commas separate texts without blanks; where they might belong to one text, the sentence says both."""
    for text in texts:
        assume(text and text.strip() == text and not set("'\"\\$,()") & set(text) and text not in ("null", "."))
    value = ",".join(texts)
    setting = said(f"data.system={value}", sweeps=True)
    assert (setting is None) == (" " in value or any(text != text.strip() for text in texts))
    assert setting is None or members_of(setting) == texts


@pytest.mark.parametrize("value", ["Be brief, please.", "a b,c", "Answer.,Be kind."])
def test_a_comma_in_a_text_makes_no_members_without_a_word(value):
    """The sentence shows what to type for one text and for several, and both can be typed in a shell."""
    with pytest.raises(UserError, match="one text or several") as caught:
        as_text([f"data.system={value}"], sweeps=True)
    one, several = str(caught.value).removesuffix(".").split(" type ")[1].split(", for 2 members ")
    [one], [several] = shlex.split(one), shlex.split(several)
    assert value_of(*as_text([one], sweeps=True)) == value
    assert members_of(*as_text([several], sweeps=True)) == [part.strip() for part in value.split(",")]


def test_a_file_with_a_comma_in_its_name_is_asked_about(tmp_path, monkeypatch):
    """With -m, `a,b.jsonl` may be a file of this name."""
    monkeypatch.chdir(tmp_path)
    assert members_of(*as_text(["data.source=a,b.jsonl"], sweeps=True)) == ["a", "b.jsonl"]
    Path("a,b.jsonl").touch()
    with pytest.raises(UserError, match="one text or several"):
        as_text(["data.source=a,b.jsonl"], sweeps=True)


@pytest.mark.parametrize(
    ("setting", "better"),
    [
        ("data.system='It's'", "data.system='It\\'s'"),
        ("data.columns={prompt: größe}", "data.columns={prompt: 'größe'}"),
        ("adapter.target_modules=[a#b, c]", "adapter.target_modules=['a#b', c]"),
        ("tracking.tags=[it's]", "tracking.tags=['it\\'s']"),
        ("data.template_kwargs={a", None),
    ],
)
def test_the_sentence_shows_what_to_type(setting, better):
    """A value that could be meant in several ways is answered with one that can be typed."""
    with pytest.raises(UserError) as caught:
        as_text([setting], sweeps=False)
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message
    if better is not None:
        [word] = shlex.split(message.rpartition(" type " if " type " in message else "as in ")[2].removesuffix("."))
        assert word == better
        value_of(word)


@pytest.mark.parametrize(
    ("setting", "kept"),
    [
        *((text, text) for text in ("loss=dpo", "seed=1", "data.system=null", "data.system='a, b'", "+x=1", "~data")),
        *((text, text) for text in ("data.source=${model.name}", "optim.lr=1e-5,1e-4", "loss=dpo,kto")),
        ("data.template_kwargs.language=größe", "data.template_kwargs.language='größe'"),
        ("optim.lr=1e-5#", "optim.lr='1e-5#'"),
        ("hydra.run.dir=~/a,b", "hydra.run.dir='~/a,b'"),
    ],
)
def test_what_the_grammar_reads_rightly_is_left_alone(setting, kept):
    """Only text that would become something else is touched."""
    assert as_text([setting], sweeps=True) == [kept]


def test_bytes_that_are_no_text_are_refused():
    """A shell can pass any bytes, and no file of a run could hold them."""
    with pytest.raises(UserError, match="not UTF-8"):
        as_text([os.fsdecode(b"data.source=a\xffb")], sweeps=False)


def test_which_settings_take_text():
    """The schema says so, also of mappings and of Hydra's own settings."""
    texts = ("data.source", "sft.data.eval_source", "model.revision", "resume", "data.columns.prompt", "hydra.run.dir")
    others = ("seed", "optim.lr", "model.dtype", "loss.beta", "data.limit", "tracking.tags", "data", "nothing.x", "a")
    assert all(map(is_text, texts)) and not any(map(is_text, others))


def test_what_is_typed_is_what_the_run_gets():
    """Text with every sign of the grammar passes through Hydra, as a value of the configuration."""
    odd = '1e3 = it\'s "größe", #5 [x] {y} (z) 50% ~ \\ ;'
    config = load(f"data.system={odd}", "data.split=0012", "model.revision=1e3", "data.source=~/nobody_has_this.jsonl")
    assert (config.data.system, config.data.split, config.model.revision) == (odd, "0012", "1e3")
    assert config.data.source == "~/nobody_has_this.jsonl"


ODD_FOLDER = "größe=1, 'a' [b] {c} 50% #2 ${d}"


@pytest.mark.slow
def test_folders_of_runs_have_any_character_and_the_home_folder(tmp_path, monkeypatch):
    """hydra.run.dir, resume and the folder of a sweep."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / ODD_FOLDER
    checked = check_arguments(["hydra.run.dir=~/runs/a=b"])
    register()
    assert compose_node(checked.for_hydra, with_hydra=True).hydra.run.dir == str(tmp_path / "runs" / "a=b")

    # A run that was begun in such a folder goes on, with the word that its refusal shows
    [begin] = shlex.split(typed_path("hydra.run.dir", folder))
    checked = check_arguments([begin, "data.system=Say \\${x}, it's 1"])
    node = compose_node(checked.for_hydra)
    assert node.data.system == "Say ${x}, it's 1"
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(OmegaConf.to_yaml(checked.for_hydra))
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(as_plain(node)))
    with pytest.raises(UserError, match="holds a run already") as caught:
        check_arguments([begin])
    [again] = shlex.split(str(caught.value).partition(" with ")[2].partition(", or choose")[0])
    checked = check_arguments([again])
    resumed = compose_node(checked.for_hydra, with_hydra=True)
    assert Path(resumed.hydra.run.dir) == Path(resumed.resume) == folder

    # A sweep
    [begin] = shlex.split(typed_path("hydra.sweep.dir", folder))
    checked = check_arguments(["-m", "recipe=quickstart", "seed=0,1", begin])
    assert checked.sweep.folder == folder
    assert begin in shlex.split(checked.sweep.command)
    assert compose_node(checked.for_hydra[1:2] + checked.for_hydra[3:], with_hydra=True).hydra.sweep.dir == str(folder)
    assert [member.folder.parent for member in checked.sweep.members] == [folder, folder]


def test_the_home_folder_of_configurations_and_templates(tmp_path, monkeypatch):
    """`--config-dir=~/conf`, which no shell expands."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf" / "data").mkdir(parents=True)
    (tmp_path / "conf" / "data" / "mine.yaml").write_text("defaults: [quickstart]\nsource: ~/rows.jsonl\n")
    assert check_arguments(["--config-dir=~/conf", "data=mine"]).config_dir == tmp_path / "conf"
    assert load("data=mine", config_dir=Path("~/conf")).data.source == "~/rows.jsonl"


@pytest.mark.slow
def test_text_in_the_sweep_of_a_recipe_is_text(tmp_path, monkeypatch):
    """A list in YAML separates members; a comma in one of its texts does not."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf" / "recipe").mkdir(parents=True)
    recipe = (
        "# @package _global_\nsweep:\n  data.system: ['Be brief, please.', '1e3', It's]\n  optim.lr: [1e-5, 2e-5]\n"
    )
    (tmp_path / "conf" / "recipe" / "texts.yaml").write_text(recipe.replace("It's", '"It\'s"'))
    sweep = check_arguments(["-m", "--config-dir", "conf", "recipe=texts"]).sweep
    assert [(m.config.data.system, m.config.optim.lr) for m in sweep.members] == [
        (text, lr) for text in ("Be brief, please.", "1e3", "It's") for lr in (1e-5, 2e-5)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("seed", ["-1", "4294967296", "99999999999999999999"])
def test_seeds_that_no_generator_takes_are_refused(seed):
    """Before anything is loaded; the largest one is taken."""
    for key in ("seed", "sft.seed"):
        with pytest.raises(UserError, match=rf"^{key} must be in \[0, 4294967296\), not {seed}\.$"):
            load("recipe=quickstart", f"{key}={seed}")
    assert load("seed=4294967295").seed == 2**32 - 1


def test_typed_is_one_word_of_a_shell():
    """Whatever the value, a shell gives the command the setting as it was meant."""
    for text in ("a", "Be brief, please.", "It's", '"$HOME`!', "\\"):
        assert shlex.split(typed("data.system", quoted(text))) == [f"data.system={quoted(text)}"]
