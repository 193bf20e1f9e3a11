"""Shared prompts: the same log-probs and gradients as one row per completion, or the flat layout."""

import logging
import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import alignment.kernels.attention
import alignment.kernels.block_attention
import alignment.kernels.matmul
import alignment.scoring.layout
import alignment.scoring.prompt_sharing
import alignment.scoring.states
from alignment.data.tokens.units import as_rows
from alignment.kernels.attention import PromptSpan, attend, enable_shared_prompts, longest_sequence, position_ids
from alignment.reference.cached import CachedReference
from alignment.reference.store import ReferenceStore
from alignment.scoring.layout import FlatLayout, ForkedLayout, SharedLayout
from alignment.scoring.logps import enable_scoring, join_scores, score
from alignment.scoring.prompt_sharing import choose_layout
from alignment.types import Group
from tests.conftest import random_groups, tiny_config, tiny_policy
from tests.helpers.adapters import adapter
from tests.helpers.flash import stands_in
from tests.helpers.masks import dense_mask
from tests.helpers.steps import SETTINGS, make_loss, make_trainer, moved, step_gradient

CPU = torch.device("cpu")

MODELS = {
    "llama": {},
    "qwen3": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True},
    "gemma": {},
    "gemma3_text": {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]},
    "mistral": {"sliding_window": 5},
    "gpt_neox": {},
}


def tiny_model(name: str, dtype: torch.dtype, **settings):
    """A small random model of that architecture with LoRA on all linear layers, its adapter already trained."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = tiny_config(model_type=name, **({"pad_token_id": None} | MODELS.get(name, {}) | settings))
    # The grouped kernel for experts knows no fp64.
    experts = {"experts_implementation": "eager"} if "moe" in name else {}
    model = AutoModelForCausalLM.from_config(config, **experts).to(dtype).requires_grad_(False)
    enable_scoring(model)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")).to(dtype)
    moved(model)
    return model.train()


def scores_and_gradient(model, groups, layout, tokens_per_batch):
    model.zero_grad()
    scored = []
    for batch in layout.batches(groups, tokens_per_batch):
        logps = score(model, batch)
        (logps.values * torch.cos(batch.targets.to(logps.values))).sum().backward()
        scored.append((batch, logps.detach()))
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    return join_scores(groups, scored).values, gradient


def assert_same(found, expected, tolerance):
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=tolerance)
    assert expected[1].norm() > 1e-2
    assert (found[1] - expected[1]).norm() <= tolerance * expected[1].norm()


@pytest.fixture
def everything_in_fp64(monkeypatch):
    """Norms and routers compute in fp32 whatever the model's dtype; here they follow it."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(alignment.kernels.matmul, "_has_onednn", lambda: False)  # it knows its fp32 by that name
    monkeypatch.setattr(alignment.kernels.attention, "_has_cpu_kernel", lambda: True)  # not to be asked in this state


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MODELS))
def test_equals_the_flat_layout_in_fp64(name, everything_in_fp64):
    model = tiny_model(name, torch.float64)
    for k in (1, 2, 5):
        groups = random_groups(4, k=k, seed=k)
        expected = scores_and_gradient(model, groups, FlatLayout(), 10_000)
        assert enable_shared_prompts(model)
        for tokens_per_batch in (1, 70, 10_000):
            assert_same(scores_and_gradient(model, groups, SharedLayout(), tokens_per_batch), expected, 1e-9)
        alignment.kernels.attention.disable_shared_prompts(model)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_equals_the_flat_layout_in_fp32(name):
    model = tiny_model(name, torch.float32)
    groups = random_groups(6, k=3, seed=11)
    expected = scores_and_gradient(model, groups, FlatLayout(), 10_000)
    enable_shared_prompts(model)
    assert_same(scores_and_gradient(model, groups, SharedLayout(), 90), expected, 1e-5)


