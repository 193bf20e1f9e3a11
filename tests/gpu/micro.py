"""Times of what a pass is made of, at Qwen3-1.7B's sizes: `python -m tests.gpu.micro [--dry] [--seconds 45]`.

Every line names an operation (`what`) and a way to compute it (`way`), with the rate of the bytes that it must move or
of its multiplications. `ms` is the GPU's time, `host_ms` what a call takes of the host's. Our own kernels come first,
what torch must compile comes last; no line starts after the time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from alignment.kernels import fused, gather, log_probs, mlp, nf4, norm, rotary
from alignment.kernels.attention import PromptSpan, attend
from alignment.kernels.fused import Fused
from alignment.scoring.head import LOGITS_PER_CHUNK, LogitTransform, score_hidden
from tests.gpu.lines import is_dry, note, out_folder

RUNS = 7
_CYCLES_PER_MS = 2_000_000
"""No card's clock is faster."""
_HOST_CALLS = 200


@dataclass(frozen=True)
class Sizes:
    """Of the passes and the model."""

    rows: int = 16384
    hidden: int = 2048
    intermediate: int = 6144
    heads: int = 16
    key_heads: int = 8
    head_width: int = 128
    vocabulary: int = 151_936
    tokens: int = 8192
    logit_rows: int = 1024
    square: int = 8192
    parameters: int = 392


TINY = Sizes(96, 64, 96, 4, 2, 16, 211, 16, 8, 64, 4)


class Bench:
    """Times functions and notes a line for each, until its time is over."""

    def __init__(self, out: Path, seconds: float, device: torch.device) -> None:
        self.out, self.device = out, device
        self._end = time.monotonic() + seconds

    def time(
        self, what: str, way: str, run: Callable[[], Any], moved: float = 0, products: float = 0, **more: Any
    ) -> None:
        """The median of several runs, in ms; an error is noted and ends only this line."""
        if time.monotonic() > self._end:
            note(self.out, "micro", what=what, way=way, error="no time left")
            return
        try:
            first, begun = self._seconds(run), time.perf_counter()
            self._seconds(run)
            again = time.perf_counter() - begun
            host_ms = self._host_ms(run, again)
            ms = statistics.median(self._once(run, host_ms) for _ in range(RUNS))
        except Exception as error:
            note(self.out, "micro", what=what, way=way, error=f"{type(error).__name__}: {error}"[:300])
            return
        rates = {"gb_per_s": round(moved / ms / 1e6, 1)} if moved else {}
        rates |= {"tflops": round(products / ms / 1e9, 2)} if products else {}
        took = {"ms": round(ms, 4), "host_ms": round(host_ms, 4), **rates, "first_s": round(first, 2)}
        note(self.out, "micro", what=what, way=way, **took, **more)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _seconds(self, run: Callable[[], Any]) -> float:
        """From the call to the end of its work."""
        begun = time.perf_counter()
        run()
        self._wait()
        return time.perf_counter() - begun

    def _host_ms(self, run: Callable[[], Any], seconds: float) -> float:
        """What a call takes of the host, which does not wait for the GPU; over so many calls that these take 20 ms."""
        calls = min(_HOST_CALLS, max(3, int(0.02 / seconds)))
        begun = time.perf_counter()
        for _ in range(calls):
            run()
        took = time.perf_counter() - begun
        self._wait()
        return 1000 * took / calls

    def _once(self, run: Callable[[], Any], host_ms: float) -> float:
        if self.device.type != "cuda":
            return 1000 * self._seconds(run)
        # The GPU sleeps until all of the work is queued, or its time would include the host's.
        torch.cuda._sleep(int(_CYCLES_PER_MS * min(50.0, 2 * host_ms + 0.2)))
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


@dataclass(frozen=True)
class Operation:
    """A fused operation and its arguments; `moved` counts the bytes of its inputs and outputs."""

    what: str
    fused: Fused[Any]
    arguments: tuple[Any, ...]
    moved: float


