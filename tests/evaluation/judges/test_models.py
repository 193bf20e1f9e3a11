"""Judges that are models: the policy's implicit reward, and a reward model in files."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import torch

from alignment.errors import UserError
from alignment.evaluation.judges.base import Item
from alignment.evaluation.judges.implicit import ImplicitJudge, implicit_rewards
from alignment.evaluation.judges.reward_model import RewardModelJudge, tokens
from alignment.types import Group, RaggedLogps

CPU = torch.device("cpu")


def ragged(*sequences) -> RaggedLogps:
    return RaggedLogps.from_sequences([torch.tensor(one) for one in sequences])


# The implicit reward


def ids(*numbers) -> np.ndarray:
    return np.array(numbers, dtype=np.int32)


def test_the_implicit_reward_by_hand():
    """Log-ratios of two answers, of two tokens and of one: the sum favours the first, the mean the second."""
    policy, reference = ragged([-1.0, -1.0], [-0.5]), ragged([-1.5, -2.0], [-1.5])
    assert implicit_rewards(policy, reference, mean=False).tolist() == [1.5, 1.0]
    assert implicit_rewards(policy, reference, mean=True).tolist() == [0.75, 1.0]
    with pytest.raises(ValueError, match="same tokens"):
        implicit_rewards(policy, ragged([-1.0], [-0.5]), mean=True)


def test_the_policy_judges_by_the_tokens_of_its_answers(tmp_path):
    """It is given groups, never texts; its two policies and its reduction are its identity. What it has said is kept by
    the tokens: another answer with the same text has a score of its own."""
    asked = []

    def logps(value, groups):
        asked.append(groups)
        return RaggedLogps.from_sequences([torch.full((len(g.completions[0]),), value) for g in groups])

    item = Item("p", ("long", "short"), group=Group(ids(1), (ids(2, 3, 4), ids(5))))

    def judge(mean, *identities):
        return ImplicitJudge(partial(logps, -1.0), partial(logps, -2.0), identities, mean, tmp_path)

    judges = [judge(mean, "a", "b") for mean in (False, True)]
    assert [judge.compare([item])[0].outcome for judge in judges] == [1, 0]
    assert judges[0].compare([item.swapped()])[0].outcome == -1
    assert [g.completions[0].tolist() for g in asked[0]] == [[2, 3, 4], [5]]
    assert len({one.identity for one in (*judges, judge(False, "a", "c"), judge(False, "c", "b"))}) == 4
    asked.clear()
    assert [one.score for one in judges[0].score([item.only(0), item.only(1)])] == [3.0, 1.0] and not asked
    again = Item("p", ("short",), group=Group(ids(1), (ids(6, 7),)))
    assert [one.score for one in judges[0].score([again])] == [2.0] and len(asked) == 2
    with pytest.raises(ValueError, match="with a group"):
        judges[0].score([Item("p", ("a",))])


# A reward model in files


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_model_folder):
    """Saves a tiny classifier with so many logits, whose pieces are made to tell them apart."""
    from transformers import AutoTokenizer, Qwen3ForSequenceClassification

    from tests.conftest import tiny_config

    def save(labels: int, **settings):
        folder = tmp_path_factory.mktemp("reward_model")
        tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
        torch.manual_seed(0)
        model = Qwen3ForSequenceClassification(tiny_config(len(tokenizer), num_labels=labels, pad_token_id=0))
        model.save_pretrained(folder, **settings)
        tokenizer.save_pretrained(folder)
        return folder, model.eval()

    return save


@pytest.mark.slow
@pytest.mark.parametrize("labels", [1, 2])
def test_a_reward_model_scores_its_template(labels, saved, tmp_path):
    """With the logit of one, or the second of two; a second run loads nothing."""
    folder, model = saved(labels)
    items = [Item("Which?", ("this one",)), Item("Which?", ("that",))]
    judge = RewardModelJudge(str(folder), tmp_path, CPU)
    found = [one.score for one in judge.score(items)]
    _, tokenizer = judge._loaded
    text = "<|im_start|>user\nWhich?<|im_end|>\n<|im_start|>assistant\nthis one<|im_end|>\n"
    assert tokens(tokenizer, items[0]) == tokenizer(text)["input_ids"]
    with torch.no_grad():
        logits = [model(torch.tensor([tokens(tokenizer, item)])).logits[0, labels - 1].item() for item in items]
    assert found == pytest.approx(logits) and found[0] != found[1]

    again = RewardModelJudge(str(folder), tmp_path, CPU)
    assert [one.score for one in again.score(items)] == found and again._loaded is None
    (folder / "extra.json").write_text("{}")
    assert RewardModelJudge(str(folder), tmp_path, CPU).identity != judge.identity


@pytest.mark.slow
def test_a_text_that_ends_with_the_token_that_pads(saved, tmp_path):
    """It is scored where it ends, not where something else than padding stands last."""
    item = Item("Which?", ("this one",))
    folder, _ = saved(1)
    judge = RewardModelJudge(str(folder), tmp_path, CPU)
    [right] = judge.score([item])
    config = json.loads((folder / "config.json").read_text())
    config["pad_token_id"] = tokens(judge._loaded[1], item)[-1]
    (folder / "config.json").write_text(json.dumps(config))
    again = RewardModelJudge(str(folder), tmp_path, CPU)
    assert again.identity != judge.identity and again.score([item])[0].score == right.score


class Tokenizer:
    """A template and a tokenizer that both write a BOS."""

    bos_token_id = 1
    chat_template = "some"

    def apply_chat_template(self, turns, tokenize):
        return "\x01" + "".join(turn["content"] for turn in turns)

    def __call__(self, text, answer=""):
        return {"input_ids": [1, *(ord(sign) for sign in text + answer)]}


def test_a_doubled_bos_is_one():
    """Whoever writes it; a pair of texts without template has the tokenizer's own."""
    tokenizer = Tokenizer()
    assert tokens(tokenizer, Item("\x02", ("\x03",))) == [1, 2, 3]
    tokenizer.chat_template = None
    assert tokens(tokenizer, Item("\x02", ("\x03",))) == [1, 2, 3]


