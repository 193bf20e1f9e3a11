"""A run that distils a teacher on its own answers: what it leaves, what it learns, its resumption, what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from alignment.config.compose import load
from alignment.config.onpolicy import DropCut, PairChoice, PairsConfig
from alignment.errors import UserError
from alignment.evaluation.sampling.answer import Answer, Finish
from alignment.evaluation.sampling.local import LocalEngine
from alignment.onpolicy.held_out import HeldOutPrompts
from alignment.onpolicy.pairs import Drawn, build
from alignment.onpolicy.rounds import read_round
from alignment.policy.teacher import require_same_tokens
from alignment.reference.teacher import Teacher
from alignment.runs.record import RunRecord
from alignment.stages.chain import Chain
from tests.helpers.commands import pair, write_lines

MATRIX = pytest.mark.matrix


@pytest.fixture(scope="module")
def teacher_folder(tiny_model_folder, tmp_path_factory) -> Path:
    """The tiny model with a head eight times as sure."""
    folder = tmp_path_factory.mktemp("teacher") / "model"
    shutil.copytree(tiny_model_folder, folder)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(8)
    model.save_pretrained(folder)
    return folder


def settings(folder: Path, model: Path, teacher: Path, *others: str) -> list[str]:
    """A small run on prompts of sums, of which ten are held out; its pairs have each prompt twice."""
    write_lines(folder / "pairs.jsonl", [pair(number) for number in [*range(1, 31), *range(1, 31)]])
    write_lines(folder / "held_out.jsonl", [pair(number) for number in range(101, 111)])
    nulls = [f"data.{key}=null" for key in ("system", "limit", "eval_limit")]
    return [
        *("recipe=quickstart", "loss=opd", "sft=none", "tracking=none", "device=cpu", f"model.name={model}"),
        *("onpolicy=distill", "onpolicy.k=2", "onpolicy.max_new_tokens=5", "onpolicy.every=3"),
        f"distill.teacher={teacher}",
        *("trainer.groups_per_step=8", "trainer.max_steps=8", "trainer.save_every=2", "trainer.eval_every=4"),
        *("evaluation=default", "evaluation.prompts=0", "optim.lr=0.01", f"data.source={folder / 'pairs.jsonl'}"),
        *(f"data.eval_source={folder / 'held_out.jsonl'}", *nulls, *others),
    ]


@pytest.fixture
def chain_of(tmp_path, tiny_model_folder, teacher_folder, monkeypatch):
    """The chain of such a run in a folder of this name."""
    monkeypatch.setenv("ALIGNMENT_CACHE", str(tmp_path / "cache"))

    def chain(name, *others, teacher=teacher_folder):
        config = load(*settings(tmp_path, tiny_model_folder, teacher, *others))
        return Chain(config, tmp_path / name, "quickstart", {})

    return chain


def rows_of(path: Path) -> list[dict]:
    return list(map(json.loads, path.read_text().splitlines()))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*/*model.safetensors")))


@pytest.mark.slow
def test_a_run_and_what_it_leaves(chain_of, tmp_path):
    """Rounds begin after 0, 3 and 6 steps, each with answers to the prompts of its steps alone; the start is the
    policy's own draw; the metrics are the teacher's. A second run draws nothing and asks the teacher for nothing."""
    summary = chain_of("run").run()
    stage = summary["stages"]["preference"]
    assert summary["data"]["preference"]["train"] == 30 and summary["data"]["preference"]["eval"] == 10
    assert stage["start"]["loss"] == pytest.approx(stage["start"]["closed_form"], rel=1e-4)
    assert summary["reference"]["mode"] == "teacher" and summary["reference"]["misses"] > 0
    names = {name.removeprefix("eval/") for name in stage["metrics"] if name.startswith("eval/")}
    assert names == {"loss", "kl/teacher", "kl/teacher_per_token", "lengths/answers", "drift"}
    train = [row for row in rows_of(tmp_path / "run" / "metrics.jsonl") if row["split"] == "train"]
    assert [row["step"] for row in train] == list(range(1, 9))
    fresh = [abs(row["drift"]) < 1e-6 for row in train]
    assert fresh == [True, False, False, True, False, False, True, False]
    held_out = rows_of(tmp_path / "run" / "held_out.jsonl")
    assert [row["moment"] for row in held_out] == ["start"] * 10 + ["final"] * 10
    assert [row["key"] for row in held_out[:10]] == [row["key"] for row in held_out[10:]]
    report = (tmp_path / "run" / "report.md").read_text()
    assert "| KL to teacher, nats/answer |" in report and "mode teacher" in report
    again = chain_of("again").run()
    assert again["reference"]["misses"] == 0
    assert again["model"]["final_identity"] == summary["model"]["final_identity"]


@pytest.mark.slow
def test_the_kl_to_the_teacher_falls(chain_of, tmp_path, tiny_model_folder, teacher_folder):
    """All weights train, on four tokens of each answer: the exact KL of the first token, over the whole vocabulary and
    the training's prompts, falls by more than half."""
    more = ["adapter=none", "trainer.max_steps=40", "trainer.groups_per_step=32", "trainer.save_every=0"]
    rare = ["optim.lr=0.003", "onpolicy.max_new_tokens=4", "onpolicy.every=1", "trainer.eval_every=0"]
    chain = chain_of("run", *more, *rare)
    chain.run()

    @torch.no_grad()
    def logps(folder):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        prompts = [torch.from_numpy(group.prompt.astype(np.int64))[None] for group in chain.data.preferences.train]
        return torch.stack([model(prompt).logits[0, -1].double().log_softmax(-1) for prompt in prompts])

    teacher = logps(teacher_folder)
    before, after = (
        (p.exp() * (p - teacher)).sum(-1).mean().item()
        for p in map(logps, (tiny_model_folder, tmp_path / "run" / "model"))
    )
    assert after < 0.5 * before


