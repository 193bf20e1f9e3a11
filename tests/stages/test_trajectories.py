"""Answers of several turns with calls of tools, from rows to the loss, and through whole runs."""

import copy
import json

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from alignment.config.compose import as_plain, compose_node, register, to_run_config
from alignment.config.compose import load as load_config
from alignment.data.conversations.trajectories import readable
from alignment.data.layouts.recognition import recognise, to_row
from alignment.data.tokens.tokenization import tokenize_groups
from alignment.kernels.attention import enable_shared_prompts
from alignment.scoring.layout import FlatLayout, SharedLayout
from alignment.stages.chain import Chain
from tests.conftest import recommended_loss
from tests.helpers.chat_templates import published
from tests.helpers.commands import write_lines
from tests.helpers.policies import load
from tests.helpers.steps import make_trainer, moved, sequence_logp, step_gradient

ADD = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}


def task(number, calls=True):
    """A pair of trajectories: one calls a tool, or asks back, and the other does not."""
    question = [{"role": "user", "content": f"Add 2 to {number}."}]
    middle = [{"role": "assistant", "content": "", "tool_calls": [ADD]}, {"role": "tool", "content": f"{number + 2}"}]
    if not calls:
        middle = [{"role": "assistant", "content": "To what?"}, {"role": "user", "content": f"To {number}!"}]
    end = [{"role": "assistant", "content": f"{number + 2}."}]
    return {"chosen": [*question, *middle, *end], "rejected": [*question, {"role": "assistant", "content": "Many."}]}


LENGTHS = ("data.system=null", "data.max_length=512", "data.max_prompt_length=256")
CONFIG = load_config("recipe=quickstart", "sft=none", "tracking=none", *LENGTHS).data
HEAD = "<|im_start|>assistant\n"
CALLED = '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>'
BY_HAND = {
    True: [(CALLED, 1), ("\n<|im_start|>user\n<tool_response>\n9\n</tool_response><|im_end|>\n" + HEAD, 0)],
    False: [("To what?<|im_end|>", 1), ("\n<|im_start|>user\nTo 7!<|im_end|>\n" + HEAD, 0)],
}


@pytest.mark.parametrize("layout", ["flat", "shared"])
def test_the_loss_of_trajectories_by_hand(tiny_model_folder, tmp_path, layout):
    """DPO of a tool's and a talk's pair from full logits, with the text and its scored spans written out here."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    tokenizer.chat_template = published("qwen2_5")
    rows = [task(7, calls) for calls in BY_HAND]
    known = recognise(rows, {}, "preference", "f")
    data = tokenize_groups([to_row(row, known, {}, "f", 1) for row in rows], tokenizer, CONFIG)
    assert data.counts["several_turns"] == 2

    def pieces(parts):
        ids = [(tokenizer(text, add_special_tokens=False)["input_ids"], scored) for text, scored in parts]
        return [i for part, _ in ids for i in part], [bool(scored) for part, scored in ids for _ in part]

    model = load(tiny_model_folder).requires_grad_(True)
    start = copy.deepcopy(model.state_dict())
    if layout == "shared":
        enable_shared_prompts(model)
    loss = recommended_loss("dpo")
    trainer = make_trainer(
        model, data.groups, loss, tmp_path, layout=FlatLayout() if layout == "flat" else SharedLayout()
    )
    moved(model)
    found, _ = step_gradient(trainer, data.groups)
    system = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    prompt, _ = pieces([(f"{system}<|im_start|>user\nAdd 2 to 7.<|im_end|>\n{HEAD}", 0)])
    sides = [[[*middle, ("9.<|im_end|>", 1)], [("Many.<|im_end|>", 1)]] for middle in BY_HAND.values()]

    def sums():
        texts = [(ids, np.array(mask)) for both in sides for ids, mask in map(pieces, both)]
        with torch.no_grad():
            return [sequence_logp(model, prompt, ids, mask).sum() for ids, mask in texts]

    now = torch.stack(sums())
    model.load_state_dict(start)
    ratios = (now - torch.stack(sums())).view(-1, 2)
    expected = -torch.nn.functional.logsigmoid(loss.beta * (ratios[:, 0] - ratios[:, 1])).mean()
    assert ratios.abs().min() > 1e-3
    assert found == pytest.approx(expected.item(), rel=1e-4)


def test_a_conversation_for_people():
    """With its roles and calls; a single question stands for itself."""
    assert (
        readable("Why?")
        == readable([{"role": "system", "content": "s"}, {"role": "user", "content": "Why?"}])
        == "Why?"
    )
    assert readable(task(7)["chosen"]) == 'user: Add 2 to 7.\n\nassistant: add({"a": 2})\n\ntool: 9\n\nassistant: 9.'


@pytest.mark.matrix
def test_whole_runs_on_trajectories(tiny_model_folder, tmp_path):
    """DPO with a cached reference, then IPO, which finds all of it; answers are to the prompts that pairs share."""
    write_lines(tmp_path / "pairs.jsonl", [task(number, number % 2) for number in range(10)])
    (tmp_path / "tools.jinja").write_text(published("qwen2_5"))
    register()
    summaries = []
    for loss in ("dpo", "ipo"):
        node = compose_node(
            [
                "recipe=quickstart", "sft=none", f"loss={loss}", "tracking=none", "adapter.r=4",
                f"model.name={tiny_model_folder}", f"model.chat_template={tmp_path / 'tools.jinja'}",
                f"reference.path={tmp_path / 'cache'}",
                f"data.source={tmp_path / 'pairs.jsonl'}", "data.eval_source=null", "data.eval_size=2",
                *LENGTHS, "data.limit=null", "data.eval_limit=null", "optim.lr=1e-2", "trainer.max_steps=2",
                "trainer.groups_per_step=4",
                "evaluation.prompts=2", "evaluation.max_new_tokens=4", "evaluation.judge=none",
                "evaluation.kl_prompts=0",
            ]
        )  # fmt: skip
        folder = tmp_path / loss
        summaries.append(Chain(to_run_config(node), folder, "quickstart", as_plain(node)).run())
        samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        assert all(sample["prompt"].startswith("Add 2 to ") for sample in samples)
    first, second = (summary["reference"] for summary in summaries)
    assert (first["hits"], second["misses"]) == (0, 0)
    assert first["misses"] == second["hits"] == 20
    assert summaries[0]["data"]["preference"]["tokens"]["several_turns"] == 10
    assert summaries[0]["stages"]["preference"]["start"]["loss"] == pytest.approx(0.693147, abs=1e-4)
