"""`python -m alignment.losses`: every loss is listed, and explained by its docstring; the page is what it writes."""

import inspect
import re
from dataclasses import fields

import pytest
import torch

from alignment.losses import LOSSES, title
from alignment.losses.__main__ import (
    COLUMNS,
    TOKEN_LEVEL,
    main,
    mixtures,
    page,
    page_path,
    read_option,
    recommended,
    rows,
)
from alignment.losses.parity import ABSENT, CHECKS
from alignment.types import RaggedLogps
from tests.conftest import recommended_loss
from tests.helpers.endings import refusal_of
from tests.helpers.loss_examples import EXAMPLES
from tests.helpers.loss_steps import make_step, statistics_of, with_policy

SINGLE = [name for name in LOSSES if name != "mixture"]


def test_lists_every_loss_on_a_line_of_80_columns(capsys):
    main([])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) <= 72
    for name, loss in LOSSES.items():
        star = "*" if loss.uncertain else ""
        assert lines.count(f"  {name + star:14} {loss.purpose}") == 1
    assert "  mpo            dpo 0.8, bco 0.2, nll 1" in lines


def test_the_list_is_grouped_by_what_the_losses_read(capsys):
    main([])
    groups = dict(part.split("\n", 1) for part in capsys.readouterr().out.split("\n\n")[1:-1])
    found = {heading: [line.split()[0].rstrip("*") for line in body.splitlines()] for heading, body in groups.items()}
    assert found["Single answers labelled good or bad, against a reference"] == [
        *("kto", "apo_zero_unpaired", "bco"),
    ]
    assert found["Ranked lists of answers, without a reference"] == ["tpo", "tpo_l"]
    assert found["Mixtures of these"] == ["mixture", "mpo"]
    assert {"simpo", "orpo", "cpo"} < set(found["Pairs of a chosen and a rejected answer, without a reference"])
    assert {"dpo", "ipo", "aot"} < set(found["Pairs of a chosen and a rejected answer, against a reference"])
    assert sum(map(len, found.values())) == len(LOSSES) + 1


def test_what_a_row_says():
    found = {row[0]: dict(zip(COLUMNS, row, strict=True)) for row in rows()}
    assert found["simpo"] == {
        "loss": "simpo",
        "title": "SimPO",
        "items": "pairs",
        "reference": "no",
        "reads": "-",
        "state": "-",
        "defaults": "beta 2, gamma_beta_ratio 0.5",
        "purpose": LOSSES["simpo"].purpose,
    }
    said = {name: (row["items"], row["reference"], row["reads"], row["state"]) for name, row in found.items()}
    assert said["kto*"] == ("rows", "yes", "answers to other prompts", "-")
    assert said["bco*"] == ("rows", "yes", "the whole step", "delta, count")
    assert said["tdpo1"] == ("pairs", "live", "distributions (divergence)", "-")
    assert said["infonca"] == ("lists", "yes", "scores", "-")
    assert said["sampo"] == ("pairs", "yes", "tokens", "-")


def test_the_losses_that_read_single_tokens():
    """The others are the same where every sequence's log-probs stand in another order."""

    def changes(loss):
        step = make_step(loss)
        turned = RaggedLogps.from_sequences([step.policy.sequence(i).flip(0) for i in range(len(step.policy))])
        step_statistics = statistics_of(loss)
        one, other = (loss(s, step_statistics).losses for s in (step, with_policy(step, turned.values)))
        return not torch.allclose(one, other, rtol=1e-9, atol=0)

    assert {loss.name for loss in EXAMPLES.values() if changes(loss)} == TOKEN_LEVEL


@pytest.mark.parametrize("name", LOSSES)
def test_says_what_it_is_for(name):
    """In a line of the list, without the name of the loss."""
    assert 10 < len(LOSSES[name].purpose) <= 62
    assert LOSSES[name].purpose[-1] != "." and not LOSSES[name].uncertain.endswith(".")


