"""The low-latency form of the expert exchange, for decoding: halves that send and halves that receive.

    sent = ep_send(x_TD, routing, group)          # what follows until ep_receive overlaps with the transfer
    rows, route = ep_receive(sent)
    returned = ep_send_back(rows_PD, route, group)
    y_TD = ep_collect(returned, weight_TK=routing.weight_TK)

Between the halves nothing occupies the GPU. All ranks call each together; a rank may send, and send back, twice before
the first of both is received. No gradients flow.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv3rt.ops.checks import check_same_device, check_tensor, require
from dsv3rt.ops.cuda.ep import KernelExchange, KernelMaskedRoute
from dsv3rt.ops.ep import EpGroup
from dsv3rt.ops.quant import ROW_TILE, quantize_1x128
from dsv3rt.ops.reference.ep import ReferenceRoute
from dsv3rt.ops.types import TILE, EpLimits, EpRoute, GroupLayout, QuantTensor, Routing, empty_row_scales, round_up


@dataclass(frozen=True)
class EpSent:
    """Tokens under way to their experts. The reference has its rows, close together, and their route already."""

    group: EpGroup
    shape_TK: tuple[int, int]
    device: torch.device
    arrived: tuple[QuantTensor, ReferenceRoute] | None


@dataclass(frozen=True)
class EpReturned:
    """Rows under way to their tokens' ranks. The reference has them close together, and their route."""

    group: EpGroup
    shape_TK: tuple[int, int]
    device: torch.device
    arrived: tuple[Tensor, ReferenceRoute] | None


@dataclass(frozen=True)
class ReferenceMaskedRoute(EpRoute):
    """compact: of the rows close together. place_R: where each of them lies in the masked layout."""

    compact: ReferenceRoute
    place_R: Tensor


def ep_send(x_TD: Tensor, routing: Routing, group: EpGroup) -> EpSent:
    """Casts tokens as `quantize_1x128` does and sends each once to every rank that holds some of its experts.

    Args:
        x_TD: bf16, at most limits.max_tokens rows of limits.num_columns; T may differ between ranks, and be 0.
        routing: of these tokens; the experts of a token differ.
        group: made with limits that have `low_latency`; with kernels where x_TD is on a CUDA device.
    Returns:
        EpSent for `ep_receive`.
    Raises:
        ValueError: shape, range, or a group without room.
        TypeError: dtype outside the above.
        ExchangeError: what kernels found earlier, as in `ep_dispatch`.
    Numerics: bitwise those of `quantize_1x128`.
    Source: DeepSeek-V3 report (arXiv 2412.19437) sec. 3.4.2.
    """
    op = "ep_send"
    limits = _limits_of(op, group)
    check_tensor(op, "x_TD", x_TD, (None, limits.num_columns), (torch.bfloat16,))
    check_tensor(op, "routing.idx_TK", routing.idx_TK, (x_TD.shape[0], limits.top_k), (torch.int64,))
    check_same_device(op, x_TD=x_TD, routing=routing.idx_TK)
    require(x_TD.shape[0] <= limits.max_tokens, op, "x_TD", f"have at most {limits.max_tokens} rows", x_TD.shape[0])
    x_TD, shape_TK = x_TD.detach(), (x_TD.shape[0], limits.top_k)
    body = group.body(x_TD)
    if isinstance(body, KernelExchange):
        body.send(x_TD, routing.idx_TK)
        return EpSent(group, shape_TK, x_TD.device, None)
    rows, route = body.dispatch(quantize_1x128(x_TD), routing.idx_TK, block=1, capacity=None)
    assert isinstance(rows, QuantTensor)
    assert isinstance(route, ReferenceRoute)
    return EpSent(group, shape_TK, x_TD.device, (rows, route))