@pytest.mark.slow
@pytest.mark.parametrize(
    "others",
    [
        pytest.param([], id="adapter", marks=MATRIX),
        pytest.param(["adapter=none", "optim.lr=0.001"], id="whole", marks=MATRIX),
        pytest.param(["loss=tropd", "loss.top_k=8"], id="tropd"),
    ],
)
def test_interrupted_and_resumed_is_the_same(others, chain_of, tmp_path, monkeypatch):
    """Killed after its fifth step, in the middle of a round, with a checkpoint after the fourth: it goes on with the
    answers of that round, although the policy that drew them is gone and the answers' cache, too, asks the teacher for
    none of them again, and ends with the weights of a run that nothing has interrupted."""
    expected = chain_of("whole", *others).run()
    shutil.rmtree(tmp_path / "cache")
    log = RunRecord.log

    def broken(self, stage, step, split, metrics):
        if (stage, step, split) == ("preference", 5, "train"):
            raise KeyboardInterrupt
        log(self, stage, step, split, metrics)

    monkeypatch.setattr(RunRecord, "log", broken)
    with pytest.raises(KeyboardInterrupt):
        chain_of("cut", *others).run()
    monkeypatch.setattr(RunRecord, "log", log)
    shutil.rmtree(tmp_path / "cache" / "answers")
    draws = []
    draw, prepare = LocalEngine.draw, Teacher.prepare
    monkeypatch.setattr(LocalEngine, "draw", lambda self, *a: draws.append(("draw", len(a[0]))) or draw(self, *a))
    monkeypatch.setattr(Teacher, "prepare", lambda self, *a: (prepare(self, *a), draws.append(self._summary["misses"])))
    found = chain_of("cut", *others).run()
    # The two rounds that had begun are read, the first one to check the start; the third one is drawn
    assert draws[:2] == [0, 0] and draws[2][0] == "draw"
    ours, theirs = weights_of(tmp_path / "cut"), weights_of(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=0, atol=0)
    assert found["model"]["final_identity"] == expected["model"]["final_identity"]


