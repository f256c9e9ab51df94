"""A process that run_ranks.py started, among the others, and what it does with its part of a batch."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3rt import ops
from dsv3rt.ops.cuda.ep import KernelExchange
from dsv3rt.ops.types import Routing
from tests.gpu.ep_cases import Batch, Shape

Result = TypeVar("Result")


class Ranks:
    """This process among the others, and what it says."""

    def __init__(self) -> None:
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.num_nodes = self.size // int(os.environ["LOCAL_WORLD_SIZE"])
        self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(self.device)
        torch.set_num_threads(1)
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
        self.start = time.monotonic()

    def say(self, text: str, everyone: bool = False) -> None:
        if everyone or self.rank == 0:
            print(f"{time.monotonic() - self.start:7.2f} s  {text}", flush=True)

    def group(self, shape: Shape, num_sms: int, timeout_s: float, low_latency: bool = False) -> ops.EpGroup:
        limits = ops.EpLimits(
            shape.max_tokens,
            shape.top_k,
            shape.num_columns,
            num_sms,
            timeout_s,
            low_latency=low_latency,
            max_rows=0 if low_latency else shape.worst_case,
        )
        group = ops.EpGroup(dist.group.WORLD, shape.num_experts, limits=limits, device=self.device)
        self.kernels_of(group)
        return group

    def kernels_of(self, group: ops.EpGroup | None) -> KernelExchange:
        """Of a group that has just been made; every group's must be asked for."""
        assert group is not None
        assert group.kernels is not None
        if self.num_nodes > 1:
            wait_after_each_exchange(group.kernels)
        return group.kernels


def wait_after_each_exchange(kernels: KernelExchange) -> None:
    """Lets the host do nothing else while an exchange between nodes of one machine is under way.

    The network there (gin_loopback.cc) copies by calls of CUDA in this process. Another thread's call that waits for
    running kernels, as a first launch with more local memory or an allocation may, would hold up those copies, which
    the kernels wait for. A network card knows no such thing.
    """

    def waiting(exchange: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            result = exchange(*args, **kwargs)
            if not torch.cuda.is_current_stream_capturing():
                torch.cuda.synchronize()
            return result

        return run

    for name in ("_pull", "sum_rows"):
        setattr(kernels, name, waiting(getattr(kernels, name)))


def equal(name: str, got: Tensor, want: Tensor) -> None:
    got = got.detach().cpu()
    if got.shape != want.shape or got.dtype != want.dtype:
        raise AssertionError(f"{name}: {got.dtype} {tuple(got.shape)} instead of {want.dtype} {tuple(want.shape)}")
    if got.dtype == torch.float8_e4m3fn:
        got, want = got.view(torch.uint8), want.view(torch.uint8)
    if not torch.equal(got, want):
        where = (got != want).nonzero()
        raise AssertionError(
            f"{name}: {len(where)} of {got.numel()} differ, first at {where[0].tolist()}: "
            f"{got[tuple(where[0])]} instead of {want[tuple(where[0])]}"
        )


def on(device: torch.device, batch: Batch, tokens: slice) -> tuple[Tensor, Routing, Tensor]:
    """x with gradients, the routing, whose weights have gradients, and the gradient of the result."""
    routing = batch.routing(tokens)
    weight = routing.weight_TK.to(device).requires_grad_()
    x_TD = batch.x_TD[tokens].to(device).requires_grad_()
    return x_TD, Routing(routing.idx_TK.to(device), weight, weight, weight), batch.dy_TD[tokens].to(device)


def captured(step: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
    """A graph of the step, and what its replays fill; all ranks run the step once before, on the capture's stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        result = step()
    return graph, result
