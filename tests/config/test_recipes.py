"""Recipes: every file composes and says what it is, a loss keeps its values, users' folders, absent machines."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from alignment.config import preflight
from alignment.config.compose import as_plain, compose_node, load, load_loss, to_run_config
from alignment.config.members import sweep_members
from alignment.config.preflight import check_machine
from alignment.config.registry import register
from alignment.config.schema import Device, Judge
from alignment.errors import UserError
from alignment.files import asset_dir
from alignment.losses import DPO, IPO, KTO, LOSSES, ORPO, SimPO
from alignment.losses.ipo import Reduction
from alignment.losses.nll import NLLReduction, NLLScope
from tests.helpers.patience import patience

ROOT = Path(__file__).parents[2]
RECIPES = asset_dir("recipes")
FILES = {path.relative_to(RECIPES).with_suffix("").as_posix(): path for path in sorted(RECIPES.rglob("*.yaml"))}
QWEN3 = {
    "sft_qwen3": (None, 2e-4, 64),
    "dpo_qwen3": (DPO(beta=0.01, label_smoothing=0.0), 5e-6, 64),
    "simpo_qwen3": (SimPO(beta=2.0, gamma_beta_ratio=0.5), 6e-6, 64),
    "kto_qwen3": (KTO(beta=0.1, desirable_weight=1.0, undesirable_weight=1.0), 2e-5, 32),
    "orpo_qwen3": (ORPO(lam=0.1, nll_reduction=NLLReduction.sequence_mean, nll_scope=NLLScope.response), 8e-5, 64),
    "ipo_qwen3": (IPO(tau=0.01, reduction=Reduction.mean), 5e-6, 64),
}


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


# The shipped recipes


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_recipe_composes_and_its_values_arrive(name):
    """Every value that the file sets is the run's, so no block is shadowed by what the recipe inherits."""
    register()
    composed = compose_node([f"recipe={name}"])
    to_run_config(composed)
    node = yaml.safe_load(FILES[name].read_text())
    plain = as_plain(composed)

    def compare(written, found, key):
        if isinstance(written, dict):
            for inner, value in written.items():
                compare(value, found[inner], f"{key}.{inner}")
        else:
            assert found == written, key

    compare({key: value for key, value in node.items() if key not in ("defaults", "sweep")}, plain, name)


SWEPT = {
    "sweep/beta_dpo": ("quickstart", "dpo", 4),
    "sweep/gamma_simpo": ("quickstart", "simpo", 4),
    "sweep/lr": ("quickstart", "dpo", 4),
    "sweep/beta_dpo_qwen3": ("dpo_qwen3", "dpo", 4),
    "sweep/gamma_simpo_qwen3": ("simpo_qwen3", "simpo", 4),
    "sweep/lr_qwen3": ("dpo_qwen3", "dpo", 4),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SWEPT)
def test_the_members_of_a_sweep_differ_in_its_setting_alone(name):
    """By what the members are given; the last one is composed and is the recipe that the sweep is of, but for it."""
    base, loss, count = SWEPT[name]
    register()
    members = sweep_members([f"recipe={name}"])
    [key] = yaml.safe_load(FILES[name].read_text())["sweep"]
    given = [dict(override.split("=") for override in member if "subdir" not in override) for member in members]
    assert all(settings == {"recipe": name, key: settings[key]} for settings in given)
    section, setting = key.split(".")
    expected = as_plain(
        compose_node([f"recipe={base}", f"loss={loss}"] if base == "quickstart" else [f"recipe={base}"])
    )
    values = [float(settings[key]) for settings in given]
    assert expected[section].pop(setting) in values
    assert len(set(values)) == count
    last = as_plain(compose_node(members[-1]))
    assert last[section].pop(setting) == values[-1]
    assert last == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", ["compare_quickstart", "compare_qwen3"])
