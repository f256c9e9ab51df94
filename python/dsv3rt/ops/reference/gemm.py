"""Reference GEMMs: operands dequantised to FP32, products accumulated in FP32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv3rt.ops.reference.common import segments
from dsv3rt.ops.reference.quant import dequantize
from dsv3rt.ops.types import GroupLayout, QuantTensor


def fp8_gemm_nt(x: QuantTensor, w: QuantTensor, out_dtype: torch.dtype, accumulate_into: Tensor | None) -> Tensor:
    y = dequantize(x, torch.float32) @ dequantize(w, torch.float32).t()
    return y.to(out_dtype) if accumulate_into is None else accumulate_into.add_(y)


def m_grouped_fp8_gemm_nt(x: QuantTensor, w: QuantTensor, layout: GroupLayout, out_dtype: torch.dtype) -> Tensor:
    x_PD = dequantize(x, torch.float32)
    y = x_PD.new_zeros(x_PD.shape[0], w.data.shape[1], dtype=out_dtype)
    for g, (start, end, _) in enumerate(segments(layout)):
        if end > start:
            w_FD = dequantize(QuantTensor(w.data[g], w.scale[g], w.tile), torch.float32)
            y[start:end] = x_PD[start:end] @ w_FD.t()
    return y


def k_grouped_fp8_gemm_nt(x: QuantTensor, y: QuantTensor, layout: GroupLayout, accumulate_into: Tensor) -> Tensor:
    x_MP, y_NP = dequantize(x, torch.float32), dequantize(y, torch.float32)
    for g, (start, end, _) in enumerate(segments(layout)):
        if end > start:
            accumulate_into[g].addmm_(x_MP[:, start:end], y_NP[:, start:end].t())
    return accumulate_into


class GroupedGemm(torch.autograd.Function):
    """One product a group that has rows, written in place; padding rows are zero in the result and in the gradient."""

    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, w_XFD: Tensor, layout: GroupLayout) -> Tensor:
        ctx.save_for_backward(x_PD, w_XFD)
        ctx.segments = segments(layout)
        y_PF = x_PD.new_empty(x_PD.shape[0], w_XFD.shape[1])
        for g, (start, end, _) in enumerate(ctx.segments):
            if end > start:
                torch.mm(x_PD[start:end], w_XFD[g].t(), out=y_PF[start:end])
        return _zero_padding(y_PF, ctx.segments)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_PF: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_PD, w_XFD = ctx.saved_tensors
        dx_PD = torch.empty_like(x_PD) if ctx.needs_input_grad[0] else None
        if dx_PD is not None:
            for g, (start, end, _) in enumerate(ctx.segments):
                if end > start:
                    torch.mm(dy_PF[start:end], w_XFD[g], out=dx_PD[start:end])
            _zero_padding(dx_PD, ctx.segments)
        dw_XFD = grouped_weight_grad(dy_PF, x_PD, ctx.segments) if ctx.needs_input_grad[1] else None
        return dx_PD, dw_XFD, None


def grouped_weight_grad(dy_PF: Tensor, x_PD: Tensor, spans: list[tuple[int, int, int]]) -> Tensor:
    dw_XFD = x_PD.new_empty(len(spans), dy_PF.shape[1], x_PD.shape[1])
    for g, (start, end, _) in enumerate(spans):
        if end > start:
            torch.mm(dy_PF[start:end].t(), x_PD[start:end], out=dw_XFD[g])
        else:
            dw_XFD[g].zero_()
    return dw_XFD


def _zero_padding(rows: Tensor, spans: list[tuple[int, int, int]]) -> Tensor:
    for _, end, next_start in spans:
        if next_start > end:
            rows[end:next_start].zero_()
    rows[spans[-1][2] if spans else 0 :].zero_()
    return rows