def operations(sizes: Sizes, device: torch.device) -> list[Operation]:
    """Those of a layer and of the head, with arguments in bfloat16."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    found = []
    for count, width in ((sizes.rows, sizes.hidden), (sizes.rows * sizes.heads, sizes.head_width)):
        x, gradient, weight = random(count, width), random(count, width), random(width)
        factors = torch.rand(count, 1, device=device) + 0.5
        name, values = f"norm {count} x {width}", 2 * x.numel()
        found.append(Operation(f"{name}, forward", norm._forward, (x, weight, 1e-6, False), 2 * values))
        found.append(Operation(f"{name}, recomputed", norm._scaled, (x, factors, weight, False), 2 * values))
        found.append(Operation(f"{name}, backward", norm._backward, (gradient, x, factors, weight, False), 3 * values))
    (silu,) = (a for a in mlp._activations() if a.name == "silu")
    gate, up, gradient = (random(sizes.rows, sizes.intermediate) for _ in range(3))
    name, values = f"silu(gate) * up, {sizes.rows} x {sizes.intermediate}", 2 * gate.numel()
    found.append(Operation(f"{name}, forward", mlp._gated, (gate, up, silu), 3 * values))
    found.append(Operation(f"{name}, backward", mlp._gated_backward, (gate, up, gradient, silu, True), 6 * values))
    cos, sin = (random(1, 1, sizes.rows, sizes.head_width) for _ in range(2))
    q, k = (random(1, sizes.rows, heads, sizes.head_width).transpose(1, 2) for heads in (sizes.heads, sizes.key_heads))
    for backward in (False, True):
        name = f"rotary, {sizes.heads} and {sizes.key_heads} heads, {'backward' if backward else 'forward'}"
        moved = 4 * (q.numel() + k.numel() + cos.numel())
        found.append(Operation(name, rotary._rotate, (q, k, cos, sin, backward), moved))
    # Keys of prompts with two completions: every prompt's appear twice
    own = torch.arange(sizes.rows, device=device, dtype=torch.int32)
    order, counts = torch.cat([own, own[: sizes.rows // 5]]).sort(stable=True)[1].int(), torch.ones_like(own)
    counts[: sizes.rows // 5] = 2
    gathered = random(len(order), sizes.key_heads, sizes.head_width)
    moved = 2 * (gathered.numel() + sizes.rows * sizes.key_heads * sizes.head_width)
    starts = (counts.cumsum(0) - counts).int()
    found.append(Operation(f"sums of {len(order)} rows", gather._summed, (gathered, order, starts), moved))
    logits = 3 * torch.randn(sizes.logit_rows, sizes.vocabulary, device=device)
    targets = torch.randint(0, sizes.vocabulary, (sizes.logit_rows,), device=device)
    for dtype, moved in ((torch.bfloat16, 10), (None, 4)):
        name = f"log-probs of {sizes.logit_rows} x {sizes.vocabulary} logits{', derivatives' if dtype else ''}"
        arguments = (logits, targets, 1.0, None, dtype)
        found.append(Operation(name, log_probs.target_log_probs, arguments, moved * logits.numel()))
    return found


def time_operations(bench: Bench, sizes: Sizes) -> None:
    """Our kernels and the eager code."""
    for operation in [*operations(sizes, bench.device), unpacking(sizes, bench.device)]:
        run, arguments = operation.fused, operation.arguments
        used = run._usable(arguments)
        bench.time(operation.what, "own", lambda r=run, a=arguments: r(*a), operation.moved, kernel=used)
        bench.time(operation.what, "eager", lambda r=run, a=arguments: r.eager(*a), operation.moved)


def time_products(bench: Bench, sizes: Sizes) -> None:
    """What the card can do: copies, products, and a product with an adapter in two orders."""
    device, dtype = bench.device, torch.bfloat16
    n = sizes.square
    big = torch.randn(4 * n, n, device=device, dtype=dtype)
    other = torch.empty_like(big)
    bench.time("copy", "torch", lambda: other.copy_(big), 4 * big.numel())
    left, right = big[:n], torch.randn(n, n, device=device, dtype=dtype)
    bench.time(f"product, {n}^3", "torch", lambda: left @ right, products=2 * n**3)
    x = torch.randn(sizes.rows, sizes.hidden, device=device, dtype=dtype)
    weight = torch.randn(sizes.intermediate, sizes.hidden, device=device, dtype=dtype)
    a = torch.randn(32, sizes.hidden, device=device, dtype=dtype)
    b = torch.randn(sizes.intermediate, 32, device=device, dtype=dtype)
    flops = 2 * sizes.rows * sizes.hidden * sizes.intermediate
    what = f"product, {sizes.rows} x {sizes.hidden} x {sizes.intermediate}"
    bench.time(what, "alone", lambda: x @ weight.t(), products=flops)
    bench.time(what, "adapter added to it", lambda: (x @ weight.t()).addmm_(x @ a.t(), b.t()), products=flops)
    bench.time(what, "added to the adapter's", lambda: ((x @ a.t()) @ b.t()).addmm_(x, weight.t()), products=flops)


def time_head(bench: Bench, sizes: Sizes) -> None:
    """The LM head, forward and backward, in chunks of several sizes."""
    device, dtype = bench.device, torch.bfloat16
    head = nn.Linear(sizes.hidden, sizes.vocabulary, bias=False, device=device, dtype=dtype).requires_grad_(False)
    hidden = torch.randn(sizes.tokens, sizes.hidden, device=device, dtype=dtype)
    targets = torch.randint(0, sizes.vocabulary, (sizes.tokens,), device=device)
    products = 4 * sizes.tokens * sizes.hidden * sizes.vocabulary
    what = f"head, {sizes.tokens} tokens"

    def run() -> None:
        score_hidden(head, hidden.detach().requires_grad_(), targets, LogitTransform()).sum().backward()

    def without_gradient() -> None:
        with torch.no_grad():
            score_hidden(head, hidden, targets, LogitTransform())

    usual, types = LOGITS_PER_CHUNK[device.type], set(fused.DEVICE_TYPES)
    try:
        for rows in (None, 512, 1024, 2048, 2**26, 2**27, 2**28):
            if rows is not None:
                LOGITS_PER_CHUNK[device.type] = rows if rows > 2**20 else rows * sizes.vocabulary
            chunk = LOGITS_PER_CHUNK[device.type] // sizes.vocabulary
            bench.time(what, f"own, {chunk} rows", run, products=products)
        LOGITS_PER_CHUNK[device.type] = usual
        bench.time(f"{what}, no gradient", "own", without_gradient, products=products / 2)
        fused.DEVICE_TYPES.clear()
        for chunk in (2**26, usual):
            LOGITS_PER_CHUNK[device.type] = chunk
            bench.time(what, f"eager, {chunk // sizes.vocabulary} rows", run, products=products)
        bench.time(f"{what}, no gradient", "eager", without_gradient, products=products / 2)
    finally:
        LOGITS_PER_CHUNK[device.type] = usual
        fused.DEVICE_TYPES.update(types)

    part, weight = hidden[: sizes.logit_rows], head.weight.detach().t()
    flops = 2 * len(part) * sizes.hidden * sizes.vocabulary
    bench.time(f"logits of {len(part)} rows", "bf16", lambda: part @ weight, products=flops)
    if device.type == "cuda":
        wide = torch.float32
        bench.time(
            f"logits of {len(part)} rows", "fp32", lambda: torch.mm(part, weight, out_dtype=wide), products=flops
        )
        back = torch.randn(len(part), sizes.vocabulary, device=device, dtype=dtype)
        name = f"hidden gradient of {len(part)} rows"
        bench.time(name, "bf16", lambda: back @ head.weight, products=flops)
        bench.time(name, "fp32", lambda: torch.mm(back, head.weight, out_dtype=wide), products=flops)


def time_trl(bench: Bench, sizes: Sizes) -> None:
    """TRL's LM head, forward and backward."""
    weight, hidden = (
        torch.randn(rows, sizes.hidden, device=bench.device, dtype=torch.bfloat16)
        for rows in (sizes.vocabulary, sizes.tokens)
    )
    targets = torch.randint(0, sizes.vocabulary, (sizes.tokens,), device=bench.device)

    def run() -> None:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        h = hidden.detach().requires_grad_()
        ChunkedLogProbFunction.apply(h, weight, None, targets, 1.0, 32768, None, 1.0, ())[0].sum().backward()

    products = 4 * sizes.tokens * sizes.hidden * sizes.vocabulary
    bench.time(f"head, {sizes.tokens} tokens", "TRL", run, products=products)


