"""RMSNorm kernels on torch tensors; arguments were checked by `dsv3rt.ops`."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3rt.ops.cuda.extension import load
from dsv3rt.ops.cuda.quant import as_bytes
from dsv3rt.ops.cuda.rows import aligned
from dsv3rt.ops.reference.norm import empty_norm_quant

MOST_PARTS = 132  # blocks that share the weight's gradient: one a multiprocessor of an H100


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The normed rows, and the reciprocal root of each."""
    y_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    rstd_T = torch.empty(x_TD.shape[0], dtype=torch.float32, device=x_TD.device)
    load().rms_norm(aligned(x_TD), aligned(weight_D), y_TD, rstd_T, eps=eps)
    return y_TD, rstd_T


def rms_norm_backward(
    dy_TD: Tensor, x_TD: Tensor, weight_D: Tensor, rstd_T: Tensor, grad_residual_TD: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight; the latter is summed by blocks of rows, and then over blocks."""
    T, D = x_TD.shape
    dx_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    dweight_D = torch.empty(D, dtype=torch.float32, device=x_TD.device)
    parts = torch.empty((min(T, MOST_PARTS), D), dtype=torch.float32, device=x_TD.device)
    residual = None if grad_residual_TD is None else aligned(grad_residual_TD)
    inputs = (aligned(dy_TD), aligned(x_TD), aligned(weight_D), rstd_T.contiguous())
    load().rms_norm_backward(*inputs, dx_TD, dweight_D, parts, grad_residual=residual)
    return dx_TD, dweight_D


def rms_norm_quantize_1x128(
    x_TD: Tensor,
    weight_D: Tensor,
    eps: float,
    residual_TD: Tensor | None,
    *,
    pow2_scales: bool,
    with_transpose: bool,
    with_output: bool,
) -> list[Tensor]:
    """What `empty_norm_quant` lists, filled."""
    with_sum = residual_TD is not None
    results = empty_norm_quant(x_TD, with_sum, with_transpose=with_transpose, with_output=with_output)
    data, scale, *rest = as_bytes(results)
    data_t, scale_t = (rest.pop(0), rest.pop(0)) if with_transpose else (None, None)
    rstd, *outputs = rest
    load().rms_norm_quantize_1x128(
        x_TD,
        aligned(weight_D),
        rstd,
        data,
        scale,
        eps=eps,
        residual=residual_TD,
        sum=outputs[-1] if with_sum else None,
        y=outputs[0] if with_output else None,
        data_t=data_t,
        scale_t=scale_t,
        pow2_scales=pow2_scales,
    )
    return results
