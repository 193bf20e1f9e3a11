"""`python -m alignment.push` against a stand-in of the hub, with the hub's own client."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants
from safetensors.torch import save_file

from alignment.push import main
from alignment.runs.cautions import cautions
from alignment.runs.folder import read_run
from alignment.runs.text import escape_markdown
from tests.helpers.hub import CUT, TOKEN, Repo, standing_in
from tests.helpers.patience import patience
from tests.helpers.run_folders import change_json, make_run

REPO = "me/my-model"
NAMES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "report.md", "recipe.yaml"}


@pytest.fixture
def hub(monkeypatch):
    """The stand-in, to which the client of this process is logged in; nobody waits between two attempts."""
    with standing_in() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found


@pytest.fixture
def folder(tmp_path):
    """A finished run with an adapter, in a folder that has a name of somebody in its path."""
    base = {"model": {"name": "org/base", "revision": None}, "adapter": {"kind": "lora", "r": 2}}
    data = {"source": "/home/someone/private/pairs.jsonl", "sources": {"web": {"source": "org/pairs"}}, "system": "Be."}
    run = make_run(
        tmp_path / "someone" / "run",
        scores=(1, 0),
        summary={"reference": {"mode": "cache", "path": "/home/someone/.cache/reference.sqlite"}},
        config=base | {"data": data, "evaluation": {"llm": {"address": "http://judge.local", "api_key": "***"}}},
    )
    adapter = run / "adapter"
    adapter.mkdir()
    save_file({"lora": torch.ones(2, 2)}, adapter / "adapter_model.safetensors", {"format": "pt"})
    config = {"base_model_name_or_path": "org/base", "r": 2, "revision": None}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (adapter / "tokenizer.json").write_text("{}")
    (adapter / "training_args.bin").write_bytes(b"pickle")
    (adapter / "README.md").write_text("peft's own")
    (run / "plots").mkdir()
    (run / "plots" / "loss.png").write_bytes(b"\x89PNG")
    report = f"# run\n\nIn {run} and /home/someone/x/pairs.jsonl.\n\n## Samples\n\n| my question |\n\n"
    (run / "report.md").write_text(f"{report}## Not available\n\n-\n")
    return run


def pushed(*words) -> str | None:
    """The sentence that the command ends with; None if it ends well."""
    try:
        main([str(word) for word in words])
    except SystemExit as end:
        return end.code
    return None


# What goes up


def test_without_yes_nothing_is_sent(hub, folder, capsys):
    hub.licenses = {"models/org/base": "mit", "datasets/org/pairs": "cc-by-4.0"}
    assert pushed(folder, REPO) is None
    said = capsys.readouterr().out
    assert not hub.repos and not hub.asked("^(POST|PUT)")
    assert said.startswith("me/my-model (private), 7 files, ")
    assert all(f"\n  {name} " in said for name in {*NAMES, "plots/loss.png"})
    assert "training_args.bin" in said and "stays here" in said
    assert said.endswith("Nothing was sent. Read the card, then add --yes.\n")
    assert (folder / "push" / "README.md").is_file()


def test_a_push_is_one_commit_of_what_was_shown(hub, folder, capsys):
    assert pushed(folder, REPO, "--yes") is None
    repo = hub.repos[REPO]
    assert repo.private and repo.commits == 1
    assert set(repo.files) - {".gitattributes"} == {*NAMES, "plots/loss.png"}
    weights = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    assert repo.files["adapter_model.safetensors"] == weights
    assert repo.files["README.md"] == (folder / "push" / "README.md").read_bytes()
    assert capsys.readouterr().out.endswith(f"{hub.address}/{REPO}/commit/{repo.sha}\n")
    texts = b"".join(content for name, content in repo.files.items() if not name.endswith(".safetensors"))
    for secret in (b"/home/", b"someone", b"my question", b"judge.local", b"hf_", b"peft's own"):
        assert secret not in texts, secret
    settings = yaml.safe_load(repo.files["recipe.yaml"])
    assert settings["data"]["source"] == "pairs.jsonl" and settings["data"]["sources"]["web"]["source"] == "org/pairs"
    assert repo.files["report.md"].decode() == "# run\n\nIn run and pairs.jsonl.\n\n## Not available\n\n-\n"


def test_a_second_push_sends_what_changed_and_removes_what_is_gone(hub, folder):
    assert pushed(folder, REPO, "--yes", "--public") is None and not hub.repos[REPO].private
    mine = {"examples/mine.txt": b"mine", "my-model-q8_0.gguf": b"GGUF"}
    hub.repos[REPO].files |= {"vocab.json": b"{}", "merged/config.json": b"{}", **mine}
    sent = hub.asked("^PUT")
    assert pushed(folder, REPO, "--yes", "--public") is None
    assert hub.asked("^PUT") == sent and hub.repos[REPO].commits == 2
    assert mine.keys() <= hub.repos[REPO].files.keys()
    assert not {"vocab.json", "merged/config.json"} & set(hub.repos[REPO].files)


def test_merged_weights_have_a_folder_of_their_own(hub, folder):
    (folder / "merged").mkdir()
    save_file({"weight": torch.ones(3)}, folder / "merged" / "model.safetensors")
    (folder / "merged" / "config.json").write_text(json.dumps({"_name_or_path": "/home/someone/base", "x": 1}))
    assert pushed(folder, REPO, "--yes") is None
    files = hub.repos[REPO].files
    assert json.loads(files["merged/config.json"]) == {"_name_or_path": "org/base", "x": 1}
    assert "merged/model.safetensors" in files and 'subfolder="merged"' in files["README.md"].decode()


def test_the_base_of_an_adapter_is_a_name_of_the_hub(hub, folder, capsys):
    path = folder / "adapter" / "adapter_config.json"
    change_json(path, base_model_name_or_path="/home/someone/models/base", revision="abc")
    assert pushed(folder, REPO) is None
    made = json.loads((folder / "push" / "adapter_config.json").read_text())
    assert made == {"base_model_name_or_path": None, "r": 2, "revision": None}
    assert "The hub does not know the base" in capsys.readouterr().out
    assert pushed(folder, REPO, "--base", "org/other") is None
    made = json.loads((folder / "push" / "adapter_config.json").read_text())
    assert made["base_model_name_or_path"] == "org/other"
    assert json.loads(path.read_text())["base_model_name_or_path"] == "/home/someone/models/base"


@pytest.mark.parametrize(
    ("name", "content"), [("adapter_config.json", b'{"r": 4,'), ("adapter_model.safetensors", None)]
)
def test_a_damaged_policy_is_not_pushed(name, content, hub, folder):
    """Such as one whose copying was interrupted."""
    path = folder / "adapter" / name
    path.write_bytes(path.read_bytes()[:-4] if content is None else content)
    assert f"{name} cannot be pushed, because it is damaged" in pushed(folder, REPO, "--yes")
    assert not hub.repos and not (folder / "push").exists()


# The card


def test_the_card_tells_of_the_run(hub, folder):
    hub.licenses = {"models/org/base": "mit", "datasets/org/pairs": "cc-by-4.0"}
    (folder / "run.log").write_text("[INFO] - W&B: https://wandb.ai/me/alignment/runs/abc123\n")
    assert pushed(folder, REPO) is None
    card = ModelCard.load(folder / "push" / "README.md")
    data = card.data.to_dict()
    assert data["base_model"] == "org/base" and data["license"] == "mit" and data["library_name"] == "peft"
    assert data["datasets"] == ["org/pairs"] and data["pipeline_tag"] == "text-generation"
    assert {"dpo", "sft", "lora"} <= set(data["tags"])
    [measured] = data["model-index"]
    values = {m["name"]: m["value"] for result in measured["results"] for m in result["metrics"]}
    assert values == {
        "Correct answers": 0.5,
        "Win rate against the model after SFT, judge None": 0.5,
    }
    text = card.text
    assert 'PeftModel.from_pretrained(base, "me/my-model")' in text and '{"role": "system", "content": "Be."}' in text
    assert "[arXiv:2305.18290](https://arxiv.org/abs/2305.18290)" in text
    assert "| org/pairs | preference | 100 | ffffffffffffffff | cc-by-4.0 |" in text
    assert "| pairs.jsonl | preference | 100 | ffffffffffffffff | - |" in text
    assert "(https://wandb.ai/me/alignment/runs/abc123)" in text
    assert "| win rate of final model | 50.0% | - |" in text
    told = [escape_markdown(caution.text) for caution in cautions(read_run(folder))]
    assert told and re.findall("^- (.+)$", text.partition("## Read this first")[2].partition("\n## ")[0], re.M) == told
    compile(text.partition("```python\n")[2].partition("```")[0], "card", "exec")


def test_how_a_reward_model_and_a_whole_model_are_loaded(hub, folder):
    change_json(folder / "summary.json", stages={"preference": {"loss": "bradley_terry"}})
    assert pushed(folder, REPO) is None
    card = ModelCard.load(folder / "push" / "README.md")
    assert card.data.pipeline_tag == "text-classification" and "reward-model" in card.data.tags
    assert 'AutoModelForSequenceClassification.from_pretrained("org/base", num_labels=1, pad_token_id=' in card.text
    assert "logits[0, 0]" in card.text and "generate" not in card.text
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"adapter": None}))
    (folder / "adapter").rename(folder / "model")
    (folder / "model" / "adapter_config.json").unlink()
    assert pushed(folder, REPO) is None
    card = ModelCard.load(folder / "push" / "README.md")
    assert (
        card.data.library_name == "transformers" and "peft" not in card.text.partition("```python")[2].split("```")[0]
    )
    assert 'AutoModelForSequenceClassification.from_pretrained("me/my-model"' in card.text


def test_text_of_the_run_is_no_markup_and_no_template(hub, folder):
    change_json(folder / "summary.json", recipe="{{ 7 * 7 }} <script>alert(1)</script> | --- |")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["data"] |= {"system": "```\n---\n<b>", "source": "<i>{{ 1 }}|`x`.jsonl"}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert pushed(folder, REPO) is None
    text = (folder / "push" / "README.md").read_text()
    assert "{{ 7 &#42; 7 }}" in text and "<script>" not in text and "<b>" not in text
    assert "<i>" not in ModelCard(text).text and "&lt;i&gt;" in text
    assert text.count("```") == 2 and ModelCard(text).data.to_dict()["library_name"] == "peft"


# Secrets


@pytest.mark.parametrize(
    ("planted", "kind"),
    [
        ("hf_" + "A1" * 17, "a token of the Hugging Face hub"),
        ("sk-" + "a1" * 12, "a key of an API"),
        ('"wandb_api_key": "' + "0a" * 20 + '"', "a key of W&B"),
        ("ghp_" + "b" * 36, "a token of GitHub"),
        ("https://me:pass@host.org/x", "a password in an address"),
        ("/home/someone/x", "a path into a home folder"),
        ("-----BEGIN RSA PRIVATE KEY-----", "a private key"),
        ("opaque-value-of-mine", "the value of $MY_SECRET"),
    ],
)
def test_secrets_are_refused_and_never_said(planted, kind, hub, folder, monkeypatch, capsys):
    monkeypatch.setenv("MY_SECRET", "opaque-value-of-mine")
    (folder / "adapter" / "tokenizer_config.json").write_text(json.dumps({"a": 1, "b": planted}, indent=1))
    said = pushed(folder, REPO, "--yes")
    assert said.startswith(f"Error: tokenizer_config.json would publish {kind}") and "in line 3" in said
    assert planted not in said and not hub.repos and not (folder / "push").exists()


def test_the_header_of_weights_is_read(hub, folder):
    save_file({"x": torch.ones(1)}, folder / "adapter" / "adapter_model.safetensors", {"from": "/home/someone/x"})
    assert "adapter_model.safetensors would publish a path into a home folder" in pushed(folder, REPO, "--yes")


def test_plain_text_holds_no_secrets(hub, folder):
    plain = "task-oriented-dialogue-with-risk-assessment https://a.org:80/home/b/c and/or commit " + "0a" * 20
    (folder / "adapter" / "tokenizer_config.json").write_text(json.dumps({"a": plain}))
    assert pushed(folder, REPO) is None


# What is refused


def test_what_cannot_be_pushed(hub, folder, monkeypatch):
    assert "is no name for the hub" in pushed(folder, "my model", "--yes")
    assert "give your name or that of a group before it, as in me/model" in pushed(folder, "model")
    assert "is no run folder" in pushed(folder / "plots", REPO)
    change_json(folder / "summary.json", status="stopped")
    assert "it was stopped early" in pushed(folder, REPO)
    change_json(folder / "summary.json", status="finished")
    (folder / "report.md").rename(folder / "away.md")
    assert "report.md is missing: python -m alignment.report" in pushed(folder, REPO)
    (folder / "away.md").rename(folder / "report.md")
    (folder / "adapter" / "adapter_model.safetensors").rename(folder / "adapter" / "adapter_model.bin")
    assert "holds no *.safetensors" in pushed(folder, REPO)
    (folder / "held_out.jsonl").unlink()
    (folder / "metrics.jsonl").unlink()
    assert "metrics.jsonl is missing" in pushed(folder, REPO)
    assert not hub.repos


def test_what_the_hub_refuses(hub, folder, monkeypatch):
    assert "Your token may not write to other/model" in pushed(folder, "other/model", "--yes")
    hub.repos["me/data"] = Repo(True, {"train.csv": b"1"})
    assert "me/data holds something else" in pushed(folder, "me/data", "--yes")
    assert set(hub.repos["me/data"].files) == {"train.csv"}
    assert pushed(folder, REPO, "--yes", "--public") is None
    assert "me/my-model is public, so everybody would see the run" in pushed(folder, REPO, "--yes")
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    assert "does not take your token" in pushed(folder, "me/second", "--yes")
    monkeypatch.setattr("alignment.publishing.hub.get_token", lambda: None)
    assert "You are not logged in to the hub" in pushed(folder, "me/second", "--yes")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in pushed(folder, "me/second", "--yes")


@pytest.mark.parametrize(
    ("asked", "status", "said"),
    [
        ("POST /api/repos/create", 500, "The hub has failed (status 500)"),
        ("POST /api/repos/create", 429, "The hub asks you to wait"),
        ("POST .*/preupload/", 503, "The hub has failed (status 503)"),
        ("PUT /lfs/", CUT, "the connection was cut"),
        ("PUT /lfs/", 403, "Your token may not write"),
        ("POST .*/commit/", CUT, "the connection was cut"),
        ("POST .*/commit/", 502, "The hub has failed (status 502)"),
    ],
)
def test_a_push_that_fails_goes_on(asked, status, said, hub, folder, capsys):
    """One sentence; nobody sees a part of it; the same command sends the rest, and weights once."""
    hub.faults = [(asked, status)] * 20
    sentence = pushed(folder, REPO, "--yes")
    assert sentence.startswith("Error: ") and said in sentence and "Traceback" not in sentence
    assert all(set(repo.files) == {".gitattributes"} for repo in hub.repos.values())
    hub.faults, hub.requests = [], []
    arrived = len(hub.blobs)
    assert pushed(folder, REPO, "--yes") is None
    assert hub.asked("^PUT") == 2 - arrived and hub.repos[REPO].commits == 1


def test_trouble_that_passes_is_no_trouble(hub, folder):
    hub.faults = [("preupload", 503), ("PUT /lfs/", CUT), ("PUT /lfs/", 500)]
    assert pushed(folder, REPO, "--yes") is None
    assert not hub.faults and hub.repos[REPO].commits == 1


def test_licenses_of_a_hub_that_does_not_answer_are_unknown(hub, folder, capsys):
    hub.faults = [("GET /api", CUT)] * 20
    assert pushed(folder, REPO) is None
    assert "The card states no license" in capsys.readouterr().out


@pytest.mark.slow
def test_what_was_pushed_loads_again(folder, tiny_model_folder, tmp_path):
    """By peft, from the stand-in: the card's own lines, with the answer of the policy that went up."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    policy = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    policy.save_pretrained(folder / "adapter")
    AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(folder / "adapter")
    token_ids = torch.arange(5)[None]
    wanted = policy(token_ids).logits
    with standing_in() as hub:
        code = (
            "import sys, torch\n"
            "from alignment.push import main\n"
            "main([sys.argv[1], 'me/my-model', '--yes'])\n"
            "from huggingface_hub import hf_hub_download\n"
            "text = open(hf_hub_download('me/my-model', 'README.md')).read()\n"
            "code = text.partition('```python\\n')[2].partition('messages =')[0]\n"
            "exec(code.replace('base-model', sys.argv[2]).replace(', device_map=\"auto\"', ''))\n"
            "torch.save(model(torch.arange(5)[None]).logits, sys.argv[3])\n"
            "print(tokenizer.chat_template is not None)\n"
        )
        own = {"HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}
        done = subprocess.run(
            [sys.executable, "-c", code, str(folder), str(tiny_model_folder), str(tmp_path / "logits.pt")],
            env=os.environ | own | {"HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True,
            text=True,
            timeout=patience(120),
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "True"
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), wanted)
