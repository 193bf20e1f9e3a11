"""All ranks of a run as rank 0 sees them, and what the others do: wait for a task, do their share, reply."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import sys
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from alignment.errors import UserError, require
from alignment.ranks.lifeline import Lifeline
from alignment.ranks.lockstep import Lockstep
from alignment.ranks.place import LOGS, Place

log = logging.getLogger(__name__)

R = TypeVar("R")

JOIN_SECONDS = 600
"""How long ranks wait for each other at the start."""
_TASK_DAYS = 30
"""How long they wait for each other later: a rank that waits for rank 0's next task may do so for hours.

Where the other has ended, the lifeline notices.
"""
_LAST_SECONDS = 10
"""How long a rank stays at most after a collective has failed: the lifeline or the launcher ends it sooner."""
_WHY = "why"
"""In the store of the process group: why a rank has ended in the midst of a task."""
_BUCKET = 2**28
"""Bytes of tensors that travel at once: a LoRA's are fewer, a whole model is never copied as a whole."""


class RankLost(UserError):
    """Another rank has ended without a word."""


@dataclass(slots=True)
class Post:
    """What a rank that follows keeps between tasks. Each wing knows what it puts here.

    Attributes:
        team: all ranks.
        model: the policy.
        device: where it is.
        layout: of passes over groups.
        machine: the groups of its ranks.
        part: of a base that these share.
        passes: runs a preference step's passes.
        trainer: runs an SFT step's passes.
        steps: updates the weights that this rank holds of a whole model.
        tracked: sends its system metrics.
        start: the policy that a preference stage starts from, where it is kept.
        teacher: (model, layout) of the one that the policy learns from.
        weak: a weaker model that answers beside it.
        stage: ends what the running stage has begun.
    """

    team: Team
    model: Any = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    layout: Any = None
    machine: Any = None
    part: Any = None
    passes: Any = None
    trainer: Any = None
    steps: Any = None
    tracked: Any = None
    start: Any = None
    teacher: Any = None
    weak: Any = None
    stage: ExitStack = field(default_factory=ExitStack)


IN_PARTS = "_trains_in_parts"
"""Set on a model whose weights train in parts, one on each rank."""


