"""Fused kernels against the eager code and exact arithmetic; on a CPU by Triton's interpreter.

The interpreter must be chosen before anything imports Triton, so tests/conftest.py does it.
"""

import logging

import pytest
import torch
from torch import nn

from alignment.kernels import base, fused, gather, log_probs, mlp, nf4, norm, rotary
from alignment.scoring.head import LOGITS_PER_CHUNK, LogitTransform, score_hidden
from tests.helpers.patched import FEW, assert_close, compute, pair

pytest.importorskip("triton", reason="NO TRITON: it is not installed, so no fused kernel was checked")

OPERATIONS = [
    norm._scaled,
    norm._forward,
    norm._backward,
    mlp._gated,
    mlp._gated_backward,
    rotary._rotate,
    log_probs.target_log_probs,
    nf4._unpacked,
    gather._summed,
]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCES = {torch.float32: 5e-6, torch.bfloat16: 2**-6 if DEVICE.type == "cuda" else 2**-5, torch.float16: 2**-9}
"""Relative to a value or to 1: what roundings to the other side do. The interpreter cuts bfloat16 off, not float16."""


@pytest.fixture(autouse=True)
def on_any_device(monkeypatch):
    """Kernels run on this machine's device, and a failing one fails its test instead of falling back."""
    monkeypatch.setattr(fused, "DEVICE_TYPES", {DEVICE.type})
    monkeypatch.setattr(fused.Fused, "_give_up", broken)
    monkeypatch.delenv("ALIGNMENT_FUSED", raising=False)
    fused._kernels.cache_clear()
    for operation in OPERATIONS:
        monkeypatch.setattr(operation, "_failed", False)
    yield
    fused._kernels.cache_clear()


def broken(self, reason):
    raise AssertionError(f"{self.name}: {reason}")


def random(*shape, dtype=torch.float32, seed=0, scale=1.0):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))
    return (scale * values).to(DEVICE, dtype)


def check(operation, *args, exact_to=None):
    """The kernel gives what the eager function gives; both are run by name, so that neither can stand in."""
    assert operation._usable(args)
    found, expected = (run(fused._copied(args)) for run in (operation._run, lambda copies: operation.eager(*copies)))
    pairs = zip(found, expected, strict=True) if isinstance(expected, tuple) else [(found, expected)]
    for one, other in pairs:
        if other is None:
            assert one is None
            continue
        assert one.shape == other.shape and one.dtype is other.dtype and one.stride() == other.stride()
        tolerance = TOLERANCES[other.dtype] if exact_to is None else exact_to
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (300, 64), (70, 96), (33, 128), (5, 1000), (2, 2048), (1, 5120)])
def test_norms(shape, shifted, dtype):
    rows, gradient = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
    rows[::3] *= 1e-3  # so small that eps matters
    weight = random(shape[1], dtype=dtype, seed=2)
    _, factors = check(norm._forward, rows, weight, 1e-6, shifted)
    result = check(norm._scaled, rows, factors, weight, shifted)
    torch.testing.assert_close(result, norm._forward(rows, weight, 1e-6, shifted)[0], rtol=0, atol=0)
    rows = random(*shape, dtype=dtype, seed=3)
    factors = norm._forward.eager(rows, weight, 1e-6, shifted)[1]
    check(norm._backward, gradient, rows, factors, weight, shifted, exact_to=4 * TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (31, 77), (9, 512), (2, 6144)])
