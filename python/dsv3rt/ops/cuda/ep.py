"""Expert-parallel kernels on torch tensors; arguments were checked by `dsv3rt.ops`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv3rt.errors import ExchangeError
from dsv3rt.ops.cuda.extension import load
from dsv3rt.ops.types import TILE, EpLimits, EpRoute, GroupLayout, QuantTensor, empty_row_scales

_PHASES = ("stage", "pull", "push", "reduce", "send", "receive", "send back", "collect")
_FAULTS = ("none", "timeout", "overflow", "peer overflow", "bad expert", "network")
_RESULTS, _GRADIENTS = 0, 1  # rooms


@dataclass(frozen=True)
class KernelRoute(EpRoute):
    """origin_P: rank * max_tokens * K + token * K + k of each row, -1 for padding. order_P: rows as they travel, by the
    numbers of their tokens. rows_needed: (1,) on the device.

    rails: bits of what goes to other nodes and what comes back from them; empty within one node.
    """

    origin_P: Tensor
    order_P: Tensor
    rows_needed: Tensor
    rails: Tensor
    block: int


@dataclass(frozen=True)
class FetchedRoute(KernelRoute):
    """Of a dispatch with weights, whose rows are fetched from rooms. place_TK: rank and row of each choice's row.
    first_row: of the rooms, at all ranks, where this dispatch's rows begin."""

    place_TK: Tensor
    first_row: int


@dataclass(frozen=True)
class KernelMaskedRoute(EpRoute):
    """origin_P: as in `KernelRoute`, written where there is a row."""

    origin_P: Tensor


