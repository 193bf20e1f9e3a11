"""The command `python -m alignment.plan`: what it prints, for which machine, and the table that it writes."""

import json
import re

import pytest
import torch
from transformers import AutoConfig

from alignment import plan as command
from alignment.config.compose import load
from alignment.evaluation.statistics.power import items_for_sign_test, t_test_power
from alignment.files import asset_dir, cache_dir
from alignment.plan import parse_memory, plan_sweep
from alignment.policy.architecture import build_model
from alignment.policy.teacher import load_teacher
from alignment.training.forecast import Machine, plan_stages, teacher_bytes
from alignment.training.memory import CONTEXT, GIB, count_weights
from alignment.training.published import (
    MARKERS,
    PUBLISHED,
    SIZE_MARKERS,
    models_table,
    position_work,
    published_config,
    sizes_table,
)
from alignment.training.qwen3_table import QWEN3, qwen3_table, with_table
from tests.conftest import tiny_config


@pytest.fixture
def config_file(tmp_path):
    folder = tmp_path / "model"
    tiny_config().save_pretrained(folder)
    return folder / "config.json"


def run(capsys, *arguments) -> str:
    command.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def refused(*arguments) -> str:
    with pytest.raises(SystemExit) as caught:
        command.main([str(argument) for argument in arguments])
    message = str(caught.value)
    assert message.startswith("Error: ")
    assert "\n" not in message
    return message


@pytest.fixture(scope="module")
def qwen3_small():
    config = AutoConfig.for_model(
        "qwen3", **QWEN3["Qwen3-1.7B"], num_key_value_heads=8, head_dim=128, vocab_size=151936, tie_word_embeddings=True
    )
    return build_model(config)


# What it says


@pytest.mark.slow
def test_json_and_the_printed_tables_agree(config_file, capsys):
    arguments = ("recipe=dpo_qwen3", "--gpu-memory", "24GiB", "--config", config_file)
    found = json.loads(run(capsys, *arguments, "--json"))
    assert found["machine"] == {"name": "a GPU of 24GiB", "device": "cuda", "memory": 24 * GIB}
    assert list(found["stages"]) == ["sft", "preference"]
    stage = found["stages"]["preference"]
    assert stage["total"] == sum(stage["needs"].values()) <= stage["limit"] == round(0.9 * 24 * GIB)
    assert stage["longest"] == 4096
    printed = run(capsys, *arguments)
    for name in ("sft", "preference"):
        values = found["stages"][name]
        assert (
            f"{name}: trainer.checkpoint_every={values['checkpoint_every']} "
            f"trainer.tokens_per_batch={values['tokens_per_batch']}; the largest group has {values['longest']} "
        ) in printed
        assert f"{values['total'] / GIB:.2f}" in printed
    tables = [line for line in printed.splitlines() if line.startswith(" ")]
    assert max(map(len, tables)) <= 80


