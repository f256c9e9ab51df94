"""ZeRO-1: gradient sums in FP32, reduced in buckets to the rank that keeps a parameter's optimizer state, and the way
back of the updated weights.

A reduction is an all-to-all and a sum in the order of the ranks: as many bytes as a reduce-scatter, and the same bits
with every backend. A bucket sets out as soon as its last gradient is there, while the backward goes on, in parcels of
limited size and number; the parcels of a group set out in one order on all ranks.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import record_function

from dsv3rt.layers.main_grad import MainGrad, attach
from dsv3rt.parallel.mesh import Mesh
from dsv3rt.parallel.pipeline.trace import BUCKETS
from dsv3rt.parallel.placement import Layout, Share, chunk


class Sum(MainGrad):
    """One parameter's gradient sum. `grad` is FP32 and whole, `shard` what is left of it here after the reduction."""

    def __init__(self, name: str, parameter: nn.Parameter, share: Share) -> None:
        super().__init__()
        self.name = name
        self.parameter = parameter
        self.share = share
        self.shard: Tensor | None = None
        self.awaited = 0  # contributions still to come before the reduction may start; 0: it waits for `reduce`
        self.on_complete: Callable[[tuple[int, ...]], None] | None = None

    def add(self, gradient: Tensor) -> None:
        if self.grad is None:
            self.grad = gradient.float()
        else:
            self.grad.add_(gradient)
        self.added()

    def added(self) -> None:
        if self.awaited:
            self.awaited -= 1
            if self.awaited == 0 and self.on_complete is not None:
                self.on_complete(self.share.ranks)


class Bucket:
    """Sums that travel together, among the ranks of one group; `index` is this rank's place among them."""

    def __init__(self, sums: list[Sum], group: Any, index: int) -> None:
        self.sums = sums
        self.started = False
        self._group = group
        self._index = index
        self._ranks = len(sums[0].share.ranks)
        self._numel = max(place.stop for _, place in self._places(0))  # the first rank's piece is the largest
        self._reduced: Tensor | None = None

    def parcels(self, num_bytes: float, idle: frozenset[str] = frozenset()) -> list[_Parcel]:
        """What has to travel, in pieces of about `num_bytes`; each rank gets an equal part of each."""
        if self._group is None or all(one.name in idle for one in self.sums):
            return []
        self.started = True
        step = int(max(1, min(self._numel, num_bytes / (4 * self._ranks))))
        return [_Parcel(self, start, min(start + step, self._numel)) for start in range(0, self._numel, step)]

    def send(self, start: int, stop: int) -> tuple[Any, Tensor, Tensor]:
        """Elements `start` to `stop` of every rank's piece; a rank without a gradient sends zeros. The last ones take
        the gradients' memory with them."""
        device = self.sums[0].parameter.device
        outgoing = torch.zeros(self._ranks, stop - start, dtype=torch.float32, device=device)
        for rank, piece in enumerate(outgoing):
            for one, place in self._places(rank):
                first, last = max(start, place.start), min(stop, place.stop)
                if one.grad is not None and first < last:
                    rows = one.grad[place.rows].flatten()
                    piece[first - start : last - start] = rows[first - place.start : last - place.start]
        if stop == self._numel:
            for one in self.sums:
                one.grad = None
        arriving = torch.empty_like(outgoing)
        return dist.all_to_all_single(arriving, outgoing, group=self._group, async_op=True), arriving, outgoing

    def receive(self, start: int, stop: int, arriving: Tensor) -> None:
        if self._reduced is None:
            self._reduced = arriving.new_empty(self._numel)
        total = self._reduced[start:stop]
        total.copy_(arriving[0])
        for piece in arriving[1:]:
            total += piece

    def finish(self, idle: frozenset[str]) -> None:
        """Give every sum its shard."""
        self.started = False
        if self._reduced is None:
            for one in self.sums:
                one.shard, one.grad = one.grad, None
            return
        total, self._reduced = self._reduced, None
        for one, place in self._places(self._index):
            shape = (place.rows.stop - place.rows.start, *one.parameter.shape[1:])
            one.shard = None if one.name in idle else place.of(total).view(shape)

    @torch.no_grad()
    def gather(self, names: Container[str]) -> None:
        """Fetch the rows of these parameters that other ranks have updated; all ranks name the same."""
        if self._group is None or all(one.name not in names for one in self.sums):
            return
        first = self.sums[0].parameter
        mine = torch.zeros(self._numel, dtype=first.dtype, device=first.device)
        for one, place in self._places(self._index):
            if one.name in names:
                place.of(mine).copy_(one.parameter.data[place.rows].flatten())
        pieces = list(torch.empty(self._ranks, self._numel, dtype=first.dtype, device=first.device))
        dist.all_gather(pieces, mine, group=self._group)
        for rank, piece in enumerate(pieces):
            for one, place in self._places(rank):
                if one.name in names:
                    rows = one.parameter.data[place.rows]
                    rows.copy_(place.of(piece).view_as(rows))

    def _places(self, rank: int) -> Iterable[tuple[Sum, _Place]]:
        """Where each sum's rows for a rank lie in that rank's piece of the bucket."""
        at = 0
        for one in self.sums:
            rows = chunk(one.parameter.shape[0], self._ranks, rank)
            numel = (rows.stop - rows.start) * math.prod(one.parameter.shape[1:])
            yield one, _Place(rows, at, at + numel)
            at += numel


