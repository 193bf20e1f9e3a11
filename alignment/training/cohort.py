"""Cohorts: several preference trainings in one process that share one frozen base.

Each member keeps its own policy (its own modules and adapter on the shared base tensors), trainer, optimizer and
files. It trains in its own greenlet, and one greenlet runs at a time. The members take turns: one step each, with their
own passes. With `trainer.joint_passes=true`, which is experimental, they share their passes where these fit:

1. A member that wants to score a micro-batch with gradient waits for the others.
2. The last one to arrive runs the base on all micro-batches at once; each adapter applies to its member's rows.
3. Each member takes its slice of the result and computes its loss and the derivative by that slice.
4. Once all have done so, one backward pass carries the derivatives to all adapters.

Up to rounding, a member computes the same whoever else takes part.
"""

from __future__ import annotations

import copy
import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from torch.nn import functional as F

from alignment.kernels.attention import SharedRow, enable_shared_prompts
from alignment.kernels.base import is_patched
from alignment.kernels.linear import JointLinear, Segments, is_lora_layer
from alignment.kernels.patch import patch_layers
from alignment.losses import Quantity
from alignment.policy.layers import decoder_layers, disable_dropout
from alignment.scoring.layout import MicroBatch
from alignment.scoring.logps import enable_scoring, score_tokens
from alignment.scoring.token_scores import TokenScores
from alignment.training.objective import PassRunner

log = logging.getLogger(__name__)

T = TypeVar("T")


def share(base: nn.Module) -> nn.Module:
    """A second model with its own modules on the tensors of a base model, after `enable_scoring` on both."""
    kept: list[Any] = [*base.parameters(), *base.buffers()]
    kept += [state for p in base.parameters() if (state := getattr(p, "quant_state", None)) is not None]
    other: Any = copy.deepcopy(base, {id(tensor): tensor for tensor in kept})
    del other.forward  # bound to the first model: the second needs its own
    enable_scoring(other)
    return other


