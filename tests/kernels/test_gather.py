"""Rows selected by position, and the flash kernel of variable lengths as far as it can be called without a GPU."""

import pytest
import torch

from alignment.kernels import attention
from alignment.kernels.attention import PromptSpan
from alignment.kernels.gather import select_rows, sum_rows

ROW = (PromptSpan(0, 5, (4, 3, 1)), PromptSpan(13, 2, (0, 6)), PromptSpan(21, 7, (2,)), PromptSpan(30, 1, (0, 0)))


def test_selected_rows_and_their_gradient():
    """Positions several times, once and never."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    positions = torch.tensor([4, 1, 4, 8, 0, 4, 1])
    weights = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    found, expected = select_rows(x, positions), x.index_select(0, positions)
    assert torch.equal(found, expected)
    gradients = [torch.autograd.grad((out * weights).sum(), x)[0] for out in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-14, atol=1e-14)
    assert not gradients[0][[2, 3, 5, 6, 7]].any()


def test_sixteen_bits_are_summed_in_32():
    """1 and 2^-8 a hundred times: rounded to bfloat16 after each addition, the sum would remain 1."""
    values = torch.full((101, 8), 2.0**-8, dtype=torch.bfloat16)
    values[0] = 1
    total = sum_rows(values, torch.arange(101), torch.tensor([0]))
    assert total.dtype is torch.bfloat16 and torch.equal(total, (1 + 100 * 2.0**-8) * torch.ones(1, 8).bfloat16())


def test_every_gathered_key_returns_to_its_position():
    lengths = attention._variable_lengths(ROW, torch.device("cpu"))
    counts = sum_rows(torch.ones(len(lengths.keys), 1), lengths.order, lengths.starts)
    assert counts.flatten().tolist() == torch.bincount(lengths.keys, minlength=ROW[-1].end).tolist()
    assert counts.min() == 1 and counts.max() == 3
    assert lengths.keys[lengths.order].tolist() == sorted(lengths.keys.tolist())


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_torch_takes_the_calls_of_its_kernel(heads, monkeypatch):
    """On the meta device: the arguments, the shapes, and gradients laid out like the projections."""
    lengths = attention._variable_lengths(ROW, torch.device("meta"))
    monkeypatch.setattr(attention, "_variable_lengths", lambda row, device: lengths)
    shapes = [(1, ROW[-1].end, count, 64) for count in (heads[0], heads[1], heads[1])]
    inputs = [torch.empty(s, device="meta", dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for s in shapes]
    out = attention._VariableLengthAttention.apply(*inputs, ROW, 0.1)
    assert out.shape == shapes[0] and out.is_contiguous()
    for gradient, shape in zip(torch.autograd.grad(out.sum(), inputs), shapes, strict=True):
        assert gradient.transpose(1, 2).shape == shape and gradient.transpose(1, 2).is_contiguous()
