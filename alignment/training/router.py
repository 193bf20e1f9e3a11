"""The load-balancing loss of a mixture's routers, where a stage asks for it.

It is the auxiliary loss of Switch Transformers (Fedus et al. 2021, arXiv:2101.03961, equations 4 to 6): the number of
experts times the sum over experts of the share of positions that chose one and its mean probability, over all layers.
It belongs to training: passes without gradient, such as a reference's, never compute it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from alignment.errors import require


def load_balance(logits: list[Tensor], top_k: int) -> Tensor:
    """The loss of one pass.

    Args:
        logits: of each layer's router, (positions, experts).
        top_k: experts of a position.

    Returns:
        A scalar in fp32; its least value is `top_k`, where every expert is as likely and as busy as every other.
    """
    experts = logits[0].shape[-1]
    chosen = likely = logits[0].new_zeros(experts, dtype=torch.float32)
    rows = 0
    for layer in logits:
        shares = layer.float().softmax(-1)
        index = shares.detach().topk(top_k, -1).indices.flatten()
        chosen = chosen.scatter_add(0, index, torch.ones_like(index, dtype=torch.float32))
        likely = likely + shares.sum(0)
        rows += len(shares)
    loss: Tensor = experts * (chosen / rows * (likely / rows)).sum()
    return loss


def routers(model: nn.Module) -> list[tuple[nn.Module, int]]:
    """The routers of a mixture of experts, and where in their output the logits are, as transformers records them."""
    found: dict[int, tuple[nn.Module, int]] = {}
    modules = list(model.modules())
    for part in modules:
        recorders = (getattr(type(part), "_can_record_outputs", None) or {}).get("router_logits", ())
        for recorder in recorders if isinstance(recorders, (list, tuple)) else [recorders]:
            kind: Any = getattr(recorder, "target_class", recorder)
            found |= {id(m): (m, getattr(recorder, "index", 0)) for m in modules if isinstance(m, kind)}
    return list(found.values())


def require_routers(model: Any, coefficient: float, setting: str) -> None:
    """Refuse a coefficient for a model whose routers are not known.

    Raises:
        UserError: it has none, or does not say how many experts they choose.
    """
    known = bool(routers(model)) and bool(getattr(model.config.get_text_config(), "num_experts_per_tok", None))
    require(
        not coefficient or known,
        f"{setting}={coefficient:g}: a {model.config.model_type} has no router that it could balance: set it to 0.",
    )


class RouterLoss:
    """Collects what the routers of a policy say in passes with gradient.

    Args:
        model: the policy.
        coefficient: of the loss; 0 collects nothing.
        setting: the key of the coefficient.

    Raises:
        UserError: a coefficient for a model without routers.
    """

    def __init__(self, model: Any, coefficient: float, setting: str) -> None:
        self.coefficient = coefficient
        self._logits: list[Tensor] = []
        self._collects = False
        require_routers(model, coefficient, setting)
        if coefficient:
            self._top_k = model.config.get_text_config().num_experts_per_tok
            for router, index in routers(model):
                router.register_forward_hook(partial(self._keep, index))

    def _keep(self, index: int, module: nn.Module, inputs: Any, output: Any) -> None:
        del module, inputs
        if self._collects and torch.is_grad_enabled():
            logits = output[index] if isinstance(output, tuple) else output
            self._logits.append(logits.reshape(-1, logits.shape[-1]))

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Collect in here; the layers that a backward pass runs again say nothing new."""
        self._logits, self._collects = [], bool(self.coefficient)
        try:
            yield
        finally:
            self._collects = False

    def take(self) -> Tensor | None:
        """The loss of the pass that was collected, without the coefficient; None where nothing was asked for."""
        if not self._logits:
            return None
        logits, self._logits = self._logits, []
        return load_balance(logits, self._top_k)