def time_optimizers(bench: Bench, sizes: Sizes) -> None:
    """A step of AdamW over an adapter's tensors."""

    def make(kind: str) -> torch.optim.Optimizer:
        shape = (32, sizes.hidden)
        parameters = [nn.Parameter(torch.randn(shape, device=bench.device)) for _ in range(sizes.parameters)]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        if kind == "bitsandbytes, 8 bits":
            import bitsandbytes

            return bitsandbytes.optim.AdamW8bit(parameters)
        return torch.optim.AdamW(parameters, fused=kind == "torch, fused", foreach=kind == "torch, foreach")

    made: dict[str, torch.optim.Optimizer] = {}

    def step(kind: str) -> None:
        if kind not in made:
            made[kind] = make(kind)
        made[kind].step()

    for kind in ("torch, fused", "torch, foreach", "bitsandbytes, 8 bits"):
        bench.time(f"AdamW, {sizes.parameters} tensors", kind, lambda k=kind: step(k))


def unpacking(sizes: Sizes, device: torch.device) -> Operation:
    """A layer's NF4 weight to bfloat16."""
    from bitsandbytes.functional import quantize_4bit

    values = torch.randn(sizes.intermediate, sizes.hidden, device=device, dtype=torch.bfloat16)
    packed, state = quantize_4bit(values, quant_type="nf4", compress_statistics=True)
    what = f"NF4 unpacked, {sizes.intermediate} x {sizes.hidden}"
    return Operation(what, nf4._unpacked, (packed, *nf4._parts(state)), 2.5 * values.numel())