def ep_receive(sent: EpSent) -> tuple[QuantTensor, EpRoute]:
    """The rows of all ranks' tokens for this rank's experts, in the masked layout of `GroupLayout.of_capacity`.

    Every expert has room for all tokens of all ranks, rounded up to 128; its rows are in (rank, token) order.

    Args:
        sent: from `ep_send`.
    Returns:
        QuantTensor (X * capacity, D), unspecified where there is no row, and the EpRoute for `ep_send_back`.
    Raises:
        RuntimeError: a launch that failed. A lost peer is an ExchangeError of the next `ep_send`; no row is there then.
    """
    limits = _limits_of("ep_receive", sent.group)
    capacity = round_up(sent.group.num_ranks * limits.max_tokens, TILE)
    if sent.arrived is None:
        assert sent.group.kernels is not None
        return sent.group.kernels.receive(sent.shape_TK, capacity, sent.device)
    compact, route = sent.arrived
    layout = GroupLayout.of_capacity(route.layout.counts_X, capacity)
    counts_X = route.layout.counts_X.long()
    shift_X = (layout.offsets - route.layout.offsets)[:-1].long()
    place_R = torch.arange(compact.shape[0], device=sent.device) + shift_X.repeat_interleave(counts_X)
    num_rows = capacity * counts_X.numel()
    data = compact.data.view(torch.uint8)
    data = data.new_zeros(num_rows, data.shape[1]).index_copy_(0, place_R, data).view(torch.float8_e4m3fn)
    scale = empty_row_scales(num_rows, compact.scale.shape[1], sent.device).zero_()
    scale.index_copy_(0, place_R, compact.scale)
    return QuantTensor(data, scale, ROW_TILE), ReferenceMaskedRoute(layout, sent.shape_TK, route, place_R)


def ep_send_back(rows_PD: Tensor, route: EpRoute, group: EpGroup) -> EpReturned:
    """Sends every row to the rank of its token.

    Args:
        rows_PD: bf16, laid out as `ep_receive` did; only rows that it gave are read.
        route: from `ep_receive`.
        group: the one that sent.
    Returns:
        EpReturned for `ep_collect`.
    Raises:
        ValueError: shape, or a group without room.
        TypeError: dtype outside the above.
    """
    op = "ep_send_back"
    limits = _limits_of(op, group)
    num_rows = route.layout.counts_X.numel() * round_up(group.num_ranks * limits.max_tokens, TILE)
    check_tensor(op, "rows_PD", rows_PD, (num_rows, limits.num_columns), (torch.bfloat16,))
    check_same_device(op, rows_PD=rows_PD, route=route.layout.counts_X)
    rows_PD = rows_PD.detach()
    if isinstance(route, ReferenceMaskedRoute):
        arrived = rows_PD.index_select(0, route.place_R), route.compact
        return EpReturned(group, route.shape_TK, rows_PD.device, arrived)
    assert isinstance(route, KernelMaskedRoute)
    assert group.kernels is not None
    group.kernels.send_back(rows_PD, route)
    return EpReturned(group, route.shape_TK, rows_PD.device, None)


def ep_collect(returned: EpReturned, *, weight_TK: Tensor | None = None) -> Tensor:
    """y_TD = sum over k, in order, of weight_TK[t, k] * the row of (t, k), as `ep_combine` has it.

    Args:
        returned: from `ep_send_back`.
        weight_TK: fp32; None: ones.
    Returns:
        y_TD, (T, D) bf16; NaN where a peer is lost.
    Raises:
        ValueError: shape.
        TypeError: dtype outside the above.
    Numerics: as `ep_combine`.
    """
    op = "ep_collect"
    if weight_TK is not None:
        check_tensor(op, "weight_TK", weight_TK, returned.shape_TK, (torch.float32,))
        weight_TK = weight_TK.detach()
    if returned.arrived is None:
        assert returned.group.kernels is not None
        return returned.group.kernels.collect(returned.shape_TK, weight_TK, returned.device)
    rows_RD, route = returned.arrived
    return returned.group.reference.combine(rows_RD, route, weight_TK)


def _limits_of(op: str, group: EpGroup) -> EpLimits:
    limits = group.limits
    if limits is None or not limits.low_latency:
        raise ValueError(f"{op}: group must have limits with low_latency, got {limits}")
    return limits