def join(batches: Sequence[MicroBatch]) -> tuple[MicroBatch, list[int]]:
    """Join micro-batches of one layout into one pass.

    Shared rows are laid end to end, without padding; flat rows are padded to the longest of all.

    Returns:
        The joined batch, and how many rows of hidden states each micro-batch has in it, in order.

    Raises:
        NotImplementedError: the prompts of a batch run before its completions, in a call of their own.
    """
    if any(batch.fork is not None for batch in batches):
        raise NotImplementedError("their prompts hand states to their completions")
    tokens: list[Tensor] = []
    scored: list[Tensor] = []
    sizes: list[int] = []
    spans: SharedRow = ()
    width = max(batch.input_ids.shape[1] for batch in batches)
    for batch in batches:
        start, (rows, own) = sum(sizes), batch.input_ids.shape
        if batch.shared_row is not None:
            spans += tuple(replace(span, start=span.start + start) for span in batch.shared_row)
            tokens.append(batch.input_ids)
            scored.append(batch.score_positions + start)
            sizes.append(own)
        else:
            tokens.append(F.pad(batch.input_ids, (0, width - own)))
            scored.append(start + batch.score_positions // own * width + batch.score_positions % own)
            sizes.append(rows * width)
    joined = MicroBatch(
        indices=(),
        input_ids=torch.cat(tokens, dim=1 if spans else 0),
        score_positions=torch.cat(scored),
        targets=torch.cat([batch.targets for batch in batches]),
        offsets=batches[0].offsets.new_zeros(0),
        num_tokens=sum(batch.num_tokens for batch in batches),
        shared_row=spans or None,
        position_ids=torch.cat([b.position_ids for b in batches if b.position_ids is not None], 1) if spans else None,
    )
    return joined, sizes


class JointModel:
    """A base model that scores micro-batches of several policies in one pass, each with the policy's adapter.

    Args:
        base: frozen, as it was loaded, without an adapter; its tensors are shared.
        policies: the policy of each member, made from `share(base)`, with adapters on linear layers alone.
    """

    def __init__(self, base: nn.Module, policies: Mapping[int, nn.Module]) -> None:
        self._segments = Segments()
        self._model = share(base).train()
        self._policies = policies
        disable_dropout(self._model)
        layers = {member: adapted_layers(policy) for member, policy in policies.items()}
        for name in sorted(set().union(*layers.values())):
            base_layer = self._model.get_submodule(name)
            found = {member: own[name] for member, own in layers.items() if name in own}
            joint = JointLinear(base_layer, found, self._segments)
            self._model.set_submodule(name, joint)
        patch_layers(self._model)

    def score(
        self, members: Sequence[int], batches: Sequence[MicroBatch], quantities: Sequence[frozenset[Quantity]]
    ) -> list[TokenScores]:
        """Scores of each of these members' micro-batches, as `score_tokens` gives them for its policy."""
        for layer, *theirs in zip(
            decoder_layers(self._model), *(decoder_layers(self._policies[m]) for m in members), strict=True
        ):
            layer.gradient_checkpointing = any(own.gradient_checkpointing for own in theirs)
            layer._gradient_checkpointing_func = getattr(theirs[0], "_gradient_checkpointing_func", None)
        batch, sizes = join(batches)
        if batch.shared_row is not None:
            enable_shared_prompts(self._model)
        self._segments.set(zip(members, sizes, strict=True))
        wanted = frozenset[Quantity]().union(*quantities)
        parts = score_tokens(self._model, batch, wanted).split([len(b.targets) for b in batches])
        return [part.select(own) for part, own in zip(parts, quantities, strict=True)]


def adapted_layers(policy: Any) -> dict[str, nn.Module]:
    """The layers that have an adapter, by their names in the base.

    Raises:
        ValueError: something else than a patched linear layer is trained, or nothing is.
    """
    layers = {name: module for name, module in policy.get_base_model().named_modules() if is_lora_layer(module)}
    trained = {id(p) for layer in layers.values() for p in layer.parameters() if p.requires_grad}
    others = [name for name, p in policy.named_parameters() if p.requires_grad and id(p) not in trained]
    head = policy.get_output_embeddings()  # its rows are not those of the layers
    foreign = others or [
        n for n, layer in layers.items() if layer is head or not is_patched(layer) or hasattr(layer, "parameter_name")
    ]
    if foreign or not layers:
        raise ValueError(
            f"a cohort trains only adapters on linear layers, not {foreign[0] if foreign else 'whole weights'}"
        )
    return layers


@dataclass(slots=True)
class _Request:
    """A micro-batch that a member waits to have scored."""

    batch: MicroBatch
    quantities: frozenset[Quantity]

    def alone(self, policy: nn.Module) -> TokenScores:
        return score_tokens(policy, self.batch, self.quantities)


@dataclass(slots=True)
class _Pass:
    """A joint pass whose backward pass is still to come.

    Attributes:
        values: each member's slice of the result, with its graph.
        leaves: the detached copy that each member derives its loss by.
        open: the members that have not finished their backward call yet.
    """

    values: dict[int, Tensor]
    leaves: dict[int, Tensor]
    open: set[int]


class CohortSlot(PassRunner):
    """One of the cohort's concurrent trainings, as that training sees it."""

    def __init__(self, cohort: Cohort, index: int) -> None:
        self._cohort = cohort
        self._index = index
        self._is_apart = False

    @property
    def width(self) -> int:
        """How many members train at once, at most."""
        return self._cohort.width

    @property
    def is_joint(self) -> bool:
        """Whether this member's passes are joint with others'."""
        return not self._cohort.is_apart

    def once(self, name: str, make: Callable[[], T]) -> T:
        """Something that all members share; the first to ask makes it."""
        return self._cohort.once(name, make)

    def base(self, load: Callable[[], nn.Module]) -> nn.Module:
        """A model for this member on the cohort's base tensors; the first member to ask loads them."""
        model = self._cohort.base(load)
        self._is_apart = self._cohort.is_apart
        return model

    def attach(self, policy: nn.Module) -> None:
        """Use this policy's adapter for the slot's rows of joint passes.

        Raises:
            ValueError: something else than a patched linear layer is trained, or nothing is.
        """
        self._cohort.attach(self._index, policy)

    def score(self, model: nn.Module, batch: MicroBatch, quantities: frozenset[Quantity]) -> TokenScores:
        """As a pass of its own, but the result is a leaf: its gradient moves on once all members have theirs."""
        return self._cohort.score(self._index, model, batch, quantities)

    def finish(self) -> None:
        """Wait until the gradients of the step have arrived."""
        self._cohort.finish(self._index)

    def separate(self) -> bool:
        """Let all members run their own passes from now on, because joint ones need too much memory."""
        was_apart, self._is_apart = self._is_apart, True
        self._cohort.separate()
        return not was_apart


class Cohort:
    """Trains several policies on one base, `width` at a time.

    Attributes:
        width: how many train at once; when one ends, the next takes its slot.
        is_apart: whether the members take turns with their own passes.

    Args:
        width: as above.
        joint_passes: whether passes are joint where they fit; None: no. Experimental: on a CPU a joint pass costs as
            much per row, needs memory for all rows, and cannot use a weight with the adapter added in, which is the
            fastest way to multiply one member's rows. On a GPU it reads and unpacks each weight once for all members;
            what that gains is not measured yet.
    """

    def __init__(self, width: int, joint_passes: bool | None = None) -> None:
        self.width = width
        self._made: dict[str, Any] = {}
        self._base: nn.Module | None = None
        self._policies: dict[int, nn.Module] = {}
        self._joint: JointModel | None = None
        self._active: set[int] = set()
        self._queue: deque[int] = deque()
        self._until: dict[int, Callable[[], bool]] = {}
        self._requests: dict[int, _Request] = {}
        self._granted: dict[int, TokenScores] = {}
        self._errors: dict[int, BaseException] = {}
        self._pass: _Pass | None = None
        self.is_apart = not joint_passes

    def run(self, trainings: Sequence[Callable[[CohortSlot], T]]) -> list[T | Exception]:
        """Run all trainings; a failing one does not stop the others.

        Returns:
            What each training returned, or the error that ended it.
        """
        results: list[Any] = [None] * len(trainings)
        slots = range(min(self.width, len(trainings)))
        self._active = set(slots)
        self._queue = deque(range(len(slots), len(trainings)))
        self._until = dict.fromkeys(slots, lambda: True)

        def work(slot: int) -> None:
            index: int | None = slot
            while index is not None:
                try:
                    results[index] = trainings[index](CohortSlot(self, slot))
                except Exception as error:
                    results[index] = error
                index = self._next(slot)

        # Greenlets, not threads: each thread would start its own OpenMP team, and these fight for the cores.
        running = {slot: greenlet(partial(work, slot)) for slot in slots}
        turns = list(slots)
        try:
            while turns:
                slot = next(slot for slot in turns if self._until[slot]())
                running[slot].switch()
                turns.remove(slot)
                if not running[slot].dead:
                    turns.append(slot)
        finally:
            for unfinished in filter(None, running.values()):  # after an interrupt
                unfinished.throw()
        return results

    def once(self, name: str, make: Callable[[], T]) -> T:
        """See `CohortSlot.once`."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def base(self, load: Callable[[], nn.Module]) -> nn.Module:
        """See `CohortSlot.base`."""
        if self._base is None:
            self._base = load()
            if self.is_apart:
                log.info("The members of the cohort take turns, each with its own passes.")
        return share(self._base)

    def attach(self, index: int, policy: nn.Module) -> None:
        """See `CohortSlot.attach`."""
        layers: dict[str, Any] = adapted_layers(policy)
        base: Any = self._base
        if base is not None and any(x.base_layer.weight is not base.get_submodule(n).weight for n, x in layers.items()):
            raise ValueError("its adapter began with a part of the base, so it has a base of its own")
        self._policies[index] = policy
        self._joint = None

    def score(self, index: int, model: nn.Module, batch: MicroBatch, quantities: frozenset[Quantity]) -> TokenScores:
        """See `CohortSlot.score`."""
        if self._pass is not None:
            self._pass.open.discard(index)
        if index in self._active and not self.is_apart:
            self._requests[index] = _Request(batch, quantities)
            self._wait(index, lambda: index in self._granted or index not in self._active or self.is_apart)
            self._requests.pop(index, None)
        granted = self._granted.pop(index, None)
        return score_tokens(model, batch, quantities) if granted is None else granted

    def finish(self, index: int) -> None:
        """See `CohortSlot.finish`."""
        if self._pass is not None and index in self._pass.values:
            self._pass.open.discard(index)
            self._wait(index, lambda: self._pass is None)
        elif self.is_apart:  # members take turns: the next step is another's
            self._switch(index, lambda: True)

    def separate(self) -> None:
        """See `CohortSlot.separate`."""
        if not self.is_apart:
            log.warning("The members of the cohort take turns from here on, each with its own passes.")
        self.is_apart = True

    def _wait(self, index: int, done: Callable[[], bool]) -> None:
        self._advance()
        if not (index in self._errors or done()):
            self._switch(index, lambda: index in self._errors or done())
        if (error := self._errors.pop(index, None)) is not None:
            raise error

    def _switch(self, index: int, until: Callable[[], bool]) -> None:
        """Let others run until this holds."""
        self._until[index] = until
        getcurrent().parent.switch()

    def _next(self, slot: int) -> int | None:
        """Forget the training that had this slot; returns the number of the one that gets it, or None."""
        for kept in (self._policies, self._requests, self._granted, self._errors):
            kept.pop(slot, None)
        self._joint = None
        if self._pass is not None:
            self._pass.open.discard(slot)
            self._pass.leaves.pop(slot, None)
        index = self._queue.popleft() if self._queue else None
        if index is None:
            self._active.discard(slot)
        else:
            self._active.add(slot)  # a training with infinite numbers has left it
        self._advance()
        return index

    def _advance(self) -> None:
        """Run the next pass if no member is missing for it."""
        if self._pass is not None and not self._pass.open:
            members = list(self._pass.values)
            self._attempt(members, self._backward)
        while self._pass is None and not self.is_apart and self._active and self._active <= self._requests.keys():
            self._attempt(sorted(self._active), self._forward)

    def _attempt(self, members: Sequence[int], run: Callable[[], None]) -> None:
        """Run it; every member of the pass gets an error of it."""
        try:
            run()
        except Exception as error:
            self._pass = None
            for member in members:
                self._requests.pop(member, None)
                # Without the traceback: it keeps the tensors of the pass alive.
                self._errors[member] = error.with_traceback(None)

    def _forward(self) -> None:
        members = sorted(self._active)
        requests = [self._requests[member] for member in members]
        if len(members) == 1:
            self._granted[members[0]] = requests[0].alone(self._policies[members[0]])
            self._requests.clear()
            return
        if self._joint is None:
            assert self._base is not None
            self._joint = JointModel(self._base, dict(self._policies))
        try:
            scores = self._joint.score(members, [r.batch for r in requests], [r.quantities for r in requests])
        except NotImplementedError as error:
            log.warning("The members of the cohort cannot share their passes: %s.", error)
            self.separate()
            return
        values = {member: part.values for member, part in zip(members, scores, strict=True)}
        if not _finite(list(values.values())) and self._expel():
            return
        leaves = {member: part.detach().requires_grad_() for member, part in values.items()}
        self._granted |= {m: replace(part, values=leaves[m]) for m, part in zip(members, scores, strict=True)}
        self._pass = _Pass(values, leaves, set(members))
        self._requests.clear()

    @torch.no_grad()
    def _expel(self) -> bool:
        """Exclude members with numbers that are not finite: kernels multiply others' rows by 0, and 0 * inf is nan."""
        broken = [m for m in sorted(self._active) if not _finite([self._requests[m].alone(self._policies[m]).values])]
        for member in broken:
            log.warning("Member %d of the cohort has numbers that are not finite: it leaves their passes.", member)
            self._active.discard(member)
            del self._requests[member]
        return bool(broken)

    def _backward(self) -> None:
        finished, self._pass = self._pass, None
        assert finished is not None
        values, gradients = [], []
        for member, leaf in finished.leaves.items():
            if leaf.grad is None:
                continue
            if _finite([leaf.grad]):
                values.append(finished.values[member])
                gradients.append(leaf.grad)
                continue
            for parameter in self._policies[member].parameters():
                if parameter.requires_grad:  # what it would get alone; a joint backward pass would spread it
                    parameter.grad = torch.full_like(parameter, torch.nan)
        if values:
            torch.autograd.backward(values, gradients)


def _finite(tensors: Sequence[Tensor]) -> bool:
    return bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())
