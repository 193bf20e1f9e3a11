"""The page to hand in: all of a student's runs, nothing that loads or runs, and files that have changed are found."""

import base64
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from matplotlib.figure import Figure

from alignment import report
from alignment.config.compose import as_plain, compose_node
from alignment.config.registry import register
from alignment.course.hand_in import write_hand_in
from alignment.errors import UserError
from alignment.files import redact, write_sealed
from alignment.runs.record import SEAL, SEALED, RunRecord
from tests.helpers.endings import refusal_of
from tests.helpers.run_folders import change_json, make_run, right

EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """The folder of a lab: a sweep of two losses, one run of a recipe with other settings, and what is no run."""
    folder = tmp_path_factory.mktemp("lab") / "outputs"
    for number, loss in enumerate(("dpo", "simpo")):
        run = make_run(folder / "sweep" / f"{number}-made", loss, {"beta": 0.1}, scores=[1.0, 0.0], right=right(12))
        RunRecord(run).seal()
    register()
    overrides = ["recipe=quickstart", "loss=simpo", "sft=none", "seed=3", "optim.lr=3e-4", "data.limit=64"]
    overrides.append("tracking.entity=api_key_0123")
    run = make_run(folder / "quickstart" / "2026-11-27_10-00-00", "simpo", {"beta": 2.0}, 3, scores=[1.0, 0.0])
    config = redact(as_plain(compose_node(overrides)))
    del config["optim"]["master_weights"]  # as in a run of a version that did not know it
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / ".hydra").mkdir()
    (run / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump([*overrides, "loss.api_key=0123"]))
    (run / ".hydra" / "config.yaml").write_text("{}\n")
    change_json(
        run / "summary.json", recipe="quickstart", versions={"torch": "2.13.0"}, seconds=61.5, model={"name": "m"}
    )
    RunRecord(run).seal()
    (folder / "tiny_model").mkdir()
    (folder / "tiny_model" / "config.json").write_text("{}")
    (folder / "wandb" / "run" / "files").mkdir(parents=True)
    (folder / "wandb" / "run" / "files" / "config.yaml").write_text("{}\n")
    return folder


@pytest.fixture
def lab(made, tmp_path, monkeypatch) -> Path:
    """A copy to damage; what is drawn is the same without pictures."""
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **settings: file.write(b"picture"))
    return shutil.copytree(made, tmp_path / "outputs")


def page_of(folder: Path) -> str:
    return write_hand_in([folder], folder.parent / "ada.html").read_text()


def rows(page: str, caption: str) -> list[list[str]]:
    """The cells of every table with this caption."""
    found = []
    for table in re.findall(rf'<table aria-label="{caption}"[^>]*>(.*?)</table>', page, re.DOTALL):
        for row in re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL):
            found.append(re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL))
    return found


def test_it_has_every_run_once_by_experiment(made, tmp_path):
    page = write_hand_in([made, made / "sweep"], tmp_path / "ada.html").read_text()
    assert "<h1>ada</h1>" in page
    names = [row[1] for row in rows(page, "All runs")[1:]]
    assert names == ["sweep/0-made", "sweep/1-made", "quickstart/2026-11-27_10-00-00"]
    assert [row[0] for row in rows(page, "All runs")[1:]] == ["1", "2", "3"]
    assert "3 runs in 2 experiments; 3 trained to the end; 1 minutes" in page
    assert {row[-1] for row in rows(page, "All runs")[1:]} == {"as the run left them"}
    assert "Every file is as its run left it" in page
    for number, name in enumerate(names, 1):
        assert f'<h2 id="run-{number}">Run {number}: {name}</h2>' in page


def test_it_has_what_is_graded(made, tmp_path):
    page = write_hand_in([made / "quickstart"], tmp_path / "ada.html").read_text()
    settings = {row[0]: row[1:] for row in rows(page, "Settings that differ from the recipe")[1:]}
    assert settings == {
        "loss": ["simpo", "dpo"],
        "seed": ["3", "0"],
        "sft": ["-", "given"],
        "data.limit": ["64", "192"],
        "optim.lr": ["0.0003", "0.0001"],
    }
    assert "The command: recipe=quickstart loss=simpo sft=none" in page and "loss.api_key" not in page
    told = dict(row for row in rows(page, "What ran"))
    assert told["seed"] == "3" and told["versions"] == "torch 2.13.0"
    assert "fingerprint ffffffffffffffff" in told["preference data"]
    files = {row[0]: row[1] for row in rows(page, "Files")[1:]}
    assert files == dict.fromkeys(SEALED, "as the run left it")
    assert "Losses and settings" in page and "On held-out pairs" in page and "Answers side by side" in page
    assert "0 from simpo" in page and "One seed per variant" in page
    pictures = re.findall(r'<img src="data:image/png;base64,([^"]+)" alt="([^;]+);', page)
    titles = ["Margin over the reference", "Reward accuracy, by the log-ratio to the reference"]
    assert [title.split(":")[0] for _, title in pictures] == [*titles, "Log-prob of the chosen answers"]
    assert all(base64.b64decode(picture)[:4] == b"\x89PNG" for picture, _ in pictures)


