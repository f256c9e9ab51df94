"""Reference routing and permutation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv3rt.ops.reference.common import at_least_fp32
from dsv3rt.ops.types import GroupLayout, Permutation, QuantTensor, Routing, empty_row_scales, round_up


@dataclass(frozen=True)
class RouteRule:
    """How `route` selects and weighs experts."""

    top_k: int
    num_groups: int
    groups_kept: int
    scale: float
    renormalize: bool


def route(logits_TE: Tensor, bias_E: Tensor, rule: RouteRule) -> Routing:
    scores_TE = torch.sigmoid(at_least_fp32(logits_TE))
    idx_TK = _select(scores_TE.detach() + bias_E, rule)
    weight_TK = scores_TE.gather(1, idx_TK)
    if rule.renormalize:
        # The addend keeps a token whose scores all underflow to zero from giving NaN.
        weight_TK = weight_TK / (weight_TK.sum(dim=1, keepdim=True) + 1e-20)
    counts_E = count_choices(idx_TK.flatten(), logits_TE.shape[1])
    return Routing(idx_TK, weight_TK * rule.scale, scores_TE, counts_E)


def _select(biased_TE: Tensor, rule: RouteRule) -> Tensor:
    """Experts by falling biased score; a stable sort gives ties to the lowest index, which topk does not promise."""
    T, E = biased_TE.shape
    if rule.groups_kept < rule.num_groups:
        grouped = biased_TE.view(T, rule.num_groups, E // rule.num_groups)
        group_score = grouped.topk(min(2, grouped.shape[2]), dim=2).values.sum(dim=2)
        order = group_score.sort(dim=1, descending=True, stable=True).indices
        dropped = torch.zeros_like(group_score, dtype=torch.bool).scatter_(1, order[:, rule.groups_kept :], True)
        biased_TE = grouped.masked_fill(dropped.unsqueeze(2), -torch.inf).view(T, E)
    return biased_TE.sort(dim=1, descending=True, stable=True).indices[:, : rule.top_k].contiguous()


def balance_loss(scores_TE: Tensor, idx_TK: Tensor, cu_seqlens: Tensor, alpha: float) -> Tensor:
    scores = at_least_fp32(scores_TE)
    mean_BT, load_BE, num_sequences = _balance_sums(scores, idx_TK, cu_seqlens)
    share_BE = mean_BT @ (scores / (scores.sum(dim=1, keepdim=True) + 1e-20))
    return alpha * (load_BE * share_BE).sum() / num_sequences


def _balance_sums(scores: Tensor, idx_TK: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T) that takes means over sequences, the loads f, and how many sequences have tokens."""
    T, E = scores.shape
    lengths = cu_seqlens.diff()
    token = torch.arange(T, device=scores.device)
    # Products with the membership matrix sum each sequence in a fixed order and need no host synchronisation.
    member_BT = (token >= cu_seqlens[:-1, None]) & (token < cu_seqlens[1:, None])
    mean_BT = member_BT.to(scores.dtype) / lengths.clamp(min=1)[:, None]
    chosen_TE = torch.zeros_like(scores).scatter_(1, idx_TK, 1.0)
    load_BE = mean_BT @ chosen_TE * (E / idx_TK.shape[1])
    return mean_BT, load_BE, (lengths > 0).sum().clamp(min=1)


def balance_slope(scores: Tensor, idx_TK: Tensor, cu_seqlens: Tensor, alpha: float) -> Tensor:
    """(B, E): the derivative of the loss by the sum-normalised scores of each token of a sequence."""
    _, load_BE, num_sequences = _balance_sums(scores, idx_TK, cu_seqlens)
    return alpha * load_BE / (num_sequences * cu_seqlens.diff().clamp(min=1)[:, None])


def balance_loss_backward(grad: Tensor, scores: Tensor, slope_BE: Tensor, cu_seqlens: Tensor) -> Tensor:
    token = torch.arange(scores.shape[0], device=scores.device)[:, None]
    member_TB = (token >= cu_seqlens[:-1]) & (token < cu_seqlens[1:])
    slope_TE = member_TB.to(scores.dtype) @ slope_BE
    total = scores.sum(dim=1, keepdim=True) + 1e-20
    return grad * (slope_TE - (slope_TE * scores).sum(dim=1, keepdim=True) / total) / total


def update_bias(bias_E: Tensor, counts_E: Tensor, gamma: float) -> Tensor:
    # load < mean  <=>  load * E < total, exact in integers.
    return bias_E + gamma * torch.sign(counts_E.sum() - counts_E * counts_E.shape[0]).to(bias_E.dtype)


def count_choices(choices: Tensor, num_experts: int) -> Tensor:
    """(E,) int64. torch.bincount would wait for the device, which a captured step must not."""
    return choices.new_zeros(num_experts).scatter_add_(0, choices, torch.ones_like(choices))


