"""Names of variants, over the settings that runs may differ in: what differs, in few words, and no two alike."""

import itertools
import random

import pytest

from alignment.comparison.members import ComparedRun
from alignment.comparison.ranking import compare
from alignment.comparison.settings import names, settings_that_matter, told
from alignment.comparison.tables import settings_left_out
from alignment.comparison.tracked import sweep_summary
from alignment.config.compose import defaults
from alignment.config.renamed import flat
from alignment.runs.folder import RunFiles
from tests.helpers.run_folders import compared, make_run


@pytest.fixture(scope="module")
def config():
    """A whole configuration, with SFT, rounds of a chat model's judgements, and quantisation."""
    return defaults(
        "onpolicy=rounds", "onpolicy.judge=llm", "evaluation.judge=llm", "sft=quickstart", "quantization=nf4"
    )


def changed(config, **values):
    """The configuration with other values, by dotted key with __; a section may be None."""
    found = {key: dict(value) if isinstance(value, dict) else value for key, value in config.items()}
    for key, value in values.items():
        *path, last = key.split("__")
        section = found
        for name in path:
            section[name] = dict(section[name])
            section = section[name]
        section[last] = value
    return found


def labels(*configs, losses=None, seeds=None):
    """The variants of runs with these configurations, by name, in the order of the runs."""
    members = [
        ComparedRun(str(n), RunFiles(None, one), settings_that_matter(one), (seeds or [0] * len(configs))[n], loss)
        for n, (one, loss) in enumerate(zip(configs, losses or ["dpo"] * len(configs), strict=True))
    ]
    of_run = {member.name: variant.label for variant in compare(members).variants for member in variant.begun}
    return [of_run[member.name] for member in members]


def test_rounds_are_told_from_training_on_the_data(config):
    rounds, offline = changed(config, onpolicy__every=8), changed(config, onpolicy=None)
    nll = changed(offline, loss=defaults("loss=nll")["loss"])
    three = labels(rounds, offline, nll, losses=["dpo", "dpo", "nll"])
    assert three == ["DPO, on-policy, every 8", "DPO, offline", "NLL"]
    assert labels(rounds, changed(rounds, onpolicy__every=4)) == ["DPO, onpolicy.every 8", "DPO, onpolicy.every 4"]
    once = changed(config, onpolicy__every=None)
    assert labels(rounds, offline, once) == ["DPO, on-policy, every 8", "DPO, offline", "DPO, on-policy, one draw"]
    eight = changed(rounds, onpolicy__k=8)
    assert labels(rounds, eight, offline)[:2] == ["DPO, on-policy, every 8, k 4", "DPO, on-policy, every 8, k 8"]


def test_a_part_is_there_or_not(config):
    assert labels(config, changed(config, sft=None)) == ["DPO, with sft", "DPO, without sft"]
    with_rates = labels(config, changed(config, sft__optim__lr=0.5), changed(config, sft=None))
    assert with_rates == ["DPO, sft.optim.lr 0.0003", "DPO, sft.optim.lr 0.5", "DPO, without sft"]
    columns = changed(config, data__columns={"chosen": "best"})
    assert labels(config, columns) == ["DPO, without data.columns", "DPO, with data.columns"]


def test_settings_of_another_judge_or_of_its_address_name_nothing(config):
    """The rules look at no chat model; and one that is asked more patiently says the same."""
    rules = changed(config, onpolicy__judge="rules", evaluation__judge="rules")
    assert labels(rules, changed(rules, onpolicy__llm__model="a", evaluation__reward_model="b")) == ["DPO", "DPO"]
    assert labels(config, changed(config, onpolicy__llm__timeout=1.0, evaluation__llm__price_in=2.0)) == ["DPO", "DPO"]
    assert labels(config, changed(config, trainer__save_every=9, sft__trainer__log_every=9)) == ["DPO", "DPO"]
    assert labels(config, changed(config, onpolicy__server__concurrency=9)) == ["DPO", "DPO"]
    two = labels(config, changed(config, onpolicy__llm__model="a", evaluation__llm__model="a"))
    assert two == ["DPO, evaluation.llm.model -", "DPO, evaluation.llm.model a"], "rounds take it from the evaluation"


def test_what_an_earlier_version_did_not_know_has_its_default(config):
    """Each setting by itself, and each section that may be off: the run is of the variant that it would be of now."""
    plain = changed(config, quantization=None, sft=None, onpolicy=None, evaluation__judge="none")
    for key in settings_that_matter(plain):
        section, *rest = key.split(".")
        if len(rest) == 1:
            then = changed(plain, **{section: {k: v for k, v in plain[section].items() if k != rest[0]}})
            assert labels(plain, then, seeds=[0, 1]) == ["DPO", "DPO"], key
    for section in ("quantization", "sft", "onpolicy"):
        then = {key: value for key, value in plain.items() if key != section}
        assert labels(plain, then, seeds=[0, 1]) == ["DPO", "DPO"], section
        assert len(set(labels(changed(plain, **{section: config[section]}), then))) == 2, section
    then = {key: value for key, value in plain.items() if key != "spectrum"}
    assert labels(changed(plain, spectrum=0.25), then) == ["DPO, spectrum 0.25", "DPO, spectrum -"]
    then = changed(plain, reference={("stages" if k == "parts" else k): v for k, v in plain["reference"].items()})
    assert labels(plain, then, seeds=[0, 1]) == ["DPO", "DPO"], "under the name of then"