@pytest.mark.parametrize("name", ["qwen3", "gpt_neox"])
def test_gradient_checkpointing_changes_nothing(name, everything_in_fp64):
    model = tiny_model(name, torch.float64)
    groups = random_groups(5, k=2, seed=5)
    enable_shared_prompts(model)
    expected = scores_and_gradient(model, groups, SharedLayout(), 60)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    assert_same(scores_and_gradient(model, groups, SharedLayout(), 60), expected, 1e-12)


def test_equals_the_flat_layout_on_a_quantised_base(tiny_model_folder):
    from alignment.config.schema import Calibration, Dtype, ModelConfig, QuantizationConfig
    from alignment.policy.adapter import attach_adapter
    from alignment.policy.load import load_base

    config = ModelConfig(
        name=str(tiny_model_folder), revision=None, dtype=Dtype.float32, attention="sdpa", chat_template=None,
        eos_token=None, trust_remote_code=False,
    )  # fmt: skip
    quantization = QuantizationConfig(double=True, compute_dtype=Dtype.float32, calibration=Calibration.none)
    lora = adapter(r=4, alpha=8)
    model = attach_adapter(load_base(config, quantization, str(tiny_model_folder), CPU), lora, 0).train()
    moved(model)
    groups = random_groups(5, k=3, seed=2)
    expected = scores_and_gradient(model, groups, FlatLayout(), 10_000)
    assert isinstance(choose_layout(model, CPU), SharedLayout)
    assert_same(scores_and_gradient(model, groups, SharedLayout(), 90), expected, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_a_training_step_is_the_same(name, tmp_path):
    """Loss and gradient of a step, reference and mismatched answers included."""
    groups = random_groups(6, seed=8)
    if name == "kto":
        groups = as_rows(groups)[2:10]
    results = []
    for layout, tokens_per_batch in ((FlatLayout(), 10_000), (SharedLayout(), 10_000), (SharedLayout(), 40)):
        model = tiny_policy(torch.float32, trained=True)
        assert isinstance(choose_layout(model, CPU), SharedLayout)
        trainer = make_trainer(model, groups, make_loss(name), tmp_path, tokens_per_batch, layout=layout)
        moved(model)
        loss, gradient = step_gradient(trainer, groups)
        results.append((loss, torch.cat([g.flatten() for n, g in gradient.items() if ".reference." not in n])))
    (expected_loss, expected), *others = results
    for loss, gradient in others:
        assert math.isclose(loss, expected_loss, rel_tol=1e-5)
        assert (gradient - expected).norm() <= 1e-5 * expected.norm()


# Attention by itself

ROW = (PromptSpan(0, 5, (4, 3, 1)), PromptSpan(13, 2, (0, 6)), PromptSpan(21, 7, (2,)), PromptSpan(30, 1, (0, 0)))


def inputs(row):
    torch.manual_seed(1)
    shapes = [(1, heads, row[-1].end, 8) for heads in (6, 2, 2)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def by_loops(q, k, v, lengths, scale):
    """What a kernel for variable lengths computes: each sequence alone, causal, aligned at the end."""
    results = []
    for i in range(len(lengths.query_ends) - 1):
        queries, keys, values = (
            q[lengths.query_ends[i] : lengths.query_ends[i + 1]],
            *(
                x[lengths.key_ends[i] : lengths.key_ends[i + 1]].repeat_interleave(q.shape[1] // k.shape[1], dim=1)
                for x in (k, v)
            ),
        )
        assert len(queries) <= lengths.most_queries and len(keys) <= lengths.most_keys
        products = torch.einsum("qhd,khd->hqk", queries, keys) * scale
        late = torch.ones(len(queries), len(keys), dtype=torch.bool).triu(len(keys) - len(queries) + 1)
        results.append(torch.einsum("hqk,khd->qhd", products.masked_fill(late, -math.inf).softmax(-1), values))
    return torch.cat(results)


@pytest.mark.parametrize("route", ["cpu", "blocks", "small blocks", "masked", "window", "variable lengths"])
def test_every_route_equals_a_dense_mask(route, monkeypatch):
    for change in stands_in(alignment.kernels.attention, by_loops):
        monkeypatch.setattr(*change)
    window = 3 if route == "window" else None
    q, k, v = inputs(ROW)
    mask = dense_mask(ROW, window)
    wide = [x.repeat_interleave(3, dim=1) for x in (k, v)]
    products = (q @ wide[0].transpose(-1, -2) * 0.4).masked_fill(~mask, -math.inf)
    expected = (products.softmax(-1) @ wide[1]).transpose(1, 2)
    torch.manual_seed(2)
    weights = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    if "blocks" in route:
        monkeypatch.setattr(alignment.kernels.attention, "_BLOCKS_FROM", 0)
    if route == "small blocks":  # several to a sequence, and widths that are rounded up in both ways
        monkeypatch.setattr(alignment.kernels.block_attention, "_BLOCK", 2)
        monkeypatch.setattr(alignment.kernels.block_attention, "_FINE", 2)
        monkeypatch.setattr(alignment.kernels.block_attention, "_FINE_TO", 6)
        monkeypatch.setattr(alignment.kernels.block_attention, "_COARSE", 4)
        alignment.kernels.block_attention._future.cache_clear()
    functions = {
        "cpu": attend,
        "blocks": attend,
        "small blocks": attend,
        "masked": alignment.kernels.attention._masked_attention,
        "window": lambda *args: attend(*args, window=3),
        "variable lengths": alignment.kernels.attention._VariableLengthAttention.apply,
    }
    found = functions[route](q, k, v, ROW, 0.4)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for gradient, wanted in zip(
        torch.autograd.grad((found * weights).sum(), (q, k, v)), expected_gradients, strict=True
    ):
        torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-12)
    alignment.kernels.block_attention._future.cache_clear()


def test_long_sequences_in_fp32(monkeypatch):
    """Both routes of a CPU, with oneDNN's products where torch has them, on sequences of several blocks."""
    row = (PromptSpan(0, 300, (150, 131)), PromptSpan(581, 90, (7, 0, 40)))
    torch.manual_seed(3)
    q, k, v = (torch.randn(1, heads, row[-1].end, 16, requires_grad=True) for heads in (6, 2, 2))
    weights = torch.randn(1, row[-1].end, 6, 16)
    results = []
    for from_length in (10_000, 0):
        monkeypatch.setattr(alignment.kernels.attention, "_BLOCKS_FROM", from_length)
        out = attend(q, k, v, row, 0.25)
        results.append((out, *torch.autograd.grad((out * weights).sum(), (q, k, v))))
    for expected, found in zip(*results, strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_positions_go_on_after_the_prompt():
    row = (PromptSpan(0, 3, (2, 1)), PromptSpan(6, 1, (0, 3)))
    assert position_ids(row).tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 2, 3]]
    assert longest_sequence(row) == 5


# Layout


def test_every_group_once_and_nothing_padded():
    groups = random_groups(40, k=3, seed=1)
    batches = list(SharedLayout().batches(groups, 100))
    assert sorted(i for b in batches for i in b.indices) == list(range(40))
    for batch in batches:
        positions = sum(len(groups[i].prompt) + sum(len(c) - 1 for c in groups[i].completions) for i in batch.indices)
        assert batch.input_ids.shape == (1, positions)
        assert positions <= 100 or len(batch.indices) == 1
        scored = sum(len(groups[i].prompt) + len(c) for i in batch.indices for c in groups[i].completions)
        assert batch.num_tokens == scored
    # First fit: what one row has left would not have held any prompt of a later row.
    free = [100 - b.input_ids.shape[1] for b in batches]
    for i, batch in enumerate(batches):
        for later in batches[i + 1 :]:
            assert all(span.end - span.start > free[i] for span in later.shared_row), (batch, later)


def test_groups_with_one_prompt_share_it():
    a, b, *_ = random_groups(8, k=2, seed=3)
    rows = [Group(g.prompt, (g.completions[k],)) for k in range(2) for g in (a, b)]
    (batch,) = SharedLayout().batches(rows, 10_000)
    (joint,) = SharedLayout().batches([a, b], 10_000)
    assert batch.input_ids.tolist() == joint.input_ids.tolist()
    assert sorted(batch.indices) == [0, 1, 2, 3]
    assert [len(span.completions) for span in batch.shared_row] == [2, 2]
    limit = len(a.prompt) + len(a.completions[0])
    tight = list(SharedLayout().batches(rows, limit))
    assert sorted(i for b in tight for i in b.indices) == [0, 1, 2, 3]
    assert all(b.input_ids.shape[1] <= limit or len(b.indices) == 1 for b in tight)


def test_the_reference_pass_runs_a_prompt_once(tmp_path, monkeypatch):
    groups = random_groups(6, k=2, seed=4)
    model = tiny_policy(torch.float32)
    store = ReferenceStore(tmp_path / "reference.sqlite")
    layout = choose_layout(model, CPU)
    reference = CachedReference(store, model, layout, 10_000, CPU, spot_checks=0)
    widths = []
    plain = SharedLayout._build

    def build(groups, families, prompts):
        batch = plain(groups, families, prompts)
        widths.append(batch.input_ids.shape[1])
        return batch

    monkeypatch.setattr(SharedLayout, "_build", staticmethod(build))
    reference.prepare(groups)
    assert sum(widths) == sum(len(g.prompt) + sum(len(c) - 1 for c in g.completions) for g in groups)


# The choice


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MODELS))
def test_these_models_share(name):
    model = tiny_model(name, torch.float32)
    assert isinstance(choose_layout(model, CPU), SharedLayout)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("mamba2", {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 16}),
        ("falcon_h1", {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}),
        ("gemma2", {}),
        ("bloom", {}),
    ],
)
def test_these_models_share_no_row(name, settings, caplog):
    """State-space layers, convolutions, capped logits, biases by distance: one line in the log, and forked states."""
    settings = {"num_key_value_heads": 2} | settings
    config = tiny_config(model_type=name, **settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float()
    enable_scoring(model)
    before = config._attn_implementation
    with caplog.at_level(logging.INFO, logger="alignment.scoring.prompt_sharing"):
        assert isinstance(choose_layout(model, CPU), ForkedLayout)
    assert caplog.text.count("Prompts share no row with their completions") == 1
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(
    ("part", "layout"), [("attend", ForkedLayout), ("enable_shared_prompts", ForkedLayout), ("both", FlatLayout)]
)
def test_whatever_sharing_raises_no_row_is_shared(part, layout, monkeypatch, caplog):
    """A class that nobody has seen may raise anything: sharing only makes training faster, so it never stops one."""

    def unforeseen(*args, **kwargs):
        raise KeyError("shared_row")

    where = alignment.kernels.attention if part == "attend" else alignment.scoring.prompt_sharing
    monkeypatch.setattr(where, "enable_shared_prompts" if part == "both" else part, unforeseen)
    if part == "both":
        monkeypatch.setattr(alignment.scoring.states, "run_completions", unforeseen)
    model = tiny_policy(torch.float32)
    with caplog.at_level(logging.INFO, logger="alignment.scoring.prompt_sharing"):
        assert isinstance(choose_layout(model, CPU), layout)
    assert "KeyError: 'shared_row'" in caplog.text
    assert model.config._attn_implementation == "sdpa"


def leaking(model, strength):
    """With a layer that hands a fading state from token to token, by no cache of transformers."""

    def leak(module, inputs, output):
        kept = [torch.zeros_like(output[:, 0])]
        for token in output.unbind(1):
            kept.append(0.8 * kept[-1] + token)
        return output + strength * torch.stack(kept[:-1], 1)

    model.get_decoder().layers[0].mlp.register_forward_hook(leak)
    return model


@pytest.mark.parametrize(
    ("dtype", "strength"), [(torch.bfloat16, 0.02), (torch.bfloat16, 1e-3), (torch.float32, 1e-6)], ids=str
)
def test_a_state_that_rounding_hides_is_found(dtype, strength, caplog):
    """Too small to be told from rounding in the log-probs; the gradient from answer to answer shows it."""
    with caplog.at_level(logging.INFO, logger="alignment.scoring.prompt_sharing"):
        assert isinstance(choose_layout(tiny_policy(dtype, trained=True), CPU), SharedLayout)
        assert isinstance(choose_layout(leaking(tiny_policy(dtype, trained=True), strength), CPU), FlatLayout)
    assert "its completions see each other beside its attention" in caplog.text


@pytest.mark.parametrize("strength", [0.1, 0.003])
def test_a_state_that_leaks_is_found(strength, caplog):
    """A layer that hands a fading state from token to token: in a shared row it goes from answer to answer."""
    model = leaking(tiny_policy(torch.float32, trained=True), strength)
    with caplog.at_level(logging.INFO, logger="alignment.scoring.prompt_sharing"):
        layout = choose_layout(model, CPU)
    assert isinstance(layout, FlatLayout) and "log-probs differ by" in caplog.text
    groups = random_groups(5, k=3, seed=2)
    alone = torch.cat([scores_and_gradient(model, [group], layout, 1)[0] for group in groups])
    torch.testing.assert_close(scores_and_gradient(model, groups, layout, 10_000)[0], alone, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_wrong_attention_is_found(monkeypatch, caplog):
    """Whatever goes wrong in it, the comparison sees it: siblings seen, the prompt not seen, a wrong scale."""
    right = alignment.kernels.attention.attend

    def joined(q, k, v, row, scale, window=None):
        spans = tuple(PromptSpan(s.start, s.prompt, (sum(s.completions),)) for s in row)
        return right(q, k, v, spans, scale, window)

    def forgetful(q, k, v, row, scale, window=None):
        spans = []
        for s in row:
            spans += [PromptSpan(s.start, s.prompt, (0,))]
            spans += [PromptSpan(first, 1, (end - first - 1,)) for first, end in s.completion_ranges() if end > first]
        return right(q, k, v, tuple(spans), scale, window)

    def rescaled(q, k, v, row, scale, window=None):
        return right(q, k, v, row, scale * 1.05, window)

    for wrong in (joined, forgetful, rescaled):
        monkeypatch.setattr(alignment.kernels.attention, "attend", wrong)
        assert not isinstance(choose_layout(tiny_policy(torch.float32, trained=True), CPU), SharedLayout), wrong
    # A window that reaches beyond every prompt of the comparison has to be seen too.
    monkeypatch.setattr(
        alignment.kernels.attention, "attend", lambda q, k, v, row, scale, window=None: right(q, k, v, row, scale)
    )
    assert not isinstance(choose_layout(tiny_model("mistral", torch.float32, sliding_window=4096), CPU), SharedLayout)
    monkeypatch.setattr(alignment.kernels.attention, "attend", right)
    assert isinstance(choose_layout(tiny_model("mistral", torch.float32, sliding_window=4096), CPU), SharedLayout)
    monkeypatch.setattr(alignment.scoring.layout, "position_ids", lambda row: torch.arange(row[-1].end)[None])
    assert not isinstance(choose_layout(tiny_policy(torch.float32, trained=True), CPU), SharedLayout)


def test_attention_without_shared_prompts_stays_what_it_was():
    model = tiny_policy(torch.float32, trained=True)
    ids = torch.arange(20)[None]
    before = model(input_ids=ids).logits
    assert enable_shared_prompts(model)
    assert torch.equal(model(input_ids=ids).logits, before)
    text = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    alignment.kernels.attention.disable_shared_prompts(model)
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=5, do_sample=False), text)


def test_a_saved_configuration_does_not_name_it(tmp_path):
    model = tiny_policy(torch.float32, r=None)
    enable_shared_prompts(model)
    model.config.save_pretrained(tmp_path)
    assert "shared_prompts" not in (tmp_path / "config.json").read_text()
    assert AutoConfig.from_pretrained(tmp_path)._attn_implementation != model.config._attn_implementation
