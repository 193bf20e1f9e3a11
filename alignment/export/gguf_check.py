"""Whether a GGUF file holds the policy: it is read by transformers' own reader, and log-probs are compared."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig

from alignment.errors import UserError
from alignment.export.gguf_file import gguf_name
from alignment.policy.requantise import Sequences, drift, largest, next_logps

log = logging.getLogger(__name__)

LIMIT = 1e-3
"""Nats by which a likely next token may differ between the file as it is read and a model with the same rounded
weights. Both compute in fp32."""
_NEW_TOKENS = 16
_PROBES = (
    "What is the capital of France?",
    "Add 17 and 25, and say how you did it.",
    "Write a haiku about rain in 3 lines.",
    "def fibonacci(n):",
)


@dataclass(frozen=True, slots=True)
class Read:
    """What a reader of a file found.

    Attributes:
        difference: nats, the largest over likely next tokens, from a model with the weights as the file rounds them.
        drift: nats, the mean over next tokens as the policy draws them, from the policy's own weights.
        same_tokens: the share of next tokens whose likeliest is the policy's.
    """

    difference: float
    drift: float
    same_tokens: float

    def to_dict(self) -> dict[str, float]:
        """For files."""
        return asdict(self)


def probe_prompts(tokenizer: Any) -> list[np.ndarray]:
    """Tokens of a few questions, as the chat template writes them; without one, as they are."""
    texts = list(_PROBES)
    if tokenizer.chat_template is not None:
        turns = [[{"role": "user", "content": text}] for text in texts]
        texts = [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]
    return [np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32) for text in texts]


@dataclass(frozen=True, slots=True)
class Probed:
    """What a model makes of a few prompts.

    Attributes:
        sequences: the prompts with its greedy answers, and where these begin to count.
        logps: (positions, vocabulary) of each, of its next tokens.
    """

    sequences: Sequences
    logps: list[Tensor]


@torch.no_grad()
def probe(model: Any, prompts: Sequence[np.ndarray], device: torch.device) -> Probed:
    """Greedy answers of a model, all of the same length, and its log-probs along them."""
    model.generation_config = GenerationConfig()  # a penalty would be another policy
    sequences = []
    for prompt in prompts:
        ids = torch.from_numpy(prompt.astype(np.int64))[None].to(device)
        options: dict[str, Any] = {"max_new_tokens": _NEW_TOKENS, "do_sample": False, "eos_token_id": None}
        whole = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        sequences.append((whole, len(prompt) - 1))
    return Probed(sequences, next_logps(model, sequences))


def load_gguf(path: Path, device: torch.device) -> Any:
    """The model in a file as transformers reads it, in fp32.

    The size of a head and the factors of scaled positions, which transformers leaves out, are taken from the file, too.

    Raises:
        ValueError: transformers does not read this architecture.
    """
    from gguf import GGUFReader
    from transformers import AutoConfig, AutoModelForCausalLM

    place, reader = {"gguf_file": path.name}, GGUFReader(path)
    config = AutoConfig.from_pretrained(path.parent, **place)
    head = reader.fields.get(f"{reader.fields['general.architecture'].contents()}.attention.key_length")
    if head is not None:
        config.head_dim = head.contents()
    found: Any = AutoModelForCausalLM.from_pretrained(path.parent, **place, config=config, dtype=torch.float32)
    factors = next((tensor for tensor in reader.tensors if tensor.name == "rope_freqs.weight"), None)
    if factors is not None:
        rotary = found.model.rotary_emb
        rotary.inv_freq = rotary.inv_freq / torch.from_numpy(factors.data.copy()).to(rotary.inv_freq)
    return found.to(device).eval()


@torch.no_grad()
def round_as(model: Any, path: Path) -> None:
    """Give a plain model the weights that a file has rounded: each by its type in the file, and nothing else of it."""
    from gguf import GGUFReader, dequantize, quantize

    reader = GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    types = {tensor.name: tensor.tensor_type for tensor in reader.tensors}
    for name, weight in model.named_parameters():
        theirs = gguf_name(architecture, model.config.num_hidden_layers, name)
        if theirs is not None and (kind := types.get(theirs)) is not None:
            rounded = dequantize(quantize(weight.cpu().numpy(), kind), kind)
            weight.copy_(torch.from_numpy(np.ascontiguousarray(rounded, np.float32)))


def check_gguf(path: Path, model: Any, probed: Probed, device: torch.device) -> Read:
    """Compare a file with the model that it was made of, whose weights are rounded in place.

    Args:
        path: of the file.
        model: plain weights in fp32.
        probed: of that model, before its weights are rounded.
        device: to compute on.

    Raises:
        UserError: the file is not the model.
        ValueError: transformers does not read this architecture.
    """
    theirs = next_logps(load_gguf(path, device), probed.sequences)
    round_as(model, path)
    rounded = next_logps(model, probed.sequences)
    found = Read(
        difference=float(np.max([largest(a, b) for a, b in zip(rounded, theirs, strict=True)])),
        drift=drift(probed.logps, theirs),
        same_tokens=_same(probed.logps, theirs),
    )
    if not found.difference <= LIMIT:
        raise UserError(
            f"to=gguf: {path.name} is not the policy, because a reader's log-probs of likely next tokens differ by up "
            f"to {found.difference:.2g} nats from those of a model with the same weights ({LIMIT:g} may be rounding), "
            f"so it was removed."
        )
    return found


def _same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    agree = [a.argmax(-1) == b.argmax(-1) for a, b in zip(ours, theirs, strict=True)]
    return torch.cat(agree).double().mean().item()
