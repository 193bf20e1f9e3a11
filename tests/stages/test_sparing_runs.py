"""Calibrated NF4, Spectrum and the elastic connection together, through the whole command."""

import json

import pytest
from safetensors import safe_open

from alignment.files import read_sealed
from tests.helpers.tiny_runs import project, tiny

__all__ = ["project", "tiny"]

WORDS = ("quantization=icq", "spectrum=0.5", "adapter.iec=true", "sft=none", "evaluation.prompts=0")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "reference", "objective"),
    [("dpo", "cache", "mse"), pytest.param("kto", "live", "entropy", marks=pytest.mark.matrix)],
)
def test_a_run_of_ir_qlora_on_chosen_layers(loss, reference, objective, tiny, tmp_path):
    """It ends with a plain LoRA on the chosen layers, says in how many bits its base is, and has started at its
    reference."""
    out = tmp_path / "run"
    ended = tiny(
        *WORDS,
        f"loss={loss}",
        f"reference={reference}",
        f"quantization.calibration={objective}",
        f"hydra.run.dir={out}",
    )
    assert ended.code == 0, ended.err[-2000:]
    [spectrum] = tmp_path.rglob("spectrum.json")
    run = spectrum.parent
    chosen = {name for name, found in read_sealed(spectrum)["modules"].items() if found["trains"]}
    with safe_open(run / "adapter" / "adapter_model.safetensors", "pt") as file:
        names = {key.removeprefix("base_model.model.").split(".lora_")[0] for key in file.keys()}  # noqa: SIM118
        assert not any("iec" in key for key in file.keys())  # noqa: SIM118
    assert names == chosen and len(chosen) == 7
    assert f"Calibrated NF4 by {objective}" in ended.out + ended.err
    summary = json.loads((run / "summary.json").read_text())
    assert summary["stages"]["preference"]["start"]["max_token_difference"] < 2e-5
