"""The registered ops under `route`, `permute` and `unpermute`, and their gradients."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv3rt.ops.reference import moe as reference
from dsv3rt.ops.reference.common import at_least_fp32
from dsv3rt.ops.registry import register
from dsv3rt.ops.types import QuantTensor, empty_row_scales, round_up

MAX_EXPERTS, MAX_GROUPS, MAX_TOP_K = 512, 32, 16  # of the kernels


def _route_on_cpu(
    logits: Tensor, bias: Tensor, top_k: int, num_groups: int, groups_kept: int, scale: float, renormalize: bool
) -> list[Tensor]:
    rule = reference.RouteRule(top_k, num_groups, groups_kept, scale, renormalize)
    routing = reference.route(logits, bias, rule)
    return [routing.idx_TK, routing.weight_TK, routing.scores_TE, routing.counts_E]


def _route_on_cuda(
    logits: Tensor, bias: Tensor, top_k: int, num_groups: int, groups_kept: int, scale: float, renormalize: bool
) -> list[Tensor]:
    from dsv3rt.ops.cuda import moe as cuda

    return cuda.route(logits, bias, (num_groups, groups_kept), top_k, scale=scale, renormalize=renormalize)


def _route_fake(
    logits: Tensor, bias: Tensor, top_k: int, num_groups: int, groups_kept: int, scale: float, renormalize: bool
) -> list[Tensor]:
    T, E = logits.shape
    idx = logits.new_empty((T, top_k), dtype=torch.int64)
    weight = logits.new_empty((T, top_k), dtype=torch.float32)
    return [idx, weight, logits.new_empty((T, E), dtype=torch.float32), idx.new_empty(E)]


_route = register(
    "route(Tensor logits, Tensor bias, int top_k, int num_groups, int groups_kept, float scale, bool renormalize)"
    " -> Tensor[]",
    cpu=_route_on_cpu,
    cuda=_route_on_cuda,
    fake=_route_fake,
)


def _route_backward_on_cpu(
    weight_grad: Tensor, scores_grad: Tensor | None, scores: Tensor, idx: Tensor, wide: bool, scale: float,
    renormalize: bool
) -> Tensor:  # fmt: skip
    chosen = scores.gather(1, idx)
    grad = weight_grad
    if renormalize:
        total = chosen.sum(dim=1, keepdim=True) + 1e-20
        grad = (grad - (grad * chosen).sum(dim=1, keepdim=True) / total) / total
    full = torch.zeros_like(scores) if scores_grad is None else scores_grad.clone()
    full.scatter_add_(1, idx, grad * scale)
    return (full * scores * (1 - scores)).to(torch.float32 if wide else torch.bfloat16)


def _route_backward_on_cuda(
    weight_grad: Tensor, scores_grad: Tensor | None, scores: Tensor, idx: Tensor, wide: bool, scale: float,
    renormalize: bool
) -> Tensor:  # fmt: skip
    from dsv3rt.ops.cuda import moe as cuda

    dtype = torch.float32 if wide else torch.bfloat16
    return cuda.route_backward((weight_grad, scores_grad), scores, idx, dtype, scale=scale, renormalize=renormalize)


def _route_backward_fake(
    weight_grad: Tensor, scores_grad: Tensor | None, scores: Tensor, idx: Tensor, wide: bool, scale: float,
    renormalize: bool
) -> Tensor:  # fmt: skip
    return torch.empty_like(scores, dtype=torch.float32 if wide else torch.bfloat16)


_route_backward = register(
    "route_backward(Tensor weight_grad, Tensor? scores_grad, Tensor scores, Tensor idx, bool wide, float scale,"
    " bool renormalize) -> Tensor",
    cpu=_route_backward_on_cpu,
    cuda=_route_backward_on_cuda,
    fake=_route_backward_fake,
)


class RouteByKernel(torch.autograd.Function):
    """(idx, weight, scores, counts) of logits, differentiable through weight and scores."""

    @staticmethod
    def forward(
        ctx: Any, logits_TE: Tensor, bias_E: Tensor, rule: reference.RouteRule
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        idx, weight, scores, counts = _route(
            logits_TE, bias_E, rule.top_k, rule.num_groups, rule.groups_kept, rule.scale, rule.renormalize
        )
        ctx.rule, ctx.wide = rule, logits_TE.dtype == torch.float32
        ctx.save_for_backward(scores, idx)
        ctx.mark_non_differentiable(idx, counts)
        ctx.set_materialize_grads(False)
        return idx, weight, scores, counts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _idx: None, dweight: Tensor | None, dscores: Tensor | None, _counts: None) -> Any:
        scores, idx = ctx.saved_tensors
        if dweight is None:
            dweight = torch.zeros(idx.shape, dtype=torch.float32, device=idx.device)
        rule = ctx.rule
        return _route_backward(dweight, dscores, scores, idx, ctx.wide, rule.scale, rule.renormalize), None, None


def _place_on_cpu(idx: Tensor, num_experts: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    layout, permutation = reference.place(idx, num_experts, block)
    return layout.counts_X, layout.offsets, permutation.row_of_TK


def _place_on_cuda(idx: Tensor, num_experts: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    if num_experts > MAX_EXPERTS:
        return _place_on_cpu(idx, num_experts, block)
    from dsv3rt.ops.cuda import moe as cuda

    return cuda.place(idx, num_experts, block)


def _place_fake(idx: Tensor, num_experts: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    counts = idx.new_empty(num_experts, dtype=torch.int32)
    return counts, counts.new_empty(num_experts + 1), idx.new_empty(idx.shape)


place = register(
    "place(Tensor idx, int num_experts, int block) -> (Tensor, Tensor, Tensor)",
    cpu=_place_on_cpu,
    cuda=_place_on_cuda,
    fake=_place_fake,
)


def _by_kernel(rows: Tensor, row_of: Tensor) -> bool:
    """Whether the kernels are for such rows: 16 bytes at a time, BF16 where they are summed."""
    bytes_a_row = rows.shape[1] * rows.element_size()
    return (
        rows.dtype in (torch.bfloat16, torch.float8_e4m3fn) and bytes_a_row % 16 == 0 and row_of.shape[1] <= MAX_TOP_K
    )


def _permute_on_cpu(
    x: Tensor, scale: Tensor | None, row_of: Tensor, counts: Tensor, offsets: Tensor, num_rows: int
) -> list[Tensor]:
    if scale is None:
        return [reference.scatter(x, row_of, x.new_zeros(num_rows, x.shape[1]))]
    rows = reference.permute_quant(QuantTensor(x, scale, (1, 128)), row_of, num_rows)
    return [rows.data, rows.scale]


def _permute_on_cuda(
    x: Tensor, scale: Tensor | None, row_of: Tensor, counts: Tensor, offsets: Tensor, num_rows: int
) -> list[Tensor]:
    if not _by_kernel(x, row_of) or counts.shape[0] > MAX_EXPERTS:
        return _permute_on_cpu(x, scale, row_of, counts, offsets, num_rows)
    from dsv3rt.ops.cuda import moe as cuda

    return cuda.permute(x, scale, row_of, (counts, offsets), num_rows)


def _permute_fake(
    x: Tensor, scale: Tensor | None, row_of: Tensor, counts: Tensor, offsets: Tensor, num_rows: int
) -> list[Tensor]:
    rows = x.new_empty(num_rows, x.shape[1])
    return [rows] if scale is None else [rows, empty_row_scales(num_rows, scale.shape[1], x.device)]


permute_rows = register(
    "permute(Tensor x, Tensor? scale, Tensor row_of, Tensor counts, Tensor offsets, SymInt num_rows) -> Tensor[]",
    cpu=_permute_on_cpu,
    cuda=_permute_on_cuda,
    fake=_permute_fake,
)


def _unpermute_on_cpu(rows: Tensor, weight: Tensor | None, row_of: Tensor) -> Tensor:
    return reference.gather_sum(rows, row_of, weight)


def _unpermute_on_cuda(rows: Tensor, weight: Tensor | None, row_of: Tensor) -> Tensor:
    weighted = weight is None or weight.dtype == torch.float32
    if rows.dtype != torch.bfloat16 or not weighted or not _by_kernel(rows, row_of):
        return reference.gather_sum(rows, row_of, weight)
    from dsv3rt.ops.cuda import moe as cuda

    return cuda.unpermute(rows, weight, row_of)


def _unpermute_fake(rows: Tensor, weight: Tensor | None, row_of: Tensor) -> Tensor:
    return rows.new_empty(row_of.shape[0], rows.shape[1])


_unpermute = register(
    "unpermute(Tensor rows, Tensor? weight, Tensor row_of) -> Tensor",
    cpu=_unpermute_on_cpu,
    cuda=_unpermute_on_cuda,
    fake=_unpermute_fake,
)


def _unpermute_backward_on_cpu(
    dy: Tensor, rows: Tensor | None, weight: Tensor | None, row_of: Tensor, counts: Tensor, offsets: Tensor,
    num_rows: int
) -> list[Tensor]:  # fmt: skip
    return reference.unpermute_backward(dy, rows, weight, row_of, num_rows)


def _unpermute_backward_on_cuda(
    dy: Tensor, rows: Tensor | None, weight: Tensor | None, row_of: Tensor, counts: Tensor, offsets: Tensor,
    num_rows: int
) -> list[Tensor]:  # fmt: skip
    weighted = weight is None or weight.dtype == torch.float32
    few = counts.shape[0] <= MAX_EXPERTS
    if dy.dtype != torch.bfloat16 or not weighted or not few or not _by_kernel(dy, row_of):
        return reference.unpermute_backward(dy, rows, weight, row_of, num_rows)
    from dsv3rt.ops.cuda import moe as cuda

    return cuda.unpermute_backward(dy, rows, weight, row_of, (counts, offsets), num_rows)


def _unpermute_backward_fake(
    dy: Tensor, rows: Tensor | None, weight: Tensor | None, row_of: Tensor, counts: Tensor, offsets: Tensor,
    num_rows: int
) -> list[Tensor]:  # fmt: skip
    rows_grad = dy.new_empty(num_rows, dy.shape[1])
    return [rows_grad] if rows is None else [rows_grad, at_least_fp32(dy[:0]).new_empty(row_of.shape)]


_unpermute_backward = register(
    "unpermute_backward(Tensor dy, Tensor? rows, Tensor? weight, Tensor row_of, Tensor counts, Tensor offsets,"
    " SymInt num_rows) -> Tensor[]",
    cpu=_unpermute_backward_on_cpu,
    cuda=_unpermute_backward_on_cuda,
    fake=_unpermute_backward_fake,
)


class Permute(torch.autograd.Function):
    """rows[row_of_TK[t, k]] = x[t]; the padding of segments zero."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, row_of_TK: Tensor, counts: Tensor, offsets: Tensor, num_rows: int) -> Tensor:
        ctx.save_for_backward(row_of_TK)
        return cast(Tensor, permute_rows(x_TD, None, row_of_TK, counts, offsets, num_rows)[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, drows_PD: Tensor) -> tuple[Tensor, None, None, None, None]:
        (row_of_TK,) = ctx.saved_tensors
        return _unpermute(drows_PD, None, row_of_TK), None, None, None, None


class Unpermute(torch.autograd.Function):
    """y[t] = sum over k of weight[t, k] * rows[row_of_TK[t, k]], k in order, accumulated in at least FP32."""

    @staticmethod
    def forward(
        ctx: Any, rows_PD: Tensor, weight_TK: Tensor | None, row_of_TK: Tensor, counts: Tensor, offsets: Tensor
    ) -> Tensor:
        ctx.num_rows = rows_PD.shape[0]
        kept = rows_PD if weight_TK is not None and weight_TK.requires_grad else None
        ctx.save_for_backward(kept, weight_TK, row_of_TK, counts, offsets)
        return cast(Tensor, _unpermute(rows_PD, weight_TK, row_of_TK))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        rows_PD, weight_TK, row_of_TK, counts, offsets = ctx.saved_tensors
        grads = _unpermute_backward(dy_TD, rows_PD, weight_TK, row_of_TK, counts, offsets, ctx.num_rows)
        dweight_TK = grads[1].to(weight_TK.dtype) if len(grads) > 1 else None
        return grads[0], dweight_TK, None, None, None


def num_rows_of(num_choices: int, num_experts: int, block: int) -> int:
    """Rows enough for any choice of experts."""
    return round_up(num_choices, block) + num_experts * block