def test_a_loss_of_an_earlier_version_too(config):
    then = changed(config, loss={"beta": 0.1})
    assert labels(config, then, changed(config, loss={"beta": 0.1, "label_smoothing": 0.5})) == [
        "DPO, label_smoothing 0",
        "DPO, label_smoothing 0",
        "DPO, label_smoothing 0.5",
    ]
    mixed = [changed(config, loss={"weights": {"dpo": 1.0, other: 0.5}}) for other in ("ipo", "nll")]
    assert len(set(labels(*mixed, losses=["mixture", "mixture"]))) == 2


def test_a_judge_of_an_earlier_version_too(config):
    then = changed(config, evaluation__llm={k: v for k, v in config["evaluation"]["llm"].items() if k != "max_tokens"})
    assert labels(config, then, seeds=[0, 1]) == ["DPO", "DPO"]


def test_a_default_that_another_setting_gives_is_that_of_the_run(config):
    now = changed(config, evaluation__max_new_tokens=24, onpolicy__max_new_tokens=24)
    then = changed(now, onpolicy={k: v for k, v in now["onpolicy"].items() if k != "max_new_tokens"})
    assert labels(now, then, seeds=[0, 1]) == ["DPO", "DPO"]


LONG = "/a/long/path/of/some/folder/with/models/inside"
VALUES = [
    *(0.1, 0.12345, 0.123451, 1, True, False, None, "", "-", "1", 10_000, 10_001, 12_345.6, 12_345.7),
    *(f"{LONG}/{number}/model" for number in range(3)),
    *("a, k 4", "a", "4, a", LONG * 3, "<b>", "x y"),
]
"""Values that look alike once they are rounded or cut, and texts that look like more than one setting."""


def test_names_are_unique_and_short_whatever_differs(config):
    """Any settings, any values: as many names as variants, the same in any order of the runs, and short ones where few
    settings tell the variants apart."""
    draw = random.Random(0)
    keys = [key for key in flat(config) if key.count(".") == 1]
    for _ in range(15):
        swept = draw.sample(keys, draw.choice([1, 2, 3, 8, 30]))
        runs = [
            changed(config, **{key.replace(".", "__"): draw.choice(VALUES) for key in swept})
            for _ in range(draw.choice([2, 3, 7]))
        ]
        for run in runs:
            run.update(dict.fromkeys(draw.sample(["sft", "onpolicy", "quantization"], draw.choice([0, 0, 1, 2]))))
        given = labels(*runs)
        ways = [
            str({key: told(float(v) if type(v) is int else v) for key, v in sorted(settings_that_matter(run).items())})
            for run in runs
        ]
        for one, two in itertools.combinations(range(len(runs)), 2):
            assert (given[one] == given[two]) == (ways[one] == ways[two])
        assert sorted(labels(*runs[::-1])) == sorted(given)


def test_of_many_settings_those_are_named_that_tell_the_variants_apart():
    long = [f"optim.{name}_long_name" for name in ("a", "another", "a_third", "one_more")]
    several = [dict.fromkeys(long, value) | {"optim.lr": lr} for value, lr in ((1.5, 1.0), (2.5, 1.0), (2.5, 2.0))]
    found = names([("dpo", settings) for settings in several])
    assert found == [
        "DPO, optim.a_long_name 1.5, optim.lr 1",
        "DPO, optim.a_long_name 2.5, optim.lr 1",
        "DPO, optim.a_long_name 2.5, optim.lr 2",
    ]


def test_values_are_cut_where_they_differ():
    def of_values(*values):
        return [name.removeprefix("DPO, x ") for name in names([("dpo", {"x": value}) for value in values])]

    assert of_values("a" * 41, "b") == [f"{'a' * 39}…", "b"]
    assert of_values(*(f"{LONG}/{name}/model" for name in "ab")) == ["…a/model", "…b/model"]
    runs = [f"/somewhere/deep/in/a/long/folder/outputs/{name}/2026-11-23_10-15-00/merged" for name in ("dpo", "ipo")]
    short = [f"…{name}/2026-11-23_10-15-00/merged" for name in ("dpo", "ipo")]
    assert of_values("org/model", *runs) == ["org/model", *short]
    assert of_values(0.123456, 0.123457) == ["0.123456", "0.123457"]
    assert of_values(True, 1, None) == ["True", "1", "-"]
    alike = [{"x": "1, y 2", "y": None}, {"x": "1", "y": "2, y -"}]
    assert names([("dpo", settings) for settings in alike]) == ["DPO, x 1, y 2, y -", "DPO, x 1, y 2, y - (2)"]


def test_the_page_and_the_tracker_have_few_columns_and_all_values(config, tmp_path):
    """What no name has stands in a table of its own; settings that only rounds have are no columns of the others."""
    for number, other in enumerate((changed(config, onpolicy__every=8), changed(config, onpolicy=None))):
        make_run(tmp_path / str(number), config={key: value for key, value in other.items() if key != "loss"})
    found = compared(*sorted(tmp_path.iterdir()))
    assert found.differing_settings == ["onpolicy", "onpolicy.every"]
    sent = sweep_summary(found, [])
    assert sent.header[:5] == ["variant", "loss", "onpolicy", "onpolicy every", "seeds"]
    assert [row[:5] for row in sent.rows] == [
        ["DPO, on-policy, every 8", "dpo", "with", 8, "0"],
        ["DPO, offline", "dpo", "without", None, "0"],
    ]
    assert settings_left_out(found) is None
    path = "/some/folder/with/models/that/is/long"
    for number in range(2):
        model = {**config["model"], "name": f"{path}/{number}"}
        make_run(tmp_path / str(number), config={"model": {**model, "revision": f"{path}/{number}.2"}})
    found = compared(*sorted(tmp_path.iterdir()))
    assert [variant.label for variant in found.variants] == [f"DPO, model.name {path}/{n}" for n in range(2)]
    assert settings_left_out(found).rows == [["model.revision", *(f"{path}/{n}.2" for n in range(2))]]