def test_help_is_short(capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0 and len(lines) <= 25 and max(map(len, lines)) <= 80


def test_overrides_length_and_given_numbers_count(config_file, capsys):
    found = json.loads(
        run(
            capsys, "recipe=dpo_qwen3", "--json", "trainer.checkpoint_every=1", "--length", 300, "sft=none",
            "--config", config_file, "trainer.tokens_per_batch=777",
        )
    )["stages"]  # fmt: skip
    assert list(found) == ["preference"]
    stage = found["preference"]
    assert (stage["longest"], stage["checkpoint_every"], stage["tokens_per_batch"]) == (600, 1, 777)
    rows = json.loads(run(capsys, "recipe=kto_qwen3", "--json", "--length", 300, "--config", config_file))["stages"]
    assert (rows["sft"]["longest"], rows["preference"]["longest"]) == (300, 300)


def test_without_a_gpu_it_plans_for_the_cpu_and_says_so(config_file, capsys, monkeypatch):
    monkeypatch.setattr(command, "this_machine", lambda: Machine("this machine's CPU", "cpu", 8 * GIB))
    printed = run(capsys, "recipe=dpo_qwen3", "--config", config_file)
    assert "this machine's CPU: 8.0 GiB, of which the plan uses up to 50%." in printed
    assert "The recipe asks for a GPU, and this machine has none" in printed


@pytest.mark.slow
def test_what_does_not_fit_is_said(qwen3_small, capsys, monkeypatch, config_file):
    monkeypatch.setattr(command, "build_model", lambda _: qwen3_small)
    printed = run(capsys, "recipe=dpo_qwen3", "--gpu-memory", "3GiB", "--length", 8192, "--config", config_file)
    assert printed.count("It may run out of memory: a pass of that group needs") == 2
    assert "does not fit" in printed


def test_an_unusual_model_is_said_to_be_estimated(tmp_path, capsys):
    AutoConfig.for_model("gpt_neox", hidden_size=64, intermediate_size=128, num_hidden_layers=2).save_pretrained(
        tmp_path
    )
    printed = run(capsys, "recipe=dpo_qwen3", "--config", tmp_path / "config.json", "adapter.target_modules=[dense]")
    assert "The activations are a rough estimate: the layers of GPTNeoXForCausalLM have another form" in printed


# What a sweep can tell


def test_a_sweep_says_what_its_held_out_set_tells(config_file, capsys):
    """The best of five losses makes four comparisons: z is 2.498 at 5% / 4. 20% differ, 5 points:

    (2.498 sqrt(0.2) + 0.8416 sqrt(0.1975))^2 / 0.0025 + 20 = 909.8.
    """
    printed = run(capsys, "-m", "recipe=compare_quickstart", "--config", config_file)
    assert (
        "A sweep of 20 members, 10 variants; the memory is that of the first: loss=dpo loss.beta=0.1 seed=0." in printed
    )
    assert "What 96 held-out prompts tell (power 80%, two-sided 5% over 4 comparisons), if two" in printed
    [row] = [line.split() for line in printed.splitlines() if line.strip().startswith("20%")]
    assert row[0] == "20%" and row[2] == "910"
    assert "By themselves 2 are too few to tell anything; it takes 5 for 5 points and 15 for 2 points" in printed
    tables = [line for line in printed.splitlines() if line.startswith(" ")]
    assert max(map(len, tables)) <= 80


def test_members_of_the_command_line_are_a_sweep(config_file, capsys):
    """Four values of beta and three seeds: three comparisons. Pairs are held out, and nobody judges answers."""
    arguments = ("-m", "recipe=dpo_qwen3", "loss.beta=0.1,0.2,0.3,0.4", "seed=0,1,2", "--config", config_file, "--json")
    found = json.loads(run(capsys, *arguments))["sweep"]
    about = {key: found[key] for key in ("members", "variants", "seeds", "comparisons", "unit", "items")}
    assert about == {"members": 12, "variants": 4, "seeds": 3, "comparisons": 3, "unit": "pairs", "items": 512}
    assert found["level"] == pytest.approx(0.05 / 3)
    told = found["told"][1]
    needed = items_for_sign_test((0.2 + told["least"]) / 2, (0.2 - told["least"]) / 2, 0.05 / 3)
    assert needed == pytest.approx(512, abs=1e-3), "the least difference is the one that needs the pairs at hand"
    power = t_test_power(found["least_by_seeds"] / found["spread_over_seeds"], 3, 0.05 / 3)
    assert power == pytest.approx(0.8, abs=1e-4)


def test_ways_to_train_are_compared_by_their_best():
    """Of DPO in rounds, DPO offline and SFT, each with two settings: two comparisons, as the comparison makes them."""
    ways = (("loss=dpo", "onpolicy=rounds"), ("loss=dpo", "onpolicy=none"), ("loss=nll", "onpolicy=none"))
    members = [[*way, f"optim.lr={lr}"] for way in ways for lr in (1e-5, 1e-4)]
    config = load("recipe=quickstart")
    assert [plan_sweep(some, config).comparisons for some in (members, members[:4], members[:2])] == [2, 1, 1]
    assert plan_sweep([[*member, "onpolicy.k=8"] for member in members[:2]] + members[:2], config).comparisons == 3


def test_one_variant_compares_nothing_and_a_single_run_is_no_sweep(config_file, capsys):
    for arguments in (("-m", "recipe=dpo_qwen3", "seed=0,1"), ("recipe=dpo_qwen3",)):
        assert "sweep" not in json.loads(run(capsys, *arguments, "--config", config_file, "--json"))


@pytest.mark.slow
def test_where_the_data_decide_how_many_are_held_out_only_needs_are_said(config_file, capsys):
    arguments = ("-m", "recipe=dpo_qwen3", "loss.beta=0.1,0.2", "data.eval_limit=null", "--config", config_file)
    printed = run(capsys, *arguments)
    assert "What held-out pairs tell (power 80%, two-sided 5%)" in printed and "points told" not in printed
    assert "With one seed, what other seeds would change stays unknown" in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["recipe=nope"], "Could not find 'recipe/nope'"),
        (["recipe=dpo_qwen3", "--gpu-memory", "much"], "--gpu-memory must be a size such as 24GiB"),
        (["recipe=dpo_qwen3", "--length", "1"], "--length must be at least 2, not 1"),
        (["recipe=dpo_qwen3", "--length", "x"], "invalid int value: 'x'; see python -m alignment.plan --help."),
        (["recipe=dpo_qwen3", "--config", "/no/such.json"], "--config: /no/such.json does not exist"),
        (["recipe=dpo_qwen3", "model.name=./nothing"], "the folder ./nothing does not exist"),
        (["recipe=dpo_qwen3", "optim.lrr=1"], "There is no setting optim.lrr (did you mean optim.lr?)"),
        (["--nope"], "Unrecognized arguments: --nope; see"),
        (["--gpu-memry", "24GiB"], "(did you mean --gpu-memory?)"),
    ],
)
def test_mistakes_are_one_sentence(arguments, expected):
    assert expected in refused(*arguments)


