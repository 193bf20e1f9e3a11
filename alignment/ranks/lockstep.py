"""Passes that the ranks of a machine run together, because each holds a part of the base's weights.

A layer runs once all ranks have gathered its weights, so every rank must run as many passes as any other. Before each
pass a rank says what it does next, and those that have nothing to do join in with a pass of two tokens that leaves no
trace. So no task needs to know how many passes the others have.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Turn(enum.IntEnum):
    """What a rank does next. Where ranks differ the largest comes first, and the others join in."""

    done = 0
    backward = 1
    forward = 2
    trained_forward = 3


class Lockstep:
    """Keeps the passes of a machine's ranks in step.

    Args:
        group: of the machine's ranks, for numbers of a CPU.
        idle: runs a pass of next to nothing through the sharded layers; returns its hidden states.
        trained: gives the tensors that train, whose gradients idle passes leave as they are.
        device: where the layers are.
        alone: called before a pass; on rank 0 it asks the others to join, unless they have a task already.
        lost: what an error of a collective means.

    Attributes:
        in_pass: whether a pass has begun and not ended, so that others may wait for this rank.
    """

    def __init__(
        self,
        group: Any,
        idle: Callable[[], Tensor],
        trained: Callable[[], Sequence[Tensor]],
        device: torch.device,
        alone: Callable[[], None],
        lost: Callable[[RuntimeError], Exception],
    ) -> None:
        self._group = group
        self._idle = idle
        self._trained = trained
        self._devices = [device] if device.type == "cuda" else []
        self._alone = alone
        self.lost = lost
        self.in_pass = False
        self._is_idle = False
        self._waiting: list[Tensor] = []  # outputs of idle passes whose backward pass is still to come

    def before_forward(self) -> None:
        """Wait for this rank's turn to run a forward pass."""
        if not self._is_idle:
            self._alone()
            self._take(Turn.trained_forward if torch.is_grad_enabled() else Turn.forward)

    def before_backward(self) -> None:
        """Wait for this rank's turn to run the backward pass of its forward passes."""
        self._take(Turn.backward)

    def after(self) -> None:
        """Called when a pass has ended."""
        self.in_pass = self._is_idle

    def finish(self) -> None:
        """Join in until no rank has a pass left."""
        self._take(Turn.done)
        self.in_pass = False
        self._waiting.clear()

    def _take(self, wanted: Turn) -> None:
        while (turn := self._next(wanted)) is not wanted:
            self._join_in(turn)

    def _next(self, wanted: Turn) -> Turn:
        import torch.distributed as dist

        value = torch.tensor(int(wanted))
        self.in_pass = False
        try:
            dist.all_reduce(value, dist.ReduceOp.MAX, group=self._group)
        except RuntimeError as error:
            raise self.lost(error) from error
        self.in_pass = True
        return Turn(int(value))

    def _join_in(self, turn: Turn) -> None:
        self._is_idle = True
        with torch.random.fork_rng(devices=self._devices):
            if turn is Turn.backward:
                self._idle_backward()
            else:
                with torch.set_grad_enabled(turn is Turn.trained_forward):
                    hidden = self._idle()
                if hidden.requires_grad:
                    self._waiting.append(hidden)
        self._is_idle = False

    def _idle_backward(self) -> None:
        trained = self._trained()
        kept = [tensor.grad for tensor in trained]
        for tensor in trained:
            tensor.grad = None
        if self._waiting:
            torch.autograd.backward(self._waiting, [torch.zeros_like(hidden) for hidden in self._waiting])
        self._waiting.clear()
        for tensor, grad in zip(trained, kept, strict=True):
            tensor.grad = grad