def test_gated_products(shape, name, dtype):
    (activation,) = [a for a in mlp._activations() if a.name == name]
    gate, up, gradient = (random(*shape, dtype=dtype, seed=i, scale=2) for i in range(3))
    check(mlp._gated, gate, up, activation)
    for needs_product in (True, False):
        check(mlp._gated_backward, gate, up, gradient, activation, needs_product, exact_to=2 * TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("width", [128, 96, 14])
@pytest.mark.parametrize(("batch", "heads", "tokens"), [(1, 5, 33), (1, 1, 1), (3, 2, 9)])
def test_rotation(batch, heads, tokens, width, backward, dtype):
    cos, sin = (random(batch, 1, tokens, width, dtype=dtype, seed=i) for i in (1, 2))
    by_head, by_token = (
        random(batch, heads, tokens, width, dtype=dtype),
        random(batch, tokens, heads, width, dtype=dtype),
    )
    part = random(batch, tokens, heads, 2 * width, dtype=dtype)[..., width:].transpose(1, 2)  # rows that lie apart
    key = random(batch, tokens, 2, width, dtype=dtype, seed=3)
    for x in (by_head, by_token.transpose(1, 2), part):
        for q, k in ((x, key.transpose(1, 2)), (key.transpose(1, 2).contiguous(), x)):
            check(rotary._rotate, q, k, cos, sin, backward)
            check(rotary._rotate, q, k, cos[:1], sin[:1], backward)
    check(rotary._rotate, by_token, key, cos.transpose(1, 2), sin.transpose(1, 2), backward)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(1,), (8, 128), (3, 77)])
def test_sums_of_rows(shape, index, dtype):
    """Positions with one row, many and none, at the ends too."""
    counts = torch.tensor([0, 1, 3, 1, 0, 40, 2, 1, 0])
    order = torch.randperm(48, generator=torch.Generator().manual_seed(1)).to(DEVICE, index)
    starts = (counts.cumsum(0) - counts).to(DEVICE, index)
    check(gather._summed, random(48, *shape, dtype=dtype), order, starts)
    check(gather._summed, random(48, *shape, dtype=dtype), order, starts[:6])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("quant_type", "nested"), [("nf4", True), ("nf4", False), ("fp4", True)])
@pytest.mark.parametrize(("shape", "blocksize"), [((64, 128), 64), ((7, 13), 64), ((300, 64), 32), ((3, 5000), 4096)])
def test_unpacked_weights_have_the_bits_of_bitsandbytes(shape, blocksize, quant_type, nested, dtype):
    functional = pytest.importorskip("bitsandbytes.functional", reason="NO BITSANDBYTES: 4-bit weights unchecked")
    values = random(*shape, dtype=dtype)
    values[::3] *= 1e-2
    packed, state = functional.quantize_4bit(values, None, None, blocksize, nested, quant_type)
    parts = nf4._parts(state)
    assert nf4._fits(packed, *parts)
    found, expected = nf4._unpacked._run((packed, *parts)), functional.dequantize_4bit(packed, state)
    torch.testing.assert_close(nf4._unpacked.eager(packed, *parts), expected, rtol=0, atol=0)
    if DEVICE.type == "cpu" and dtype is torch.bfloat16:  # the interpreter cuts off
        state.dtype = torch.float32
        expected = functional.dequantize_4bit(packed, state).view(torch.int32).bitwise_and(-(2**16))
        expected = expected.view(torch.float32).to(torch.bfloat16)
    else:
        assert nf4._unpacked._usable((packed, *parts))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_packed_parameter_becomes_a_plain_tensor(monkeypatch):
    modules = pytest.importorskip("bitsandbytes.nn", reason="NO BITSANDBYTES: 4-bit weights unchecked")
    weight = modules.Params4bit(random(64, 128), requires_grad=False)._quantize(DEVICE)
    ran, run = [], nf4._unpacked._run
    monkeypatch.setattr(nf4._unpacked, "_run", lambda args: ran.append(type(args[0])) or run(args))
    found, expected = (
        nf4.unpack(weight, weight.quant_state),
        nf4._unpacked.eager(weight, *nf4._parts(weight.quant_state)),
    )
    assert set(ran) == {torch.Tensor} and type(found) is torch.Tensor
    torch.testing.assert_close(found, expected.as_subclass(torch.Tensor), rtol=0, atol=0)


def test_other_packings_are_left_to_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional", reason="NO BITSANDBYTES: 4-bit weights unchecked")
    packed, state = functional.quantize_4bit(random(64, 96), compress_statistics=True)
    parts = nf4._parts(state)
    assert nf4._fits(packed, *parts)
    assert not nf4._fits(packed.t(), *parts)
    assert not nf4._fits(packed.view(-1, 4).view(torch.float32), *parts)
    assert not nf4._fits(packed[:-1], *parts)
    state.state2.blocksize = 128
    assert not nf4._fits(packed, *nf4._parts(state))


