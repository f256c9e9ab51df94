"""Expert parallelism on any torch.distributed backend: the exchange of rows by two all-to-alls.

What a rank's experts get is what `ops.permute` would lay out for them if the tokens of all ranks were one batch, in
the order of the ranks: bit for bit, and in the same places. Deterministic; the sizes of the messages are read on the
host, so each dispatch waits for the router.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv3rt import ops
from dsv3rt.layers.moe import Dispatched
from dsv3rt.ops.types import GroupLayout, Permutation, Routing


@dataclass(frozen=True)
class _Way:
    """How rows travelled: rows sent to and received from each rank, and the received rows' places."""

    sent: list[int]
    received: list[int]
    place_R: Tensor


class ExpertExchange:
    """Rank i of `group` holds the i-th of equal shares of the experts."""

    def __init__(self, group: Any, num_ranks: int) -> None:
        self._group = group
        self._num_ranks = num_ranks

    def dispatch(self, x_TD: Tensor, routing: Routing, *, num_experts: int, block: int) -> Dispatched:
        """See `layers.moe.Exchange`."""
        rows_PD, layout, permutation = ops.permute(x_TD, routing, num_experts=num_experts, block=1)
        num_rows = routing.idx_TK.numel()  # with blocks of 1 there is no padding between them, only after them
        counts_RX = self._exchange_counts(layout.counts_X)
        sent = layout.counts_X.view(self._num_ranks, -1).sum(dim=1).tolist()
        received = counts_RX.sum(dim=1).tolist()
        local, place_R, total = _places(counts_RX, block)
        arrived_RD = cast(Tensor, _AllToAll.apply(rows_PD[:num_rows], sent, received, self._group))
        rows_PD = arrived_RD.new_zeros(total, x_TD.shape[1]).index_copy(0, place_R, arrived_RD)
        way = _Way(sent, received, place_R)
        return Dispatched(rows_PD, local, Permutation(permutation.row_of_TK, num_rows), way)

    def collect(self, rows_PD: Tensor, dispatched: Dispatched) -> Tensor:
        """See `layers.moe.Exchange`."""
        way = cast(_Way, dispatched.route)
        leaving_RD = rows_PD.index_select(0, way.place_R)
        return cast(Tensor, _AllToAll.apply(leaving_RD, way.received, way.sent, self._group))

    def _exchange_counts(self, counts_E: Tensor) -> Tensor:
        """(ranks, X): how many rows each rank sends to each expert of this one."""
        counts_RX = torch.empty_like(counts_E)
        dist.all_to_all_single(counts_RX, counts_E, group=self._group)
        return counts_RX.view(self._num_ranks, -1)


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
