"""Mixture of experts: routing, load balance, and the permutation between tokens and expert-major rows."""

from __future__ import annotations

from typing import cast, overload

import torch
from torch import Tensor

from dsv3rt.ops import expert_rows as rows
from dsv3rt.ops.balance import BalanceByKernel
from dsv3rt.ops.checks import FLOATS, check_dtype, check_quant, check_same_device, check_tensor, require
from dsv3rt.ops.quant import ROW_TILE
from dsv3rt.ops.reference import moe as reference
from dsv3rt.ops.types import GroupLayout, Permutation, QuantTensor, Routing


def route(
    logits_TE: Tensor,
    bias_E: Tensor,
    *,
    top_k: int,
    num_groups: int = 1,
    groups_kept: int = 1,
    scale: float = 1.0,
    renormalize: bool = True,
) -> Routing:
    """Sigmoid gates, top-k experts inside the best expert groups, chosen by score + bias. weight_TK is differentiable.

    Args:
        logits_TE: bf16, fp32 or fp64.
        bias_E: fp32 (or fp64): moves the choice, never the weights.
        top_k: experts a token, at most groups_kept * E / num_groups.
        num_groups: of E / num_groups neighbouring experts each; a group's score sums its two best biased scores.
        groups_kept: groups a token may use.
        scale: factor of the weights.
        renormalize: divide each token's weights by their sum before scaling.
    Returns:
        Routing: idx_TK int64 by falling biased score, ties to the lowest index; weight_TK and scores_TE fp32 (fp64 for
        fp64 logits); counts_E int64.
    Raises:
        ValueError: shape or range.
        TypeError: dtype outside the above.
    Source: DeepSeek-V3 report (arXiv 2412.19437) Eq. 13-16; inference/model.py Gate.
    """
    op = "route"
    check_tensor(op, "logits_TE", logits_TE, (None, None), FLOATS)
    E = logits_TE.shape[1]
    check_tensor(op, "bias_E", bias_E, (E,), (torch.float32, torch.float64))
    check_same_device(op, logits_TE=logits_TE, bias_E=bias_E)
    require(num_groups > 0 and E % num_groups == 0, op, "num_groups", f"divide the {E} experts", num_groups)
    require(0 < groups_kept <= num_groups, op, "groups_kept", f"be in 1..{num_groups}", groups_kept)
    available = groups_kept * (E // num_groups)
    require(0 < top_k <= available, op, "top_k", f"be in 1..{available}", top_k)
    rule = reference.RouteRule(top_k, num_groups, groups_kept, scale, renormalize)
    small = E <= rows.MAX_EXPERTS and num_groups <= rows.MAX_GROUPS and top_k <= rows.MAX_TOP_K
    if logits_TE.is_cuda and small and logits_TE.dtype != torch.float64 and bias_E.dtype == torch.float32:
        return Routing(*rows.RouteByKernel.apply(logits_TE, bias_E, rule))
    return reference.route(logits_TE, bias_E, rule)


def balance_loss(scores_TE: Tensor, idx_TK: Tensor, cu_seqlens: Tensor, *, alpha: float) -> Tensor:
    """The sequence-wise balance loss: alpha * sum over experts of f * P, averaged over the sequences that have tokens.

    Args:
        scores_TE: the sigmoid scores of `route`, fp32 (or bf16, fp64). Differentiable.
        idx_TK: int64 chosen experts. f_i = E / (K * length) * (tokens of the sequence that chose expert i).
        cu_seqlens: (B + 1,) int32, rising from 0 to T. P_i = mean over the sequence of the sum-normalised scores.
        alpha: factor of the loss.
    Returns:
        a scalar, fp32 (fp64 for fp64 scores); 0 without tokens, alpha at perfect balance.
    Raises:
        ValueError: shape.
        TypeError: dtype outside the above.
        BackendUnavailableError: what the kernel is for, no extension.
    Numerics: sums in FP32, in a fixed order; bitwise repeatable. The kernel runs on CUDA for fp32 scores, E up to 512,
        K up to 16; there a choice out of range counts nowhere.
    Source: DeepSeek-V3 report (arXiv 2412.19437) Eq. 17-20.
    """
    op = "balance_loss"
    check_tensor(op, "scores_TE", scores_TE, (None, None), FLOATS)
    check_tensor(op, "idx_TK", idx_TK, (scores_TE.shape[0], None), (torch.int64,))
    check_tensor(op, "cu_seqlens", cu_seqlens, (None,), (torch.int32,))
    require(cu_seqlens.shape[0] > 0, op, "cu_seqlens", "have at least one entry", tuple(cu_seqlens.shape))
    check_same_device(op, scores_TE=scores_TE, idx_TK=idx_TK, cu_seqlens=cu_seqlens)
    small = scores_TE.shape[1] <= rows.MAX_EXPERTS and 0 < idx_TK.shape[1] <= rows.MAX_TOP_K
    if scores_TE.is_cuda and small and scores_TE.dtype == torch.float32:
        return cast(Tensor, BalanceByKernel.apply(scores_TE, idx_TK, cu_seqlens, alpha))
    return reference.balance_loss(scores_TE, idx_TK, cu_seqlens, alpha)


def update_bias(bias_E: Tensor, counts_E: Tensor, *, gamma: float) -> Tensor:
    """The new routing bias: + gamma below the mean load, - gamma above it, unchanged at it.

    Args:
        bias_E: fp32.
        counts_E: int64 loads of the whole batch.
        gamma: bias update speed, not negative.
    Returns:
        a new tensor like bias_E.
    Raises:
        ValueError: shape or gamma.
        TypeError: dtype outside the above.
    Source: DeepSeek-V3 report (arXiv 2412.19437) sec. 2.1.2; arXiv 2408.15664.
    """
    op = "update_bias"
    check_tensor(op, "bias_E", bias_E, (None,), (torch.float32, torch.float64))
    check_tensor(op, "counts_E", counts_E, (bias_E.shape[0],), (torch.int64,))
    check_same_device(op, bias_E=bias_E, counts_E=counts_E)
    require(gamma >= 0, op, "gamma", "not be negative", gamma)
    return reference.update_bias(bias_E, counts_E, gamma)


def place(idx_TK: Tensor, *, num_experts: int, block: int = 128) -> tuple[GroupLayout, Permutation]:
    """Where `permute` puts the rows, by itself.

    Args:
        idx_TK: int64 chosen experts, in 0..num_experts.
        num_experts: as in `permute`.
        block: as in `permute`.
    Returns:
        the GroupLayout of the E segments; the Permutation.
    Raises:
        ValueError: shape or range.
        TypeError: dtype outside the above.
    """
    op = "place"
    check_tensor(op, "idx_TK", idx_TK, (None, None), (torch.int64,))
    return _place(op, "idx_TK", idx_TK, num_experts, block)


@overload
def permute(
    x_TD: Tensor, routing: Routing, *, num_experts: int, block: int = 128
) -> tuple[Tensor, GroupLayout, Permutation]: ...
@overload
def permute(
    x_TD: QuantTensor, routing: Routing, *, num_experts: int, block: int = 128
) -> tuple[QuantTensor, GroupLayout, Permutation]: ...
def permute(
    x_TD: Tensor | QuantTensor, routing: Routing, *, num_experts: int, block: int = 128
) -> tuple[Tensor | QuantTensor, GroupLayout, Permutation]:
    """Copies every token to a row of each expert it chose, expert-major. Differentiable to x (not for a QuantTensor).

    Args:
        x_TD: bf16, fp32 or fp64, or a QuantTensor of tile (1, 128).
        routing: of these T tokens; idx_TK in 0..num_experts.
        num_experts: E, the number of segments.
        block: each segment is padded with zero rows to a multiple of it.
    Returns:
        rows_PD like x_TD, P = round_up(T * K, block) + E * block, rows of an expert in (token, k) order, the padding of
        segments zero (a QuantTensor's has scale 0); the GroupLayout of the E segments; the Permutation for `unpermute`.
        Rows behind the last segment are zero in the reference, unspecified in the kernel.
    Raises:
        ValueError: shape or range. On CUDA experts are not looked at: a choice out of range gets row -1, is left out.
        TypeError: dtype outside the above.
        BackendUnavailableError: what the kernel is for, no extension.
    Numerics: rows are copied, gradients summed over k in order, in FP32; bitwise repeatable. The kernels run on CUDA
        for bf16 and FP8 rows of a multiple of 16 bytes, K up to 16, E up to 512.
    """
    op = "permute"
    if isinstance(x_TD, QuantTensor):
        check_quant(op, "x_TD", x_TD, (None, None), (ROW_TILE,))
    else:
        check_tensor(op, "x_TD", x_TD, (None, None), FLOATS)
    check_tensor(op, "routing.idx_TK", routing.idx_TK, (x_TD.shape[0], None), (torch.int64,))
    check_same_device(op, x_TD=x_TD.data, routing=routing.idx_TK)
    layout, permutation = _place(op, "routing.idx_TK", routing.idx_TK, num_experts, block)
    row_of_TK, counts, offsets = permutation.row_of_TK, layout.counts_X, layout.offsets
    if isinstance(x_TD, QuantTensor):
        parts = rows.permute_rows(x_TD.data, x_TD.scale, row_of_TK, counts, offsets, permutation.num_rows)
        return QuantTensor(parts[0], parts[1], x_TD.tile), layout, permutation
    rows_PD = cast(Tensor, rows.Permute.apply(x_TD, row_of_TK, counts, offsets, permutation.num_rows))
    return rows_PD, layout, permutation


def _place(op: str, argument: str, idx_TK: Tensor, num_experts: int, block: int) -> tuple[GroupLayout, Permutation]:
    require(num_experts > 0, op, "num_experts", "be positive", num_experts)
    require(block > 0, op, "block", "be positive", block)
    if idx_TK.device.type == "cpu" and idx_TK.numel() > 0:  # elsewhere looking would wait for the device
        low, high = (int(bound) for bound in idx_TK.aminmax())
        require(low >= 0 and high < num_experts, op, argument, f"be in 0..{num_experts - 1}", f"{low}..{high}")
    counts, offsets, row_of_TK = rows.place(idx_TK, num_experts, block)
    layout = GroupLayout(counts, offsets)
    return layout, Permutation(row_of_TK, rows.num_rows_of(row_of_TK.numel(), num_experts, block), layout)


def unpermute(rows_PD: Tensor, permutation: Permutation, weight_TK: Tensor | None) -> Tensor:
    """y_TD = sum over k, in order, of weight_TK[t, k] * rows_PD[row of (t, k)]. Differentiable to rows and weights.

    Args:
        rows_PD: bf16, fp32 or fp64, as `permute` laid them out.
        permutation: from `permute`.
        weight_TK: fp32 (or fp64, bf16); None: ones.
    Returns:
        y_TD, (T, D), rows' dtype; fp32 sum inside. Rows of padding are not read and get zero gradient, those behind the
        last segment an unspecified one from the kernel.
    Raises:
        ValueError: shape.
        TypeError: dtype outside the above.
        BackendUnavailableError: what the kernel is for, no extension.
    Numerics: the kernel, for bf16 rows and fp32 weights as in `permute`, multiplies and adds in one rounding.
    """
    op = "unpermute"
    check_tensor(op, "rows_PD", rows_PD, (permutation.num_rows, None), FLOATS)
    if weight_TK is not None:
        check_dtype(op, "weight_TK", weight_TK, FLOATS)
        check_tensor(op, "weight_TK", weight_TK, tuple(permutation.row_of_TK.shape), FLOATS)
    check_same_device(op, rows_PD=rows_PD, permutation=permutation.row_of_TK, weight_TK=weight_TK)
    row_of_TK, layout = permutation.row_of_TK, permutation.layout
    if layout is None:
        return cast(Tensor, reference.Unpermute.apply(rows_PD, weight_TK, row_of_TK))
    return cast(Tensor, rows.Unpermute.apply(rows_PD, weight_TK, row_of_TK, layout.counts_X, layout.offsets))