@dataclass(frozen=True)
class _Place:
    """Rows of a parameter, and the elements `start` to `stop` of a bucket."""

    rows: slice
    start: int
    stop: int

    def of(self, piece: Tensor) -> Tensor:
        return piece[self.start : self.stop]


@dataclass(frozen=True)
class _Parcel:
    bucket: Bucket
    start: int
    stop: int


class _Line:
    """The parcels of one group, first come, first out, at most `limit` of them on their way.

    During the backward nobody waits for a parcel: one that finds no room stays where it is, in the gradients, and goes
    at a later call. A wait could last for ever: the ranks of a group may be at different places of the pipeline (those
    of the embedding, or of DualPipe's two copies), and who has not sent its parcel yet may need, to get there, a
    message that the waiting rank would send after it. `drain` waits, when all messages of the step have been sent:
    every rank comes to it and drains its groups in one order, so the first group that anyone waits for moves on.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._ready: deque[_Parcel] = deque()
        self._travelling: deque[tuple[_Parcel, Any, Tensor, Tensor]] = deque()

    def add(self, parcels: Iterable[_Parcel]) -> None:
        self._ready += parcels

    def advance(self) -> None:
        """Take in what has arrived, and send as much as there is room for."""
        while self._travelling and self._travelling[0][1].is_completed():
            self._take_oldest()
        while self._ready and len(self._travelling) < self._limit:
            parcel = self._ready.popleft()
            with record_function(BUCKETS):
                self._travelling.append((parcel, *parcel.bucket.send(parcel.start, parcel.stop)))

    def drain(self) -> None:
        self.advance()
        while self._travelling:
            self._take_oldest()
            self.advance()

    def _take_oldest(self) -> None:
        parcel, work, arriving, _ = self._travelling.popleft()
        with record_function(BUCKETS):
            work.wait()
            parcel.bucket.receive(parcel.start, parcel.stop, arriving)


class Gradients:
    """The gradient sums of a rank's parameters, from backward to their shards.

    `late` parameters are used several times in a backward that runs in pieces: their gradients gather in
    `parameter.grad` until `take`; those of all others are taken by a hook as soon as autograd has them. Products in FP8
    add to the sums themselves.
    """

    def __init__(
        self,
        sums: Sequence[Sum],
        groups: Mapping[tuple[int, ...], tuple[Any, int]],
        bucket_bytes: float = math.inf,
        in_flight: int = 1,
        late: frozenset[str] = frozenset(),
    ) -> None:
        """groups: by the ranks of a share, the process group (None for one rank) and this rank's place in it.
        in_flight: parcels of `bucket_bytes` that each group may have on their way."""
        self.sums = {one.name: one for one in sums}
        self._by_parameter = {id(one.parameter): one for one in sums}
        self._queues: dict[tuple[int, ...], list[Bucket]] = {}  # of each group, in the order in which they set out
        for bucket in _buckets(sums, groups, bucket_bytes):
            self._queues.setdefault(bucket.sums[0].share.ranks, []).append(bucket)
        self._bucket_bytes = bucket_bytes
        self._lines = {ranks: _Line(in_flight) for ranks in sorted(self._queues)}
        for one in sums:
            attach(one.parameter, one)
            one.on_complete = self._set_out
            if one.name not in late:
                one.parameter.register_post_accumulate_grad_hook(self.take)

    @classmethod
    def whole(cls, parameters: Iterable[tuple[str, nn.Parameter]]) -> Self:
        """Of one process that keeps everything."""
        shares = [(name, p, Share((0,), slice(0, p.shape[0]), tuple(p.shape), 0)) for name, p in parameters]
        return cls([Sum(*one) for one in shares], {(0,): (None, 0)})

    @classmethod
    def spread(
        cls,
        parameters: Iterable[tuple[str, nn.Parameter]],
        layout: Layout,
        mesh: Mesh,
        shapes: Mapping[str, tuple[int, ...]],
        late: frozenset[str],
    ) -> Self:
        """Of this rank's parameters; `shapes` are those of the whole model's."""
        sums = [Sum(name, p, layout.share(name, shapes[name], mesh.rank)) for name, p in parameters]
        made = mesh.groups("zero", layout.share_groups(shapes))
        groups = {ranks: (group, ranks.index(mesh.rank)) for ranks, group in made.items()}
        parallel = layout.parallel
        return cls(sums, groups, parallel.bucket_mb * 2**20, parallel.buckets_in_flight, late)

    def expect(self, contributions: Mapping[str, int]) -> None:
        """How many gradients each parameter is going to get in this step."""
        for name, one in self.sums.items():
            one.awaited = contributions.get(name, 0)

    def take(self, parameter: Tensor) -> None:
        """Move the gradient that backward has finished into the sum, and free it; nothing where there is none."""
        if parameter.grad is not None:
            gradient, parameter.grad = parameter.grad, None
            self.add(parameter, gradient)

    def add(self, parameter: Tensor, gradient: Tensor) -> None:
        self._by_parameter[id(parameter)].add(gradient)

    def reduce(self, idle: frozenset[str] = frozenset()) -> None:
        """Finish the reduction: afterwards every sum has its shard, None for `idle` ones, which no rank used."""
        for one in self.sums.values():
            self.take(one.parameter)
        for ranks, line in self._lines.items():
            for bucket in self._queues[ranks]:
                if not bucket.started:
                    line.add(bucket.parcels(self._bucket_bytes, idle))
            line.advance()
        for ranks, line in self._lines.items():
            line.drain()
            for bucket in self._queues[ranks]:
                bucket.finish(idle)

    def buckets(self) -> Iterator[Bucket]:
        """In the order in which all ranks of a group gather them."""
        for queue in self._queues.values():
            yield from queue

    def drop(self) -> None:
        """Forget all gradients."""
        for one in self.sums.values():
            one.parameter.grad = one.grad = one.shard = None

    def _set_out(self, ranks: tuple[int, ...]) -> None:
        """Send off the group's next buckets as far as they are complete."""
        for bucket in self._queues[ranks]:
            if not bucket.started:
                if any(one.awaited or one.grad is None for one in bucket.sums):
                    break
                self._lines[ranks].add(bucket.parcels(self._bucket_bytes))
        for line in self._lines.values():
            line.advance()


def _buckets(
    sums: Sequence[Sum], groups: Mapping[tuple[int, ...], tuple[Any, int]], bucket_bytes: float
) -> Iterable[Bucket]:
    """Sums of one group and one dtype, last first as backward finishes them, until a bucket is full; those of one rank
    alone don't travel."""
    open_buckets: dict[tuple[tuple[int, ...], torch.dtype], list[Sum]] = {}
    full: list[list[Sum]] = []
    for one in reversed(sums):
        key = (one.share.ranks, one.parameter.dtype)
        members = open_buckets.setdefault(key, [])
        members.append(one)
        travels = groups[one.share.ranks][0] is not None
        if travels and sum(4 * other.parameter.numel() for other in members) >= bucket_bytes:
            full.append(open_buckets.pop(key))
    for members in (*full, *open_buckets.values()):
        yield Bucket(members, *groups[members[0].share.ranks])
