"""A reward model: its rewards by the book, its head's precision and seed, and what others load of what is saved."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig
from trl import RewardConfig, RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference

from alignment.config.compose import load as compose
from alignment.config.schema import Dtype
from alignment.data.conversations.ends import turn_end
from alignment.data.rows.row import Row
from alignment.data.tokens.tokenization import tokenize_groups
from alignment.errors import UserError
from alignment.policy.adapter import attach_adapter, load_adapter
from alignment.policy.identity import policy_identity
from alignment.policy.load import load_tokenizer
from alignment.policy.merge import export_merged
from alignment.policy.reward_model import (
    attach_reward_head,
    load_reward_weights,
    put_reward_head,
    require_classifier,
    rewards_of_texts,
    save_trained,
    with_padding,
)
from alignment.scoring.ends import EndsLayout
from alignment.scoring.layout import FlatLayout, ForkedLayout, SharedLayout
from alignment.scoring.prompt_sharing import choose_layout
from tests.conftest import each, random_groups, recommended_loss, tiny_config, tiny_policy
from tests.helpers.families import FAMILIES, write_model
from tests.helpers.policies import CPU, NF4, adapter, load
from tests.helpers.steps import make_trainer, moved
from tests.helpers.trl_stubs import bare

TURN = ({"role": "user"}, {"role": "assistant"})
TEXTS = [("Add 2 and 3", "5.", "Perhaps 6, or not"), ("Name a colour", "Red is one of them.", "No")]


@pytest.fixture(scope="module")
def tokenizer(tiny_model_folder):
    return load_tokenizer(compose("recipe=quickstart").model, str(tiny_model_folder))


@pytest.fixture(scope="module")
def settings():
    return compose("recipe=quickstart", "data.system=null")


def conversation(prompt, answer):
    return [turn | {"content": text} for turn, text in zip(TURN, (prompt, answer), strict=True)]


def reward_model(folder, quantization=None, whole=False, **options):
    """One of a tiny model, moved as by training."""
    config = None if whole else adapter(r=4, alpha=8, **options)
    model = attach_adapter(load(folder, quantization), config, 0)
    attach_reward_head(model, seed=3)
    moved(model)
    return model.eval()


def rewards_by_others(model, tokenizer, texts):
    """Of a batch that a tokenizer has padded."""
    batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**{key: batch[key] for key in ("input_ids", "attention_mask")}).logits[:, 0]


# Rewards


@pytest.mark.parametrize("layout", ["flat", "shared", "forked"])
def test_a_reward_is_the_heads_number_at_the_last_token(layout):
    """In every layout, of completions of one token and of many, whatever mask of scored tokens they have."""
    model = tiny_policy(torch.float64, trained=True)
    attach_reward_head(model, seed=0)
    moved(model)
    groups = random_groups(4, k=3, seed=5)
    groups[1] = replace(groups[1], scored=tuple(np.arange(len(c)) == 0 for c in groups[1].completions))
    layouts = {"flat": FlatLayout(), "shared": SharedLayout(), "forked": ForkedLayout(least_gain=0)}
    if layout != "flat":
        choose_layout(model, CPU)  # the model takes shared rows from now on
    trainer = make_trainer(model, groups, recommended_loss("bradley_terry"), "unused", 200, layout=layouts[layout])
    found = trainer.objective.collect(groups, 200).logps
    texts = [np.concatenate([group.prompt, tokens]) for group in groups for tokens in group.completions]
    base = model.get_base_model()
    with torch.no_grad():
        hidden = [base.model(input_ids=torch.tensor(text)[None].long()).last_hidden_state[0, -1] for text in texts]
        expected = torch.stack([base.score(state)[0] for state in hidden])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert len(found) == 12 and found.std() > 0.01


def test_what_the_template_writes_after_the_end_is_read_and_a_cut_answer_ends_where_it_was_cut():
    """A line break follows the end of turn in ChatML, and other programs score at it."""
    layout = EndsLayout(FlatLayout(), (7, 8))
    ended, cut = np.array([3, 7], dtype=np.int32), np.array([3, 5], dtype=np.int32)
    assert layout.whole(ended).tolist() == [3, 7, 8]
    assert layout.whole(cut).tolist() == [3, 5]
    assert EndsLayout(FlatLayout()).whole(ended).tolist() == [3, 7]


def test_the_end_of_a_turn_has_all_that_the_template_writes(tokenizer, settings):
    """The end token comes first, the line break after it."""
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert turn_end(tokenizer, settings.data) == (end, *tokenizer("\n", add_special_tokens=False)["input_ids"])


def test_rewards_are_not_log_probs_to_the_metrics(tmp_path):
    """The metrics of an evaluation are rewards, lengths of whole completions and calibration, and no log-probs."""
    model = tiny_policy(trained=True)
    groups = random_groups(30, seed=2)
    trainer = make_trainer(model, groups, recommended_loss("bradley_terry"), tmp_path, eval_groups=groups)
    found = trainer.held_out_metrics(groups)
    assert not [name for name in found if name.startswith(("logps", "ranking", "nats", "kl"))]
    assert found["lengths/chosen"] == np.mean([len(group.completions[0]) for group in groups])
    assert found["rewards/mean"] == pytest.approx((found["rewards/chosen"] + found["rewards/rejected"]) / 2)
    assert 0 < found["rewards/calibration_error"] < 1


# The head


def test_the_head_is_seeded_and_a_part_of_the_identity(tiny_model_folder):
    """The same seed gives the same head, whatever was drawn before; another head is another policy."""
    identities = []
    for seed, drawn in ((3, 0), (3, 1), (4, 0)):
        torch.manual_seed(drawn)
        model = attach_adapter(load(tiny_model_folder), adapter(r=4, alpha=8), 0)
        attach_reward_head(model, seed)
        identities.append(policy_identity(model)[0])
    assert identities[0] == identities[1] != identities[2]
    with torch.no_grad():
        model.get_base_model().score.modules_to_save["default"].weight += 1e-3
    assert policy_identity(model)[0] != identities[2]


@pytest.mark.parametrize("quantization", [None, NF4], ids=["bf16", "nf4"])
def test_the_head_stays_in_fp32(quantization, tiny_model_folder):
    """On a base of 16 bits, and on one of 4, it is neither rounded nor quantised, and its rewards are fp32."""
    model = attach_adapter(load(tiny_model_folder, quantization, Dtype.bfloat16), adapter(r=4, alpha=8), 0)
    attach_reward_head(model, seed=0)
    head = model.get_base_model().score.modules_to_save["default"]
    assert type(head) is torch.nn.Linear and head.weight.dtype == torch.float32 and head.weight.requires_grad
    assert rewards_of_texts(model, [np.arange(5)], CPU).dtype == torch.float64
    ids = torch.arange(5)[None]
    assert model(input_ids=ids, score_positions=ids[0, -1:], targets=ids[0, -1:]).dtype == torch.float32


# Files


@pytest.mark.parametrize(
    "kind", ["adapter", "nf4", "whole", "tied tokens", pytest.param("dora", marks=pytest.mark.slow)]
)
def test_others_load_what_is_saved_and_give_the_same_rewards(kind, tiny_model_folder, tokenizer, tmp_path):
    """transformers and peft alone, on a padded batch of texts that the chat template has written; the base of an NF4
    policy is quantised by them, too."""
    options = {"tied tokens": {"trainable_tokens": [3]}, "dora": {"kind": "dora"}}.get(kind, {})
    model = reward_model(tiny_model_folder, NF4 if kind == "nf4" else None, kind == "whole", **options)
    save_trained(model, tokenizer, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    texts = [theirs.apply_chat_template(conversation(p, a), tokenize=False) for p, *both in TEXTS for a in both]
    texts.append(texts[0][: len(texts[0]) // 2])  # cut

    if kind == "whole":
        others = AutoModelForSequenceClassification.from_pretrained(tmp_path)
        assert others.config.num_labels == 1 and others.config.pad_token_id == theirs.pad_token_id
    else:
        packed = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "load_in_4bit": True}
        quantised = {"quantization_config": BitsAndBytesConfig(**packed), "device_map": "cpu", "dtype": torch.float32}
        base = AutoModelForSequenceClassification.from_pretrained(
            tiny_model_folder,
            num_labels=1,
            pad_token_id=theirs.pad_token_id,
            **(quantised if kind == "nf4" else {}),
        )
        for module in base.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):  # its packing fails at weights as narrow as these
                module.support_avx512bf16_for_cpu = False
        others = PeftModel.from_pretrained(base, tmp_path)
        assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"

    ids = [np.array(theirs(text, add_special_tokens=False)["input_ids"]) for text in texts]
    expected = rewards_of_texts(model, ids, CPU).float()
    found = rewards_by_others(others, theirs, texts)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert expected.std() > 1e-3


def test_transformers_alone_loads_the_adapter_by_its_folder(tiny_model_folder, tokenizer, tmp_path):
    """As a judge does that is given a folder and knows nothing of it."""
    model = reward_model(tiny_model_folder)
    save_trained(model, tokenizer, tmp_path)
    others = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, num_labels=1, pad_token_id=tokenizer.pad_token_id
    )
    text = np.array(tokenizer("a text\n", add_special_tokens=False)["input_ids"])
    with torch.no_grad():
        found = others.eval()(input_ids=torch.from_numpy(text)[None]).logits[0]
    torch.testing.assert_close(found, rewards_of_texts(model, [text], CPU).float(), rtol=0, atol=1e-6)


def test_trl_gives_the_same_loss_with_what_is_saved(tiny_model_folder, tokenizer, settings, tmp_path):
    """Its RewardTrainer with its padded batch, on the texts as the template writes them, is our loss on the groups."""
    model = reward_model(tiny_model_folder)
    rows = [Row(*_as_row(texts), source=f"row {i}") for i, texts in enumerate(TEXTS)]
    groups = list(tokenize_groups(rows, tokenizer, settings.data).groups)
    trainer = make_trainer(model, groups, recommended_loss("bradley_terry"), tmp_path)
    for part in (trainer.objective, trainer.passes):
        part._layout = EndsLayout(FlatLayout(), turn_end(tokenizer, settings.data))
    ours = trainer.held_out_metrics(groups)

    save_trained(model, tokenizer, tmp_path / "saved")
    base = AutoModelForSequenceClassification.from_pretrained(
        tiny_model_folder, num_labels=1, pad_token_id=tokenizer.pad_token_id
    )
    others = PeftModel.from_pretrained(base, tmp_path / "saved").eval()
    texts = [[tokenizer.apply_chat_template(conversation(p, a), tokenize=False) for a in both] for p, *both in TEXTS]
    ids = [tokenizer(pair, add_special_tokens=False)["input_ids"] for pair in texts]
    batch = DataCollatorForPreference(tokenizer.pad_token_id)([{"chosen_ids": c, "rejected_ids": r} for c, r in ids])
    theirs = bare(RewardTrainer, RewardConfig, model=others.train(), center_rewards_coefficient=0.01)
    loss = theirs.compute_loss(others, batch)
    assert loss.item() == pytest.approx(ours["loss"], rel=1e-5)
    assert theirs._metrics["train"]["margin"][0] == pytest.approx(ours["rewards/margins"], rel=1e-4)


def _as_row(texts):
    prompt, *answers = texts
    return [TURN[0] | {"content": prompt}], tuple([TURN[1] | {"content": answer}] for answer in answers)


@pytest.mark.parametrize("whole", [False, True], ids=["adapter", "whole"])
def test_a_saved_reward_model_is_loaded_again_as_it_was(whole, tiny_model_folder, tokenizer, tmp_path):
    """By a run that goes on after its last stage: the same identity, and the same rewards."""
    model = reward_model(tiny_model_folder, whole=whole)
    save_trained(model, tokenizer, tmp_path)
    again = load(tiny_model_folder)
    put_reward_head(again)
    if whole:
        again = attach_adapter(again, None, 0)
        load_reward_weights(again, tmp_path)
    else:
        again = load_adapter(again, tmp_path)
    text = [np.arange(9)]
    assert rewards_of_texts(again.eval(), text, CPU).tolist() == rewards_of_texts(model, text, CPU).tolist()
    if not whole:  # of a whole one the test has moved the head for words, which is not saved
        assert policy_identity(again)[0] == policy_identity(model)[0]


def test_the_merged_model_gives_the_same_rewards(tiny_model_folder, tokenizer, settings, tmp_path):
    """Base, adapter and head as one classification model, checked as it is written."""
    config = replace(settings, model=replace(settings.model, name=str(tiny_model_folder)))
    model = reward_model(tiny_model_folder)
    texts = [np.arange(3, 12), np.arange(20, 50)]
    found = export_merged(model, tokenizer, tmp_path / "merged", config, str(tiny_model_folder), CPU, texts)
    assert found["max_reward_difference"] < 1e-5
    others = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        rewards = torch.cat([others(input_ids=torch.from_numpy(text)[None]).logits[:, 0] for text in texts])
    torch.testing.assert_close(rewards, rewards_of_texts(model, texts, CPU).float(), rtol=0, atol=1e-5)


# Padding


NO_BREAK = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize(("template", "kept"), [("as it is", True), (NO_BREAK, False), (None, False)])
def test_a_text_never_ends_with_padding(template, kept, tiny_model_folder, tokenizer, tmp_path):
    """The tokenizer pads with its end of turn. Where texts end with that token, another one pads, or the reward would
    be that of the token before it; where a line break follows it, everything stays as the model has it."""
    own = AutoTokenizer.from_pretrained(tiny_model_folder)
    assert own.pad_token == own.eos_token == "<|im_end|>"
    if template != "as it is":
        own.chat_template = template
    assert (with_padding(own) is own) == kept
    model = reward_model(tiny_model_folder, whole=True)
    save_trained(model, own, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.pad_token == "<|im_end|>") == kept
    assert own.pad_token == "<|im_end|>", "the run's own tokenizer is left alone"

    if template is None:
        texts = [f"{prompt} {answer}<|im_end|>" for prompt, answer, _ in TEXTS]
    else:
        texts = [own.apply_chat_template(conversation(p, a), tokenize=False) for p, a, _ in TEXTS]
    ids = [np.array(own(text, add_special_tokens=False)["input_ids"]) for text in texts]
    others = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    found = rewards_by_others(others, theirs, texts)
    torch.testing.assert_close(found, rewards_of_texts(model, ids, CPU).float(), rtol=0, atol=1e-6)
    if not kept:
        others.config.pad_token_id = own.pad_token_id
        assert (rewards_by_others(others, own, texts) - found).abs().min() > 1e-4


# Families


def test_a_family_without_a_classification_class_is_refused(settings):
    """In one sentence, before any weights are loaded."""
    from transformers import AutoConfig

    with pytest.raises(UserError, match=r"a mamba2, cannot be: transformers has no such class for it; choose a model"):
        require_classifier(AutoConfig.for_model("mamba2"), settings.model, "bradley_terry")
    require_classifier(tiny_config(), settings.model, "bradley_terry")


BY_TITLE = {family.title: family for family in FAMILIES}


@pytest.mark.slow
@pytest.mark.parametrize("title", each(list(BY_TITLE), [family.title for family in FAMILIES if family.core]))
def test_every_family_is_loaded_by_others_or_refused(title, settings, tokenizer, tmp_path):
    """Its classification class gives the rewards that we give, with an adapter and whole."""
    config = BY_TITLE[title].config()
    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        with pytest.raises(UserError, match="has no such class for it"):
            require_classifier(config, settings.model, "bradley_terry")
        return
    require_classifier(config, settings.model, "bradley_terry")
    folder = write_model(BY_TITLE[title], tmp_path / "base")
    model = attach_adapter(load(folder, attention="eager"), adapter(r=4, target_modules=["auto"]), 0)
    attach_reward_head(model, seed=3)
    moved(model)
    text = np.arange(2, 30)
    save_trained(model, tokenizer, tmp_path / "adapter")
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, attn_implementation="eager")
    base.config.get_text_config().pad_token_id = None
    others = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        found = others(input_ids=torch.from_numpy(text)[None]).logits[0]
    expected = rewards_of_texts(model.eval(), [text], CPU).float()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