@pytest.mark.slow
@pytest.mark.parametrize("loss", [pytest.param("opd", marks=MATRIX), "tropd"])
def test_order_and_passes_change_nothing(loss, chain_of, tmp_path):
    """One answer a pass or all of a step, drawn one by one or together: the weights are the same but for rounding."""
    fixed = (f"loss={loss}", "optim.lr=0.0001")
    chain_of("one", "trainer.tokens_per_batch=1", "evaluation.batch_size=1", *fixed).run()
    shutil.rmtree(tmp_path / "cache")
    chain_of("all", "trainer.tokens_per_batch=4096", "evaluation.batch_size=64", *fixed).run()
    one, whole = (weights_of(tmp_path / name) for name in ("one", "all"))
    for key, value in one.items():
        torch.testing.assert_close(value, whole[key], rtol=0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("renormalise", [False, True])
def test_tropd_by_full_logits(renormalise, chain_of, tmp_path, tiny_model_folder, teacher_folder):
    """The loss at the start, of the first step's answers, from whole distributions of both models; some tokens are
    trusted and some are not. A second run asks the teacher for nothing and ends with the same policy."""
    asked = ("loss=tropd", "loss.top_k=8", f"loss.renormalise={str(renormalise).lower()}", "trainer.max_steps=3")
    found = chain_of("run", *asked).run()
    policy, teacher = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        for folder in (tiny_model_folder, teacher_folder)
    )
    made = read_round(tmp_path / "run" / "stages" / "preference" / "rounds" / "0001")
    total, tokens = 0.0, 0
    for group in made.groups[:8]:
        ids = torch.from_numpy(np.concatenate([group.prompt, group.completions[0]]).astype(np.int64))
        with torch.no_grad():
            rows = slice(len(group.prompt) - 1, -1)
            p, q = (model(ids[None]).logits[0, rows].log_softmax(-1) for model in (policy, teacher))
        y = ids[len(group.prompt) :, None]
        gap = (p - q).gather(1, y)[:, 0]
        trusted = (-gap).exp().clamp(max=1)
        best = q.topk(8).indices
        own = q.gather(1, best)
        own = own.log_softmax(-1) if renormalise else own
        kl = (own.exp() * (own - p.gather(1, best))).sum(-1)
        total, tokens = total + (trusted * gap + (1 - trusted) * kl).sum().item(), tokens + len(y)
    assert found["stages"]["preference"]["start"]["loss"] == pytest.approx(total / tokens, rel=1e-4)
    metrics = found["stages"]["preference"]["metrics"]
    assert 0 < metrics["train/trusted"] < 1 and 0 < metrics["eval/trusted"] < 1
    again = chain_of("again", *asked).run()
    assert again["reference"]["misses"] == 0
    assert again["model"]["final_identity"] == found["model"]["final_identity"]


@pytest.mark.slow
def test_the_policy_as_its_own_teacher_stays(chain_of, tmp_path, tiny_model_folder):
    """The loss is what the rounding of two scorings leaves, and plain gradient descent moves nothing by more."""
    sgd = ["optim.name=sgd", "optim.lr=0.1"]
    stage = chain_of("run", *sgd, "adapter=none", teacher=tiny_model_folder).run()["stages"]["preference"]
    assert abs(stage["start"]["loss"]) < 1e-6 and abs(stage["metrics"]["eval/kl/teacher"]) < 1e-5
    ours, theirs = weights_of(tmp_path / "run"), load_file(tiny_model_folder / "model.safetensors")
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=0, atol=1e-6)


def test_more_likeliest_tokens_than_there_are_tokens(chain_of):
    with pytest.raises(UserError, match=r"^loss\.top_k=100000: the policy has \d+ tokens, so set no more\.$"):
        chain_of("run", "loss=tropd", "loss.top_k=100000")


@pytest.mark.slow
def test_a_teacher_may_be_a_run(chain_of, tmp_path, tiny_model_folder):
    """The folder of an adapter stands for its base with it; the same policy in 4 bits is another teacher."""
    chain_of("run").run()
    seen = {}
    for name, more in {"adapter": [], "nf4": ["distill.nf4=true"]}.items():
        found = chain_of(name, "trainer.max_steps=1", *more, teacher=tmp_path / "run" / "adapter").run()
        seen[name] = found["reference"]["identity"]
        assert abs(found["stages"]["preference"]["start"]["loss"]) > 1e-6
    assert seen["adapter"] != seen["nf4"]


def test_the_first_token_that_differs_is_named():
    """Also where it is no token of the teacher; more tokens of the teacher's are fine."""
    own = {"a": 0, "b": 1, "c": 2}
    require_same_tokens("t", own, own | {"d": 3})
    sentence = r"^distill\.teacher=t: 2 of the policy's 3 tokens are others to it; the first, 'b', is number 1 to the"
    with pytest.raises(UserError, match=sentence + r" policy and number 2 to the teacher: choose"):
        require_same_tokens("t", own, {"a": 0, "b": 2, "c": 1})
    with pytest.raises(UserError, match=sentence + r" policy and none of the teacher's: choose"):
        require_same_tokens("t", own, {"a": 0})


