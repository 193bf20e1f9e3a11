"""Texts that share their beginnings have the same tokens as when each is tokenised whole."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from alignment.data.tokens.encoding import BatchEncoder

PIECES = ("<a>", "<b>", "<c>", "<ab>", "<", "a", "b", "ab", " ", "  ", "\n", ">", "x")


def tokenizer(tokens: list[AddedToken], kind: str) -> PreTrainedTokenizerFast:
    """One token per character, but for the merges "ab" and two marks of a word; `kind` says how a word is marked."""
    characters = ["<", ">", "a", "b", "c", "x", " ", "\n", "▁", "?"]
    vocabulary = {token: i for i, token in enumerate([*characters, "ab", "▁▁", "▁a"])}
    backend = Tokenizer(models.BPE(vocabulary, [("a", "b"), ("▁", "▁"), ("▁", "a")], unk_token="?"))
    if kind == "first word":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    if kind == "every part":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.add_tokens(tokens)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize("kind", ["plain", "first word", "every part"])
@pytest.mark.parametrize(
    "traits", [{}, {"lstrip": True}, {"rstrip": True}, {"single_word": True}, {"normalized": True}], ids=str
)
def test_texts_with_a_shared_beginning_have_the_tokens_of_whole_texts(kind: str, traits: dict[str, bool]) -> None:
    """For tokenizers that mark words in each way, and added tokens that look at their neighbours in each way."""
    given = {"normalized": False, "special": True} | traits
    made = tokenizer([AddedToken(name, **given) for name in ("<a>", "<b>", "<ab>")], kind)
    drawn = random.Random(0)
    texts = []
    for _ in range(150):
        prompt = "".join(drawn.choices(PIECES, k=drawn.randrange(1, 9)))
        texts += [prompt, *(prompt + "".join(drawn.choices(PIECES, k=5)) for _ in range(2))]
    encoder = BatchEncoder(made)
    assert [list(ids) for ids in encoder.encode(texts)] == [
        made(t, add_special_tokens=False)["input_ids"] for t in texts
    ]
    assert encoder.shares  # it has not fallen back


def test_a_prompt_is_tokenised_once_for_its_completions(qwen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tokenizer is given: the prompt's parts up to its last special token, and what follows it, each once."""
    encoder = BatchEncoder(qwen)
    list(encoder.encode(["<|im_start|>x<|im_start|>"]))
    given: list[str] = []

    class Backend:
        def __getattr__(self, name: str) -> Any:
            return getattr(qwen.backend_tokenizer, name)

        def encode_batch_fast(self, texts: list[str], **kwargs: Any) -> Any:
            given.extend(texts)
            return qwen.backend_tokenizer.encode_batch_fast(texts, **kwargs)

    monkeypatch.setattr(encoder, "_backend", Backend())
    start, end = "<|im_start|>assistant\n", "<|im_end|>\n"
    prompts = [f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{x}{end}{start}" for x in ("Hi", "Ho")]
    list(encoder.encode([text for prompt in prompts for text in (prompt, f"{prompt}Yes", f"{prompt}No")]))
    first, second = ([f"<|im_start|>user\n{question}"] for question in ("Hi", "Ho"))
    assert given == ["<|im_start|>system\nBe brief.", end, *first, start, f"{start}Yes", f"{start}No", *second]


def test_a_tokenizer_of_another_mind_gets_whole_texts(qwen: Any, caplog: pytest.LogCaptureFixture) -> None:
    """One that does more than its fast part, as those in models' own code may, is asked itself; the log says so."""

    class Own(PreTrainedTokenizerFast):
        def __call__(self, texts: Any, **kwargs: Any) -> Any:
            found = super().__call__(texts, **kwargs)
            return {"input_ids": [[1, *ids] for ids in found["input_ids"]]}

    made = Own(tokenizer_object=qwen.backend_tokenizer)
    texts = ["<|im_start|>a", "<|im_start|>ab"]
    with caplog.at_level("INFO"):
        found = [list(ids) for ids in BatchEncoder(made).encode(texts)]
    assert found == made(texts, add_special_tokens=False)["input_ids"]
    assert "does not take texts apart" in caplog.text