def test_what_is_no_reward_model_is_refused_before_the_run(tmp_path):
    """No folder, or weights that may run code."""
    with pytest.raises(UserError, match=r"evaluation.reward_model=nobody/nothing is no folder, and the hub"):
        RewardModelJudge("nobody/nothing", tmp_path, CPU)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match=r"has no \*.safetensors"):
        RewardModelJudge(str(tmp_path), tmp_path, CPU)
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "none"}))
    with pytest.raises(UserError, match="cannot be loaded as a sequence classification model"):
        RewardModelJudge(str(tmp_path), tmp_path, CPU).score([Item("p", ("a",))])


@pytest.mark.slow
def test_a_model_of_more_scores_is_refused(saved, tmp_path):
    """Nobody knows which of them is the reward."""
    folder, _ = saved(3)
    with pytest.raises(UserError, match="has 3 scores"):
        RewardModelJudge(str(folder), tmp_path, CPU).score([Item("p", ("a",))])


@pytest.mark.slow
def test_an_adapter_with_its_head_scores_as_it_was_trained(saved, tmp_path):
    """As a reward model that was trained here is saved; its base counts for its identity, too."""
    from peft import LoraConfig, get_peft_model

    base, model = saved(1)
    settings = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"], modules_to_save=["score"])
    adapted = get_peft_model(model, settings).eval()
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                weight.normal_()
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    for file in base.glob("tok*"):
        (tmp_path / "adapter" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "adapter" / "chat_template.jinja").write_bytes((base / "chat_template.jinja").read_bytes())
    judge = RewardModelJudge(str(tmp_path / "adapter"), tmp_path, CPU)
    [found] = judge.score([Item("Which?", ("this one",))])
    _, tokenizer = judge._loaded
    with torch.no_grad():
        ids = torch.tensor([tokens(tokenizer, Item("Which?", ("this one",)))])
        assert found.score == pytest.approx(adapted(input_ids=ids).logits[0, 0].item())
    assert any(name.startswith("base/") for name in judge.description()["files"])