@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.25, None), (1.0, 30.0)])
@pytest.mark.parametrize("dtype", [None, *DTYPES])
@pytest.mark.parametrize(("count", "vocabulary"), [(1, 2), (5, 97), (3, 8193)])
def test_log_probs(count, vocabulary, dtype, scale, cap):
    check_log_probs(count, vocabulary, dtype, scale, cap)


def test_log_probs_of_a_large_vocabulary():
    check_log_probs(2, 151_936, torch.bfloat16, 1.0, None)


def check_log_probs(count, vocabulary, dtype, scale, cap):
    logits = random(count, vocabulary, scale=8)
    logits[0] *= 4
    targets = torch.arange(count, device=DEVICE) * 7919 % vocabulary
    targets[-1] = vocabulary - 1
    logps, derivatives = check(
        log_probs.target_log_probs,
        logits,
        targets,
        scale,
        cap,
        dtype,
        exact_to=2e-5 if dtype in (None, torch.float32) else None,
    )
    exact = logits.double().requires_grad_()
    transformed = exact * scale if cap is None else cap * torch.tanh(exact / cap)
    expected = transformed.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(logps.double(), expected, rtol=1e-6, atol=2e-5)
    if dtype is not None:
        (gradient,) = torch.autograd.grad(expected.sum(), exact)
        limit = 1e-5 if dtype is torch.float32 else TOLERANCES[dtype]
        torch.testing.assert_close(derivatives.double(), gradient, rtol=limit, atol=min(limit, 1e-3))


def in_float64(function, *inputs):
    """Value and gradients of the inputs, by autograd in float64."""
    exact = [x.detach().double().requires_grad_() for x in inputs]
    value = function(*exact)
    weights = random(*value.shape, seed=9).double()
    return value, torch.autograd.grad((value * weights).sum(), exact), weights


@pytest.mark.parametrize("shifted", [False, True])
def test_norm_and_rotation_against_exact_gradients(shifted):
    x, weight = random(2, 3, 4, 96).requires_grad_(), random(96, seed=1)

    def exact_norm(x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (weight.double() + shifted)

    expected, (gradient,), weights = in_float64(exact_norm, x)
    found = norm._RMSNorm.apply(x, weight, 1e-6, shifted)[0]
    (own,) = torch.autograd.grad((found * weights).sum(), x)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own.double(), gradient, rtol=1e-4, atol=1e-5)

    cos, sin = random(2, 1, 3, 96, seed=2), random(2, 1, 3, 96, seed=3)
    q, k = (random(2, 3, heads, 96, seed=heads).transpose(1, 2).requires_grad_() for heads in (4, 2))

    def exact_rotation(q):
        first, second = q.chunk(2, -1)
        return q * cos.double() + torch.cat([-second, first], -1) * sin.double()

    for index, x in enumerate((q, k)):
        expected, (gradient,), weights = in_float64(exact_rotation, x)
        found = rotary._Rotary.apply(q, k, cos, sin)[index]
        (own,) = torch.autograd.grad((found * weights).sum(), x)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(own.double(), gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(scale=0.5), LogitTransform(cap=5.0)])
