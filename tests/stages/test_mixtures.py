"""A mixture of experts in NF4 through a whole run: SFT, then DPO with a cached reference, stopped and resumed."""

import json

import pytest
from transformers import AutoTokenizer

from alignment.config.compose import as_plain, compose_node, register, to_run_config
from alignment.errors import UserError
from alignment.runs.folder import read_run
from alignment.stages.chain import Chain
from tests.helpers.commands import write_project
from tests.helpers.mixtures import write_mixture

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_model_folder):
    """Data, and a mixture with the tokenizer of the tiny model."""
    folder = tmp_path_factory.mktemp("mixture")
    write_mixture(folder / "model")
    AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(folder / "model")
    write_project(folder / "project", folder / "model")
    return folder


def run(project, folder, cache, *overrides):
    register()
    data = project / "project" / "data"
    node = compose_node(
        [
            "recipe=quickstart", "tracking=none", "quantization=nf4", "device=cpu", f"model.name={project / 'model'}",
            "adapter.r=4", "adapter.target_modules=[q_proj,v_proj,gate_proj,up_proj,down_proj]",
            f"reference.path={cache}", f"sft.data.source={data / 'sft.jsonl'}", "sft.data.eval_size=2",
            "sft.data.system=null", "sft.data.limit=null", "sft.optim.lr=1e-2", "sft.trainer.max_steps=2",
            "sft.trainer.groups_per_step=2", f"data.source={data / 'pairs.jsonl'}",
            f"data.eval_source={data / 'held_out.jsonl'}", "data.system=null", "data.limit=null",
            "data.eval_limit=null", "optim.lr=1e-2", "trainer.groups_per_step=4", "trainer.save_every=2",
            "trainer.max_steps=4", "evaluation.prompts=0", "evaluation.kl_prompts=0", "evaluation.judge=none",
            *overrides,
        ]
    )  # fmt: skip
    return Chain(to_run_config(node), folder, "quickstart", as_plain(node)).run()


def rows(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("time", "wall_s", "crc32")} for line in lines]


@pytest.mark.matrix
def test_a_run_that_is_stopped_ends_as_one_that_is_not(project, tmp_path, monkeypatch):
    """With a loss of the routers in both stages; the record says in what the base is."""
    both = ("trainer.router_aux_loss_coef=0.01", "sft.trainer.router_aux_loss_coef=0.01")
    whole = run(project, tmp_path / "whole", tmp_path / "cache", *both)
    assert whole["model"]["stored"].startswith("NF4 ") and whole["model"]["notes"] == []
    assert whole["model"]["quantization"] == "nf4" and whole["stages"]["preference"]["start"]["loss"] == pytest.approx(
        0.693147, abs=1e-4
    )
    assert f"| weights of the base | {whole['model']['stored']} |" in (tmp_path / "whole" / "report.md").read_text()
    assert read_run(tmp_path / "whole").summary["model"]["weights"]["NF4"] > 0
    logged = [row["router_loss"] for row in rows(tmp_path / "whole") if "router_loss" in row]
    assert len(logged) == 4 and all(2 <= value < 4 for value in logged)

    class Stopped(Exception):
        pass

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr("alignment.training.callbacks.RecordCallback.on_save", stop, raising=False)
        with pytest.raises(Stopped):
            run(project, tmp_path / "parts", tmp_path / "other", *both)
    parts = run(project, tmp_path / "parts", tmp_path / "other", *both)
    assert parts["model"]["final_identity"] == whole["model"]["final_identity"]
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")


def test_a_stage_without_the_loss_of_routers_has_none(project, tmp_path, monkeypatch):
    """TRL would add the one that the model was pretrained with; here it is told 0."""
    told = []
    from trl import SFTTrainer

    own = SFTTrainer.__init__

    def watched(self, *args, **kwargs):
        own(self, *args, **kwargs)
        told.append((self.aux_loss_enabled, self.router_aux_loss_coef))

    monkeypatch.setattr(SFTTrainer, "__init__", watched)
    run(project, tmp_path / "run", tmp_path / "cache", "trainer.max_steps=1", "evaluation.prompts=0")
    assert told == [(False, 0.0)]
    with pytest.raises(UserError, match=r"must be a finite number, at least 0, not -1"):
        run(project, tmp_path / "other", tmp_path / "cache", "trainer.router_aux_loss_coef=-1")