def test_every_loss_is_titled_as_its_paper_writes_it():
    """Without a title of its own a loss derived from DPO would be shown as DPO."""
    titles = [title(name) for name in [*LOSSES, *mixtures()]]
    assert len(set(titles)) == len(titles)
    for name, shown in zip([*LOSSES, *mixtures()], titles, strict=True):
        assert name == "mixture" or name != shown
        if name != "apo_zero_unpaired":  # no paper names it
            assert re.sub(r"[^a-z0-9]", "", shown.lower()) == name.replace("_", "")
    assert [title(name) for name in ("simpo", "slic_hf", "mpo", "margin_dpo")] == [
        "SimPO",
        "SLiC-HF",
        "MPO",
        "margin_dpo",
    ]


@pytest.mark.parametrize("name", SINGLE)
def test_recommended_settings_are_those_of_a_run(name):
    """And each of them has a source."""
    assert recommended(name) == recommended_loss(name)
    sources = read_option(name).sources
    assert sources.keys() == {field.name for field in fields(LOSSES[name])}
    assert all(len(source) > 5 for source in sources.values())


@pytest.mark.parametrize("name", LOSSES)
def test_explains_one(name, capsys):
    main(["show", name])
    shown = capsys.readouterr().out
    text = inspect.getdoc(LOSSES[name])
    assert text.startswith("L = ") and " ".join(text.split()) in " ".join(shown.split())
    assert shown.startswith(f"{title(name)} (loss={name}): ") and max(map(len, shown.splitlines())) <= 80
    unchecked = f"Not checked against the paper: {LOSSES[name].uncertain}."
    assert (unchecked in " ".join(shown.split())) == bool(LOSSES[name].uncertain)
    assert "arXiv" in shown or name == "nll"
    for field in fields(LOSSES[name]):
        assert re.search(rf"^  loss\.{field.name} \S+: \S+", shown, re.MULTILINE), field.name


def test_explains_a_setting_with_its_source(capsys):
    main(["show", "ipo"])
    shown = capsys.readouterr().out
    assert "  loss.tau 0.1: within the usual search" in shown
    assert "  loss.reduction mean: per-token means, as the authors used" in shown


def test_explains_a_ready_mixture(capsys):
    main(["show", "mpo"])
    assert "weights: {dpo: 0.8, bco: 0.2, nll: 1.0}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["show", "sipmo"], "There is no loss 'sipmo' (did you mean simpo?); python -m alignment.losses lists all"),
        (["show", "xyzzy"], "There is no loss 'xyzzy'; python -m alignment.losses lists all of them."),
        (["show"], "show needs the key of a loss"),
        (["shwo"], "'shwo'"),
        (["--all"], "--all"),
    ],
)
def test_an_unknown_name_gets_one_sentence(arguments, said):
    error = refusal_of(main, arguments)
    assert error.startswith("Error: ") and said in error


# The page


def test_the_page_is_what_the_command_writes():
    assert page_path().read_text() == page(), "python -m alignment.losses docs"


def test_the_page_is_whole():
    """Every loss has its row, its section, its settings; every table is a table; every link has a target."""
    text = page_path().read_text()
    for name, loss in LOSSES.items():
        assert f"\n## {name}\n\n**{title(name)}**: {loss.purpose}.\n\n{inspect.getdoc(loss)}\n" in text
    titles = {title.lower() for title in re.findall(r"^## (.*)$", text, re.MULTILINE)}
    links = re.findall(r"\]\(#([^)]*)\)", text)
    assert {*LOSSES, "parity"} == titles == set(links)
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert [len(table.splitlines()) - 2 for table in tables] == [len(LOSSES), len(CHECKS)]
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_the_parity_of_a_loss():
    """Ours is the formula's; a number of TRL's that is another one is bold."""
    parity = page_path().read_text().partition("## Parity")[2]
    assert "| 0.6432582 | 0.6432582 | **0.6302582** | DPO sigmoid, label_smoothing 0.1 |" in parity
    cells = [line.split(" | ") for line in parity.splitlines() if line.startswith("| `")]
    for check, (_, formula, here, theirs, asked, *_) in zip(CHECKS, cells, strict=True):
        assert formula == here
        assert theirs in ("", formula) or re.fullmatch(r"\*\*[\d.]+\*\*", theirs)
        assert (asked == "absent") == (check.trl == ABSENT) == (theirs == "")


def test_docs_writes_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("alignment.losses.__main__.page_path", lambda: tmp_path / "README.md")
    main(["docs"])
    assert (tmp_path / "README.md").read_text() == page_path().read_text()
    assert "Written: " in capsys.readouterr().out