def test_the_head_in_chunks_against_exact_gradients(transform, monkeypatch):
    monkeypatch.setitem(LOGITS_PER_CHUNK, DEVICE.type, 3 * 211)
    head = nn.Linear(32, 211, bias=False, device=DEVICE).requires_grad_(False)
    nn.init.normal_(head.weight, generator=torch.Generator(DEVICE).manual_seed(0))
    hidden, targets = random(10, 32).requires_grad_(), torch.arange(10, device=DEVICE) * 20

    def exact(hidden):
        logits = hidden @ head.weight.double().t()
        logits = (
            logits * transform.scale if transform.cap is None else transform.cap * torch.tanh(logits / transform.cap)
        )
        return logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)

    expected, (gradient,), weights = in_float64(exact, hidden)
    found = score_hidden(head, hidden, targets, transform)
    (own,) = torch.autograd.grad((found[0] * weights).sum(), hidden)
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own.double(), gradient, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(score_hidden(head, hidden, targets, transform), found.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["qwen3", "gemma"])
def test_a_whole_model_gives_the_same(kind, monkeypatch):
    """Every operation is called with the arguments that its kernel expects."""
    own, changed = (model.to(DEVICE) for model in pair(kind))
    monkeypatch.setattr(base, "_MIN_BLOCK_ROWS", 2**20)  # one block, as on a GPU
    run, names = fused.Fused._run, set()
    monkeypatch.setattr(fused.Fused, "_run", lambda self, args: names.add(self.name) or run(self, args))
    assert_close(compute(changed, FEW), compute(own, FEW), 1e-5)
    assert names == {op.name for op in OPERATIONS} - {"target_log_probs", "unpack_4bit", "sum_rows"}


def faulty(operation, monkeypatch, kernel):
    """The operation with another kernel, and its real way of giving up."""
    monkeypatch.undo()
    monkeypatch.setattr(fused, "DEVICE_TYPES", {DEVICE.type})
    monkeypatch.setattr(operation, "_agrees", {})
    monkeypatch.setattr(operation, "_failed", False)
    fused._kernels.cache_clear()
    monkeypatch.setattr(fused._kernels(), operation.name, kernel)


def does_not_compile(*args):
    raise RuntimeError("no C compiler\nand more")


@pytest.mark.parametrize("kernel", [does_not_compile, lambda rows, factors, weight, shifted: rows * 1.1])
def test_a_kernel_that_fails_or_differs_leaves_the_eager_code_and_one_warning(kernel, monkeypatch, caplog):
    faulty(norm._scaled, monkeypatch, kernel)
    rows, factors, weight = random(4, 8), torch.ones(4, 1, device=DEVICE), torch.ones(8, device=DEVICE)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            torch.testing.assert_close(norm._scaled(rows, factors, weight, False), rows, rtol=0, atol=0)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "norm_recompute" in record.message and "\n" not in record.message
    assert "no C compiler" in record.message or "differs by" in record.message


def test_a_kernel_that_fails_later_leaves_the_eager_code(monkeypatch, caplog):
    kernels, calls = fused._kernels(), []

    def later(*args):
        calls.append(args)
        return genuine(*args) if len(calls) < 4 else does_not_compile()

    genuine = kernels.norm_recompute
    faulty(norm._scaled, monkeypatch, later)
    rows, factors, weight = random(4, 8), torch.ones(4, 1, device=DEVICE), torch.ones(8, device=DEVICE)
    for _ in range(3):
        torch.testing.assert_close(norm._scaled(rows, factors, weight, False), rows, rtol=0, atol=0)
    assert len(calls) == 4 and len(caplog.records) == 1


def test_out_of_memory_is_not_a_reason_to_give_up(monkeypatch):
    def out_of_memory(*args):
        raise torch.cuda.OutOfMemoryError("no memory")

    faulty(norm._scaled, monkeypatch, out_of_memory)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        norm._scaled(random(4, 8), torch.ones(4, 1, device=DEVICE), torch.ones(8, device=DEVICE), False)
    assert not norm._scaled._failed


def test_the_switch_and_a_missing_triton(monkeypatch, caplog):
    x = random(4, 8)
    assert fused.is_fused(x)
    assert not fused.is_fused(x.double())
    monkeypatch.setenv("ALIGNMENT_FUSED", "0")
    fused._kernels.cache_clear()
    assert not fused.is_fused(x) and not caplog.records
    monkeypatch.delenv("ALIGNMENT_FUSED")
    fused._kernels.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "alignment.kernels.triton_kernels", None)
    assert not fused.is_fused(x)
    torch.testing.assert_close(norm._scaled(x, x[:, :1] * 0 + 1, x[0] * 0 + 1, False), x, rtol=0, atol=0)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "Triton" in record.message
