"""A frozen copy of the policy, in memory beside the one that trains."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from alignment.errors import require
from alignment.policy.adapter import has_adapter, starts_at_base
from alignment.policy.adapter_kinds import is_product_update
from alignment.scoring.logps import enable_scoring


def _joined(parts: list[Tensor], is_up: bool, experts: int, gone: int) -> Tensor:
    """The ranks of all parts side by side, without the first `gone`.

    Args:
        parts: (experts * r, in), expert by expert; or of B, where `is_up`, (out, r * experts), rank by rank. A layer
            that is none of experts counts as one.
    """
    if is_up:
        ranks = torch.cat([part.reshape(len(part), -1, experts) for part in parts], 1)
        return ranks[:, gone:].reshape(len(parts[0]), -1).clone()
    ranks = torch.cat([part.reshape(experts, -1, part.shape[-1]) for part in parts], 1)
    return ranks[:, gone:].reshape(-1, parts[0].shape[-1]).clone()


def most_updates(share: float) -> int:
    """How many updates of the policy a mixed LoRA is made of at most, before the oldest one's share is lost in fp32."""
    least, left = torch.finfo(torch.float32).eps, share
    count = 1
    while share < 1 and (left := left * (1 - share)) >= least:
        count += 1
    return count


class FrozenPolicy:
    """A frozen copy of the policy as it is now, beside the one that trains; `mix` moves it.

    With an adapter that has no effect yet it is the base with the adapter switched off. With any other adapter it is a
    frozen copy of all tensors that train, which take their places while the copy is active. Without an adapter it is a
    copy of the model.

    A mixed LoRA is exact in weight space; no other adapter can be mixed. Mixing A with A and B with B would give wrong
    products, so the updates are concatenated: for shares s_i of the updates B_i A_i, sum_i s_i B_i A_i =
    [s_1 B_1, s_2 B_2, ...] [A_1; A_2; ...].
    Every mix adds the policy's rank, until the oldest share is lost in rounding and its update is dropped: the rank
    grows to 17 times the policy's for a mix of 0.6 in fp32.

    Attributes:
        form: which of the three it is, in words.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._copy: nn.Module | None = None
        self._adapter: dict[str, nn.Parameter] = {}
        self._shares: list[float] = []
        if not has_adapter(model):
            self.form = "copy of the model"
            self._copy = copy.deepcopy(model).requires_grad_(False)
            del self._copy.forward  # bound to the original: the copy needs its own
            enable_scoring(self._copy)
        elif starts_at_base(model):
            self.form = "adapter switched off"
        else:
            self.form = "frozen copy of the adapter"
            self.mix(1.0)

    @torch.no_grad()
    def mix(self, share: float) -> None:
        """Become `share` times the policy as it is now plus 1 - `share` times what this copy was.

        Raises:
            UserError: `share` is not in (0, 1], or an adapter is to be mixed that is no plain LoRA.
        """
        require(0 < share <= 1, f"A reference mixes in a share of the policy in (0, 1], not {share}.")
        require(
            share == 1 or self._copy is not None or is_product_update(self._model),
            "Only a plain LoRA or a whole model can be mixed: set reference.sync_mix=1, or adapter=lora.",
        )
        if self._copy is not None:
            for parameter, trained in zip(self._copy.parameters(), self._model.parameters(), strict=True):
                parameter.lerp_(trained, share)
            return
        own = {name: p.detach() for name, p in self._model.named_parameters() if p.requires_grad}
        own = {name: p for name, p in own.items() if ".lora_iec." not in name}  # that is in A and B already
        shares = [old * (1 - share) for old in self._shares]
        least = torch.finfo(next(iter(own.values())).dtype).eps
        lost = next((i for i, old in enumerate(shares) if old >= least), len(shares))
        self._shares = [*shares[lost:], share]
        for name, tensor in own.items():
            is_up = ".lora_B." in name or ".lora_embedding_B." in name
            parts = [share * tensor if is_up else tensor.clone()]
            if len(self._shares) > 1:
                parts.insert(0, (1 - share) * self._adapter[name] if is_up else self._adapter[name])
                layer = self._model.get_submodule(name.split(".lora_")[0])
                experts = getattr(layer, "num_experts", 1)
                rank = tensor.shape[1 if is_up else 0] // experts
                parts = [_joined(parts, is_up, experts, lost * rank)]
            self._adapter[name] = nn.Parameter(parts[0], requires_grad=False)

    @contextmanager
    def active(self) -> Iterator[nn.Module]:
        """Yield the model to score with; it is the frozen copy only inside the `with` block."""
        if self._copy is not None:
            yield self._copy
        elif not self._adapter:
            with self._model.disable_adapter():
                yield self._model
        else:
            own = self._swap(self._adapter)
            try:
                yield self._model
            finally:
                self._swap(own)

    def _swap(self, tensors: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Put tensors into the model; returns the ones that were there."""
        replaced = {}
        for name, tensor in tensors.items():
            module_name, _, key = name.rpartition(".")
            module = self._model.get_submodule(module_name)
            replaced[name] = module._parameters[key]
            module._parameters[key] = tensor
        return replaced  # type: ignore[return-value]

    def state(self) -> dict[str, Tensor]:
        """What `load_state` needs to restore this copy beside a model with the same start."""
        if self._copy is not None:
            return {name: p.detach() for name, p in self._copy.named_parameters()}
        return {**self._adapter, "shares": torch.tensor(self._shares, dtype=torch.float64)}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""
        if self._copy is not None:
            for name, parameter in self._copy.named_parameters():
                parameter.copy_(state[name])
            return
        self._shares = state["shares"].tolist()
        device = next(self._model.parameters()).device
        self._adapter = {
            name: nn.Parameter(tensor.to(device), requires_grad=False)
            for name, tensor in state.items()
            if name != "shares"
        }

    def close(self) -> None:
        """Drop the copy."""
        self._copy = None
        self._adapter = {}