def test_it_loads_nothing_and_is_the_same_every_time(made, tmp_path):
    first = write_hand_in([made], tmp_path / "ada.html").read_bytes()
    page = first.decode()
    assert not re.search(r"<(script|link|iframe|object|embed|form|base)\b", page)
    assert {a.partition(",")[0] for a in re.findall(r'(?:src|href)="([^"#]+)', page)} == {"data:image/png;base64"}
    assert "url(" not in page and "@import" not in page and "default-src 'none'" in page
    assert str(made) not in page, "no path of the machine"
    assert write_hand_in([made], tmp_path / "ada.html").read_bytes() == first


@pytest.mark.parametrize("name", SEALED)
def test_a_file_that_has_changed_is_said(name, lab):
    """A number in metrics.jsonl with its row's own checksum made anew, a byte anywhere else."""
    path = lab / "sweep" / "1-made" / name
    if name == "metrics.jsonl":
        record = RunRecord(path.parent)
        kept = [json.loads(line) for line in path.read_text().splitlines()]
        path.unlink()
        for row in kept:
            metrics = {k: v / 2 for k, v in row.items() if isinstance(v, float) and k != "wall_s"}
            record.log(row["stage"], row["step"], row["split"], metrics)
    else:
        path.write_text(path.read_text().replace("0", "1", 1))
    page = page_of(lab)
    assert f"<li>Run 2: {name} has changed since the run ended.</li>" in page
    assert "Every file is as its run left it" not in page
    assert rows(page, "All runs")[2][-1] == f"not as the run left them: {name}"
    assert [row[:2] for row in rows(page, "Files") if row[1] != "as the run left it"].count(
        [name, "changed since the run ended"]
    ) == 1


def test_a_file_that_is_gone_and_digests_that_are_no_longer_right_are_said(lab):
    (lab / "sweep" / "0-made" / "held_out.jsonl").unlink()
    (lab / "sweep" / "1-made" / SEAL).unlink()
    write_sealed(lab / "quickstart" / "2026-11-27_10-00-00" / SEAL, ["no mapping"])
    page = page_of(lab)
    assert "<li>Run 1: held_out.jsonl is missing.</li>" in page
    assert f"<li>Run 2: There is no {SEAL}, which a run writes at its end" in page
    assert f"<li>Run 3: {SEAL} cannot be read, so nobody knows" in page
    assert [row[-1] for row in rows(page, "All runs")[1:]] == [
        "not as the run left them: held_out.jsonl", "no digests: the run did not end", "nobody knows"
    ]  # fmt: skip


NO_COUNTS = {"evaluation": {"win_rate": {"final_vs_sft": {"rate": 0.5}}, "answers": {"sft": {"n": 1}}}}


def test_numbers_that_cannot_be_leave_out_their_run_alone(lab):
    """A win rate without its counts: forged files must not keep the others from being graded."""
    change_json(lab / "sweep" / "0-made" / "summary.json", **NO_COUNTS)
    page = page_of(lab)
    assert re.search(r"Run 1: Its numbers cannot be shown \((ValueError|KeyError): .+\), so it is left out", page)
    assert "Run 1: summary.json has changed since the run ended." in page
    assert "1 run, 1 variant of SimPO" in page and len(rows(page, "Files")) == 3 * (1 + len(SEALED))
    change_json(lab / "sweep" / "1-made" / "summary.json", **NO_COUNTS)
    assert "No run has numbers that can be shown." in page_of(lab)


def test_digests_of_other_files_are_not_looked_up(lab):
    """A name in checksums.json cannot point out of the run's folder."""
    write_sealed(lab / "sweep" / "0-made" / SEAL, {"../../../etc/passwd": "0"})
    page = page_of(lab)
    assert "passwd" not in page and f"{SEAL} cannot be read" in page


def test_text_of_models_and_users_stays_text(lab):
    run = lab / "sweep" / "0-made"
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    RunRecord(run).write_samples([row | {"prompt": EVIL, "final": f"{EVIL}$x_{{$"} for row in samples])
    change_json(run / "summary.json", recipe=EVIL, git_commit=EVIL)
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"loss": {"note": f"$\\frac{EVIL}"}, EVIL: 1}))
    shutil.move(lab / "sweep", lab / "<b>sweep")
    page = page_of(lab)
    assert EVIL not in page and "<b>" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 4


def test_a_recipe_that_is_not_known_here_shows_all_settings(made, tmp_path):
    page = write_hand_in([made / "sweep"], tmp_path / "ada.html").read_text()
    assert ["data.source", "pairs.jsonl", "-"] in rows(page, "Settings")
    assert "These are all settings, because the recipe cannot be composed here: Could not find" in page


def test_the_command_writes_it_and_refuses_what_it_cannot(made, tmp_path, capsys):
    report.main([str(made), "--hand-in", str(tmp_path / "ada.html")])
    assert capsys.readouterr().out == f"{tmp_path / 'ada.html'}\n"
    for arguments, said in (
        ([str(made / "tiny_model"), "--hand-in", "x.html"], "neither there nor below is a run"),
        ([str(made), "--hand-in", "x.pdf"], "--hand-in=x.pdf must be a file that ends in .html."),
        ([str(tmp_path / "nowhere"), "--hand-in", "x.html"], "There is no folder"),
    ):
        assert said in refusal_of(report.main, arguments)
    with pytest.raises(UserError, match="cannot be written"):
        write_hand_in([made], tmp_path / "ada.html" / "x.html")
