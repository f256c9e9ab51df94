"""Reference elementwise layers: at least FP32 inside, the caller's dtype outside."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from dsv3rt.ops.reference.common import at_least_fp32
from dsv3rt.ops.reference.quant import empty_1x128


def wide_dtype(x: Tensor) -> torch.dtype:
    """Of the statistics and the weight's gradient."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The normed rows, and the reciprocal root (T,) of each."""
    wide = at_least_fp32(x_TD)
    rstd_T = torch.rsqrt(wide.square().mean(dim=-1) + eps)
    return (wide * rstd_T.unsqueeze(-1) * weight_D).to(x_TD.dtype), rstd_T


def rms_norm_backward(
    dy_TD: Tensor, x_TD: Tensor, weight_D: Tensor, rstd_T: Tensor, grad_residual_TD: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of x, with the residual stream's added, and of the weight: operation by operation what autograd makes
    of `rms_norm`, so that a model trains to the same numbers."""
    rstd_T1, dy, x = rstd_T.unsqueeze(-1), at_least_fp32(dy_TD), at_least_fp32(x_TD)
    grad = dy * weight_D
    of_mean = -0.5 * (grad * x).sum(dim=-1, keepdim=True) * rstd_T1.pow(3)
    dx = grad * rstd_T1 + of_mean / x.shape[-1] * (2 * x)
    if grad_residual_TD is not None:
        dx = dx + grad_residual_TD
    return dx.to(x_TD.dtype), (dy * (x * rstd_T1)).sum(dim=0)


def empty_norm_quant(x: Tensor, with_sum: bool, *, with_transpose: bool, with_output: bool) -> list[Tensor]:
    """What rms_norm_quantize_1x128 returns, as its registered op lists it, without values."""
    T, D = x.shape
    result = empty_1x128(x, (T, D), by_rows=True, by_columns=with_transpose)
    result.append(x.new_empty(T, dtype=torch.float32))
    return result + [x.new_empty(T, D) for wanted in (with_output, with_sum) if wanted]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return (silu(at_least_fp32(gate)) * at_least_fp32(up)).to(gate.dtype)
