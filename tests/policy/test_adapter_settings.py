"""Settings of adapters that do not go together or do not fit the model: one sentence each."""

import pytest
import yaml

from alignment.config.adapters import AdapterConfig
from alignment.config.compose import load as compose
from alignment.errors import UserError
from tests.helpers.adapters import adapter


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "lora_fa"}, r"^adapter\.kind must be one of lora, .*did you mean lora\?"),
        ({"kind": "qalora"}, r"^adapter\.kind=qa_lora is not there: .*GPTQ"),
        ({"init": "pisa"}, r"^adapter\.init must be one of .*did you mean pissa\?"),
        ({"init": "pissa_niter_0"}, r"^adapter\.init must be one of"),
        ({"kind": "dora", "init": "pissa"}, r"^adapter\.init=pissa takes a part of the base away"),
        ({"kind": "vera", "alpha": None, "init": "eva"}, r"^adapter\.init=eva is for lora and dora"),
        ({"kind": "vera", "alpha": None, "rslora": True}, r"^adapter\.rslora means nothing to adapter\.kind=vera"),
        ({"kind": "vera"}, r"^adapter\.alpha=8 means nothing to adapter\.kind=vera: set adapter\.alpha=null"),
        ({"kind": "oft", "r": None, "alpha": None}, r"^adapter\.block_size must be a number for adapter\.kind=oft"),
        ({"r": None}, r"^adapter\.r must be a number for adapter\.kind=lora"),
        ({"init": "orthogonal", "rank_pattern": {"q_proj": 3}}, r"^adapter\.init=orthogonal needs even ranks, not 3"),
        ({"lr_ratio": 0.0}, r"^adapter\.lr_ratio must be a finite number above 0"),
        ({"layers_to_transform": []}, r"^adapter\.layers_to_transform must be null or numbers of layers"),
    ],
)
def test_settings_that_do_not_go_together_are_one_sentence(settings, said):
    """Before anything is loaded."""
    with pytest.raises(UserError, match=said):
        adapter(**settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("adapter=loftq",), r"^adapter\.init=loftq makes up for what 4 bits lose"),
        (("adapter=dora", "reference=tr_dpo"), r"^reference\.sync_mix below 1 mixes the updates of a plain LoRA"),
        (("reference=tr_dpo", "adapter.modules_to_save=[lm_head]"), r"^reference\.sync_mix below 1 mixes"),
    ],
)
def test_what_no_run_can_do_is_refused_before_it(words, said):
    """As the command composes it."""
    with pytest.raises(UserError, match=said):
        compose("recipe=quickstart", *words)


def test_every_option_of_the_command_is_one_of_ours():
    """`adapter=<name>` for each file, in one sweep."""
    from alignment.files import asset_dir

    files = {path.stem: path for path in (asset_dir("conf") / "adapter").glob("*.yaml") if path.stem != "none"}
    usual = yaml.safe_load(files["lora"].read_text())
    for name, path in files.items():
        settings = usual | yaml.safe_load(path.read_text())
        settings.pop("defaults")
        config = AdapterConfig(**settings)
        assert name in (config.kind, config.init) or config.kind == "lora", name
    assert {"dora", "vera", "oft", "boft", "pissa", "olora", "eva", "corda", "loftq", "zero_a"} <= files.keys()
    assert compose("recipe=quickstart", "adapter=oft", "adapter.block_size=16").adapter.r is None