def test_an_unreachable_hub_is_one_sentence_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    message = refused("recipe=dpo_qwen3", "model.name=nobody/knows-this-model")
    assert "model.name=nobody/knows-this-model" in message
    assert "--config FILE" in message


def test_an_optimizer_that_does_not_exist_is_refused(config_file):
    assert "optim.name must be one of" in refused("recipe=dpo_qwen3", "optim.name=nope", "--config", config_file)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("24GiB", 24 * 2**30), ("80 GB", 80 * 10**9), ("24576MiB", 24 * 2**30), ("24", 24 * 2**30), ("1.5g", 3 * 2**29)],
)
def test_sizes(text, expected):
    assert parse_memory(text) == expected


# A base that GPUs share


def llama_70b():
    return build_model(
        AutoConfig.for_model(
            "llama", hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
            num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False,
        )
    )  # fmt: skip


@pytest.mark.matrix
def test_a_base_of_70_billion_weights_is_shared_where_a_gpu_is_too_small():
    """QLoRA fits into 80 GB whole; 24 GB hold an eighth of it, and no half; LoRA on 16 bits needs all of 8 x 80."""
    model, found = llama_70b(), {}
    for quantization, devices, memory in (
        ("nf4", 2, 24),
        ("nf4", 8, 24),
        ("nf4", 2, 80),
        ("nf4", 8, 80),
        ("none", 8, 80),
    ):
        recipe = ("recipe=dpo_qwen3", f"quantization={quantization}", "sft=none", f"trainer.devices={devices}")
        plans = plan_stages(load(*recipe), model, Machine("", "cuda", memory * 10**9), 512)
        stage = plans["preference"]
        weights = stage.chosen.needs.weights / 10**9
        found[quantization, devices, memory] = stage.ranks, stage.chosen.fits, pytest.approx(weights, abs=0.5)
    assert found == {
        ("nf4", 2, 24): (2, False, 21.4),
        ("nf4", 8, 24): (8, True, 7.7),
        ("nf4", 2, 80): (1, True, 39.5),
        ("nf4", 8, 80): (1, True, 39.5),
        ("none", 8, 80): (8, True, 19.5),
    }


@pytest.mark.matrix
def test_a_model_of_8_billion_weights_that_all_train_is_shared():
    """One GPU of 80 GB cannot hold 16 bytes a weight; eight hold an eighth each, with masters and both states."""
    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    config = AutoConfig.for_model("llama", **shape, num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False)
    recipe = ("recipe=dpo_qwen3", "adapter=none", "quantization=none", "sft=none")
    model, found = build_model(config), {}
    for devices in (1, 8):
        plans = plan_stages(load(*recipe, f"trainer.devices={devices}"), model, Machine("", "cuda", 80 * 10**9), 512)
        stage = plans["preference"]
        needs = stage.chosen.needs
        sizes = [round(size / 10**9, 1) for size in (needs.weights, needs.gradients, needs.optimizer)]
        found[devices] = stage.ranks, stage.chosen.fits, sizes
    assert found == {1: (1, False, [16.1, 16.1, 96.4]), 8: (8, True, [2.0, 2.0, 12.0])}


@pytest.mark.slow
def test_the_command_plans_for_so_many_devices(config_file, capsys):
    arguments = ("recipe=dpo_qwen3", "--gpu-memory", "24GiB", "--devices", 4, "--config", config_file)
    assert json.loads(run(capsys, *arguments, "--json"))["stages"]["preference"]["ranks"] == 1
    found = json.loads(run(capsys, *arguments, "--json", "trainer.shard=node"))["stages"]["preference"]
    assert found["ranks"] == 4
    assert "4 of them share one base: each holds a part of its layers" in run(capsys, *arguments, "trainer.shard=node")
    assert "there is one: set trainer.devices" in refused(*arguments, "trainer.shard=node", "--devices", 1)