def test_the_members_of_a_comparison(name):
    """They are given a loss, a value of its key setting, how it trains, a seed; one of each loss is composed."""
    register()
    members = sweep_members([f"recipe={name}"])
    given = [dict(override.split("=") for override in member if "subdir" not in override) for member in members]
    losses = ("dpo", "simpo", "kto", "orpo", "ipo")
    assert [settings["loss"] for settings in given] == [loss for loss in losses for _ in range(4)]
    assert [settings["seed"] for settings in given] == ["0", "1"] * 10
    assert len({str(settings) for settings in given}) == 20
    for loss in losses:
        both = [settings for settings in given if settings["loss"] == loss]
        [swept] = {key for key in both[0] if key.startswith("loss.")}
        assert len({settings[swept] for settings in both}) == 2
        others = {key for settings in both for key in settings} - {"recipe", "loss", swept, "seed"}
        assert others <= {"optim.lr", "trainer.groups_per_step"}
        assert all(len({settings[key] for settings in both}) == 1 for key in others)
    configs = [load(*member) for member in members[3::4]]
    assert [config.loss.name for config in configs] == list(losses)
    assert {config.seed for config in configs} == {1}
    assert all(config.sft == configs[0].sft and config.data == configs[0].data for config in configs)
    assert all(config.reference.for_metrics for config in configs)


def test_the_arms_of_the_comparison_of_rounds():
    """Three seeds of each, the same but for where the answers come from, and for the loss of the last."""
    register()
    members = sweep_members(["recipe=compare_onpolicy"])
    given = [dict(override.split("=") for override in member if "subdir" not in override) for member in members]
    assert [settings.pop("seed") for settings in given] == ["0", "1", "2"] * 3
    arms = [{"onpolicy": "rounds", "onpolicy.every": "8"}, {"onpolicy": "none"}, {"onpolicy": "none", "loss": "nll"}]
    assert given == [{"recipe": "compare_onpolicy", **arm} for arm in arms for _ in range(3)]


@pytest.mark.parametrize("name", FILES)
def test_a_recipe_says_what_it_is(name):
    first, *rest = FILES[name].read_text().splitlines()
    assert first == "# @package _global_"
    header = " ".join(line[1:].strip() for line in rest[: rest.index("defaults:")])
    for part in ("Needs ", "Gives ", "bout "):  # hardware, result, time
        assert part in header, part


def test_the_table_of_recipes_is_complete():
    rows = re.findall(r"^\| \[([\w/]+)\]\((.+?)\) \|", (asset_dir("recipes") / "README.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted((name, f"{name}.yaml") for name in FILES)


@pytest.mark.slow
@pytest.mark.parametrize("name", QWEN3)
def test_the_qwen3_recipes_differ_in_the_loss_and_what_it_asks_for(name):
    loss, lr, groups = QWEN3[name]
    config = load(f"recipe={name}")
    assert config.loss == loss
    assert (config.optim.lr, config.trainer.groups_per_step) == (lr, groups)
    assert (config.sft is None) == (name == "orpo_qwen3") == (not config.reference.for_metrics)
    assert config.model.name == "Qwen/Qwen3-1.7B-Base"
    assert config.quantization.double
    assert (config.adapter.r, config.adapter.alpha, config.adapter.target_modules) == (32, 64, ["auto"])
    assert (config.evaluation.prompts, config.evaluation.judge, config.device) == (64, Judge.none, Device.cuda)
    assert (config.data.split, config.data.eval_split) == ("train_prefs", "test_prefs")
    for data in (config.data, config.sft.data if config.sft else config.data):
        assert data.template_kwargs == {"enable_thinking": False}


# Loss values and their loss


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "loss"), [("dpo_qwen3", "dpo"), ("dpo_qwen3", "simpo"), ("dpo_qwen3", "orpo"), ("ipo_qwen3", "ipo")]
)
def test_another_loss_inherits_nothing_from_the_recipes_loss(recipe, loss):
    """Chosen on the command line a loss has its own defaults, be it the recipe's, or one with settings in common."""
    assert load(f"recipe={recipe}", f"loss={loss}").loss == load_loss(loss)


@pytest.mark.slow
@pytest.mark.parametrize("loss", [[], ["loss=dpo"], ["loss=simpo"]])
def test_values_on_the_command_line_win(loss):
    assert load("recipe=dpo_qwen3", *loss, "loss.beta=0.7").loss.beta == 0.7


