"""Nothing secret of the environment or of the settings reaches a file or a line of a run."""

import os
from pathlib import Path

import pytest

from alignment.config.compose import load
from alignment.config.places import has_password
from alignment.errors import UserError
from tests.helpers.commands import command, write_project

pytestmark = pytest.mark.slow

SECRETS = {
    "HF_TOKEN": "hf_PlantedTokenOfTheHub",
    "HUGGING_FACE_HUB_TOKEN": "hf_PlantedOldTokenOfTheHub",
    "WANDB_API_KEY": "0123456789abcdefplantedkeyofwandb0123456",
    "AWS_SECRET_ACCESS_KEY": "PlantedSecretOfTheCloud",
    "OPENAI_API_KEY": "sk-planted-key-of-a-judge",
    "DATABASE_URL": "postgres://user:PlantedPassword@db.example/x",
    "GITHUB_TOKEN": "ghp_PlantedTokenOfTheRepository",
}


def plant() -> None:
    os.environ.update(SECRETS, WANDB_MODE="offline")


def leaks(folder: Path) -> list[str]:
    """Files that hold one of the secrets, as they are or within."""
    return [
        f"{name} in {path.relative_to(folder)}"
        for path in folder.rglob("*")
        if path.is_file()
        for name, value in SECRETS.items()
        if value.encode() in path.read_bytes()
    ]


def test_no_file_of_a_run_holds_a_secret_of_the_environment(tiny_model_folder, tmp_path):
    """With all that writes: the log, the record, the tracker, the checkpoints, and the refusal of a wrong setting."""
    project = write_project(tmp_path / "project", tiny_model_folder)
    settings = ("--config-dir", str(project), "recipe=tiny", "tracking=wandb", "trainer.max_steps=2", "sft=none")
    ended = command(*settings, cwd=tmp_path, cache=tmp_path / "cache", patch=plant)
    assert ended.code == 0, ended.err
    assert any(path.suffix == ".wandb" for path in tmp_path.rglob("*")), "the tracker has written"
    refused = command(*settings, "optim.lr=-1", cwd=tmp_path, cache=tmp_path / "cache 2", patch=plant)
    assert refused.code == 1
    assert leaks(tmp_path) == []
    (tmp_path / "planted").write_text(SECRETS["HF_TOKEN"])
    assert leaks(tmp_path) == ["HF_TOKEN in planted"], "the search finds what is there"


@pytest.mark.parametrize("key", ["data.source", "data.eval_source", "sft.data.source", "data.decontaminate"])
def test_an_address_with_a_password_is_refused_without_saying_it(key):
    """It would stand in the settings that a run keeps, to be continued with."""
    with pytest.raises(UserError, match=rf"{key.rpartition('.')[0]}\.source: an address has a password") as refused:
        load(f"{key}=['https://me:PlantedPassword@data.example/rows.jsonl']")
    assert "Planted" not in str(refused.value)


def test_only_a_password_is_one():
    assert has_password("s3://key:secret@bucket/x") and has_password("https://:token@host/x.jsonl")
    for address in ("hf://datasets/a/b@main/x.parquet", "https://me@host/x", "https://host:80/a:b@c.jsonl", "a:b@c"):
        assert not has_password(address)
