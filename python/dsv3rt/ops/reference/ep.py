"""The exchange of rows between ranks by two all-to-alls, on any torch.distributed backend.

What a rank's experts get is what `ops.permute` would lay out for them if the tokens of all ranks were one batch, in
the order of the ranks: bit for bit, and in the same places. The sizes of the messages are read on the host, so each
dispatch waits for the router.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv3rt.errors import ExchangeError
from dsv3rt.ops.reference.moe import Permute, Unpermute, permute_quant, place
from dsv3rt.ops.types import EpRoute, GroupLayout, Permutation, QuantTensor, empty_row_scales


@dataclass(frozen=True)
class ReferenceRoute(EpRoute):
    """sent, received: rows to and from each rank. place_R: where received rows lie. permutation: of the sent ones."""

    sent: list[int]
    received: list[int]
    place_R: Tensor
    permutation: Permutation


class ReferenceExchange:
    """Rank i of `group` holds the i-th of equal shares of the experts. Differentiable."""

    def __init__(self, group: Any, num_experts: int) -> None:
        self._group = group
        self._num_experts = num_experts
        self._num_ranks = dist.get_world_size(group)

    def dispatch(
        self, x: Tensor | QuantTensor, idx_TK: Tensor, *, block: int, capacity: int | None
    ) -> tuple[Tensor | QuantTensor, EpRoute]:
        layout, permutation = place(idx_TK, self._num_experts, 1)  # no padding between the rows, only after them
        num_rows = idx_TK.numel()
        counts_RE = self._gather_counts(layout.counts_X)
        if capacity is not None:
            self._check_capacity(counts_RE, block, capacity)
        counts_RX = counts_RE.view(self._num_ranks, self._num_ranks, -1)[:, dist.get_rank(self._group)]
        sent = layout.counts_X.view(self._num_ranks, -1).sum(dim=1).tolist()
        received = counts_RX.sum(dim=1).tolist()
        local, place_R, total = _places(counts_RX, block)
        shape_TK = (idx_TK.shape[0], idx_TK.shape[1])
        packed = Permutation(permutation.row_of_TK, num_rows)
        route = ReferenceRoute(local, shape_TK, sent, received, place_R, packed)
        num_places = total if capacity is None else capacity
        if isinstance(x, QuantTensor):
            return self._send_quant(permute_quant(x, packed.row_of_TK, num_rows), route, num_places), route
        rows = cast(Tensor, Permute.apply(x, packed.row_of_TK, num_rows))
        return self._send(rows, route, num_places), route

    def dispatch_with_weights(
        self, x_TD: Tensor, idx_TK: Tensor, weight_TK: Tensor, *, block: int, capacity: int | None
    ) -> tuple[Tensor, Tensor, EpRoute]:
        rows, route = self.dispatch(x_TD, idx_TK, block=block, capacity=capacity)
        assert isinstance(rows, Tensor)
        assert isinstance(route, ReferenceRoute)
        row_of_TK = route.permutation.row_of_TK.flatten()
        leaving = weight_TK.new_zeros(row_of_TK.numel(), 1).index_copy(0, row_of_TK, weight_TK.reshape(-1, 1))
        return rows, self._send(leaving, route, rows.shape[0])[:, 0], route

    def combine(self, rows_PD: Tensor, route: EpRoute, weight_TK: Tensor | None) -> Tensor:
        assert isinstance(route, ReferenceRoute)
        leaving_RD = rows_PD.index_select(0, route.place_R)
        back = cast(Tensor, _AllToAll.apply(leaving_RD, route.received, route.sent, self._group))
        return cast(Tensor, Unpermute.apply(back, weight_TK, route.permutation.row_of_TK))

    def _send(self, rows: Tensor, route: ReferenceRoute, num_places: int) -> Tensor:
        arrived_RD = cast(Tensor, _AllToAll.apply(rows, route.sent, route.received, self._group))
        return arrived_RD.new_zeros(num_places, rows.shape[1]).index_copy(0, route.place_R, arrived_RD)

    def _send_quant(self, rows: QuantTensor, route: ReferenceRoute, num_places: int) -> QuantTensor:
        data = self._send(rows.data.view(torch.uint8), route, num_places)
        scale = empty_row_scales(num_places, rows.scale.shape[1], rows.device)
        scale.copy_(self._send(rows.scale.contiguous(), route, num_places))
        return QuantTensor(data.view(torch.float8_e4m3fn), scale, rows.tile)

    def _gather_counts(self, counts_E: Tensor) -> Tensor:
        """(ranks, E): how many rows each rank has for each expert."""
        counts = [torch.empty_like(counts_E) for _ in range(self._num_ranks)]
        dist.all_gather(counts, counts_E, group=self._group)
        return torch.stack(counts)

    def _check_capacity(self, counts_RE: Tensor, block: int, capacity: int) -> None:
        """All ranks see every rank's rows, so that none waits for one that has given up."""
        padded_E = (counts_RE.sum(dim=0) + block - 1) // block * block
        for rank, needed in enumerate(padded_E.view(self._num_ranks, -1).sum(dim=1).tolist()):
            if needed > capacity:
                raise ExchangeError(f"expert exchange: rank {rank} found {needed} rows for {capacity}: raise capacity")


def _places(counts_RX: Tensor, block: int) -> tuple[GroupLayout, Tensor, int]:
    """The layout of the local experts, each received row's place in it, and the number of rows, padding included.

    Rows arrive by rank and, from one rank, by expert; an expert's rows lie by rank.
    """
    counts_X = counts_RX.sum(dim=0, dtype=torch.int64)
    padded_X = (counts_X + block - 1) // block * block
    offsets = torch.cat([padded_X.new_zeros(1), padded_X.cumsum(0)])
    before_RX = counts_RX.cumsum(0) - counts_RX  # an expert's rows of earlier ranks
    runs = counts_RX.flatten().long()
    starts = (offsets[:-1] + before_RX).flatten()
    within = torch.arange(int(runs.sum()), device=runs.device) - (runs.cumsum(0) - runs).repeat_interleave(runs)
    place_R = starts.repeat_interleave(runs) + within
    return GroupLayout(counts_X.int(), offsets.int()), place_R, int(offsets[-1])


class _AllToAll(torch.autograd.Function):
    """Rows to all ranks, `sent[r]` of them to rank r in order; the backward is the way back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
        ctx.way = (sent, received, group)
        return _all_to_all(rows, sent, received, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, drows: Tensor) -> tuple[Tensor | None, ...]:
        sent, received, group = ctx.way
        return _all_to_all(drows, received, sent, group), None, None, None


def _all_to_all(rows: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
    arrived = rows.new_empty(sum(received), rows.shape[1])
    dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=group)
    return arrived
