"""The processes of a run as a grid: pipeline ranks by data-parallel ranks, expert-parallel groups inside the latter.

Rank = pp index * dp + dp index; the `ep` neighbours of a dp row form an expert group. So the expert all-to-all stays
within neighbouring processes, and pipeline messages go between far ones.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from dsv3rt.config import ParallelConfig
from dsv3rt.env import Launch
from dsv3rt.errors import PeerError

Result = TypeVar("Result")

TIMEOUT = datetime.timedelta(minutes=30)  # of what processes do together


@dataclass(frozen=True)
class Ranks:
    """All processes of a run, for what they do or decide together. A single one needs no group."""

    rank: int = 0
    size: int = 1
    group: Any = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def together(self, work: Callable[[], Result], *, everywhere: bool = False) -> Result:
        """Let rank 0 do the work and give its result to all, or with `everywhere` let all do it, each its own.

        Where it fails on some rank no rank goes on: that one raises its error, the others a PeerError of its message.
        """
        if self.size < 2:
            return work()
        result, failure = None, None
        if everywhere or self.is_first:
            try:
                result = work()
            except (OSError, ValueError, RuntimeError) as error:
                failure = error
        told = None if failure is None else (f"rank {self.rank}: {failure}", getattr(failure, "errno", None))
        outcomes: list[Any] = [None] * self.size
        dist.all_gather_object(outcomes, (None if everywhere else result, told), group=self.group)
        if failure is not None:
            raise failure
        for _, told in outcomes:
            if told is not None:
                raise PeerError(*told)
        return cast(Result, result if everywhere else outcomes[0][0])

    def highest(self, *values: int) -> list[int]:
        """The highest of all ranks' values, each."""
        if self.size < 2:
            return list(values)
        highest = torch.tensor(values)
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=self.group)
        return highest.tolist()


@dataclass(frozen=True)
class Mesh:
    """Where this process stands. With one process there are no groups (None): torch.distributed is never started."""

    config: ParallelConfig
    rank: int = 0

    @property
    def size(self) -> int:
        return self.config.num_processes

    @property
    def pp_rank(self) -> int:
        return self.rank // self.config.dp

    @property
    def dp_rank(self) -> int:
        return self.rank % self.config.dp

    @property
    def ep_rank(self) -> int:
        return self.dp_rank % self.config.ep

    def at(self, pp_rank: int, dp_rank: int) -> int:
        """The rank at a place of the grid."""
        return pp_rank * self.config.dp + dp_rank

    def pipeline_peer(self, pp_rank: int) -> int:
        """The rank of another pipeline rank in this process's column."""
        return self.at(pp_rank, self.dp_rank)

    def groups(self, purpose: str, members: Iterable[tuple[int, ...]], most_sms: int = 0) -> dict[tuple[int, ...], Any]:
        """Make process groups, one for each tuple of ranks; returns those of this process, None for one alone.

        All processes call this together and with the same list: torch names groups by counting them.
        most_sms: multiprocessors of a GPU that what a group does may take; 0: as many as NCCL likes.
        """
        mine: dict[tuple[int, ...], Any] = {}
        for ranks in members:
            group = None
            if len(ranks) > 1:
                options = _nccl_options(most_sms)
                group = dist.new_group(list(ranks), timeout=TIMEOUT, group_desc=purpose, pg_options=options)
            if self.rank in ranks:
                mine[ranks] = group
                _connect(group, len(ranks))
        return mine

    def ranks(self, purpose: str) -> Ranks:
        """All processes, over a group of its own in host memory; all processes call this together."""
        group = dist.new_group(backend="gloo", group_desc=purpose) if self.size > 1 else None
        return Ranks(self.rank, self.size, group)


def join(config: ParallelConfig, started: Launch, device: torch.device) -> Mesh:
    """Meet the other processes that torchrun started.

    Raises:
        ValueError: their number is not pp * dp.
    """
    if started.num_processes != config.num_processes:
        raise ValueError(
            f"parallel.pp times parallel.dp must be the number of processes, {started.num_processes} "
            f"(torchrun --nproc-per-node starts more), got {config.pp} * {config.dp}"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if started.num_processes > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        # After a restart torchrun's store may still hold the addresses of processes that are gone.
        store, rank, size = next(rendezvous("env://"))
        store = dist.PrefixStore(f"start-{started.restarts}", store)
        # With a device NCCL makes every group's communicator at once, in one order on all ranks.
        bound = device if device.type == "cuda" else None
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT, device_id=bound)
    return Mesh(config, started.rank)


def _nccl_options(most_sms: int) -> Any:
    world = dist.group.WORLD
    if most_sms == 0 or world is None or world.bound_device_id is None:
        return None
    options = dist.ProcessGroupNCCL.Options()
    options.config.max_ctas = most_sms
    options._timeout = TIMEOUT  # as new_group is told, or it warns
    return options


def _connect(group: Any, size: int) -> None:
    """Exchange one message between any two ranks of a group on GPUs. At the first one both ends set a connection up and
    wait for each other in it: during a step, where ranks come to their groups in different orders, for ever."""
    world = dist.group.WORLD
    device = None if group is None or world is None else world.bound_device_id
    if device is not None:
        outgoing = torch.zeros(size, device=device)
        dist.all_to_all_single(torch.empty_like(outgoing), outgoing, group=group)


def leave() -> None:
    """Part from the other processes; nothing where there are none."""
    if dist.is_initialized():
        dist.destroy_process_group()