def time_liger(bench: Bench, sizes: Sizes) -> None:
    """Liger's norm and gated product, where it is installed."""
    x, weight = (
        torch.randn(s, device=bench.device, dtype=torch.bfloat16) for s in ((sizes.rows, sizes.hidden), sizes.hidden)
    )
    gate, up = (
        torch.randn(sizes.rows, sizes.intermediate, device=bench.device, dtype=torch.bfloat16) for _ in range(2)
    )

    def liger_norm() -> None:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        LigerRMSNormFunction.apply(x, weight, 1e-6, 0.0, "llama", False)

    def liger_gated() -> None:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        LigerSiLUMulFunction.apply(gate, up)

    bench.time(f"norm {sizes.rows} x {sizes.hidden}, forward", "liger", liger_norm, 4 * x.numel())
    name = f"silu(gate) * up, {sizes.rows} x {sizes.intermediate}, forward"
    bench.time(name, "liger", liger_gated, 6 * gate.numel())


def time_compiled(bench: Bench, sizes: Sizes) -> None:
    """The eager code, compiled by torch for any number of rows."""
    # On a CPU every one would be built by a C++ compiler, which takes minutes and says nothing of a GPU.
    for operation in operations(sizes, bench.device) if bench.device.type == "cuda" else ():
        compiled = torch.compile(operation.fused.eager, dynamic=True)
        run = torch.no_grad()(lambda c=compiled, a=operation.arguments: c(*a))
        bench.time(operation.what, "compiled", run, operation.moved)