def place(idx_TK: Tensor, num_experts: int, block: int) -> tuple[GroupLayout, Permutation]:
    """Rows by prefix sums: expert segments in order, (token, k) order inside, each segment padded to `block`."""
    choices = idx_TK.flatten()
    counts = count_choices(choices, num_experts)
    padded = (counts + block - 1) // block * block
    offsets = torch.zeros(num_experts + 1, dtype=torch.int64, device=choices.device)
    offsets[1:] = padded.cumsum(0)
    order = choices.argsort(stable=True)
    rank = torch.empty_like(choices)
    rank[order] = torch.arange(choices.numel(), device=choices.device)
    row = offsets[choices] + rank - (counts.cumsum(0) - counts)[choices]
    num_rows = round_up(choices.numel(), block) + num_experts * block
    return GroupLayout(counts.int(), offsets.int()), Permutation(row.view_as(idx_TK), num_rows)


class Permute(torch.autograd.Function):
    """rows[row_of_TK[t, k]] = x[t]; all other rows zero."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, row_of_TK: Tensor, num_rows: int) -> Tensor:
        ctx.save_for_backward(row_of_TK)
        return scatter(x_TD, row_of_TK, x_TD.new_zeros(num_rows, x_TD.shape[1]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, drows_PD: Tensor) -> tuple[Tensor, None, None]:
        (row_of_TK,) = ctx.saved_tensors
        return gather_sum(drows_PD, row_of_TK, None), None, None


class Unpermute(torch.autograd.Function):
    """y[t] = sum over k of weight[t, k] * rows[row_of_TK[t, k]], k in order, accumulated in at least FP32."""

    @staticmethod
    def forward(ctx: Any, rows_PD: Tensor, weight_TK: Tensor | None, row_of_TK: Tensor) -> Tensor:
        ctx.num_rows = rows_PD.shape[0]
        ctx.save_for_backward(None if weight_TK is None else rows_PD, weight_TK, row_of_TK)
        return gather_sum(rows_PD, row_of_TK, weight_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows_PD, weight_TK, row_of_TK = ctx.saved_tensors
        grads = unpermute_backward(dy_TD, rows_PD, weight_TK, row_of_TK, ctx.num_rows)
        return grads[0], grads[1].to(weight_TK.dtype) if len(grads) > 1 else None, None


def unpermute_backward(
    dy_TD: Tensor, rows_PD: Tensor | None, weight_TK: Tensor | None, row_of_TK: Tensor, num_rows: int
) -> list[Tensor]:
    """The gradient of the rows and, where rows are given, that of the weights in at least FP32."""
    drows_PD = dy_TD.new_zeros(num_rows, dy_TD.shape[1])
    for k in range(row_of_TK.shape[1]):
        dy = dy_TD if weight_TK is None else (dy_TD * weight_TK[:, k, None]).to(dy_TD.dtype)
        drows_PD.index_copy_(0, row_of_TK[:, k], dy)
    if rows_PD is None:
        return [drows_PD]
    dots = [_row_dots(dy_TD, rows_PD.index_select(0, row)) for row in row_of_TK.unbind(1)]
    return [drows_PD, torch.stack(dots, dim=1)]


def permute_quant(x: QuantTensor, row_of_TK: Tensor, num_rows: int) -> QuantTensor:
    """The rows' bytes and scales, unchanged; padding rows have scale 0."""
    data = torch.zeros(num_rows, x.data.shape[1], dtype=torch.uint8, device=x.device)
    scatter(x.data.view(torch.uint8), row_of_TK, data)
    scale = empty_row_scales(num_rows, x.scale.shape[1], x.device).zero_()
    scatter(x.scale, row_of_TK, scale)
    return QuantTensor(data.view(torch.float8_e4m3fn), scale, x.tile)


def scatter(x: Tensor, row_of_TK: Tensor, rows: Tensor) -> Tensor:
    for row in row_of_TK.unbind(1):
        rows.index_copy_(0, row, x)
    return rows


def gather_sum(rows_PD: Tensor, row_of_TK: Tensor, weight_TK: Tensor | None) -> Tensor:
    T, K = row_of_TK.shape
    y = at_least_fp32(rows_PD[:0]).new_zeros(T, rows_PD.shape[1])
    for k in range(K):
        picked = rows_PD.index_select(0, row_of_TK[:, k])
        y = y.add_(picked) if weight_TK is None else y.addcmul_(picked, weight_TK[:, k, None])
    return y.to(rows_PD.dtype)


def _row_dots(x: Tensor, y: Tensor) -> Tensor:
    return (at_least_fp32(x) * at_least_fp32(y)).sum(dim=1)