# A teacher


def distilling(folder, teacher, *others) -> tuple[str, ...]:
    model = f"model.name={folder}"
    return ("recipe=opd_quickstart", "sft=none", model, f"distill.teacher={teacher}", *others)


@pytest.mark.parametrize(
    "others", [(), ("distill.dtype=bfloat16",), ("distill.nf4=true",)], ids=["as it is", "16", "4"]
)
def test_a_teacher_is_counted_as_it_is_loaded(others, tiny_model_folder, capsys):
    """By what the loaded one takes; only the preference stage has it."""
    if "distill.nf4=true" in others:
        pytest.importorskip("bitsandbytes")
    arguments = distilling(tiny_model_folder, tiny_model_folder, *others)
    teacher = load_teacher(load(*arguments), torch.device("cpu"), cache_dir(None))
    taken = count_weights(teacher).base
    found = json.loads(run(capsys, *arguments, "--json"))["stages"]["preference"]
    assert found["teacher"] == pytest.approx(taken, rel=0.01 if "distill.nf4=true" in others else 1e-9)
    assert found["needs"]["context"] == found["teacher"] + CONTEXT["cpu"]


def test_a_teacher_takes_room_from_the_step(tiny_model_folder, tmp_path):
    """As much as it weighs, so that less fits; with its adapter."""
    config = load(*distilling(tiny_model_folder, tiny_model_folder))
    model = build_model(tiny_config())
    stage = plan_stages(config, model, Machine("", "cpu", 2 * GIB), 64)["preference"]
    dpo = plan_stages(load("recipe=quickstart", "sft=none"), model, Machine("", "cpu", 2 * GIB), 64)["preference"]
    assert dpo.teacher == 0 < stage.teacher == stage.chosen.needs.context - dpo.chosen.needs.context
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tiny_model_folder)}))
    (folder / "adapter_model.safetensors").write_bytes(bytes(1000))
    assert teacher_bytes(load(*distilling(tiny_model_folder, folder)), "cpu") == stage.teacher + 1000


def test_the_table_has_a_row_for_the_teacher(tiny_model_folder, capsys):
    arguments = distilling(tiny_model_folder, tiny_model_folder)
    said = run(capsys, *arguments)
    assert re.search(r"^ *teacher +0\.00", said, re.M) and "come on top" not in said
    assert "teacher" not in run(capsys, "recipe=quickstart", f"model.name={tiny_model_folder}")


def test_a_teacher_that_is_not_there_is_named(tiny_model_folder):
    said = refused(*distilling(tiny_model_folder, "org/nobody-has-this"))
    assert (
        said.startswith("Error: distill.teacher=org/nobody-has-this: ")
        and "a folder with its config.json will do" in said
    )
    assert "distill.teacher: the folder /nowhere" in refused(*distilling(tiny_model_folder, "/nowhere"))


# Reward models that judge


def judging(folder, *others) -> tuple[str, ...]:
    return (
        "recipe=onpolicy_quickstart", "sft=none", f"model.name={folder}", "evaluation.judge=reward_model",
        f"evaluation.reward_model={folder}", *others,
    )  # fmt: skip


def test_reward_models_that_judge_on_the_way_are_counted(tiny_model_folder, capsys):
    """Those of rounds and of looks are beside the policy; one that judges at the end alone is not."""
    size = sum(path.stat().st_size for path in tiny_model_folder.glob("*.safetensors"))
    rounds = ("onpolicy.judge=reward_model", f"onpolicy.reward_model={tiny_model_folder}")
    for others, count in ((), 0), (("evaluation.every=4",), 1), (rounds, 1), ((*rounds, "evaluation.every=4"), 2):
        said = run(capsys, *judging(tiny_model_folder, *others), "--json")
        found = json.loads(said)["stages"]["preference"]
        assert sum(found["judges"].values()) == found["needs"]["context"] - CONTEXT["cpu"] == count * size
    assert re.search(r"^ *reward models that judge +0\.00", run(capsys, *judging(tiny_model_folder, *rounds)), re.M)
    elsewhere = run(capsys, *judging(tiny_model_folder, *rounds[:1], "onpolicy.reward_model=org/nobody-has-this"))
    assert "The model of onpolicy.reward_model is not on this machine, so its size is not known" in elsewhere