@pytest.mark.slow
def test_every_member_of_a_sweep_over_recipes_composes():
    members = sweep_members(["recipe=dpo_qwen3,simpo_qwen3", "loss.beta=0.01,0.5", "optim.lr=2e-6,5e-6"])
    assert [member[2] for member in members] == ["optim.lr=2e-06", "optim.lr=5e-06"] * 4
    losses = [load(*member).loss for member in members[::2]]
    assert [(type(loss), loss.beta) for loss in losses] == [
        (kind, beta) for kind in (DPO, SimPO) for beta in (0.01, 0.5)
    ]


# A user's folder


def test_a_users_recipe_and_options(tmp_path):
    folder = write(
        tmp_path,
        {
            "recipe/ours.yaml": "defaults:\n  - dpo_qwen3\n  - override /loss: simpo\n  - override /optim: ours\n"
            "loss: {gamma_beta_ratio: 0.3}\ndata: {limit: 7}\n",
            "optim/ours.yaml": "defaults: [adamw, _self_]\nlr: 1.0e-3\n",
        },
    )
    config = load("recipe=ours", config_dir=folder)
    assert config.loss == SimPO(beta=2.0, gamma_beta_ratio=0.3)
    assert (config.data.limit, config.model.name) == (7, "Qwen/Qwen3-1.7B-Base")
    assert config.optim.name == "adamw_torch_fused"
    assert config.optim.lr == 5e-6, "a value of the inherited recipe stands over the option"
    assert load("recipe=ours", "loss=dpo", config_dir=folder).loss == load_loss("dpo")


BROKEN = {
    "open bracket": ("recipe/bad.yaml", "data: [1, 2\n", "line 2"),
    "tab": ("recipe/bad.yaml", "data:\n\t- 1\n", "line 2"),
    "no mapping": ("recipe/bad.yaml", "- 1\n", "mapping"),
    "defaults no list": ("recipe/bad.yaml", "defaults: quickstart\n", "`defaults` must be a list"),
    "unknown key": ("recipe/bad.yaml", "optim: {lrr: 1.0e-5}\n", "accepted are name, lr, weight_decay"),
    "unknown block": ("recipe/bad.yaml", "optimizer: {lr: 1.0e-5}\n", "accepted are seed, device, model"),
    "wrong type": ("recipe/bad.yaml", "optim: {lr: fast}\n", "'fast'"),
    "unknown group": ("recipe/bad.yaml", "defaults:\n  - override /losss: dpo\n", "losss"),
    "unknown base": ("recipe/bad.yaml", "defaults:\n  - quickstrat\n", "quickstrat"),
    "loss unchosen": ("recipe/bad.yaml", "loss: {beta: 1.0}\n", "override /loss"),
    "loss of another": (
        "recipe/bad.yaml",
        "defaults:\n  - override /loss: simpo\nloss: {tau: 1.0}\n",
        "accepted are beta, gamma_beta_ratio",
    ),
    "shipped name": ("recipe/quickstart.yaml", "seed: 1\n", "shipped"),
    "shipped option": ("optim/adamw.yaml", "lr: 1.0\n", "shipped"),
    "option key": ("optim/bad.yaml", "defaults: [adamw, _self_]\nlrr: 1.0e-5\n", "accepted are name, lr"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_named_in_one_sentence(case, tmp_path):
    name, text, expected = BROKEN[case]
    folder = write(tmp_path, {name: text})
    with pytest.raises(UserError) as caught:
        load("optim=bad" if "option" in case else "recipe=bad", config_dir=folder)
    message = str(caught.value)
    assert str(folder / name) in message
    assert expected in message
    assert "\n" not in message
    assert message.endswith(".")


def test_a_file_that_is_not_utf_8_is_named(tmp_path):
    path = tmp_path / "recipe" / "bad.yaml"
    path.parent.mkdir()
    path.write_bytes(b"# caf\xe9\nseed: 1\n")
    with pytest.raises(UserError, match=re.escape(str(path))):
        load("recipe=bad", config_dir=tmp_path)


def test_a_recipe_that_includes_itself(tmp_path):
    with pytest.raises(UserError, match="leads back to the recipe itself"):
        load("recipe=circle", config_dir=write(tmp_path, {"recipe/circle.yaml": "defaults:\n  - circle\n"}))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("recipe=nope", "Could not find 'recipe/nope'; available are .*quickstart.*sweep/beta_dpo"),
        (
            "loss=simpoo",
            r"Could not find 'loss/simpoo' \(did you mean simpo\?\); available are "
            + ".*".join(sorted([*LOSSES, "none", "mpo"])),
        ),
        ("optim.lrr=1", r"There is no setting optim.lrr \(did you mean optim.lr\?\); accepted are name, lr, "),
        ("sft.optim.lrr=1", r"There is no setting sft.optim.lrr \(did you mean sft.optim.lr\?\); accepted are name, "),
        ("lr=1", r"There is no setting lr \(did you mean optim.lr\?\); accepted are seed, "),
        ("losss=dpo", r"There is no setting losss \(did you mean loss\?\)"),
        ("recipe=beta_dpo", r"\(did you mean sweep/beta_dpo\?\)"),
        ("optim=adamv", r"\(did you mean adamw\?\)"),
    ],
)
def test_a_mistake_on_the_command_line_lists_what_is_accepted(override, expected):
    """Among the losses may be one that another test has registered in this process."""
    with pytest.raises(UserError, match=expected):
        load(override)