def trained_parameters(model: Any) -> list[Tensor]:
    """The tensors that train, in an order that is the same on all ranks; none where each rank trains its own part."""
    if getattr(model, IN_PARTS, False):
        return []
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class Team:
    """The ranks of a run; made by `join`.

    Attributes:
        place: this process's.
        size: how many ranks there are.
        lockstep: of the ranks of this machine where they share a base; None where each has its own.
    """

    def __init__(self, place: Place, store: Any, tensors: Any, lifeline: Lifeline) -> None:
        self.place = place
        self.size = place.size
        self.lockstep: Lockstep | None = None
        self._store = store
        self._tensors = tensors  # the group that tensors of a GPU travel in
        self._lifeline = lifeline
        self._in_task = False
        self._has_joined = False

    # Rank 0

    def run(
        self,
        task: Callable[[Post, Any], R],
        shares: Sequence[Any],
        own: Callable[[Any], R],
        weights: Sequence[Tensor] = (),
    ) -> list[R]:
        """Have every rank do its share of a task.

        Args:
            task: a function of a module, which the other ranks call with their post and their share.
            shares: for each rank.
            own: does the share of this rank.
            weights: if given, the tensors that train; the others take over their values first.

        Returns:
            What each rank returned, in order.

        Raises:
            UserError: the sentence of the first rank that has failed, or a rank has ended.
        """
        self._let_go()
        self._in_task = True
        with self._lost_ranks():
            self._send([(task, share, bool(weights)) for share in shares])
            self.spread(weights)
        failure: Exception | None = None
        results: list[Any] = [None]
        try:
            results = [own(shares[0])]
            if self.lockstep is not None:
                self.lockstep.finish()
        except Exception as error:  # the others still do their shares and reply
            if self.lockstep is not None:  # unless they wait for the rest of a pass
                raise (self.why_lost(error) if isinstance(error, RuntimeError) else error) from error.__cause__
            failure = error
        except KeyboardInterrupt as error:
            if self._lifeline.lost is None:
                raise
            raise self._lost() from error  # the launcher stops this rank because another has died
        with self._lost_ranks():
            replies = self._gather(None)
        self._in_task = False
        for rank, (theirs, value) in enumerate(replies[1:], 1):
            if theirs is not None and failure is None:
                failure = theirs if isinstance(theirs, UserError) else RuntimeError(f"Rank {rank} failed: {theirs}")
            results.append(value)
        if failure is not None:
            raise failure
        return results

    def tell(self, task: Callable[[Post, Any], Any], share: Any = None, weights: Sequence[Tensor] = ()) -> list[Any]:
        """Have every other rank do a task of which rank 0 has no share; returns what they returned."""
        return self.run(task, [share] * self.size, lambda _: None, weights)[1:]

    def sum_gradients(self, parameters: Sequence[Tensor], used: Sequence[bool]) -> None:
        """Add up the gradients of all ranks on rank 0.

        Args:
            parameters: all that train.
            used: which of them have a gradient on some rank; the others keep none.
        """
        self.run(_give_gradients, [list(used)] * self.size, lambda _: self.add_up(parameters, used))

    def ask_to_join(self) -> None:
        """Before a pass of rank 0 that is no part of a task: have the others join in until the next task."""
        if self.place.rank == 0 and not self._in_task:
            self._in_task = self._has_joined = True
            with self._lost_ranks():
                self._send([(_join_in, None, False)] * self.size)

    def _let_go(self) -> None:
        if self._has_joined and self.lockstep is not None:
            self.lockstep.finish()
            with self._lost_ranks():
                self._gather(None)
            self._in_task = self._has_joined = False

    def end(self) -> None:
        """Let the other ranks end, unless one of them is in the midst of a task: then the launcher ends them."""
        if self.lockstep is not None and not self.lockstep.in_pass:
            with suppress(UserError):
                self._let_go()
        if not self._in_task:
            with suppress(RuntimeError):  # they have ended
                self._send([None] * self.size)
        self._leave()

    # The others

    def follow(self) -> None:
        """Do what rank 0 asks until it is done. Ends the process where rank 0 has ended."""
        post = Post(self)
        while True:
            try:
                asked = self._send(None)
                if asked is None:
                    self._leave()
                    return
                task, share, has_weights = asked
                if has_weights:
                    self.spread(trained_parameters(post.model))
                reply = _reply(task, post, share)
                if self.lockstep is not None:
                    if reply[0] is None:
                        self.lockstep.finish()
                    else:
                        self._say_why(reply[0])
                self._gather(reply)
            except (RuntimeError, RankLost):
                time.sleep(_LAST_SECONDS)  # rank 0 has ended: its launcher sees that before this
                os._exit(1)

    def _say_why(self, error: Exception) -> NoReturn:
        """End here, in the midst of a task of ranks that share a base: they may wait for the rest of a pass."""
        if not isinstance(error, RankLost):
            self._store.set(_WHY, pickle.dumps(error))
            if LOGS in os.environ:
                sys.stderr.write(f"Error: {error}\n")
        _end_group()
        raise RuntimeError("The others see that this rank is gone.")

    def why_lost(self, error: RuntimeError) -> Exception:
        """What an error means: where it is a collective's, why another rank is gone; else itself."""
        return self._lost() if _is_of_collective(error) else error

    def _lost(self) -> Exception:
        """What a rank has said before it ended, or that one has ended without a word."""
        if self.place.rank == 0 and self._store.check([_WHY]):
            said = pickle.loads(self._store.get(_WHY))
            return said if isinstance(said, UserError) else RuntimeError(f"Another rank failed: {said}")
        return self._rank_lost()

    # The end

    def _leave(self) -> None:
        self._lifeline.close()
        _end_group()

    def _rank_lost(self) -> RankLost:
        _let_signals_in()  # Ctrl-C ends all ranks at once, and is what happened then
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # the launcher ends what is left: say why first
        return RankLost(self._lifeline.sentence())

    @contextmanager
    def _lost_ranks(self) -> Iterator[None]:
        """Around collectives of rank 0: say what an error of theirs means."""
        try:
            with self._lifeline.waiting():
                yield
        except RuntimeError as error:
            raise self._lost() from error

    # Collectives

    def machine_groups(self, device: torch.device) -> tuple[Any, Any]:
        """This machine's ranks as a group for tensors of the device and one for numbers; every rank must call this.

        Raises:
            UserError: machines have different numbers of ranks.
        """
        import torch.distributed as dist

        count = self.place.local_size
        require(
            self.size % count == 0 and self.place.rank % count == self.place.local_rank,
            f"trainer.shard=node needs the same number of ranks on all machines, numbered machine by machine, and rank "
            f"{self.place.rank} of {self.size} is number {self.place.local_rank} of {count}: start as many on each.",
        )
        spoken, _ = dist.new_subgroups(count, backend="gloo", timeout=timedelta(days=_TASK_DAYS))
        if device.type == "cpu":
            return spoken, spoken
        gathered, _ = dist.new_subgroups(count, backend="nccl")
        return gathered, spoken

    def across_machines(self, device: torch.device) -> Any:
        """The ranks of all machines that have this one's number there, as a group for tensors of the device.

        None on a single machine. Every rank must call this, after `machine_groups`.
        """
        import torch.distributed as dist

        count = self.place.local_size
        if self.size == count:
            return None
        backend = "gloo" if device.type == "cpu" else "nccl"
        groups = [dist.new_group(list(range(local, self.size, count)), backend=backend) for local in range(count)]
        return groups[self.place.local_rank]

    def _send(self, objects: Sequence[Any] | None) -> Any:
        """One object to each rank, from rank 0."""
        import torch.distributed as dist

        received: list[Any] = [None]
        dist.scatter_object_list(received, None if objects is None else list(objects))
        return received[0]

    def _gather(self, value: Any) -> list[Any]:
        """One object of each rank, on rank 0; empty on the others."""
        import torch.distributed as dist

        found: list[Any] | None = [None] * self.size if self.place.rank == 0 else None
        dist.gather_object(value, found)
        return found or []

    def spread(self, tensors: Sequence[Tensor]) -> None:
        """Give all ranks the values that these tensors have on rank 0."""
        import torch.distributed as dist

        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in bucket])
            dist.broadcast(flat.view(torch.uint8), 0, group=self._group(flat))
            if self.place.rank:
                for tensor, values in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                    tensor.data.copy_(values.view_as(tensor))

    def add_up(self, parameters: Sequence[Tensor], used: Sequence[bool]) -> None:
        """Every rank's part of `sum_gradients`. What has 16 bits is added in 32."""
        import torch.distributed as dist

        wanted = [parameter for parameter, is_used in zip(parameters, used, strict=True) if is_used]
        for bucket in _buckets(wanted):
            for parameter in bucket:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            flat = torch.cat([parameter.grad.reshape(-1) for parameter in bucket if parameter.grad is not None])
            flat = flat.float() if flat.dtype.itemsize < 4 else flat
            with self._lifeline.waiting():
                dist.reduce(flat, 0, group=self._group(flat))
            if self.place.rank == 0:
                for parameter, values in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                    assert parameter.grad is not None
                    parameter.grad.copy_(values.view_as(parameter))

    def _group(self, tensor: Tensor) -> Any:
        return self._tensors if tensor.device.type == "cuda" else None


