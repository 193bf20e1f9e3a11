"""4-bit weights on a CPU are unpacked to their values, whatever the processor's own kernel does."""

import pytest
import torch

from alignment.kernels.cpu_unpacking import mend_unpacking

pytest.importorskip("bitsandbytes")
BLOCK = 64
SHAPES = [(4, 64), (4, 128), (64, 96), (64, 80), (64, 32), (3, 32), (5, 30), (2, 3, 48), (7, 9)]


def values(packed, absmax, code):
    """By hand: the high half of a byte first, and one statistic for 64 values in a row."""
    halves = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten().long()
    found = code[halves]
    return found * absmax.repeat_interleave(BLOCK)[: len(found)]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_of_any_width_are_unpacked(shape, nested):
    from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise
    from bitsandbytes.nn import Params4bit

    mend_unpacking()
    torch.manual_seed(0)
    weight = Params4bit(torch.randn(shape), requires_grad=False, quant_type="nf4", compress_statistics=nested).to("cpu")
    state = weight.quant_state
    absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset if nested else state.absmax
    count = torch.Size(shape).numel()
    expected = values(weight.data, absmax, state.code)[:count].view(shape)
    with torch.compiler.set_stance("force_eager"):  # what it compiles where rows are odd takes longer than all the rest
        found = dequantize_4bit(weight.data, state)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


class Kernel:
    """Of a processor: it begins a new block with each row, as bitsandbytes' own does with AVX-512, or does not."""

    def __init__(self, wrong):
        self.wrong = wrong

    def call_boxed(self, keys, packed, absmax, blocksize, quant_type, shape, dtype):
        from bitsandbytes.functional import get_4bit_type

        found = values(packed, torch.ones(10**4), get_4bit_type(quant_type, device="cpu"))
        width = shape[-1]
        place = torch.arange(len(found))
        if self.wrong:
            place = (place // width) * width // blocksize * blocksize + place % width
        return (found * absmax[(place // blocksize).clamp(max=len(absmax) - 1)]).view(shape)


@pytest.mark.parametrize("wrong", [True, False])
def test_a_wrong_kernel_is_replaced_and_a_right_one_left_alone(wrong, monkeypatch, caplog):
    replaced = []

    class Library:
        def __init__(self, *names):
            pass

        def impl(self, name, kernel, key, allow_override):
            replaced.append((name, kernel, key))

    caplog.set_level("INFO")
    monkeypatch.setattr(torch.library, "get_kernel", lambda *names: Kernel(wrong))
    monkeypatch.setattr(torch.library, "Library", Library)
    kept = mend_unpacking.__wrapped__()
    assert (kept is not None) == bool(replaced) == bool(caplog.records) == wrong
    for name, kernel, key in replaced:
        packed, absmax = torch.arange(192, dtype=torch.uint8)[:, None], torch.arange(1.0, 7.0)
        found = kernel(packed, absmax, BLOCK, "nf4", (4, 96), torch.float32)
        expected = Kernel(False).call_boxed(None, packed, absmax, BLOCK, "nf4", (4, 96), torch.float32)
        assert (name, key) == ("dequantize_4bit", "CPU")
        assert torch.equal(found, expected)