@pytest.mark.parametrize("value", ["null", "3", "true", "0.5", "{a: 1}", "[a,b]"])
@pytest.mark.parametrize(
    "group", sorted({"recipe", *(path.name for path in (ROOT / "conf").iterdir() if path.is_dir())})
)
def test_a_group_takes_the_name_of_an_option_and_nothing_else(group, value):
    with pytest.raises(UserError, match=f"{group} takes the name of an option"):
        load(f"{group}={value}")


# Machines that lack something


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft_qwen3", "dpo_qwen3", "orpo_qwen3"])
def test_a_dead_network_is_waited_for_once(name, monkeypatch):
    """One question to the hub, whatever the run needs; everything that is missing stands in one sentence."""
    asked = []

    class DeadHub:
        def model_info(self, name, timeout):
            asked.append((name, timeout))
            raise OSError("no route to host")

        dataset_info = model_info

    monkeypatch.setattr(preflight, "HfApi", DeadHub)
    monkeypatch.setattr(preflight, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(preflight, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(preflight, "_dataset_is_cached", lambda *_: False)
    config = load(f"recipe={name}", "device=cpu")
    with pytest.raises(UserError) as caught:
        check_machine(config)
    assert len(asked) == 1
    assert asked[0][1] <= 5
    used = {"the model Qwen/Qwen3-1.7B-Base"}
    if name != "orpo_qwen3":
        used.add("the data set HuggingFaceH4/ultrachat_200k")
    if name != "sft_qwen3":
        used.add("the data set HuggingFaceH4/ultrafeedback_binarized")
    assert set(re.findall(r"the (?:model|data set) \S+", str(caught.value))) == used
    assert str(caught.value).count("the hub cannot be reached") == 1


@pytest.mark.slow
def test_without_the_hub_a_qwen3_recipe_stops_at_once(tmp_path):
    """By the command: status 1, one sentence, nothing written, and no heavy import on the way."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "alignment.run", "recipe=dpo_qwen3"],
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=patience(300),
    )
    lines = done.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    said = [line for line in lines if not line.startswith("import time:")]
    assert done.returncode == 1
    assert not done.stdout
    assert len(said) == 1
    assert said[0].startswith("Error: This run lacks ")
    for part in ("Qwen/Qwen3-1.7B-Base", "ultrachat_200k", "ultrafeedback_binarized", "recipe=quickstart"):
        assert part in said[0]
    assert list(tmp_path.iterdir()) == []
    assert "alignment.config.preflight" in imported
    assert "transformers" not in imported