# The recipes and the table


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["sft_qwen3", "dpo_qwen3", "ipo_qwen3", "simpo_qwen3", "kto_qwen3", "orpo_qwen3"])
def test_the_qwen3_recipes_fit_where_they_say(recipe, qwen3_small):
    """From the 6 GB that their headers name; on 24 GiB nothing is computed twice."""
    config = load(f"recipe={recipe}")
    for memory in (6, 24):
        stages = plan_stages(config, qwen3_small, Machine("", "cuda", memory * GIB), None)
        assert all(stage.chosen.fits for stage in stages.values()), memory
    assert all(stage.chosen.checkpoint_every == 0 for stage in stages.values())
    assert all("6 GB of memory or more" in path.read_text() for path in asset_dir("recipes").glob(f"{recipe}.yaml"))


@pytest.mark.slow
def test_the_table_in_the_readme_is_what_the_command_writes():
    path = asset_dir("recipes") / "README.md"
    text = path.read_text(encoding="utf-8")
    table = qwen3_table()
    assert with_table(text, table) == text, "run python -m alignment.plan --table"
    assert len(table.splitlines()) == 2 + 16


def test_the_table_goes_between_its_markers():
    text = "a\n<!-- made by: python -m alignment.plan --table -->\nold\n<!-- end of the table -->\nb\n"
    once = with_table(text, "| new |")
    assert once == with_table(once, "| new |")
    assert once.startswith("a\n<!--") and once.endswith("-->\nb\n") and "old" not in once and "| new |" in once


# Models with an option of their own


@pytest.mark.slow
@pytest.mark.parametrize("published", PUBLISHED, ids=lambda published: published.option)
def test_a_model_option_composes_under_its_recipe_and_is_planned(published):
    """Its name is the hub's; a model of four of its layers is planned and fits, without the hub."""
    recipe = load(f"recipe={published.recipe}", f"model={published.option}", *published.settings)
    assert published.title.lower() in recipe.model.name.lower()
    whole = published_config(published)
    small = published_config(published, num_hidden_layers=4)
    assert whole.num_hidden_layers > small.num_hidden_layers
    stages = plan_stages(recipe, build_model(small), Machine("", "cuda", 24 * GIB), 64)
    assert stages["preference"].chosen.fits
    assert set(stages) == ({"sft", "preference"} if published.recipe == "dpo_qwen3" else {"preference"})


WEIGHTS = {
    "qwen3_0p6b_base": 596_049_920, "qwen3_1p7b_base": 1_720_574_976, "qwen3_4b_base": 4_022_468_096,
    "qwen3_8b_base": 8_190_735_360, "qwen3_30b_a3b_base": 30_532_122_624, "smollm2_1p7b": 1_711_376_384,
    "smollm3_3b": 3_075_098_624, "llama3p2_3b": 3_212_749_824, "llama3p1_8b": 8_030_261_248, "gemma3_1b": 999_885_952,
    "falcon_h1_1p5b_instruct": 1_554_863_488, "gpt_oss_20b": 20_914_757_184, "qwen3p5_4b_base": 4_205_751_296,
}  # fmt: skip
"""As published; Falcon-H1's to its paper's 1,554.86 million. Qwen3.5's is ours: what is published counts its tower."""


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda published: published.option)
def test_a_published_model_has_as_many_weights_as_its_publisher_says(published):
    """A wrong width or depth would show."""
    assert sum(p.numel() for p in build_model(published_config(published)).parameters()) == WEIGHTS[published.option]


def test_the_work_of_a_token_is_that_of_its_experts():
    """Qwen3-30B-A3B: 3.35 billion weights with its embeddings, as its name and its card say; gpt-oss-20b: 3.6."""
    models = {p.option: build_model(published_config(p)) for p in PUBLISHED if "30b" in p.option or "20b" in p.option}
    for option, active in (("qwen3_30b_a3b_base", 3.35e9), ("gpt_oss_20b", 4.2e9)):
        model = models[option]
        embeddings = model.get_input_embeddings().weight.numel()
        assert position_work(model) + embeddings == pytest.approx(active, rel=0.02), option


@pytest.mark.matrix
def test_every_model_option_of_the_gpu_recipes_is_in_the_table():
    """The README's table has a row for each file in conf/model but the quickstart's, as the command writes it."""
    options = {path.stem for path in (asset_dir("conf") / "model").glob("*.yaml")} - {"smollm2_135m"}
    assert {published.option for published in PUBLISHED} == options
    text = (asset_dir("recipes") / "README.md").read_text(encoding="utf-8")
    assert with_table(text, models_table(), MARKERS) == text, "run python -m alignment.plan --table"


@pytest.mark.matrix
def test_what_fits_each_size_of_gpu_is_in_the_readme():
    """As the command writes it."""
    text = (asset_dir("recipes") / "README.md").read_text(encoding="utf-8")
    assert with_table(text, sizes_table(), SIZE_MARKERS) == text, "run python -m alignment.plan --table"
