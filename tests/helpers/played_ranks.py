"""All ranks of a run played by one process, and what would travel between them."""

from __future__ import annotations

import pickle
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from alignment.ranks.place import Place
from alignment.ranks.team import Post, Team, _buckets, _give_gradients, _reply, trained_parameters


class PlayedTeam(Team):
    """A team without processes: rank 0 is the caller, and the others do their shares when their replies are asked for.

    The others hold the same policy, so one copy of it plays them all; each keeps its gradients until they are added up.

    Attributes:
        calls: collectives by name, as rank 0 makes them.
        sent: bytes that rank 0 has given to the collective of that name; of gradients, what one rank gives.
        shares: by the name of a task, bytes of what each of the others was sent for it the last time.
    """

    def __init__(self, size: int) -> None:
        super().__init__(Place(0, size, 0, size), None, None, None)  # type: ignore[arg-type]
        self.calls: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.shares: dict[str, list[int]] = {}
        self._post = Post(self)
        self._asked: list[bytes] = []
        self._gradients: list[list[Tensor | None]] = []

    def _send(self, objects: Any) -> None:
        self._asked = [pickle.dumps(asked) for asked in objects[1:]]
        sizes = [len(asked) for asked in self._asked]
        self.shares[objects[0][0].__name__] = sizes
        self.calls["scatter"] += 1
        self.sent["scatter"] += sum(sizes)
        if objects[0][0] is not _give_gradients:
            self._gradients = []

    def spread(self, tensors: Any) -> None:
        for bucket in _buckets(tensors):
            self.calls["broadcast"] += 1
            self.sent["broadcast"] += sum(tensor.nbytes for tensor in bucket)
        if tensors:
            for own, value in zip(trained_parameters(self._post.model), tensors, strict=True):
                own.data.copy_(value)

    def _gather(self, value: Any) -> list[Any]:
        replies = [value]
        known: dict[bytes, Any] = {}  # all that load the policy, or have nothing to do, do the same
        for asked in self._asked:
            if asked in known:
                replies.append(known[asked])
                continue
            task, share, _ = pickle.loads(asked)
            replies.append(_reply(task, self._post, share))
            trained = [] if self._post.model is None else trained_parameters(self._post.model)
            if any(parameter.grad is not None for parameter in trained):
                self._gradients.append([parameter.grad for parameter in trained])
                for parameter in trained:
                    parameter.grad = None
            else:
                known[asked] = replies[-1]
        self.calls["gather"] += 1
        self.sent["gather"] += sum(len(pickle.dumps(reply)) for reply in replies[1:])
        return replies

    def add_up(self, parameters: Any, used: Any) -> None:
        if parameters and parameters[0] is trained_parameters(self._post.model)[0]:
            return  # of a rank that is played: its gradients are kept
        for bucket in _buckets([p for p, is_used in zip(parameters, used, strict=True) if is_used]):
            self.calls["reduce"] += 1
            self.sent["reduce"] += sum(tensor.nbytes for tensor in bucket)
        for number, parameter in enumerate(parameters):
            for gradients in self._gradients:
                if gradients[number] is not None:
                    own = parameter.grad
                    parameter.grad = gradients[number].clone() if own is None else own + gradients[number]

    def _lost_ranks(self) -> AbstractContextManager[None]:
        return nullcontext()

    def end(self) -> None:
        """Nobody is there."""
