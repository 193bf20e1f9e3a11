"""What binds a resumed run: the tokens as they train, the base's weights and the adapter's start, not rows or names."""

import datetime
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from alignment.config.compose import load
from alignment.data.preparation.prepare import fit_preferences, load_conversations, read_preferences
from alignment.errors import UserError
from alignment.files import read_sealed
from alignment.policy.adapter import attach_adapter
from alignment.policy.chat_templates import with_templates
from alignment.policy.load import load_base, load_tokenizer
from alignment.stages.beginning import begin, first_day, first_templates
from tests.helpers.chat_templates import LLAMA3
from tests.helpers.commands import pair, write_lines

pytestmark = pytest.mark.slow

DAY = datetime.date(2026, 3, 1)
CPU = torch.device("cpu")


@pytest.fixture
def start(tmp_path, tiny_model_folder):
    """Begin a run, or go on with it; a keyword says what is different now."""
    shutil.copytree(tiny_model_folder, tmp_path / "model")
    pairs = [pair(number) for number in range(1, 7)]

    def begun(rows=pairs, name="pairs.jsonl", template=None, folder="model", seed=0, fresh=True, own=None):
        write_lines(tmp_path / name, rows)
        mixed = ()
        if own is not None:
            source = f"{{source: '{tmp_path / name}', eval_size: 2, chat_template: '{tmp_path / own}'}}"
            mixed = ("data.source=null", f"data.sources={{plain: '{tmp_path / name}', own: {source}}}")
        config = load(
            *(
                "recipe=quickstart",
                "sft=quickstart",
                f"model.name={tmp_path / folder}",
                "adapter.r=2",
                "data.eval_size=2",
            ),
            *(f"data.source={tmp_path / name}", "data.eval_source=null", "data.system=null", "data.limit=null"),
            *(f"sft.data.source={tmp_path / name}", "sft.data.eval_source=null", "sft.data.eval_size=2"),
            *("sft.data.system=null", "sft.data.limit=null", "data.eval_limit=null", "sft.data.eval_limit=null"),
            *mixed,
        )
        tokenizer = load_tokenizer(config.model, str(tmp_path / folder))
        if template is not None:
            tokenizer.chat_template = template(tokenizer.chat_template)
        record = tmp_path / "run" / "stages" / "beginning.json"
        day = first_day(record) if record.exists() else DAY
        config = with_templates(config, tokenizer, first_templates(record))
        read = read_preferences(config.data, tokenizer, day=day)
        infos = {
            "sft": load_conversations(config.sft.data, tokenizer, day=day)[0].info,
            "preference": fit_preferences(read, config.data, config.loss)[0].info,
        }
        model = attach_adapter(load_base(config.model, None, str(tmp_path / folder), CPU), config.adapter, seed)
        begin(record, day, config, tokenizer, infos, model, fresh)
        return read_sealed(record)

    begun.pairs = pairs
    return begun


def other_weights(model):
    """One number of the base is another, in the file."""
    path = model / "model.safetensors"
    weights = load_file(path)
    name = min(weights)
    weights[name].view(-1)[0] += 1e-3
    save_file(weights, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"template": lambda t: t.replace("<|im_start|>' + m", "' + m")},
            "the chat template, and with it the tokens of",
        ),
        ({"seed": 1}, "the adapter that training starts from has"),
        (
            {"rows": [*(pair(n) for n in (1, 2, 3, 4, 5)), pair(9)]},
            "the rows of the sft data and the preference data have",
        ),
        ({"folder": "other"}, "the base's weights, or its configuration, have"),
    ],
)
def test_what_decides_the_results_may_not_change(changed, said, start, tmp_path):
    """One sentence says which of these it was."""
    shutil.copytree(tmp_path / "model", tmp_path / "other")
    other_weights(tmp_path / "other")
    first = start()
    with pytest.raises(UserError) as caught:
        start(**changed)
    sentence = str(caught.value)
    assert sentence.startswith(f"A resumed run keeps its data and its policy, but {said}"), sentence
    assert sentence.endswith("began: bring back what it was, or start a new run.")
    assert start() == first, "the record stays as it was"


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"name": "renamed.jsonl"},
        {"folder": "moved"},
        {"template": lambda t: "{# the same, said otherwise #}" + t},
        {"rows": [{**pair(n), "answer": "another", "note": n} for n in range(1, 7)]},
        {"seed": 1, "fresh": False},
    ],
)
def test_what_does_not_decide_them_may(changed, start, tmp_path):
    """Names, remarks in a template, columns that do not train, an adapter that has trained since."""
    shutil.copytree(tmp_path / "model", tmp_path / "moved")
    assert start() == start(**changed)


def test_the_scores_and_weights_of_rows_bind(start):
    """They train, although they are no tokens."""
    start(rows=[{**row, "weight": 1.0} for row in start.pairs])
    with pytest.raises(UserError, match=r"the rows of the preference data have changed since"):
        start(rows=[{**row, "weight": 0.5} for row in start.pairs])


def test_the_day_on_which_a_run_began_stays(start, tmp_path):
    """A template that writes the date goes on writing that day."""
    record = tmp_path / "run" / "stages" / "beginning.json"
    assert first_day(record) == datetime.date.today()
    assert start()["day"] == "2026-03-01"
    assert first_day(record) == DAY


def test_the_template_of_a_source_is_kept_and_may_not_become_another(start, tmp_path):
    """The run goes on with its copy where the file is gone; another text is refused with the name of the source."""
    path = tmp_path / "own.jinja"
    path.write_text(LLAMA3)
    begun = start(own=path.name)
    assert begun["templates"].keys() == {"model", "data.sources.own"}
    assert begun["templates"]["data.sources.own"] == LLAMA3
    path.unlink()
    assert start(own=path.name) == begun
    path.write_text("{# a remark #}" + LLAMA3)
    assert start(own=path.name) == begun
    path.write_text(LLAMA3.replace("\n\n", "\n"))
    with pytest.raises(UserError) as caught:
        start(own=path.name)
    assert str(caught.value).startswith(
        "A resumed run keeps its data and its policy, but the chat template of data.sources.own, and with it the "
        "tokens of the preference data, has changed since"
    )


def test_a_record_of_another_version_is_refused(tmp_path):
    """In one sentence, before anything is loaded."""
    (tmp_path / "beginning.json").write_text('{"preference": "abc"}')
    with pytest.raises(UserError, match=r"beginning\.json is damaged, or of another version of this package: start"):
        first_day(tmp_path / "beginning.json")