def time_attention(bench: Bench, sizes: Sizes) -> None:
    """Attention with shared prompts, both ways: ours, FlexAttention with a mask of blocks, and flash attention
    over a row for each completion.
    """
    device, dtype = bench.device, torch.bfloat16 if bench.device.type == "cuda" else torch.float32
    width = sizes.rows // 16
    prompt, answer = width // 5, 2 * width // 5
    row = tuple(PromptSpan(i * width, prompt, (answer, width - prompt - answer)) for i in range(16))
    total = row[-1].end

    def random(heads: int, length: int) -> torch.Tensor:
        return torch.randn(1, heads, length, sizes.head_width, device=device, dtype=dtype, requires_grad=True)

    q, k, v = random(sizes.heads, total), random(sizes.key_heads, total), random(sizes.key_heads, total)
    scale = sizes.head_width**-0.5
    seen = 16 * (prompt**2 / 2 + sum(n * prompt + n * n / 2 for n in (answer, width - prompt - answer)))
    products = 7 * 2 * sizes.heads * sizes.head_width * seen
    what = f"attention, {total} positions, 16 prompts with 2 completions"

    def both(function: Callable[[], torch.Tensor], inputs: tuple[torch.Tensor, ...] = (q, k, v)) -> None:
        torch.autograd.grad(function().float().sum(), inputs)

    bench.time(what, "own", lambda: both(lambda: attend(q, k, v, row, scale)), products=products)

    if device.type != "cuda":  # FlexAttention has no backward pass there
        return
    # FlexAttention, as its documentation has it: the mask is made anew for every pass.
    group = torch.arange(total, device=device) // width
    inside = torch.arange(total, device=device) % width
    branch = (inside >= prompt).int() + (inside >= prompt + answer).int()

    def sees(batch: Any, head: Any, at: Any, key: Any) -> Any:
        del batch, head
        return (at >= key) & (group[at] == group[key]) & ((branch[key] == 0) | (branch[key] == branch[at]))

    make_mask = torch.compile(create_block_mask)

    def mask() -> Any:
        return make_mask(sees, None, None, total, total, device=device)

    flex = torch.compile(flex_attention)
    bench.time(what, "flex, its mask", mask)
    blocks = mask()
    bench.time(
        what, "flex", lambda: both(lambda: flex(q, k, v, block_mask=blocks, scale=scale, enable_gqa=True)),
        products=products,
    )  # fmt: skip
    with torch.no_grad():
        expected = attend(q, k, v, row, scale).float()
        found = flex(q, k, v, block_mask=blocks, scale=scale, enable_gqa=True).transpose(1, 2).float()
    note(bench.out, "micro", what=what, way="flex", against_own=((found - expected).norm() / expected.norm()).item())

    flat = tuple(PromptSpan(i * (prompt + answer), prompt, (answer,)) for i in range(32))
    rows = [random(heads, flat[-1].end) for heads in (sizes.heads, sizes.key_heads, sizes.key_heads)]
    bench.time(what, "a row for each completion", lambda: both(lambda: attend(*rows, flat, scale), tuple(rows)))


def time_flash_3(bench: Bench, sizes: Sizes) -> None:
    """FlashAttention 3 in torch's operations, where its library is installed."""
    torch.nn.attention.activate_flash_attention_impl("FA3")
    try:
        time_attention(bench, sizes)
    finally:
        torch.nn.attention.restore_flash_attention_impl()


PARTS: dict[str, Callable[[Bench, Sizes], None]] = {
    "operations": time_operations,
    "head": time_head,
    "products": time_products,
    "optimizers": time_optimizers,
    "trl": time_trl,
    "liger": time_liger,
    "attention": time_attention,
    "flash3": time_flash_3,
    "compiled": time_compiled,
}


def main() -> None:
    """All lines, the most wanted ones first; `--only` names the parts."""
    parser = argparse.ArgumentParser(description="Time what a pass is made of.")
    parser.add_argument("--only", nargs="+", choices=PARTS)
    parser.add_argument("--dry", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--seconds", type=float, default=45)
    given = parser.parse_args()
    dry = given.dry or is_dry()
    device = torch.device("cuda" if torch.cuda.is_available() and not dry else "cpu")
    if device.type == "cpu" and not dry:
        parser.error("no GPU is visible here; --dry tries the script on a CPU")
    sizes = TINY if dry else Sizes()
    bench = Bench(out_folder(), given.seconds, device)
    chosen = [name for name in PARTS if not given.only or name in given.only]
    for name in chosen:
        try:
            PARTS[name](bench, sizes)
        except Exception as error:
            note(bench.out, "micro", what=name, error=f"{type(error).__name__}: {error}"[:300])


if __name__ == "__main__":
    main()