def join(place: Place) -> Team:
    """Meet the other ranks.

    Raises:
        UserError: not all of them have come.
    """
    import torch.distributed as dist

    if place.rank:
        _be_quiet()
    wait = timedelta(seconds=JOIN_SECONDS)
    names = [f"here/{rank}" for rank in range(place.size)]
    present: list[str] = []
    try:
        store, _, _ = next(dist.rendezvous("env://", place.rank, place.size, timeout=wait))
        store.set(names[place.rank], "")
        present = [names[place.rank]]
        store.wait(names, wait)
    except (dist.DistError, ValueError, RuntimeError) as error:
        raise UserError(
            f"Rank {place.rank} has waited {JOIN_SECONDS} seconds for {place.size} ranks, and not all have come"
            f"{'' if present else f' ({str(error).splitlines()[0]})'}: see what the others say, and that MASTER_ADDR "
            f"and MASTER_PORT name a place that all machines reach."
        ) from error
    # Objects travel between CPUs; a GPU's tensors in a group of their own.
    dist.init_process_group(
        "gloo", store=store, rank=place.rank, world_size=place.size, timeout=timedelta(days=_TASK_DAYS)
    )
    tensors = dist.new_group(backend="nccl") if torch.cuda.is_available() else None
    return Team(place, store, tensors, Lifeline(store, place, wait))


def _end_group() -> None:
    """Take the process group apart: its threads would abort a process that ends with them."""
    import torch.distributed as dist

    with suppress(RuntimeError):
        dist.destroy_process_group()


def _be_quiet() -> None:
    """Rank 0 alone speaks, and decides what a signal means, which launchers send to all: the others end with rank 0."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    os.environ["TQDM_DISABLE"] = "1"
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _reply(task: Callable[[Post, Any], Any], post: Post, share: Any) -> tuple[Exception | None, Any]:
    try:
        return None, task(post, share)
    except UserError as error:
        return error, None
    except Exception:
        return RuntimeError(traceback.format_exc()), None


def _join_in(post: Post, _: None) -> None:
    """Nothing beside the passes that rank 0 runs."""


def _is_of_collective(error: RuntimeError) -> bool:
    """Whether an error says that another rank is gone."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _give_gradients(post: Post, used: list[bool]) -> None:
    post.team.add_up(trained_parameters(post.model), used)


def _let_signals_in() -> None:
    """Python looks for signals where a function begins."""


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype and device, up to the size of a bucket; a larger one is a bucket of its own."""
    alike: defaultdict[Any, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        alike[tensor.dtype, tensor.device].append(tensor)
    for members in alike.values():
        bucket: list[Tensor] = []
        size = 0
        for tensor in members:
            if bucket and size + tensor.nbytes > _BUCKET:
                yield bucket
                bucket, size = [], 0
            bucket.append(tensor)
            size += tensor.nbytes
        yield bucket
