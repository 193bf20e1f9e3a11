"""Nothing secret of the environment or of the settings reaches a file or a line of a run."""

import json
import logging
import os
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from alignment.config.compose import as_plain, compose_node, load
from alignment.config.resume import changes, finished_run
from alignment.errors import UserError, has_password
from alignment.files import redact
from alignment.stages.quiet import quieten_libraries
from tests.helpers.commands import command, write_project

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


@pytest.mark.slow
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


@pytest.mark.slow
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


ADDRESSES = st.builds(
    "{}://{}:{}@{}".format,
    st.sampled_from(["https", "s3", "postgres"]),
    st.text("ab1", max_size=3),
    st.text("PQ:!$%", min_size=1, max_size=6).map("Planted{}".format),
    st.sampled_from(["host/x", "h:5432", "[::1]/a@b"]),
)


@given(st.lists(st.one_of(ADDRESSES, st.text(" /:@a.,\n", max_size=6)), max_size=5), st.text(max_size=8))
def test_no_address_in_a_text_keeps_its_password(parts, other):
    """Wherever it stands in the settings that are written, in sentences, and in what is sent to W&B."""
    assume("Planted" not in other and "://" not in other)
    text = " ".join(parts)
    written = redact({"data": {"system": text, "list": [text, 1]}, "other": other})
    assert "Planted" not in json.dumps(written) + str(UserError(f"It cannot be read: {text}."))
    assert written["other"] == other
    assert redact(written) == written, "a resumed run compares what was written before"


def test_a_line_of_the_log_hides_passwords(caplog):
    """Libraries name the addresses of mirrors and proxies."""
    before = logging.getLogRecordFactory()
    try:
        quieten_libraries()
        with caplog.at_level(logging.INFO):
            logging.getLogger("any").info("%s answers: %d", "https://me:Planted@host/x", 5)
    finally:
        logging.setLogRecordFactory(before)
    assert caplog.messages == ["https://me:***@host/x answers: 5"]


@pytest.mark.slow
def test_what_is_hidden_binds_a_resume_and_comes_back(tmp_path):
    """The file of the settings hides a password; the run's own overrides have it, to go on with and to read again."""
    typed = "data.system='Ask postgres://me:Planted@host/x.'"
    node = compose_node([typed])
    written = OmegaConf.to_yaml(OmegaConf.create(redact(as_plain(node))))
    assert "Planted" not in written and "postgres://me:***@host/x." in written
    (tmp_path / ".hydra").mkdir()
    (tmp_path / "config.yaml").write_text(written)
    (tmp_path / ".hydra" / "overrides.yaml").write_text(OmegaConf.to_yaml([typed]))
    assert changes(tmp_path, node) == ""
    assert "data.system" in changes(tmp_path, compose_node(["data.system='Ask postgres://you:Planted@host/x.'"]))
    config, saved = finished_run(tmp_path)
    assert config.data.system == "Ask postgres://me:Planted@host/x."
    assert "Planted" not in str(saved)