def test_a_teacher_with_other_tokens_is_refused_before_anything_is_loaded(
    chain_of, tmp_path, tiny_model_folder, teacher_folder, monkeypatch
):
    """The tokens, more embeddings than the teacher has, and a folder that is not there: one sentence each."""
    other = tmp_path / "other"
    shutil.copytree(tiny_model_folder, other)
    file = json.loads((other / "tokenizer.json").read_text())
    vocabulary = file["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[5:7]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(file))
    with pytest.raises(UserError, match=r"distill\.teacher=\S+: 2 of the policy's \d+ tokens .*number 5 .*number 6"):
        chain_of("run", teacher=other)
    small = tmp_path / "small"
    shutil.copytree(tiny_model_folder, small)
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] - 1}))
    with pytest.raises(
        UserError, match=r"it has \d+ embeddings and the policy \d+, so that the policy can write tokens"
    ):
        chain_of("run", teacher=small)
    with pytest.raises(UserError, match=r"^distill\.teacher: the folder /nowhere does not exist\.$"):
        chain_of("run", teacher=Path("/nowhere"))
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("distill.teacher=null", r"^loss opd needs distill\.teacher, a hub id or the folder of a model\.$"),
        ("onpolicy=none", r"^loss opd learns from answers that are drawn: set onpolicy=distill\.$"),
        (
            "onpolicy.temperature=0.8",
            r"^onpolicy\.temperature must be 1 for loss opd: only what the policy itself draws",
        ),
        ("onpolicy.mix_offline=0.5", r"^onpolicy\.mix_offline must be 0 for loss opd"),
        (
            "onpolicy.pairs.choice=gold_vs_sample",
            r"choice=gold_vs_sample and loss opd do not fit: .* set onpolicy=dist",
        ),
        ("loss=dpo", r"^onpolicy\.pairs\.choice=answers and loss dpo do not fit: choice answers is for losses with a"),
        ("reference=live", r"loss opd has its teacher as the reference, whose log-probs are kept: set reference=cache"),
        ("reference=sdpo", r"and so do rounds: leave them out"),
        (
            "loss=tropd loss.outliers=mask loss.renormalise=true",
            r"^loss\.renormalise has no effect with loss\.outliers=",
        ),
        ("stopping=asha", r"compares chosen with rejected answers, and loss opd has none: set stopping=none\.$"),
    ],
)
def test_what_does_not_fit_is_refused(given, sentence, tmp_path):
    """Before the run, in one sentence."""
    kept = settings(tmp_path, Path("model"), Path("teacher"))
    if given == "onpolicy=none":
        kept = [one for one in kept if not one.startswith("onpolicy")]
    with pytest.raises(UserError, match=sentence):
        load(*kept, *given.split())


def test_a_teacher_without_a_loss_that_draws_is_refused():
    with pytest.raises(UserError, match=r"distill\.teacher has no effect: only a loss that draws answers"):
        load("recipe=quickstart", "distill.teacher=somewhere")


def test_answers_for_a_teacher_are_rows_as_they_were_drawn():
    """Also cut, empty and repeated ones, which tell how likely they are; prompts of the held-out set are left out."""
    config = PairsConfig(
        choice=PairChoice.answers, min_margin=0, max_length_gap=None, drop_cut=DropCut.chosen, threshold=None
    )
    tokens = [np.array(one, dtype=np.int32) for one in ([5, 2], [5, 2], [2], [5, 6])]
    ends = [Finish.stop, Finish.stop, Finish.stop, Finish.length]
    answers = [Answer(one, -np.ones(len(one), np.float32), end) for one, end in zip(tokens, ends, strict=True)]
    drawn = Drawn(prompt=np.array([1], dtype=np.int32), answers=answers, texts=["a", "a", "", "ab"], question="Say a.")
    built = build([drawn], config)
    assert sorted(group.completions[0].tolist() for group in built.groups) == [[2], [5, 2], [5, 2], [5, 6]]
    assert {group.labels for group in built.groups} == {(True,)} and built.counts.kept == built.counts.drawn == 4
    assert {group.key(0) for group in built.groups} == built.logps.keys()
    assert not build([drawn], config, held_out=HeldOutPrompts(["Say a."])).groups
