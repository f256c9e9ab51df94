"""Expert parallelism of the MoE layer: its rows carried by `ops.ep_dispatch` and `ops.ep_combine`."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3rt import ops
from dsv3rt.layers import fp8
from dsv3rt.layers.moe import Dispatched
from dsv3rt.ops.types import TILE, Permutation, Routing, round_up
from dsv3rt.parallel.eplb import Placement


def room(num_experts: int, num_ranks: int, capacity: float, choices: tuple[int, int], block: int) -> int:
    """Rows that a rank's experts have room for, padding included.

    capacity: over an even load; 0: any load. choices: the most tokens of any rank, and how many experts each chooses.
    """
    local, (tokens, top_k) = num_experts // num_ranks, choices
    most = num_ranks * tokens * min(top_k, local)
    if capacity:
        most = min(most, math.ceil(capacity * tokens * top_k))
    return round_up(most, block) + local * block


class ExpertExchange:
    """Rank i of `group` holds the i-th of equal shares of the experts.

    On a GPU the kernels carry BF16 rows where every rank has them and an NCCL that is new enough; else, and for other
    dtypes, the reference does. The communicator is made by `open`, else at the first dispatch, for its most tokens.
    """

    def __init__(
        self,
        group: Any,
        num_ranks: int,
        placement: Placement | None = None,
        *,
        capacity: float = 0.0,
        num_sms: int = 16,
        carries_gates: bool = False,
        num_chunks: int = 1,
    ) -> None:
        """placement: of replicas, for serving; rank i then holds the experts `placement.experts_on(i)`, in this order.
        capacity: rows that a rank's experts have room for, over an even load; 0: for any load. num_sms: of the kernels.
        num_chunks: that may be under way together; all sizes are those of one.
        carries_gates: gates go along with the rows where experts want them and the ranks are of one node; not for
            layers of which two forwards may be under way at a time (`ops.ep_dispatch_with_weights`).

        Raises:
            ValueError: a placement on another number of GPUs than there are ranks.
        """
        if placement is not None and placement.num_gpus != num_ranks:
            raise ValueError(
                f"ExpertExchange: placement must be on the group's {num_ranks} ranks, got {placement.num_gpus} GPUs"
            )
        self._group = group
        self._num_ranks = num_ranks
        self._placement = placement
        self._capacity = capacity
        self._num_sms = num_sms
        self._carries_gates = carries_gates
        self.num_chunks = num_chunks
        self._most_tokens = 0
        self._experts: ops.EpGroup | None = None

    def open(self, like_TD: Tensor, num_experts: int, top_k: int) -> None:
        """Make the communicator for dispatches of as many rows as `like_TD` has, on any rank; all ranks together.

        To map windows may wait for all work of the device. Where messages of other ranks are awaited on it already, as
        in a pipeline from its first step on, that could be for ever.
        """
        slots = num_experts if self._placement is None else self._placement.num_slots
        limits = self._limits(like_TD, slots, top_k)
        self._experts = ops.EpGroup(self._group, slots, limits=limits, device=like_TD.device)

    def dispatch(
        self,
        x_TD: Tensor,
        routing: Routing,
        *,
        num_experts: int,
        block: int,
        with_gates: bool = False,
        chunk: int = 0,
    ) -> Dispatched:
        """See `layers.moe.Exchange`.

        Raises:
            ValueError: gradients, or another number of experts, where experts have replicas.
            ExchangeError: more rows than there is room for; from kernels at a later call.
        """
        if self._placement is not None:
            routing, num_experts = self._to_slots(x_TD, routing, num_experts)
        top_k = routing.idx_TK.shape[1]
        if self._experts is None:
            self.open(x_TD, num_experts, top_k)
            assert self._experts is not None
        capacity = self._room(num_experts, top_k, block) if self._capacity else None
        group, gates = self._experts, None
        if with_gates and self._carries_gates and group.carries_weights(x_TD):
            first_row = chunk * self._room(num_experts, top_k, block)
            rows_PD, gate_P, route = ops.ep_dispatch_with_weights(
                x_TD, routing, group, block=block, capacity=capacity, first_row=first_row
            )
            gates = fp8.Weighed(gate_P, lambda backward: ops.ep_room(route, group, gradients=backward))
        else:
            rows_PD, route = ops.ep_dispatch(x_TD, routing, group, block=block, capacity=capacity)
        return Dispatched(rows_PD, route.layout, Permutation(routing.idx_TK, rows_PD.shape[0]), route, gates)

    def combine(self, rows_PD: Tensor, dispatched: Dispatched, weight_TK: Tensor) -> Tensor:
        """See `layers.moe.Exchange`."""
        assert self._experts is not None
        assert isinstance(dispatched.route, ops.EpRoute)
        weight = weight_TK if dispatched.gates is None else None
        return ops.ep_combine(rows_PD, dispatched.route, self._experts, weight_TK=weight)

    def _to_slots(self, x_TD: Tensor, routing: Routing, num_experts: int) -> tuple[Routing, int]:
        """Replicas' slots in the place of experts."""
        placement = self._placement
        assert placement is not None
        if num_experts != placement.num_experts:
            raise ValueError(
                f"ExpertExchange: placement must be of the layer's {num_experts} experts, got {placement.num_experts}"
            )
        if torch.is_grad_enabled() and (x_TD.requires_grad or routing.weight_TK.requires_grad):
            raise ValueError("ExpertExchange: replicas must serve without gradients (torch.no_grad), got a gradient")
        return dataclasses.replace(routing, idx_TK=placement.assign(routing.idx_TK)), placement.num_slots

    def _limits(self, x_TD: Tensor, num_experts: int, top_k: int) -> ops.EpLimits | None:
        """What all ranks agree on; None: some rank has no kernels for these rows."""
        fits = x_TD.is_cuda and x_TD.dtype == torch.bfloat16
        lacks = not fits or ops.EpGroup.kernels_problem() != ""
        here = torch.tensor([x_TD.shape[0], int(lacks)], device=x_TD.device)
        dist.all_reduce(here, dist.ReduceOp.MAX, group=self._group)
        self._most_tokens, lacking = here.tolist()
        rows = self.num_chunks * self._room(num_experts, top_k, TILE) if self._carries_gates else 0
        limits = ops.EpLimits(self._most_tokens, top_k, x_TD.shape[1], self._num_sms, max_rows=rows)
        return None if lacking else limits

    def _room(self, num_experts: int, top_k: int, block: int) -> int:
        return room(num_experts, self._num_ranks, self._capacity, (self._most_tokens, top_k), block)