def sms_for(node_size: int, sharing: int, sms_of_gpu: int) -> int:
    """How many fill the way between ranks. node_size: ranks that reach each other's memory. sharing: those on this GPU.

    An SM moves rows at 30 GB/s or so (csrc/comm/README.md), NVLink up to 450 GB/s, a network card 50. Ranks that share
    a GPU leave half of it to others: kernels that wait for one another have to be resident together.
    """
    return max(1, min(16 if node_size > 1 else 8, sms_of_gpu // (2 * sharing)))


class KernelExchange:
    """A rank's communicator: a window of memory that all ranks of its node reach, made by all of the group together.

    Dispatches run in one order on all ranks, and so do combines; streams are the caller's. The host waits for nothing.
    """

    def __init__(self, group: Any, num_experts: int, limits: EpLimits, device: torch.device) -> None:
        self.limits = limits
        self._rank, self._num_ranks = dist.get_rank(group), dist.get_world_size(group)
        self._num_local = num_experts // self._num_ranks
        ids = [load().ep_unique_id() if self._rank == 0 else None]
        dist.broadcast_object_list(ids, group=group, group_src=0)
        self._comm = load().EpComm(
            num_ranks=self._num_ranks,
            rank=self._rank,
            num_experts=num_experts,
            max_tokens=limits.max_tokens,
            top_k=limits.top_k,
            num_columns=limits.num_columns,
            max_rows=limits.max_rows,
            id=ids[0],
            device=device.index if device.index is not None else torch.cuda.current_device(),
            timeout_us=int(limits.timeout_s * 1e6),
            low_latency=limits.low_latency,
        )
        if limits.num_sms == 0:
            properties = torch.cuda.get_device_properties(device)
            gpus: list[str] = [""] * self._num_ranks
            dist.all_gather_object(gpus, str(properties.uuid), group=group)
            sharing, node_size = gpus.count(gpus[self._rank]), self._num_ranks // self.num_nodes
            self.limits = replace(limits, num_sms=sms_for(node_size, sharing, properties.multi_processor_count))
        self._rail_words = int(self._comm.rail_words())
        self._rooms: list[Tensor] = []
        if self.carries_weights:
            self._rooms = [_Room(self._comm, room, limits).tensor(device) for room in (_RESULTS, _GRADIENTS)]
        dist.barrier(group=group)  # every window is cleared before anyone writes into it

    @property
    def window_bytes(self) -> int:
        return int(self._comm.window_bytes())

    @property
    def num_nodes(self) -> int:
        """Sets of ranks that reach each other's memory; between them NCCL's one-sided puts carry the rows."""
        return int(self._comm.num_nodes())

    @property
    def carries_weights(self) -> bool:
        """Whether `dispatch_with_weights` is there: the window has rooms, and all ranks reach them."""
        return self.limits.max_rows > 0 and self.num_nodes == 1

    def check(self) -> None:
        """Does not wait: a fault of a kernel that still runs is found by a later call.

        Raises:
            ExchangeError: the first fault on this rank; it stays.
        """
        found = self._comm.error()
        if found is not None:
            raise ExchangeError(_describe(self._rank, *found))

    def destroy(self) -> None:
        """By all ranks together; after a fault each may do it alone."""
        self._rooms = []
        self._comm.destroy()

    def dispatch(
        self, x: Tensor | QuantTensor, idx_TK: Tensor, *, block: int, capacity: int
    ) -> tuple[Tensor | QuantTensor, KernelRoute]:
        self.check()
        if isinstance(x, QuantTensor):
            return self.dispatch_by_choice(x, idx_TK, block, capacity)
        rows, route = _Dispatch.apply(x, self, idx_TK, block, capacity)
        return rows, route

    def dispatch_with_weights(
        self, x_TD: Tensor, idx_TK: Tensor, weight_TK: Tensor, *, block: int, rows: range
    ) -> tuple[Tensor, Tensor, FetchedRoute]:
        """rows: of the rooms."""
        self.check()
        rows_PD, weight_P, route = _DispatchWithWeights.apply(x_TD, weight_TK, self, idx_TK, block, rows)
        return rows_PD, weight_P, route

    def room(self, route: FetchedRoute, *, gradients: bool) -> Tensor:
        """A route's rows of a room. Not a view for autograd, which would tie together all that ever lies there."""
        rows = slice(route.first_row, route.first_row + route.origin_P.shape[0])
        return self._rooms[_GRADIENTS if gradients else _RESULTS][rows].data

    def combine(self, rows_PD: Tensor, route: EpRoute, weight_TK: Tensor | None) -> Tensor:
        """Raises nothing: a rank whose rows did not fit tells its peers so here, and must not leave them waiting."""
        if isinstance(route, FetchedRoute):
            return cast(Tensor, _Fetch.apply(rows_PD, self, route))
        return cast(Tensor, _Combine.apply(rows_PD, weight_TK, self, route))

    # What follows is not differentiable.

    def dispatch_by_choice(
        self, x: Tensor | QuantTensor, idx_TK: Tensor, block: int, capacity: int
    ) -> tuple[Tensor | QuantTensor, KernelRoute]:
        route = self._route_for(idx_TK, block, capacity)
        return self._pull(x, route, choice=idx_TK.contiguous()), route

    def dispatch_by_choice_with_weights(
        self, x_TD: Tensor, idx_TK: Tensor, weight_TK: Tensor, block: int, rows: range
    ) -> tuple[Tensor, Tensor, FetchedRoute]:
        place_TK = torch.empty(idx_TK.shape, dtype=torch.int32, device=idx_TK.device)
        weight_P = torch.empty(len(rows), dtype=torch.float32, device=idx_TK.device)
        route = self._route_for(idx_TK, block, len(rows))
        route = FetchedRoute(**vars(route), place_TK=place_TK, first_row=rows.start)
        given = {"choice": idx_TK.contiguous(), "weight": weight_TK, "row_weight": weight_P, "place": place_TK}
        return cast(Tensor, self._pull(x_TD, route, **given)), weight_P, route

    def dispatch_weighted(
        self, x_TD: Tensor, route: KernelRoute, weight_TK: Tensor, outputs_PD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Rows times their weights, and each choice's product of token and output row."""
        weight_grad_TK = torch.empty_like(weight_TK)
        rows = self._pull(x_TD, route, weight=weight_TK, outputs=outputs_PD, weight_grad=weight_grad_TK)
        return cast(Tensor, rows), weight_grad_TK

    def dispatch_again(self, x_TD: Tensor, route: KernelRoute) -> Tensor:
        """Rows of other tokens by a route that is known already."""
        return cast(Tensor, self._pull(x_TD, route))

    def sum_rows(self, rows_PD: Tensor, route: KernelRoute, weight_TK: Tensor | None) -> Tensor:
        y_TD = rows_PD.new_empty(route.shape_TK[0], rows_PD.shape[1])
        self._comm.combine(rows_PD, self._route(route), y_TD, weight=weight_TK, num_sms=self.limits.num_sms)
        return y_TD

    def fetch(
        self, rows_PD: Tensor, route: FetchedRoute, weight_grad_P: Tensor | None = None, *, gradients: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Sums of rows, and where rows are gradients those of the weights. Rows that lie elsewhere are copied first."""
        room_PD = self.room(route, gradients=gradients)
        if rows_PD.data_ptr() != room_PD.data_ptr():
            room_PD.copy_(rows_PD)
        y_TD = rows_PD.new_empty(route.shape_TK[0], rows_PD.shape[1])
        weight_grad_TK = None if weight_grad_P is None else weight_grad_P.new_empty(route.shape_TK)
        self._comm.fetch(
            _GRADIENTS if gradients else _RESULTS,
            route.first_row,
            self._route(route),
            route.place_TK,
            y_TD,
            row_weight_grad=weight_grad_P,
            weight_grad=weight_grad_TK,
            num_sms=self.limits.num_sms,
        )
        return y_TD, weight_grad_TK

    # The low-latency form.

    def send(self, x_TD: Tensor, idx_TK: Tensor) -> None:
        self.check()
        self._comm.send(x_TD.contiguous(), idx_TK.contiguous(), num_sms=self.limits.num_sms)

    def receive(self, shape_TK: tuple[int, int], capacity: int, device: torch.device) -> tuple[QuantTensor, EpRoute]:
        num_rows, D = self._num_local * capacity, self.limits.num_columns
        counts_X = torch.empty(self._num_local, dtype=torch.int32, device=device)
        origin_P = torch.empty(num_rows, dtype=torch.int32, device=device)
        data = torch.empty(num_rows, D, dtype=torch.uint8, device=device)
        scale = empty_row_scales(num_rows, D // TILE, device)
        self._comm.receive(counts_X, origin_P, data, scale, num_sms=self.limits.num_sms)
        rows = QuantTensor(data.view(torch.float8_e4m3fn), scale, (1, TILE))
        return rows, KernelMaskedRoute(GroupLayout.of_capacity(counts_X, capacity), shape_TK, origin_P)

    def send_back(self, rows_PD: Tensor, route: KernelMaskedRoute) -> None:
        rows_PD = rows_PD.contiguous()
        self._comm.send_back(rows_PD, route.layout.counts_X, route.origin_P, num_sms=self.limits.num_sms)

    def collect(self, shape_TK: tuple[int, int], weight_TK: Tensor | None, device: torch.device) -> Tensor:
        y_TD = torch.empty(shape_TK[0], self.limits.num_columns, dtype=torch.bfloat16, device=device)
        weight_TK = None if weight_TK is None else weight_TK.contiguous()
        self._comm.collect(y_TD, weight=weight_TK, num_sms=self.limits.num_sms)
        return y_TD

    def _route_for(self, idx_TK: Tensor, block: int, capacity: int) -> KernelRoute:
        """For a dispatch to fill in."""

        def integers(count: int) -> Tensor:
            return torch.empty(count, dtype=torch.int32, device=idx_TK.device)

        layout = GroupLayout(integers(self._num_local), integers(self._num_local + 1))
        shape_TK = (idx_TK.shape[0], idx_TK.shape[1])
        origin_P, order_P = integers(capacity), integers(capacity)
        return KernelRoute(layout, shape_TK, origin_P, order_P, integers(1), integers(self._rail_words), block)

    def _pull(self, x: Tensor | QuantTensor, route: KernelRoute, **given: Tensor) -> Tensor | QuantTensor:
        capacity = route.origin_P.shape[0]
        if isinstance(x, QuantTensor):
            data = torch.empty(capacity, x.data.shape[1], dtype=torch.uint8, device=x.device)
            scale = empty_row_scales(capacity, x.scale.shape[1], x.device)
            self._comm.dispatch(
                x.data.view(torch.uint8),
                self._route(route),
                data,
                token_scale=x.scale,
                row_scale=scale,
                num_sms=self.limits.num_sms,
                **given,
            )
            return QuantTensor(data.view(torch.float8_e4m3fn), scale, x.tile)
        rows_PD = x.new_empty(capacity, x.shape[1])
        self._comm.dispatch(x, self._route(route), rows_PD, num_sms=self.limits.num_sms, **given)
        return rows_PD

    @staticmethod
    def _route(route: KernelRoute) -> Any:
        layout = route.layout
        return load().EpRoute(
            layout.counts_X,
            layout.offsets,
            route.origin_P,
            route.order_P,
            route.rows_needed,
            route.rails,
            route.block,
        )


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, exchange: KernelExchange, idx_TK: Tensor, block: int, capacity: int
    ) -> tuple[Tensor, KernelRoute]:
        rows_PD, route = exchange.dispatch_by_choice(x_TD.contiguous(), idx_TK, block, capacity)
        ctx.way = exchange, route
        return cast(Tensor, rows_PD), route

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, drows_PD: Tensor, _: None) -> tuple[Tensor | None, ...]:
        exchange, route = ctx.way
        exchange.check()
        return exchange.sum_rows(drows_PD.contiguous(), route, None), None, None, None, None


class _DispatchWithWeights(torch.autograd.Function):
    """Its backward fetches the rows' gradients, and their weights', from the room where they lie."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_TK: Tensor,
        exchange: KernelExchange,
        idx_TK: Tensor,
        block: int,
        rows: range,
    ) -> tuple[Tensor, Tensor, FetchedRoute]:
        x_TD, weight_TK = x_TD.contiguous(), weight_TK.contiguous()
        rows_PD, weight_P, route = exchange.dispatch_by_choice_with_weights(x_TD, idx_TK, weight_TK, block, rows)
        ctx.way = exchange, route
        return rows_PD, weight_P, route

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, drows_PD: Tensor, dweight_P: Tensor, _: None) -> tuple[Tensor | None, ...]:
        exchange, route = ctx.way
        exchange.check()
        dx_TD, dweight_TK = exchange.fetch(drows_PD.contiguous(), route, dweight_P.contiguous(), gradients=True)
        return dx_TD, dweight_TK, None, None, None, None


class _Fetch(torch.autograd.Function):
    """Keeps none of the rows: no gradient needs them."""

    @staticmethod
    def forward(ctx: Any, rows_PD: Tensor, exchange: KernelExchange, route: FetchedRoute) -> Tensor:
        ctx.way = exchange, route
        return exchange.fetch(rows_PD.contiguous(), route, gradients=False)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        exchange, route = ctx.way
        exchange.check()
        return exchange.dispatch_again(dy_TD.contiguous(), route), None, None


class _Room:
    """A room of a window as memory that torch takes for a tensor, and that lives until the window is destroyed."""

    def __init__(self, comm: Any, room: int, limits: EpLimits) -> None:
        shape = (limits.max_rows, limits.num_columns)
        address = int(comm.room_address(room))
        self.__cuda_array_interface__ = {"shape": shape, "typestr": "<i2", "data": (address, False), "version": 3}

    def tensor(self, device: torch.device) -> Tensor:
        return torch.as_tensor(self, device=device).view(torch.bfloat16)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_PD: Tensor, weight_TK: Tensor | None, exchange: KernelExchange, route: KernelRoute
    ) -> Tensor:
        rows_PD = rows_PD.contiguous()
        weight_TK = None if weight_TK is None else weight_TK.contiguous()
        ctx.way = exchange, route
        ctx.save_for_backward(*((None, None) if weight_TK is None else (rows_PD, weight_TK)))
        return exchange.sum_rows(rows_PD, route, weight_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        exchange, route = ctx.way
        rows_PD, weight_TK = ctx.saved_tensors
        exchange.check()
        dy_TD = dy_TD.contiguous()
        if weight_TK is None:
            return exchange.dispatch_again(dy_TD, route), None, None, None
        drows_PD, dweight_TK = exchange.dispatch_weighted(dy_TD, route, weight_TK, rows_PD)
        return drows_PD, dweight_TK, None, None


def _describe(rank: int, fault: int, phase: int, peer: int, expected: int, seen: int) -> str:
    kind = _FAULTS[fault]
    if kind == "timeout":
        return (
            f"expert exchange: rank {rank} waited in vain for rank {peer} to finish {_PHASES[phase]} "
            f"(expected counter {expected}, seen {seen})"
        )
    if kind == "network":
        return f"expert exchange: rank {rank} waited in vain for the network to take what {_PHASES[phase]} puts"
    if kind == "bad expert":
        return f"expert exchange: rank {rank} was given expert {seen} of {expected}"
    return f"expert exchange: rank {peer} found {seen} rows for {expected}: raise capacity"
