"""Policies on one base: each computes what it computes alone, and the base is in memory once."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from peft import BOFTConfig, LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from alignment.chat.opening import open_guests
from alignment.chat.speaker import Memory, Speaker, Weights
from alignment.config.compose import load as compose
from alignment.errors import UserError
from alignment.policy.adapter import attach_adapter
from alignment.policy.load import load_tokenizer, save_policy
from alignment.types import Group
from tests.helpers.adapter_options import OPTIONS, start_sources
from tests.helpers.chats import write_adapter
from tests.helpers.policies import CPU, NF4, adapter, load, scores

PROMPT, ANSWER = np.array([7, 8, 9], np.int32), np.array([3, 4, 5, 6], np.int32)


def alone(model, adapter=None):
    """Log-probs of the answer by transformers and peft alone, from whole logits."""
    found = AutoModelForCausalLM.from_pretrained(model)
    if adapter is not None:
        found = PeftModel.from_pretrained(found, adapter)
    ids = torch.from_numpy(np.concatenate([PROMPT, ANSWER]).astype(np.int64))
    with torch.no_grad():
        logits = found(input_ids=ids[None]).logits[0, len(PROMPT) - 1 : -1].double()
    return logits.log_softmax(-1).gather(1, ids[len(PROMPT) :, None]).squeeze(1).numpy()


@pytest.fixture(scope="module")
def adapters(tiny_model_folder, tmp_path_factory):
    """LoRAs of other ranks and layers, and one of another kind."""
    root = tmp_path_factory.mktemp("adapters")
    other = LoraConfig(r=2, target_modules=["down_proj", "q_proj"], use_dora=True)
    return [
        write_adapter(tiny_model_folder, root / "one", 1),
        write_adapter(tiny_model_folder, root / "two", 2, settings=other),
        write_adapter(tiny_model_folder, root / "three", 3, settings=BOFTConfig(target_modules=["q_proj"])),
    ]


def test_adapters_take_turns_on_one_base(tiny_model_folder, adapters):
    one, two, _ = adapters
    guests = open_guests([str(one), str(two)], "start", ["device=cpu"])
    first, second = guests.speakers
    bases = [pair[1] for pair in guests.pairs]
    expected = {first: alone(tiny_model_folder, one), second: alone(tiny_model_folder, two)}
    expected |= {base: alone(tiny_model_folder) for base in bases}
    assert (
        min(np.abs(a - b).max() for a, b in combinations([expected[who] for who in (first, second, bases[0])], 2))
        > 0.01
    )
    for speaker in (first, second, bases[0], first, bases[1], second, bases[0]):
        np.testing.assert_allclose(speaker.logps(PROMPT, ANSWER), expected[speaker], atol=2e-5)
    assert first.memory is second.memory and len(first.memory._bases) == 1


def test_an_adapter_of_another_kind_has_a_base_of_its_own(tiny_model_folder, adapters):
    one, _, three = adapters
    guests = open_guests([str(one), str(three)], "start", ["device=cpu"])
    for speaker, folder in zip(guests.speakers, (one, three), strict=True):
        np.testing.assert_allclose(speaker.logps(PROMPT, ANSWER), alone(tiny_model_folder, folder), atol=2e-5)
    assert len(guests.speakers[0].memory._bases) == 2
    np.testing.assert_allclose(guests.pairs[1][1].logps(PROMPT, ANSWER), alone(tiny_model_folder), atol=2e-5)


@pytest.mark.parametrize("quantization", [None, NF4], ids=["float", "nf4"])
def test_an_adapter_that_began_with_a_part_of_its_base(quantization, tiny_model_folder, tmp_path):
    """PiSSA: what was trained speaks, beside the whole base. In 4 bits the base rounds otherwise without that part."""
    sources = start_sources(tiny_model_folder, tmp_path)
    trained = attach_adapter(load(tiny_model_folder, quantization), adapter(**OPTIONS["pissa"]), 0, sources)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    group = [Group(PROMPT, (ANSWER,))]
    expected = scores(trained, group).numpy(), scores(load(tiny_model_folder, quantization), group).numpy()
    settings = compose("recipe=quickstart").model
    save_policy(trained, load_tokenizer(settings, str(tiny_model_folder)), tmp_path / "adapter")
    base = Weights(str(tiny_model_folder), settings, quantization, None)
    memory = Memory(CPU, tmp_path)
    found = [
        Speaker("it", None, memory, weights).logps(PROMPT, ANSWER)
        for weights in (replace(base, adapter=tmp_path / "adapter"), base)
    ]
    assert np.abs(expected[0] - expected[1]).max() > 0.01
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    assert len(memory._bases) == (1 if quantization is None else 2)


def test_whole_models_and_a_base_that_is_a_policy_too(tiny_model_folder, adapters):
    guests = open_guests([str(adapters[0]), str(tiny_model_folder)], "start", ["device=cpu"])
    assert guests.pairs[1] is None, "a plain model began with nothing that is known"
    np.testing.assert_allclose(guests.speakers[1].logps(PROMPT, ANSWER), alone(tiny_model_folder), atol=2e-5)
    guests.load()
    assert len(guests.speakers[0].memory._bases) == 1
    [speaker] = open_guests([str(tiny_model_folder)], "start", ["device=cpu"]).speakers
    assert isinstance(speaker.memory, Memory)


def test_who_meets_whom(tiny_model_folder, adapters):
    def names(*words, against="start"):
        return [speaker.name for speaker in open_guests([str(word) for word in words], against, []).speakers]

    one, two, _ = adapters
    assert names(one) == ["one", "base"] and names(one, against="none") == ["one"]
    assert names(one, two) == ["one", "two"] and names(one, one) == ["one #1", "one #2"]
    assert names(tiny_model_folder) == [tiny_model_folder.name]
    with pytest.raises(UserError, match="has no policy after SFT"):
        names(one, against="sft")
    with pytest.raises(UserError, match="There is no folder outputs/quickstart/nine"):
        names("outputs/quickstart/nine")


def test_a_prompt_is_what_the_template_makes_of_the_conversation(tiny_model_folder):
    [speaker] = open_guests([str(tiny_model_folder)], "none", ["device=cpu"]).speakers
    messages = [
        {"role": "system", "content": "Be."},
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    tokenizer = speaker.questions.tokenizer
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages) + "<|im_start|>assistant\n"
    assert tokenizer.decode(speaker.prompt(messages)) == text
    assert tokenizer.decode(speaker.prompt(messages[1:])) == text.partition("Be.<|im_end|>\n")[2]
    tokenizer.chat_template = None
    assert tokenizer.decode(speaker.prompt(messages)) == "three", "without a template the text goes on"
    tokenizer.chat_template = "{{ raise_exception('no system texts') }}"
    with pytest.raises(UserError, match="cannot be asked this: the chat template refuses it: no system texts"):
        speaker.prompt(messages)


def test_a_conversation_that_is_too_long_is_refused(tiny_model_folder):
    from tests.helpers.chats import SHORT

    [speaker] = open_guests([str(tiny_model_folder)], "none", ["device=cpu"]).speakers
    assert isinstance(speaker, Speaker)
    with pytest.raises(UserError, match=r"has 1020 tokens and an answer up to 6, and .* reads 1024: lower max_new"):
        speaker.answer(np.ones(1020, np.int32), 0, SHORT.sampling((3,)), lambda rows, tokens: None)
