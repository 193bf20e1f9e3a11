"""The machine, and whether its attention kernel computes what the shared layout needs."""

from __future__ import annotations

import shutil

import torch
import transformers

from alignment.kernels.attention import PromptSpan, _masked_attention, _VariableLengthAttention
from tests.gpu.lines import note, out_folder

ROW = (PromptSpan(0, 170, (330, 300)), PromptSpan(800, 33, (0, 65)), PromptSpan(898, 1, (400, 1, 128)))
"""Prompts and completions around the kernel's blocks of 64 and 128."""


def main() -> None:
    """Note the machine; compare one row's attention and its gradients with masked attention in fp32."""
    out = out_folder()
    gpu = torch.cuda.is_available()
    note(
        out, "environment", torch=torch.__version__, transformers=transformers.__version__,
        gpu=str(torch.cuda.get_device_properties(0)) if gpu else None, gpus=torch.cuda.device_count(),
        gcc=shutil.which("gcc"), cuda=torch.version.cuda,
    )  # fmt: skip
    if not gpu:
        return
    note(out, "environment", memory=torch.cuda.mem_get_info())
    torch.manual_seed(0)
    for head in (64, 128):
        shapes = [(1, heads, ROW[-1].end, head) for heads in (16, 8, 8)]
        inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
        wide = [x.detach().float().requires_grad_() for x in inputs]
        found, wanted = _VariableLengthAttention.apply(*inputs, ROW, 0.09), _masked_attention(*wide, ROW, 0.09)
        weights = torch.randn_like(wanted)
        gradients = torch.autograd.grad((found * weights).sum(), inputs)
        expected = torch.autograd.grad((wanted * weights).sum(), wide)
        note(
            out, "attention", head=head, relative=distance(found, wanted),
            gradients=[distance(g, e) for g, e in zip(gradients, expected, strict=True)],
        )  # fmt: skip


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The difference as a share of what is wanted."""
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


if __name__ == "__main__":
    main()
