"""Expert parallelism: tokens to the ranks that hold their experts, and the results back."""

from __future__ import annotations

from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3rt.errors import BackendUnavailableError
from dsv3rt.ops.checks import FLOATS, check_quant, check_same_device, check_tensor, require
from dsv3rt.ops.cuda.ep import FetchedRoute, KernelExchange, KernelRoute
from dsv3rt.ops.cuda.extension import load
from dsv3rt.ops.quant import ROW_TILE
from dsv3rt.ops.reference.ep import ReferenceExchange, ReferenceRoute
from dsv3rt.ops.types import TILE, EpLimits, EpRoute, QuantTensor, Routing, round_up


class EpGroup:
    """The ranks of a torch.distributed group as holders of equal shares of the experts, in order.

    Made, used and destroyed by all ranks together. `limits` and a CUDA device make a communicator for the kernels;
    without them the reference carries the rows, by the group's own all-to-all.

    Raises:
        ValueError: experts that the ranks cannot share equally, or limits out of range.
        BackendUnavailableError: no kernels in this installation.
        RuntimeError: NCCL is missing, too old, or finds no way between ranks that do not reach each other's memory; or
            there are such ranks, and the low-latency form was asked for.
    """

    def __init__(
        self,
        group: Any,
        num_experts: int,
        *,
        limits: EpLimits | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.num_ranks = dist.get_world_size(group)
        self.num_experts = num_experts
        self.limits = limits
        op = "EpGroup"
        require(num_experts > 0 and num_experts % self.num_ranks == 0, op, "num_experts",
                f"be a positive multiple of the {self.num_ranks} ranks", num_experts)  # fmt: skip
        if limits is not None and limits.low_latency:
            require(0 < limits.max_tokens <= 256, op, "limits.max_tokens", "be in 1..256 with low_latency",
                    limits.max_tokens)  # fmt: skip
            require(limits.num_columns % TILE == 0, op, "limits.num_columns",
                    f"be a multiple of {TILE} with low_latency", limits.num_columns)  # fmt: skip
        self.kernels: KernelExchange | None = None
        if limits is not None and device is not None and device.type == "cuda":
            require(num_experts <= 1024, op, "num_experts", "be at most 1024", num_experts)
            require(self.num_ranks <= 64, op, "group", "have at most 64 ranks", self.num_ranks)
            require(limits.max_tokens > 0, op, "limits.max_tokens", "be positive", limits.max_tokens)
            require(0 < limits.top_k <= num_experts, op, "limits.top_k", f"be in 1..{num_experts}", limits.top_k)
            require(limits.num_columns % 16 == 0, op, "limits.num_columns", "be a multiple of 16", limits.num_columns)
            require(limits.num_sms >= 0, op, "limits.num_sms", "not be negative", limits.num_sms)
            require(0 <= limits.max_rows < 2**26, op, "limits.max_rows", "be in 0..2^26 - 1", limits.max_rows)
            self.kernels = KernelExchange(group, num_experts, limits, device)
        self.reference = ReferenceExchange(group, num_experts)

    @staticmethod
    def kernels_problem() -> str:
        """Why this process cannot use the kernels, on whatever GPU; empty if it can."""
        try:
            return str(load().ep_nccl_info()["problem"])
        except BackendUnavailableError as error:
            return str(error)

    def worst_case(self, tokens: int, top_k: int, block: int) -> int:
        """Rows that suffice whatever the router does, with at most `tokens` tokens a rank."""
        num_local = self.num_experts // self.num_ranks
        return round_up(self.num_ranks * tokens * min(top_k, num_local), block) + num_local * block

    def carries_weights(self, x: Tensor) -> bool:
        """Whether `ep_dispatch_with_weights` takes these tokens; kernels do where `limits.max_rows` is positive and all
        ranks are of one node."""
        body = self.body(x)
        return isinstance(body, ReferenceExchange) or body.carries_weights

    def body(self, x: Tensor) -> KernelExchange | ReferenceExchange:
        """Kernels for BF16 and FP8 on a CUDA device, if the group has a communicator."""
        fits = x.is_cuda and x.dtype in (torch.bfloat16, torch.float8_e4m3fn)
        return self.kernels if fits and self.kernels is not None else self.reference

    def destroy(self) -> None:
        if self.kernels is not None:
            self.kernels.destroy()


@overload
def ep_dispatch(
    x_TD: Tensor, routing: Routing, group: EpGroup, *, block: int = 128, capacity: int | None = None
) -> tuple[Tensor, EpRoute]: ...
@overload
def ep_dispatch(
    x_TD: QuantTensor, routing: Routing, group: EpGroup, *, block: int = 128, capacity: int | None = None
) -> tuple[QuantTensor, EpRoute]: ...
def ep_dispatch(
    x_TD: Tensor | QuantTensor, routing: Routing, group: EpGroup, *, block: int = 128, capacity: int | None = None
) -> tuple[Tensor | QuantTensor, EpRoute]:
    """The rows of all ranks' tokens for this rank's experts, laid out as `permute` would lay them out in one process.

    Inside an expert rows are in (rank, token, k) order. Differentiable to x (not for a QuantTensor). All ranks call it
    together, with the same K and D.

    Args:
        x_TD: bf16, fp32 or fp64, or a QuantTensor of tile (1, 128). T may differ between ranks, and be 0.
        routing: of these T tokens; idx_TK in 0..num_experts.
        group: the ranks, and the kernels' communicator where there is one.
        block: each segment is padded with zero rows to a multiple of it.
        capacity: P, a multiple of block. None: with kernels the worst case, else as many rows as there are.
    Returns:
        rows_PD like x_TD; rows past the last segment are zero in the reference, unspecified in kernels. The EpRoute for
        `ep_combine`, whose `layout` is the GroupLayout of the local experts.
    Raises:
        ValueError: shape or range.
        TypeError: dtype outside the above.
        ExchangeError: more rows than capacity, or a peer that did not come in time. From kernels at a later call, as
            nothing waits for the device; the layout then names only rows that exist, and `ep_combine` gives NaN.
    Numerics: copies; bitwise repeatable.
    Source: DeepSeek-V3 report (arXiv 2412.19437) sec. 3.2.2.
    """
    op = "ep_dispatch"
    if isinstance(x_TD, QuantTensor):
        check_quant(op, "x_TD", x_TD, (None, None), (ROW_TILE,))
    else:
        check_tensor(op, "x_TD", x_TD, (None, None), FLOATS)
    _check_routed(op, x_TD.data, routing, block, capacity)
    body = group.body(x_TD.data)
    if isinstance(body, ReferenceExchange):
        return body.dispatch(x_TD, routing.idx_TK, block=block, capacity=capacity)
    _check_limits(op, body.limits, x_TD.data, routing)
    capacity = capacity or group.worst_case(body.limits.max_tokens, body.limits.top_k, block)
    return body.dispatch(x_TD, routing.idx_TK, block=block, capacity=capacity)


def ep_dispatch_with_weights(
    x_TD: Tensor,
    routing: Routing,
    group: EpGroup,
    *,
    block: int = 128,
    capacity: int | None = None,
    first_row: int = 0,
) -> tuple[Tensor, Tensor, EpRoute]:
    """`ep_dispatch` that gives every row its weight along, for experts that multiply by it themselves.

    `ep_combine` then sums the rows as they are, and needs none of them for its backward. By kernels it fetches them
    from a room of their rank's window: rows that were written there (`ep_room`) are never copied. A group has one
    room for results and one for gradients of rows. Exchanges with weights that are between dispatch and combine at one
    time, or between the combine's backward and the dispatch's, need rows of their own there, from `first_row` on.

    Args:
        x_TD: as in `ep_dispatch`, but no QuantTensor.
        routing: with weight_TK, fp32, to which this is differentiable too.
        group: one that `carries_weights`.
        block: as in `ep_dispatch`; the same on all ranks.
        capacity: as in `ep_dispatch`.
        first_row: of the rooms, from which on this exchange has `capacity` rows; a multiple of block, the same on all
            ranks. With kernels they end within limits.max_rows.
    Returns:
        rows_PD; weight_P, fp32, 0 for padding and unspecified past the last segment; the EpRoute.
    Raises:
        ValueError: shape or range, or a group that carries no weights.
        TypeError: dtype outside the above.
        ExchangeError: as `ep_dispatch`.
    Numerics: copies; bitwise repeatable.
    Source: as `ep_dispatch`.
    """
    op = "ep_dispatch_with_weights"
    check_tensor(op, "x_TD", x_TD, (None, None), FLOATS)
    _check_routed(op, x_TD, routing, block, capacity)
    check_tensor(op, "routing.weight_TK", routing.weight_TK, tuple(routing.idx_TK.shape), (torch.float32,))
    check_same_device(op, x_TD=x_TD, weight_TK=routing.weight_TK)
    require(first_row >= 0 and first_row % block == 0, op, "first_row", f"be a multiple of {block}, not negative",
            first_row)  # fmt: skip
    body = group.body(x_TD)
    if isinstance(body, ReferenceExchange):
        return body.dispatch_with_weights(x_TD, routing.idx_TK, routing.weight_TK, block=block, capacity=capacity)
    limits = body.limits
    require(body.carries_weights, op, "group", "have limits.max_rows, and ranks of one node", f"{limits.max_rows} rows "
            f"and {body.num_nodes} nodes")  # fmt: skip
    _check_limits(op, limits, x_TD, routing)
    capacity = capacity or group.worst_case(limits.max_tokens, limits.top_k, block)
    most = limits.max_rows - first_row
    require(capacity <= most, op, "capacity", f"be at most {most}, the rooms' rows from first_row on", capacity)
    rows = range(first_row, first_row + capacity)
    return body.dispatch_with_weights(x_TD, routing.idx_TK, routing.weight_TK, block=block, rows=rows)


def ep_room(route: EpRoute, group: EpGroup, *, gradients: bool = False) -> Tensor | None:
    """Where to write rows that are to be fetched, so that none is copied.

    Args:
        route: from `ep_dispatch_with_weights`; any other has no room.
        group: the one that dispatched.
        gradients: of rows, which the dispatch's backward fetches, instead of results, which `ep_combine` does.
    Returns:
        (P, D) bf16, overwritten by the exchange after this one; None where rows are not fetched: write anywhere then.
    Raises:
        Nothing.
    """
    if not isinstance(route, FetchedRoute):
        return None
    assert group.kernels is not None
    return group.kernels.room(route, gradients=gradients)


def _check_routed(op: str, x_TD: Tensor, routing: Routing, block: int, capacity: int | None) -> None:
    check_tensor(op, "routing.idx_TK", routing.idx_TK, (x_TD.shape[0], None), (torch.int64,))
    check_same_device(op, x_TD=x_TD, routing=routing.idx_TK)
    require(block > 0, op, "block", "be positive", block)
    if capacity is not None:
        require(capacity > 0 and capacity % block == 0, op, "capacity", f"be a positive multiple of {block}", capacity)


def _check_limits(op: str, limits: EpLimits, x_TD: Tensor, routing: Routing) -> None:
    T, K, D = x_TD.shape[0], routing.idx_TK.shape[1], x_TD.shape[1]
    require(limits.max_tokens >= T, op, "x_TD", f"have at most {limits.max_tokens} rows", T)
    require(limits.num_columns == D, op, "x_TD", f"have {limits.num_columns} columns", D)
    require(limits.top_k == K, op, "routing.idx_TK", f"have {limits.top_k} columns", K)


def ep_combine(rows_PD: Tensor, route: EpRoute, group: EpGroup, *, weight_TK: Tensor | None = None) -> Tensor:
    """y_TD = sum over k, in order, of weight_TK[t, k] * the row of (t, k), wherever it lies. Differentiable to both.

    Args:
        rows_PD: bf16, fp32 or fp64, laid out as `ep_dispatch` did; rows of padding are not read.
        route: from `ep_dispatch`.
        group: the one that dispatched.
        weight_TK: fp32 (or fp64, bf16 in the reference); None: ones. None by kernels after `ep_dispatch_with_weights`.
    Returns:
        y_TD, (T, D), rows' dtype; fp32 sum inside. NaN where some rank's rows did not fit or a peer is lost.
    Raises:
        ValueError: shape.
        TypeError: dtype outside the above.
        ExchangeError: from kernels at a later call, as in `ep_dispatch`.
    Numerics: fused multiply-adds in FP32 in the order of k; bitwise repeatable, and bitwise the same in both bodies.
    Source: DeepSeek-V3 report (arXiv 2412.19437) sec. 3.2.2.
    """
    op = "ep_combine"
    if isinstance(route, ReferenceRoute):
        check_tensor(op, "rows_PD", rows_PD, (None, None), FLOATS)
        if weight_TK is not None:
            check_tensor(op, "weight_TK", weight_TK, route.shape_TK, FLOATS)
        return group.reference.combine(rows_PD, route, weight_TK)
    assert group.kernels is not None
    assert isinstance(route, KernelRoute)
    shape_PD = (route.origin_P.shape[0], group.kernels.limits.num_columns)
    check_tensor(op, "rows_PD", rows_PD, shape_PD, (torch.bfloat16,))
    if weight_TK is not None:
        fetches = isinstance(route, FetchedRoute)
        require(not fetches, op, "weight_TK", "be None after ep_dispatch_with_weights", "weights")
        check_tensor(op, "weight_TK", weight_TK, route.shape_TK, (torch.float32,))
    check_same_device(op, rows_PD=rows_PD, route=route.origin_P, weight_TK=weight_TK)
    return group.kernels.combine(rows_PD, route, weight_TK)
