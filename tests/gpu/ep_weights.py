"""What ranks and one process make of an exchange that gives rows their weights along."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv3rt import ops
from dsv3rt.ops.types import Routing
from tests.gpu.ep_cases import Batch, Shape, factor_of, row_factors


class _InRooms(torch.autograd.Function):
    """Rows as the experts' last product would leave them."""

    @staticmethod
    def forward(ctx: Any, rows_PD: Tensor, route: ops.EpRoute, group: ops.EpGroup) -> Tensor:
        return _moved(rows_PD, ops.ep_room(route, group))

    @staticmethod
    def backward(ctx: Any, drows_PD: Tensor) -> tuple[Tensor, None, None]:
        return drows_PD, None, None


class _GradientsInRooms(torch.autograd.Function):
    """Gradients of rows as the last product of the experts' backward would leave them."""

    @staticmethod
    def forward(ctx: Any, rows_PD: Tensor, route: ops.EpRoute, group: ops.EpGroup) -> Tensor:
        ctx.way = route, group
        return rows_PD.clone()

    @staticmethod
    def backward(ctx: Any, drows_PD: Tensor) -> tuple[Tensor, None, None]:
        return _moved(drows_PD, ops.ep_room(*ctx.way, gradients=True)), None, None


def _moved(rows_PD: Tensor, room_PD: Tensor | None) -> Tensor:
    return rows_PD.clone() if room_PD is None else room_PD.copy_(rows_PD)


def forward_with_weights(
    x_TD: Tensor, routing: Routing, group: ops.EpGroup, shape: Shape, rank: int, *, in_rooms: bool
) -> tuple[Tensor, Tensor, Tensor, ops.EpRoute]:
    """Rows, their weights, results and the route, for experts that multiply by a number of theirs and by the weight.

    in_rooms: whether rows and their gradients are written where they are fetched, or elsewhere.
    """
    rows_PD, weight_P, route = ops.ep_dispatch_with_weights(x_TD, routing, group, block=shape.block)
    read_PD = rows_PD
    if in_rooms:
        read_PD = _GradientsInRooms.apply(rows_PD, route, group)
    factor = row_factors(route.layout.counts_X, route.layout.offsets, rank * shape.num_local, rows_PD.shape[0])
    out_PD = (read_PD.float() * factor * weight_P[:, None]).to(rows_PD.dtype)
    if in_rooms:
        out_PD = _InRooms.apply(out_PD, route, group)
    return rows_PD, weight_P, ops.ep_combine(out_PD, route, group), route


def wanted(batch: Batch, tokens: slice) -> tuple[Tensor, Tensor]:
    """Result and gradient of the tokens, as one process rounds them."""
    weight, factor = batch.weight_TK[tokens, :, None], factor_of(batch.idx_TK[tokens])[:, :, None].float()
    out_TKD = (batch.x_TD[tokens, None].float() * factor * weight).bfloat16()
    drows_TKD = (batch.dy_TD[tokens, None].float() * weight * factor).bfloat16()
    return _in_order(out_TKD), _in_order(drows_TKD)


def _in_order(rows_TKD: Tensor) -> Tensor:
    total = torch.zeros(rows_TKD.shape[0], rows_TKD.shape[2])
    for row_TD in rows_TKD.unbind(1):
        total += row_TD.float()
    return total.bfloat16()


def weights_by_row(batch: Batch, num_rows: int, first: int, permutation: ops.Permutation) -> Tensor:
    """Of the rows from `first` on of all ranks' rows; 0 for padding."""
    rows = torch.zeros(permutation.num_rows)
    rows.index_copy_(0, permutation.row_of_TK.flatten(), batch.weight_TK.flatten())
    return rows[first : first + num_rows]


def check_gradient_of_weights(got: Tensor, batch: Batch, tokens: slice) -> None:
    """Against FP64; each of the additions, one a column at most, errs by 2^-24 of the sum of magnitudes."""
    factor = factor_of(batch.idx_TK[tokens])[:, :, None].double()
    terms = batch.dy_TD[tokens, None].double() * batch.x_TD[tokens, None].double() * factor
    error = (got.detach().cpu().double() - terms.sum(dim=2)).abs()
    bound = (terms.shape[2] + 2) * 2.0**-24 * terms.abs().sum(dim=2) + 1e-30
    if not bool((error <= bound).all()):
        raise AssertionError(f"gradients of weights are off by up to {float(error.max())}")
